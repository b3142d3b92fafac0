"""FP8 as emulated, FP16 with loss scaling and BF16 moments, in whole training steps: what they change, exact
resume, and layouts.
"""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dist import tiny
from tests.dist.harness import run_distributed
from tests.dist.test_resume import load, save
from tests.dist.tiny import LAYOUTS

FP8 = {"training.use_fp8": True}
DELAYED = FP8 | {"training.fp8.recipe": "delayed", "training.fp8.amax_history_len": 3}
BF16_MOMENTS = {"training.adam_exp_avg_dtype": "bf16", "training.adam_exp_avg_sq_dtype": "bf16"}


# --- in a worker ------------------------------------------------------------------------------


def losses(settings: dict[str, Any], steps: int = 3) -> list[list[float]]:
    return [record["losses"] for record in tiny.train(tiny.start(settings), 0, steps)]


def train_on(step: Any) -> dict[str, Any]:
    return {"records": tiny.train(step, 2, 2), "shards": tiny.shards(step)}


def go_on(settings: dict[str, Any], directory: Path) -> dict[str, Any]:
    step = tiny.start(settings)
    tiny.train(step, 0, 2)
    save(step, directory, 2)
    return train_on(step)


def resume(settings: dict[str, Any], directory: Path, generators: bool = True) -> dict[str, Any]:
    step = tiny.start(settings | {"seed": 7})
    load(step, directory, generators)
    return train_on(step)


def moment_types(settings: dict[str, Any]) -> set[tuple[torch.dtype, torch.dtype]]:
    step = tiny.start(settings)
    tiny.train(step, 0, 1)
    inner = getattr(step.optimizer, "chained_optimizers", [step.optimizer])
    states = [state for one in inner for state in one.optimizer.state.values()]
    return {(state["exp_avg"].dtype, state["exp_avg_sq"].dtype) for state in states}


def start_in(precision: str, settings: dict[str, Any]) -> Any:
    """A step in 16 bits, which a command line offers on CUDA only, or in FP32."""
    import torch.distributed as dist

    from megads.mcore.groups import destroy_process_groups, initialize_device, initialize_process_groups

    config, resolved = tiny.configure({"training.use_bf16": False} | settings)
    resolved = dataclasses.replace(resolved, precision=precision)
    initialize_device(resolved.device)
    if dist.is_initialized():
        destroy_process_groups()
    initialize_process_groups(resolved, timeout_minutes=4, seed=config.seed)
    from megads.train.step import TrainingStep

    step = TrainingStep(config, resolved)
    for chunk in step.chunks:
        for module in chunk.modules():
            if hasattr(module, "gradient_accumulation_fusion"):
                module.gradient_accumulation_fusion = False  # on a CPU, for FP32 gradients
    return step


def fp16_steps(step: Any, first: int, count: int) -> list[tuple[bool, bool, float | None, float]]:
    found = []
    for index in range(first, first + count):
        parts = tiny.micro_batches(step, tiny.global_batch(index))
        result = step.train(iter(parts) if step.needs_data else None, len(parts), tiny.scalars(step))
        found.append((result.applied, result.settling, result.loss_scale, result.loss))
    return found


def overflow_and_settle(settings: dict[str, Any]) -> dict[str, Any]:
    """Steps whose scale is too large at first; weights before and after the first."""
    step = start_in("fp16", settings)
    before = tiny.shards(step, optimizer=False)
    first = fp16_steps(step, 0, 1)
    after = tiny.shards(step, optimizer=False)
    rest = fp16_steps(step, 1, 9)
    unchanged = all(torch.equal(a[3], b[3]) for a, b in zip(before, after, strict=True))
    inner = step.optimizer.chained_optimizers
    scales = {float(one.get_loss_scale()) for one in inner}
    return {"steps": first + rest, "unchanged": unchanged, "parts": len(inner), "scales": scales}


def resume_fp16(settings: dict[str, Any], directory: Path) -> dict[str, Any]:
    step = start_in("fp16", settings)
    fp16_steps(step, 0, 4)
    save(step, directory, 2)
    went_on = fp16_steps(step, 4, 4)
    step = start_in("fp16", settings | {"seed": 7, "training.fp16.initial_loss_scale": 8.0})
    load(step, directory, generators=True)
    return {"went_on": went_on, "resumed": fp16_steps(step, 4, 4)}


