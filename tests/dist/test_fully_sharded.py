"""ZeRO-2 and ZeRO-3 by Megatron-FSDP, beyond what the tests of layouts, resumes and metrics show of them.

In BF16 the optimizer has weights of its own; a command line offers that on CUDA only, so here the resolved
precision is replaced.
"""

import dataclasses
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.dist import tiny
from tests.dist.harness import run_distributed
from tests.dist.test_layout_parity import TIED, assert_same_run
from tests.dist.test_resume import load, save
from tests.dist.tiny import LAYOUTS

BF16_MOMENTS = {"training.adam_exp_avg_dtype": "bf16", "training.adam_exp_avg_sq_dtype": "bf16"}


# --- in a worker ------------------------------------------------------------------------------


def start_bf16(settings: dict[str, Any]) -> Any:
    """A step in BF16; elsewhere than under Megatron-FSDP its linears add FP32 gradients by themselves."""
    configure = tiny.configure

    def in_bf16(settings: dict[str, Any]) -> Any:
        config, resolved = configure(settings)
        return config, dataclasses.replace(resolved, precision="bf16")

    with mock.patch.object(tiny, "configure", in_bf16):
        step = tiny.start(settings)
    for chunk in step.chunks:
        for module in chunk.modules():
            if hasattr(module, "gradient_accumulation_fusion"):
                module.gradient_accumulation_fusion = False
    return step


