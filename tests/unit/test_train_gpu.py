"""The GPU benchmark without a GPU: which slices it takes, how it sorts kernels, counts time, and judges."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import train_gpu  # noqa: E402
from gpu_training import kernels, stopwatch, summary  # noqa: E402
from gpu_training.contenders import SETTINGS, Contender  # noqa: E402
from gpu_training.plan import plan_rows  # noqa: E402
from gpu_training.processes import run_variant  # noqa: E402
from gpu_training.shapes import (  # noqa: E402
    SHAPES,
    USABLE_SHARE,
    planned_bytes,
    planned_tensor_bytes,
    slice_config,
)
from gpu_training.variant import Job, Measured, max_violation, zipf_batches  # noqa: E402

from megads.config.flops import count_parameters  # noqa: E402
from megads.config.loader import load_config  # noqa: E402
from megads.errors import ConfigError  # noqa: E402
from megads.plan.hardware import GPUS  # noqa: E402
from megads.train import phases  # noqa: E402

H200 = GPUS["h200"].memory_bytes
MODELS = ("v3", "v2-lite", "moonlight")


# --- slices -----------------------------------------------------------------------------------


def slice_of(name: str, precision: str = "bf16", memory: int = H200, **changes: Any) -> Any:
    return slice_config(SHAPES[name], precision, "cuda", memory, 4, changes)


@pytest.mark.parametrize("name", MODELS)
def test_a_slice_is_as_deep_as_memory_allows_and_keeps_every_width(name: str) -> None:
    config, whole = slice_of(name), load_config(Path("configs") / SHAPES[name].config)
    one_more = slice_of(name, **{"model.num_layers": config.model.num_layers + 1})

    def needed(config: Any) -> float:
        return planned_bytes(config).total + 2 * count_parameters(config).total

    assert needed(config) <= USABLE_SHARE * H200 < needed(one_more)
    kept, original = config.model.mla.model_dump(), whole.model.mla.model_dump()
    assert {key for key in kept if kept[key] != original[key]} <= {"max_context_length", "use_flash_mla"}
    experts = config.model.moe.model_copy(
        update={"num_experts": whole.model.moe.num_experts, "bias_update_rate_phases": ()}
    )
    assert experts == whole.model.moe.model_copy(update={"bias_update_rate_phases": ()})
    share = config.model.vocab_size / whole.model.vocab_size
    assert share == pytest.approx(config.model.num_layers / whole.model.num_layers, abs=0.03)
    assert config.model.moe.num_experts == (32 if name == "v3" else 64)


def test_all_precisions_have_the_same_model_and_smaller_devices_a_smaller_one() -> None:
    assert slice_of("v3", "fp8").model == slice_of("v3", "bf16").model
    assert slice_of("v3", "fp8").training.use_fp8
    # Weights in FP8 beside those in BF16 take more than activations save.
    assert planned_tensor_bytes(slice_of("v3", "fp8")) > planned_tensor_bytes(slice_of("v3"))
    assert slice_of("v3", memory=H200 // 2).model.num_layers < slice_of("v3").model.num_layers
    with pytest.raises(ConfigError, match="not even one layer"):
        slice_of("v3", memory=H200 // 20)


def test_a_users_settings_win() -> None:
    config = slice_of("v3", **{"model.num_layers": 2, "training.gradient_checkpointing": "full"})
    assert config.model.num_layers == 2
    assert config.training.gradient_checkpointing == "full"


@pytest.mark.parametrize("name", MODELS)
def test_the_slices_can_be_captured_as_graphs(name: str) -> None:
    assert slice_of(name, **SETTINGS["megads-graphs"]).training.cuda_graphs


def test_the_planner_shows_the_slices_without_a_gpu() -> None:
    headings, bf16, fp8 = plan_rows(["v3"], ["bf16", "fp8"], GPUS["h200"], 4, {})
    assert len(headings) == len(bf16) == len(fp8)
    assert bf16[2] == fp8[2] == str(slice_of("v3").model.num_layers)
    speed = headings.index("tokens/s")
    assert float(fp8[speed].replace(",", "")) > float(bf16[speed].replace(",", ""))
    assert "products" in bf16[-1]


def test_tokens_are_the_same_every_time_and_frequent_ones_are_frequent() -> None:
    config = slice_config(SHAPES["tiny"], "fp32", "cpu", H200, 2, {})
    (first, second), (again, _) = zipf_batches(config, 2, 2), zipf_batches(config, 2, 2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert [tuple(batch.shape) for batch in first] == [(2, 129)] * 2
    assert not torch.equal(first[0], second[0])
    counts = torch.stack(first).flatten().bincount(minlength=1024)
    assert counts[:10].sum() > counts[100:500].sum() > 0


# --- kernels ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "callers", "group"),
    [
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3", [], "attention"),
        ("void flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...>", [], "attention"),
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NTT", ["_LinearBackward"], "dense products"),
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NTT", ["_GroupedLinear"], "grouped products"),
        ("nvjet_qqtst_128x128_128x6", ["x", "autograd::_GroupedLinearBackward"], "grouped products"),
        ("cutlass::device_kernel<GroupProblemShape<...>>", ["aten::_grouped_mm"], "grouped products"),
        ("transformer_engine::block_scaled_cast_transpose_kernel", ["_GroupedLinear"], "quantization"),
        ("_permute_kernel", [], "routing"),
        ("void at::native::sbtopk::gatherTopK<float>", ["aten::topk"], "routing"),
        ("void transformer_engine::normalization::rmsnorm_fwd_tuned_kernel", [], "norms, elementwise"),
        ("void at::native::vectorized_elementwise_kernel<4, ...>", ["aten::add"], "norms, elementwise"),
        ("void at::native::vectorized_elementwise_kernel<4>", ["aten::mul", "optimizer"], "optimizer"),
        ("ncclDevKernel_AllReduce_Sum_f32_RING_LL", [], "communication"),
        ("userbuffers_fp16_sum_inplace_gpu_mc_rs_oop", ["_Linear"], "communication"),
        ("aten::mm", ["MmBackward0"], "dense products"),
        ("aten::bmm", ["CausalAttention"], "attention"),
        ("optimizer", [], "optimizer"),
        ("something_new", [], "other"),
    ],
)
def test_a_kernel_belongs_to_the_group_of_its_name_or_its_callers(
    name: str, callers: list[str], group: str
) -> None:
    assert kernels.group_of(name, callers) == group


def event(name: str, device: str, microseconds: float, parent: Any = None, **more: Any) -> Any:
    return SimpleNamespace(
        name=name,
        device_type=SimpleNamespace(name=device),
        time_range=SimpleNamespace(elapsed_us=lambda: microseconds),
        self_cpu_time_total=microseconds,
        cpu_parent=parent,
        kernels=more.get("kernels", []),
        is_user_annotation=more.get("annotation", False),
    )


def test_every_microsecond_of_the_device_is_counted_once() -> None:
    product = SimpleNamespace(name="nvjet_x", duration=30.0)
    grouped = event("_GroupedLinear", "CPU", 500)
    events = [
        grouped,
        event("cublas", "CPU", 400, parent=grouped, kernels=[product]),
        event("nvjet_x", "CUDA", 30),
        event("nvjet_x", "CUDA", 12),  # launched by what the profiler did not see
        event("optimizer", "CUDA", 1000, annotation=True),  # a range, no kernel
    ]
    found = kernels.seconds_by_group(SimpleNamespace(events=lambda: events), steps=2)  # type: ignore[arg-type]
    assert {group: seconds for group, seconds in found.items() if seconds} == pytest.approx(
        {"grouped products": 15e-6, "dense products": 6e-6}
    )


def test_on_a_cpu_operators_are_counted_by_their_own_time() -> None:
    step = event("optimizer", "CPU", 5)
    events = [step, event("aten::mul_", "CPU", 7, parent=step), event("aten::mm", "CPU", 11)]
    found = kernels.seconds_by_group(SimpleNamespace(events=lambda: events), steps=1)  # type: ignore[arg-type]
    assert {group: seconds for group, seconds in found.items() if seconds} == pytest.approx(
        {"optimizer": 12e-6, "dense products": 11e-6}
    )


# --- one process ------------------------------------------------------------------------------


def test_time_belongs_to_the_phase_that_a_mark_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(phases.time, "perf_counter", lambda: now[0])

    def spend(seconds: float) -> None:
        now[0] += seconds

    class Model(torch.nn.Module):
        def forward(self) -> None:
            spend(2)

    watch, model = stopwatch.Stopwatch(cuda=False), Model()
    watch.watch_forward(model)
    update = watch.watched_optimizer(lambda: spend(5))
    for _ in range(2):  # a step forgets the one before
        watch.start()
        spend(1)
        for _ in range(2):
            model()
            spend(3)
        update()
        spend(0.5)
        seconds = watch.seconds()
    assert seconds == {"forward": 4, "backward": 6, "optimizer": 5, "other": 1.5}


class MapRouter(torch.nn.Module):
    """Two tokens to expert 0, one to expert 1, as a map."""

    def forward(self) -> tuple[None, torch.Tensor]:
        return None, torch.tensor([[1, 0], [1, 0], [0, 1]]).bool()


class NumberRouter(torch.nn.Module):
    """All four tokens to expert 1, as numbers."""

    def forward(self) -> tuple[None, None, torch.Tensor]:
        return None, None, torch.ones(4, 1, dtype=torch.int64)


def test_imbalance_is_read_from_every_kind_of_router_over_all_micro_batches() -> None:
    model = torch.nn.ModuleList([MapRouter(), NumberRouter(), torch.nn.Identity()])

    def step(micro_batches: list[torch.Tensor]) -> float:
        for _ in micro_batches:
            model[0]()
            model[1]()
        return 0.0

    config = slice_config(SHAPES["tiny"], "fp32", "cpu", H200, 2, {"model.moe.num_experts": 2})
    found = max_violation(Contender("", model, step), config, [torch.zeros(1)] * 2)
    assert found == pytest.approx(((2 / 1.5 - 1) + (4 / 2 - 1)) / 2)
    assert not any(module._forward_hooks for module in model.modules())


JOB = Job("tiny", "megads", "fp32", "cpu", 1, 1, False, {})


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a program in the place of a variant's process."""

    def put(text: str) -> None:
        script = tmp_path / "program"
        script.write_text(f"#!{sys.executable}\n{text}")
        script.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(script))

    return put