def change_precision(settings: dict[str, Any], first: str, then: str, directory: Path) -> dict[str, Any]:
    """Going on in one precision, resuming in the other; weights and (rank 0) masters after loading."""
    step = start_in(first, settings)
    tiny.train(step, 0, 3)
    save(step, directory, 3)
    went_on = tiny.train(step, 3, 2)
    step = start_in(then, settings | {"seed": 7})
    load(step, directory, generators=True)
    weights = [weight.detach().clone() for chunk in step.chunks for weight in chunk.parameters()]
    step.gather_parameters = lambda: None  # what the first step would do
    held = {name: part for name, _, _, part in tiny.shards(step)}
    return {"went_on": went_on, "weights": weights, "held": held, "resumed": tiny.train(step, 3, 2)}


# --- with the workers' results ----------------------------------------------------------------


def job(layout: str, function: Any, settings: dict[str, Any], **kwargs: Any) -> list[Any]:
    processes, of_layout = LAYOUTS[layout]
    return run_distributed(processes, function, settings=of_layout | settings, **kwargs)


@pytest.fixture(scope="module")
def fp32() -> list[list[float]]:
    return job("single", losses, {})[0]


@pytest.mark.parametrize("recipe", ["blockwise", "tensorwise", "delayed", "mxfp8"])
def test_emulated_fp8_trains_near_fp32(recipe: str, fp32: list[list[float]]) -> None:
    (found,) = job("single", losses, FP8 | {"training.fp8.recipe": recipe})
    assert found != fp32
    torch.testing.assert_close(torch.tensor(found), torch.tensor(fp32), rtol=0.02, atol=0)


@pytest.mark.parametrize("layout", ["tp2", "ep2"])
def test_emulated_fp8_works_in_parallel_layouts(layout: str, fp32: list[list[float]]) -> None:
    ranks = job(layout, losses, FP8)
    assert ranks[0] == ranks[1] != fp32
    torch.testing.assert_close(torch.tensor(ranks[0]), torch.tensor(fp32), rtol=0.02, atol=0)


def test_layers_kept_in_bf16_have_no_fp8(fp32: list[list[float]]) -> None:
    decoder = FP8 | {"training.fp8.bf16_first_layers": 1, "training.fp8.bf16_last_layers": 3}
    (found,) = job("single", losses, decoder, steps=1)
    assert found[0][0] == fp32[0][0]
    assert found[0][1:] != fp32[0][1:]  # MTP is in FP8 all the same
    (found,) = job("single", losses, FP8 | {"training.fp8.bf16_mtp": True}, steps=1)
    assert found[0][0] != fp32[0][0]
    (first,) = job("single", losses, FP8 | {"training.fp8.bf16_first_layers": 1}, steps=1)
    (last,) = job("single", losses, FP8 | {"training.fp8.bf16_last_layers": 1}, steps=1)
    assert first != last


@pytest.mark.parametrize(
    ("layout", "settings"),
    [("dp2", BF16_MOMENTS), ("ep2", DELAYED | {"training.gradient_checkpointing": "full"})],
    ids=["bf16-moments", "delayed"],
)
def test_a_resume_is_exact(layout: str, settings: dict[str, Any], tmp_path: Path) -> None:
    went_on = job(layout, go_on, settings, directory=tmp_path)
    resumed = job(layout, resume, settings, directory=tmp_path)
    for a, b in zip(went_on, resumed, strict=True):
        assert a["records"] == b["records"]
        for (name, *_, ours), (other, *_, theirs) in zip(a["shards"], b["shards"], strict=True):
            assert name == other
            assert torch.equal(ours, theirs), name


PARTS = ["mla_up_proj", "moe_act", "mlp", "shared_experts"]


@pytest.mark.parametrize(
    ("recipe", "recomputation"),
    [
        (DELAYED, {"training.gradient_checkpointing": "full"}),
        (FP8, {"training.gradient_checkpointing": "selective", "training.recompute_modules": PARTS}),
    ],
    ids=["delayed-full", "blockwise-selective"],
)
def test_recomputation_changes_nothing(recipe: dict[str, Any], recomputation: dict[str, Any]) -> None:
    (kept,) = job("single", losses, recipe)
    (recomputed,) = job("single", losses, recipe | recomputation)
    assert kept == recomputed


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_moments_are_of_the_types_asked_for(zero_stage: int) -> None:
    settings = BF16_MOMENTS | {"distributed.zero_stage": zero_stage}
    assert job("single", moment_types, settings) == [{(torch.bfloat16, torch.bfloat16)}]
    one = {"training.adam_exp_avg_dtype": "bf16", "distributed.zero_stage": zero_stage}
    assert job("single", moment_types, one) == [{(torch.bfloat16, torch.float32)}]