def train_bf16(settings: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Four steps, a checkpoint after two."""
    step = start_bf16(settings)
    records = tiny.train(step, 0, 2)
    save(step, directory, 2)
    saved = tiny.shards(step)
    records += tiny.train(step, 2, 2)
    return {"losses": [record["losses"] for record in records], "saved": saved, "end": tiny.shards(step)}


def go_on_bf16(settings: dict[str, Any], directory: Path) -> dict[str, Any]:
    step = start_bf16(settings | {"seed": 7})
    load(step, directory, generators=True)
    loaded = tiny.shards(step)
    records = tiny.train(step, 2, 2)
    return {"losses": [r["losses"] for r in records], "loaded": loaded, "end": tiny.shards(step)}


def load_weights_only(settings: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Weights of a checkpoint, and what the optimizer then starts from."""
    from megads.checkpoint.store import CheckpointStore
    from megads.train.snapshot import restore_state, sharded_state

    step = start_bf16(settings | {"seed": 7})
    with CheckpointStore(directory) as store:
        places = sharded_state(step, optimizer=False, generators=False, loading=True)
        found = store.load("latest", places)
        assert found is not None
        restore_state(step, found[0], optimizer=False, generators=False)
    return {"loaded": tiny.shards(step)}


def train_offloaded(settings: dict[str, Any], directory: Path, resume: bool) -> dict[str, Any]:
    """As on a GPU half of the moments would be offloaded; here all memory is the host's."""
    with mock.patch("megads.optim.build.offloaded_fraction", return_value=0.5):
        return (go_on_bf16 if resume else train_bf16)(settings, directory)


def overflow(settings: dict[str, Any]) -> dict[str, Any]:
    """One step with an infinite gradient on one rank only, then a sound one."""
    import torch.distributed as dist

    from megads.model.build import unwrap

    def spoil(module: torch.nn.Module, tokens: Any, output: torch.Tensor) -> None:
        output.register_hook(lambda gradient: gradient * (torch.inf if dist.get_rank() == 1 else 1))

    step = tiny.start(settings)
    before = tiny.shards(step, optimizer=False)
    handle = unwrap(step.chunks[0]).embedding.register_forward_hook(spoil)
    parts = tiny.micro_batches(step, tiny.global_batch(0))
    result = step.train(iter(parts), len(parts), tiny.scalars(step))
    after = tiny.shards(step, optimizer=False)
    handle.remove()
    unchanged = all(torch.equal(a[3], b[3]) for a, b in zip(before, after, strict=True))
    return {"applied": result.applied, "unchanged": unchanged, "next": tiny.train(step, 1, 1)[0]["losses"]}


def release(settings: dict[str, Any]) -> int:
    """Bytes of weights and gradients that are left after a run."""
    from megads.optim.build import release_data_parallel

    step = tiny.start(settings)
    tiny.train(step, 0, 1)
    (chunk,) = step.chunks
    groups = chunk.param_and_grad_buffer.parameter_groups
    shards = list(chunk.shards())
    release_data_parallel(step.chunks)
    buffers = [b for g in groups for b in (g.model_weight_buffer, g.main_weight_buffer, g.main_grad_buffer)]
    left = [buffer.data for buffer in buffers if buffer is not None]
    left += [tensor for shard in shards for tensor in (shard.parameter, shard.optimized.to_local())]
    return sum(tensor.untyped_storage().nbytes() for tensor in left)


# --- with the workers' results ----------------------------------------------------------------


def job(layout: str, function: Any, settings: dict[str, Any] | None = None, **kwargs: Any) -> list[Any]:
    processes, of_layout = LAYOUTS[layout]
    together = of_layout | (settings or {})
    return run_distributed(processes, function, settings=together, **kwargs)


def whole(ranks: list[dict[str, Any]], name: str) -> dict[str, torch.Tensor]:
    return tiny.assemble([rank[name] for rank in ranks])


def differences(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name, tensor in one.items() if not torch.equal(tensor, other[name])]


@pytest.fixture(scope="module")
def zero3_in_bf16(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    directory = tmp_path_factory.mktemp("zero3")
    return directory, job("dp2-zero3", train_bf16, directory=directory)


def test_bf16_trains_like_zero_1(zero3_in_bf16: Any, tmp_path: Path) -> None:
    """The optimizer's FP32 weights are sharded apart from the model's; gradients are reduced in FP32."""
    expected = job("dp2", train_bf16, directory=tmp_path)[0]["losses"]
    found = zero3_in_bf16[1][0]["losses"]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=2e-3, atol=0)


def test_bf16_resumes_bitwise(zero3_in_bf16: Any) -> None:
    directory, before = zero3_in_bf16
    after = job("dp2-zero3", go_on_bf16, directory=directory)
    assert not differences(whole(after, "loaded"), whole(before, "saved"))
    assert after[0]["losses"] == before[0]["losses"][2:]
    assert not differences(whole(after, "end"), whole(before, "end"))


def test_bf16_goes_over_to_zero_1(zero3_in_bf16: Any) -> None:
    directory, before = zero3_in_bf16
    after = job("dp2", go_on_bf16, directory=directory)
    assert not differences(whole(after, "loaded"), whole(before, "saved"))


@pytest.mark.parametrize("layout", ["dp2-zero3", "dp2-zero2"])
def test_the_optimizer_starts_from_weights_that_come_alone(layout: str, zero3_in_bf16: Any) -> None:
    directory, before = zero3_in_bf16
    loaded, saved = (
        whole(job(layout, load_weights_only, directory=directory), "loaded"),
        whole(before, "saved"),
    )
    for name in (name for name in saved if not name.startswith("optimizer.")):
        assert torch.equal(loaded[name], saved[name]), name
        if (of_optimizer := f"optimizer.state.param.{name}") in saved:
            assert torch.equal(loaded[of_optimizer], saved[name].float()), name


def test_low_precision_moments(tmp_path: Path) -> None:
    found = job("dp2-zero3", train_bf16, BF16_MOMENTS, directory=tmp_path)
    assert whole(found, "saved")["optimizer.state.exp_avg.output_layer.weight"].dtype == torch.bfloat16
    after = job("dp2-zero3", go_on_bf16, BF16_MOMENTS, directory=tmp_path)
    assert after[0]["losses"] == found[0]["losses"][2:]
    assert not differences(whole(after, "end"), whole(found, "end"))


@pytest.mark.parametrize(
    "changes", [{"training.gradient_checkpointing": "full"}, TIED], ids=["recompute", "tied"]
)
def test_layers_computed_twice_and_weights_used_twice(changes: dict[str, Any]) -> None:
    assert_same_run("dp2-zero3", changes)


@pytest.mark.parametrize("layout", ["dp2", "dp2-zero3"])
def test_offloaded_moments_change_nothing_and_resume(layout: str, tmp_path: Path, zero3_in_bf16: Any) -> None:
    found = job(layout, train_offloaded, directory=tmp_path, resume=False)
    after = job(layout, train_offloaded, directory=tmp_path, resume=True)
    expected, losses = zero3_in_bf16[1][0]["losses"], found[0]["losses"]
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=2e-3, atol=0)
    assert after[0]["losses"] == losses[2:]
    assert not differences(whole(after, "end"), whole(found, "end"))


@pytest.mark.parametrize("layout", ["dp2-zero2", "dp2-zero3"])
def test_gradients_that_are_not_finite_change_nothing(layout: str) -> None:
    expected = job("dp2", overflow)[0]
    for rank in job(layout, overflow):
        assert (rank["applied"], rank["unchanged"]) == (False, True)
        assert rank["next"] == pytest.approx(expected["next"], rel=1e-5)


@pytest.mark.parametrize("layout", ["dp2-zero2", "dp2-zero3"])
def test_release_frees_weights_and_gradients(layout: str) -> None:
    assert job(layout, release) == [0, 0]