def test_a_process_that_fails_is_reported_with_its_last_words(program: Any, tmp_path: Path) -> None:
    program("print('building'); raise ValueError('no such kernel')")
    found = run_variant(JOB, 60, tmp_path / "log.txt")
    assert found["problem"].startswith("exit code 1")
    assert "no such kernel" in found["problem"]
    assert "building" in (tmp_path / "log.txt").read_text()


def test_a_process_that_hangs_is_stopped_with_all_that_it_started(program: Any, tmp_path: Path) -> None:
    # Its child holds the same pipe: the call returns only when that is gone too.
    program("import subprocess\nprint('begun', flush=True)\nsubprocess.run(['sleep', '600'])")
    found = run_variant(JOB, 3, tmp_path / "log.txt")
    assert found["problem"] == "stopped after 3 s"


def test_the_last_line_is_the_result(program: Any, tmp_path: Path) -> None:
    program("print('a warning'); print('{\"problem\": \"refused\"}')")
    assert run_variant(JOB, 60, tmp_path / "log.txt") == {"problem": "refused"}


# --- what becomes of it -----------------------------------------------------------------------

MEASURED = Measured(
    about="", device="", parameters=1, layers=1, tokens_per_step=1000, flops_per_token=2e9,
    flops_per_token_whole_square=3e9, peak_flops_per_second=1e13, planned_bytes=2 * summary.GIB,
    seconds=[0.5, 0.4, 0.6], losses=[1.0], phases=dict.fromkeys(stopwatch.PHASES, 0.1),
    kernels={"attention": 0.25}, peak_allocated_bytes=3 * summary.GIB, peak_reserved_bytes=None, max_vio=0.5,
)  # fmt: skip


