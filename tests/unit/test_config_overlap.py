"""Overlap of communication with computation: each reason why it cannot work is told alone."""

from typing import Any

import pytest

from megads.config.loader import load_config
from megads.config.resolve import resolve
from megads.config.validate_overlap import overlap_problems
from megads.errors import EnvironmentSetupError
from megads.mcore import backend, translate
from megads.mcore.fusions import Fusions
from megads.mcore.translate import ddp_config, transformer_config
from tests.dist import tiny

EP, PP = "distributed.expert_parallel_size", "distributed.pipeline_parallel_size"
TP, CP = "distributed.tensor_parallel_size", "distributed.context_parallel_size"
VPP, LAYOUT = "distributed.virtual_pipeline_parallel_size", "distributed.pipeline_layout"
COMBINED = {
    "distributed.overlap_expert_parallel": True,
    "distributed.device": "cuda",
    "training.num_predict_tokens": 2,
    EP: 2,
}
SHARED = {"distributed.overlap_shared_experts": True, EP: 2}
DELAYED = COMBINED | {"distributed.delay_wgrad_compute": True}
IN_PIECES = {
    "distributed.tp_comm_overlap": True,
    "distributed.device": "cuda",
    TP: 2,
    "model.mla.d_model": 64,
}
FP8 = {"training.use_fp8": True}
SELECTIVE = {"training.gradient_checkpointing": "selective"}


def problems(settings: dict[str, Any]) -> list[str]:
    return list(overlap_problems(load_config(None, tiny.BASE | settings), cuda=True))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        COMBINED,
        COMBINED | {PP: 2, VPP: 2},
        COMBINED | SELECTIVE,
        DELAYED,
        DELAYED | {PP: 2, VPP: 2} | SELECTIVE,
        SHARED,
        {"distributed.overlap_shared_experts": True, TP: 2},
        IN_PIECES,
        IN_PIECES | {PP: 2, EP: 2, CP: 2} | SELECTIVE,
        IN_PIECES | SHARED,
        IN_PIECES | FP8 | {"training.fp8.recipe": "tensorwise"},
        IN_PIECES | {"distributed.slurm.enabled": True, "distributed.slurm.gpus_per_node": 8},
    ],
)
def test_what_works(settings: dict[str, Any]) -> None:
    assert not problems(settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (COMBINED | {"distributed.device": "cpu"}, "needs CUDA"),
        (COMBINED | {"training.use_bf16": False}, "works in 16 bits only"),
        (COMBINED | {EP: 1}, "no exchange to hide with expert_parallel_size = 1"),
        (COMBINED | {PP: 2}, "without virtual stages"),
        (COMBINED | {"distributed.zero_stage": 2}, "does not work with zero_stage = 2"),
        (COMBINED | {PP: 2, VPP: 2, LAYOUT: [2, 1, 1, 0]}, "a stage without decoder layers"),
        (COMBINED | {"training.gradient_checkpointing": "full"}, "MoE layers are recomputed whole"),
        (COMBINED | SELECTIVE | {"training.recompute_modules": ["moe"]}, "MoE layers are recomputed whole"),
        (COMBINED | {"training.num_predict_tokens": 3}, "at most one MTP module, and there are 2"),
        (
            COMBINED | {"model.dense_layers": [3], "model.first_k_dense_replace": None},
            "the last layer is dense",
        ),
        (COMBINED | {"model.moe.dropout": 0.1}, "model.moe.dropout"),
        (COMBINED | SHARED, "exclude each other"),
        (SHARED | {"model.moe.num_shared_experts": 0}, "no shared experts"),
        (SHARED | {EP: 1}, "no exchange to hide"),
        (SHARED | SELECTIVE | {"training.recompute_modules": ["shared_experts"]}, "leave out one of them"),
        (DELAYED | {"distributed.overlap_expert_parallel": False}, "needs the combined schedule"),
        (DELAYED | {"model.backend": "native"}, "needs Transformer Engine"),
        (IN_PIECES | {"distributed.device": "cpu"}, "needs CUDA"),
        (IN_PIECES | {"model.backend": "native"}, "needs Transformer Engine"),
        (IN_PIECES | {"training.use_bf16": False}, "adds up in BF16, and this run is in FP32"),
        (
            IN_PIECES | {"training.use_bf16": False, "training.use_fp16": True},
            "adds up in BF16, and this run is in FP16",
        ),
        (IN_PIECES | FP8, 'cannot cut up tensors with a scale per block (recipe = "auto")'),
        (IN_PIECES | {TP: 6}, "adds up over 2, 4, 8, 16, 32 ranks only"),
        (IN_PIECES | {TP: 1}, "has nothing to overlap with tensor_parallel_size = 1"),
        (
            IN_PIECES | {"distributed.sequence_parallel": False},
            "overlaps what sequence parallelism exchanges",
        ),
        (
            IN_PIECES | {"distributed.slurm.enabled": True, "distributed.slurm.gpus_per_node": 3},
            "whose 3 processes do not divide into groups of 2",
        ),
        (IN_PIECES | {"model.mla.d_model": 96}, "needs a multiple of 64 in model.mla.d_model"),
        (IN_PIECES | {"distributed.zero_stage": 3}, "zero_stage 0 and 1 only"),
        (IN_PIECES | {"training.cuda_graphs": ["mlp"]}, "not been tried inside CUDA graphs"),
        (IN_PIECES | {"training.deterministic": True}, "is not deterministic"),
        (IN_PIECES | COMBINED, "tp_comm_overlap and overlap_expert_parallel exclude each other"),
    ],
)
def test_each_reason_is_told_alone(settings: dict[str, Any], said: str) -> None:
    (problem,) = problems(settings)
    assert said in problem


def test_megatron_core_accepts_what_we_do() -> None:
    """Its own checks run when its configuration is made."""
    config = load_config(None, tiny.BASE | COMBINED | {PP: 2, VPP: 2, "model.backend": "native"})
    translated = transformer_config(config, resolve(config, 4, cuda=True))
    assert translated.overlap_moe_expert_parallel_comm
    assert not translated.moe_shared_expert_overlap
    assert not translated.delay_wgrad_compute


def test_weight_gradients_are_put_off_in_the_model_and_in_their_reduction(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(backend, "transformer_engine_problem", lambda: None)
    monkeypatch.setattr(translate, "choose_fusions", lambda *unused: Fusions())
    config = load_config(None, tiny.BASE | DELAYED | {"model.backend": "transformer_engine"})
    resolved = resolve(config, 2, cuda=True)
    assert transformer_config(config, resolved).delay_wgrad_compute
    assert ddp_config(config, resolved).delay_wgrad_compute


@pytest.mark.parametrize(
    ("settings", "name"), [(DELAYED, "delay_wgrad_compute"), (IN_PIECES, "tp_comm_overlap")]
)
def test_what_transformer_engine_alone_can_do(
    settings: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it is there is known on the machine that trains only."""
    monkeypatch.setattr(backend, "transformer_engine_problem", lambda: "Transformer Engine is not installed")
    config = load_config(None, tiny.BASE | settings)
    with pytest.raises(EnvironmentSetupError, match=f"distributed.{name} needs Transformer Engine"):
        backend.choose_backend(config, resolve(config, 2, cuda=True))
