"""Derived values: shape, layout, precision, length."""

from pathlib import Path
from typing import Any

import pytest

from megads.config.flops import count_parameters
from megads.config.loader import load_config
from megads.config.resolve import model_shape, pipeline_layout, planned_hardware, resolve, run_length
from megads.config.schema import Config


def config(**changes: Any) -> Config:
    return load_config(None, {path.replace("__", "."): value for path, value in changes.items()})


def test_open_dimensions() -> None:
    shape = model_shape(config(model__moe__num_shared_experts=1, training__use_mtp=True))
    assert (shape.qk_nope_head_dim, shape.qk_rope_head_dim, shape.v_head_dim) == (64, 32, 64)
    # As V3's 18432 = 9 x 2048: two routed experts and the shared one.
    assert (shape.intermediate_size, shape.shared_intermediate_size) == (3 * 2048, 2048)
    assert shape.mtp_depth == 1
    assert all(shape.is_moe)
    assert len(shape.is_moe) == 12


def test_given_dimensions_are_kept() -> None:
    mla = {"qk_nope_head_dim": 10, "qk_rope_head_dim": 4, "v_head_dim": 6}
    moe = {"num_shared_experts": 2, "shared_intermediate_size": 50}
    shape = model_shape(config(model__mla=mla, model__moe=moe, model__intermediate_size=77))
    assert (shape.qk_nope_head_dim, shape.qk_rope_head_dim, shape.v_head_dim) == (10, 4, 6)
    assert (shape.intermediate_size, shape.shared_intermediate_size, shape.mtp_depth) == (77, 100, 0)


@pytest.mark.parametrize(
    ("changes", "dense"),
    [
        ({}, []),
        ({"model__first_k_dense_replace": 3}, [0, 1, 2]),
        ({"model__dense_layer_interval": 3}, [0, 3, 6, 9]),
        ({"model__first_k_dense_replace": 2, "model__dense_layer_interval": 6}, [0, 1, 6]),
        ({"model__dense_layers": [11, 4]}, [4, 11]),
        ({"model__moe__num_experts": 0}, list(range(12))),
    ],
)
def test_which_layers_are_dense(changes: dict[str, Any], dense: list[int]) -> None:
    shape = model_shape(config(**changes))
    assert [layer for layer, is_moe in enumerate(shape.is_moe) if not is_moe] == dense
    assert shape.mtp_is_moe == (11 not in dense)


def test_layout_sizes() -> None:
    distributed = {
        "tensor_parallel_size": 2,
        "pipeline_parallel_size": 2,
        "context_parallel_size": 2,
        "expert_parallel_size": 4,
        "expert_tensor_parallel_size": 2,
    }
    resolved = resolve(config(distributed=distributed), 32, cuda=True)
    sizes = (resolved.tp, resolved.pp, resolved.cp, resolved.dp, resolved.ep, resolved.etp, resolved.edp)
    assert sizes == (2, 2, 2, 4, 4, 2, 2)
    assert resolved.world_size == 32
    assert resolved.vpp is None
    assert resolved.sequence_parallel


def test_sequence_parallel_needs_tensor_parallel() -> None:
    assert not resolve(config(distributed__sequence_parallel=True), 1, cuda=False).sequence_parallel
    off = config(distributed={"sequence_parallel": False, "tensor_parallel_size": 2})
    assert not resolve(off, 2, cuda=False).sequence_parallel


@pytest.mark.parametrize(
    ("changes", "cuda", "expected"),
    [
        ({}, False, ("cpu", "gloo", "fp32")),
        ({}, True, ("cuda", "nccl", "bf16")),
        ({"distributed__device": "cpu"}, True, ("cpu", "gloo", "fp32")),
        ({"training__use_bf16": False}, True, ("cuda", "nccl", "fp32")),
        ({"training__use_bf16": False, "training__use_fp16": True}, True, ("cuda", "nccl", "fp16")),
        ({"distributed__backend": "deepspeed"}, True, ("cuda", "nccl", "bf16")),
    ],
)
def test_device_backend_precision(changes: dict[str, Any], cuda: bool, expected: tuple[str, ...]) -> None:
    resolved = resolve(config(**changes), 1, cuda)
    assert (resolved.device, resolved.backend, resolved.precision) == expected