def variant(contender: str, precision: str, speed: float, gib: int = 3) -> summary.Variant:
    """`speed` times as fast as `MEASURED`."""
    one = replace(
        MEASURED, seconds=[s / speed for s in MEASURED.seconds], peak_allocated_bytes=gib * summary.GIB
    )
    return summary.Variant("v3", precision, contender, [one, one])


def test_speed_and_utilization_by_hand() -> None:
    found = variant("megads", "bf16", 1)
    assert found.tokens_per_second == 2000
    assert found.flops_per_second == 4e12
    assert found.utilization == pytest.approx(0.4)
    assert found.utilization_whole_square == pytest.approx(0.6)
    assert found.peak_bytes == 3 * summary.GIB
    assert json.loads(json.dumps(found.as_json()))["mfu"] == found.utilization


def test_claims_are_judged_by_what_was_measured() -> None:
    variants = [
        variant("megads", "bf16", 1.2),
        variant("stock", "bf16", 1.0, gib=4),
        variant("transformers", "bf16", 0.3),
        variant("megads", "fp8", 1.5),
        summary.Variant("v3", "fp8", "stock", [], "out of memory"),
    ]
    _, *rows = summary.claim_rows(variants)
    assert {claim.split(",")[0]: (measured, holds) for claim, measured, holds in rows} == {
        "v3 bf16: MFU": ("0.480", "yes"),
        "v3 bf16: over stock": ("1.200", "yes"),
        "v3 bf16: stock's peak memory over ours": ("1.333", "yes"),
        "v3 bf16: over transformers": ("4.000", "yes"),
        "v3 fp8: over bf16": ("1.250", "no"),
    }


def test_tables_have_a_cell_for_every_heading_and_say_why_there_is_nothing() -> None:
    variants = [variant("megads", "bf16", 1), summary.Variant("v3", "fp8", "stock", [], "out of memory")]
    for rows in train_gpu.tables_of(variants, "cuda").values():
        assert len({len(row) for row in rows}) == 1
        assert summary.as_markdown(rows).count("\n") == len(rows)
    assert "out of memory" in summary.as_markdown(list(summary.speed_rows(variants)))
    cut_off = replace(variants[0], problem="no time was left")
    assert "; then no time was left" in summary.as_markdown(list(summary.speed_rows([cut_off])))


def test_every_contender_in_every_precision_by_default_and_settings_pass_through() -> None:
    options, changes = train_gpu.parse_arguments(
        ["--shape", "v3", "v2-lite", "--training.micro_batch_size", "1"]
    )
    variants = train_gpu.Session(options, changes).variants()
    assert len(variants) == 2 * 2 * 3
    assert changes == {"training.micro_batch_size": 1}