@pytest.mark.parametrize("zero_stage", [0, 1])
@pytest.mark.parametrize("first", [{}, BF16_MOMENTS], ids=["from-fp32", "from-bf16"])
def test_moments_change_their_type_on_resume_in_another_layout(
    first: dict[str, Any], zero_stage: int, tmp_path: Path
) -> None:
    zero = {"distributed.zero_stage": zero_stage}
    then = {} if first else BF16_MOMENTS
    (went_on,) = job("single", go_on, first | zero, directory=tmp_path)
    resumed = job("dp2", resume, then | zero, directory=tmp_path, generators=False)[0]
    for a, b in zip(went_on["records"], resumed["records"], strict=True):
        torch.testing.assert_close(a["losses"], b["losses"], rtol=2e-3, atol=0)
    assert went_on["records"] != resumed["records"]


@pytest.mark.parametrize(("first", "then"), [("fp32", "bf16"), ("bf16", "fp32"), ("fp16", "bf16")])
def test_a_run_resumes_in_another_precision(first: str, then: str, tmp_path: Path) -> None:
    """With the master weights of the first, rounded to the other precision on every rank."""
    scaling = {"training.fp16.initial_loss_scale": 2.0**8}
    ranks = job("dp2", change_precision, scaling, first=first, then=then, directory=tmp_path)
    for weight, other in zip(ranks[0]["weights"], ranks[1]["weights"], strict=True):
        assert torch.equal(weight, other)
    held, masters = ranks[0]["held"], "optimizer.state.param."
    names = [name.removeprefix(masters) for name in held if name.startswith(masters)]
    assert "decoder.layers.1.mlp.experts.weight1" in names
    for name in names:
        assert torch.equal(held[name], held[masters + name].to(held[name].dtype))
    for a, b in zip(ranks[0]["went_on"], ranks[0]["resumed"], strict=True):
        assert a["losses"] != b["losses"]
        torch.testing.assert_close(torch.tensor(a["losses"]), torch.tensor(b["losses"]), rtol=0.03, atol=0)


@pytest.mark.parametrize("layout", ["single", "ep2"])
def test_fp16_lowers_its_scale_until_gradients_fit(layout: str) -> None:
    ranks = job(layout, overflow_and_settle, {"training.fp16.initial_loss_scale": 2.0**16})
    for found in ranks:
        applied, settling, scales, _ = zip(*found["steps"], strict=True)
        assert not applied[0]
        assert found["unchanged"]
        assert applied[-1]
        assert all(a != s for a, s in zip(applied, settling, strict=True))  # no sign of divergence
        # Every overflow but the first (hysteresis: 2) halves the scale.
        assert scales[-1] == 2.0 ** (16 - (applied.count(False) - 1))
        assert found["parts"] == 2
        assert found["scales"] == {scales[-1]}
    assert [r["steps"] for r in ranks] == [ranks[0]["steps"]] * len(ranks)


def test_a_fixed_or_least_scale_does_not_settle() -> None:
    too_large = 2.0**30
    (fixed,) = job("single", overflow_and_settle, {"training.fp16.loss_scale": too_large})
    least = {"training.fp16.initial_loss_scale": too_large, "training.fp16.min_loss_scale": too_large}
    (dynamic,) = job("single", overflow_and_settle, least)
    for found in (fixed, dynamic):
        assert {step[:3] for step in found["steps"]} == {(False, False, too_large)}


def test_fp16_resumes_exactly_with_its_scale(tmp_path: Path) -> None:
    settings = {"training.fp16.initial_loss_scale": 2.0**8, "training.fp16.loss_scale_window": 3}
    (found,) = job("single", resume_fp16, settings, directory=tmp_path)
    assert found["went_on"] == found["resumed"]
    assert found["went_on"][-1][2] == 2.0**10  # doubled after three steps, and after three more