def test_length_from_tokens_then_steps_then_ratio() -> None:
    step_tokens = 64 * 2048
    everything = {"training__total_training_tokens": 10 * step_tokens - 1, "training__train_steps": 3}
    assert run_length(config(**everything)) == (10 * step_tokens - 1, 10)
    assert run_length(config(training__train_steps=3)) == (3 * step_tokens, 3)
    by_ratio = config(training__tokens_per_parameter_ratio=2)
    total = 2 * count_parameters(by_ratio).active
    assert run_length(by_ratio) == (total, -(-total // step_tokens))


def test_length_counts_the_batch_ramp() -> None:
    ramp = {"batch_size_rampup_start": 32, "batch_size_rampup_tokens": 32 * 2048 * 10, "train_steps": 12}
    # One increment, at the end of the ramp: ten steps of half the size, then two whole ones.
    assert run_length(config(training=ramp)) == ((10 * 32 + 2 * 64) * 2048, 12)


@pytest.mark.parametrize(
    ("stages", "virtual", "layout"),
    [
        (1, None, (12,)),
        (4, None, (3, 3, 3, 3)),
        (5, None, (2, 3, 3, 2, 2)),
        (2, 3, (2,) * 6),
        (7, None, (1, 2, 2, 2, 2, 2, 1)),
    ],
)
def test_layers_of_each_stage(stages: int, virtual: int | None, layout: tuple[int, ...]) -> None:
    sizes = {"pipeline_parallel_size": stages, "virtual_pipeline_parallel_size": virtual}
    assert pipeline_layout(config(distributed=sizes)) == layout


def test_directories_default_to_the_output() -> None:
    resolved = resolve(config(output_dir="out"), 1, cuda=False)
    assert (resolved.checkpoint_dir, resolved.tensorboard_dir) == ("out/checkpoints", "out/tensorboard")
    given = config(checkpointing__save_dir="a", logging__tensorboard__log_dir="b")
    resolved = resolve(given, 1, cuda=False)
    assert (resolved.checkpoint_dir, resolved.tensorboard_dir) == ("a", "b")


@pytest.mark.parametrize(
    ("distributed", "world_size", "expected"),
    [
        ({}, None, 1),
        ({}, 5, 5),
        ({"slurm": {"enabled": True, "nodes": 3, "gpus_per_node": 8}}, None, 24),
        ({"tensor_parallel_size": 2, "data_parallel_size": 3}, None, 6),
        ({"pipeline_parallel_size": 2, "context_parallel_size": 2, "expert_parallel_size": 3}, None, 12),
    ],
)
def test_planned_processes(distributed: dict[str, Any], world_size: int | None, expected: int) -> None:
    assert planned_hardware(config(distributed=distributed), world_size)[0] == expected


def test_planned_device() -> None:
    slurm = {"enabled": True, "gpus_per_node": 8}
    assert planned_hardware(config(distributed__slurm=slurm))[1]
    assert not planned_hardware(config(distributed={"slurm": slurm, "device": "cpu"}))[1]


def test_a_balanced_layout_has_no_stage_with_much_more_to_do() -> None:
    """DeepSeek-V3 on 16 stages: a head for two depths and MTP weigh as much as two to three layers."""
    path = Path(__file__).parents[2] / "configs" / "deepseek_v3_671b.json"
    layout = pipeline_layout(load_config(path, {"distributed.pipeline_layout": "balanced"}))
    assert (len(layout), sum(layout)) == (16, 61)
    assert max(layout) == 4
    assert layout[-1] == 1
