"""Predicted steps against published runs, the parts of a step against sums, and money."""

from pathlib import Path
from typing import Any

import pytest

from megads.config.flops import training_flops_per_token
from megads.config.loader import load_config
from megads.config.resolve import resolve
from megads.config.schema import Config
from megads.plan.activations import SavedActivations
from megads.plan.budget import Interruptions, budget, tokens_per_second_at
from megads.plan.hardware import gpu_named
from megads.plan.speed import OVERLAP, ModelFlops, SpeedModel, StepTime

CONFIGS = Path(__file__).parents[2] / "configs"
NO_RAMP = {"training.batch_size_rampup_start": None, "training.batch_size_rampup_tokens": 0}
BRIDGE = {
    "distributed.tensor_parallel_size": 2,
    "distributed.pipeline_parallel_size": 8,
    "distributed.virtual_pipeline_parallel_size": 4,
    "distributed.pipeline_layout": [1] + [2] * 30 + [0],
    "training.global_batch_size": 8192,
}
AS_V3 = {"training.gradient_checkpointing": "selective"}
SHORT = {
    "training.seq_length": 4096,
    "model.mla.max_context_length": 4096,
    "training.global_batch_size": 2048,
}


def shipped(name: str, **changes: Any) -> Config:
    return load_config(CONFIGS / f"{name}.json", changes)


def predicted(config: Config, gpus: int, gpu: str) -> StepTime:
    saved = SavedActivations(config, resolve(config, gpus, cuda=True))
    return SpeedModel(saved, gpu_named(gpu), ModelFlops.of(config)).step()


@pytest.mark.parametrize(
    ("name", "changes", "gpus", "gpu", "tokens_per_second"),
    [
        # Tokens per second and GPU, at 4K. DeepSeek-V3's own run hides its all-to-all, which we do not.
        ("deepseek_v3_671b", AS_V3 | {"training.use_fp8": True}, 2048, "h800", 1543),
        ("deepseek_v3_671b", AS_V3 | BRIDGE | NO_RAMP, 1024, "h100", 1061),
        ("moonlight_16b_a3b", SHORT | NO_RAMP, 16, "h100", 22528),
    ],
    ids=["DeepSeek-V3", "Megatron-Bridge-V3", "Megatron-Bridge-Moonlight"],
)
def test_published_speeds(
    name: str, changes: dict[str, Any], gpus: int, gpu: str, tokens_per_second: float
) -> None:
    step = predicted(shipped(name, **changes), gpus, gpu)
    assert step.tokens_per_second_per_gpu == pytest.approx(tokens_per_second, rel=1 / 3)


def test_gpu_hours_of_deepseek_v3() -> None:
    """180K H800 hours per trillion tokens at 385 causal TFLOP/s, which is 38.9% of the BF16 peak."""
    config, gpu = shipped("deepseek_v3_671b"), gpu_named("h800")
    speed = tokens_per_second_at(0.389, gpu, training_flops_per_token(config))
    money = budget(10**12, 2048, speed, 2.0)
    assert money.gpu_hours == pytest.approx(180e3, rel=0.15)
    whole = budget(14_800_000_000_000, 2048, speed, 2.0)
    assert whole.dollars == pytest.approx(5.328e6, rel=0.15)  # table 1: pre-training
    assert whole.days == pytest.approx(54, rel=0.15)  # "in less than two months"


def test_flops_per_token_of_deepseek_v3() -> None:
    """About 250 GFLOP forward and backward: 6 x 36.6B active matrix weights, and causal attention at 4K.

    61 layers x 128 heads x (192 + 128) wide x 2 FLOPs x 4097 / 2 keys on average, three times.
    """
    config = shipped("deepseek_v3_671b", **{"training.use_mtp": False, "training.mtp_loss_weight_phases": []})
    attention = 3 * 61 * 128 * (192 + 128) * 2 * 4097 / 2
    assert training_flops_per_token(config) == pytest.approx(6 * 36.62e9 + attention, rel=0.002)
    assert training_flops_per_token(config) == pytest.approx(250e9, rel=0.02)


@pytest.mark.parametrize("q_lora_rank", [None, 1536])
def test_user_buffers_hide_exchanges_of_hidden_states(q_lora_rank: int | None) -> None:
    """Of a layer with d wide states; queries of the hidden states are gathered beside their product too."""
    d, latent = 2048, 512 + 64
    layout = {"distributed.tensor_parallel_size": 2, "model.mla.q_lora_rank": q_lora_rank}
    overlap = {"distributed.tp_comm_overlap": True}
    plain, in_pieces = (
        predicted(shipped("deepseek_v2_lite", **layout | changes), 64, "h100") for changes in ({}, overlap)
    )
    exchanged = 3 * ((q_lora_rank or d) + latent + d) + 2 * 2 * d
    beside_products = (2 if q_lora_rank is None else 1) * d + 2 * 2 * d
    ratio = in_pieces.tensor_parallel / plain.tensor_parallel
    assert ratio == pytest.approx(1 - OVERLAP * beside_products / exchanged)
    assert in_pieces.seconds < plain.seconds


def test_a_step_adds_up() -> None:
    step = predicted(shipped("deepseek_v2_lite"), 64, "h100")
    assert sum(step.by_cause().values()) == step.seconds
    assert step.tensor_parallel == step.context_parallel == step.bubble == 0
    assert step.expert_parallel > 0
    assert step.tokens_per_second_per_gpu * step.seconds == pytest.approx(4608 * 4096 / 64)
    assert 0.2 < step.mfu < 0.6


def test_what_makes_a_step_longer_or_shorter() -> None:
    lite = shipped("deepseek_v2_lite")
    base = predicted(lite, 64, "h100")
    assert predicted(lite, 64, "a100").seconds > base.seconds > predicted(lite, 64, "b200").seconds
    full = predicted(shipped("deepseek_v2_lite", **{"training.gradient_checkpointing": "full"}), 64, "h100")
    assert 1.1 < full.seconds / base.seconds < 4 / 3
    split = predicted(shipped("deepseek_v2_lite", **{"distributed.tensor_parallel_size": 8}), 64, "h100")
    assert split.tensor_parallel > 0
    far = predicted(shipped("deepseek_v2_lite", **{"distributed.expert_parallel_size": 32}), 64, "h100")
    assert far.expert_parallel > 3 * base.expert_parallel, "beyond a node the network is the link"


def test_bubble_of_equal_stages() -> None:
    """(pp - 1) / m of the work, divided by the virtual stages (arXiv:2104.04473, section 2.2)."""
    sizes = {
        "model.num_layers": 16,
        "model.first_k_dense_replace": None,
        "model.vocab_size": 64,
        "distributed.pipeline_parallel_size": 4,
        "distributed.expert_parallel_size": 1,
    }
    for vpp in (None, 2):
        virtual = {"distributed.virtual_pipeline_parallel_size": vpp}
        step = predicted(shipped("deepseek_v2_lite", **sizes, **virtual), 64, "h100")
        work = step.products + step.attention + step.memory
        micro_batches = 4608 / (2 * 16)
        assert step.bubble / work == pytest.approx(3 / micro_batches / (vpp or 1), rel=0.02)


def test_interruptions() -> None:
    often = Interruptions.on_spot(step_seconds=36.0, save_interval_steps=100, hours_between=3.0)
    assert often.lost_hours == pytest.approx(0.5 + 0.25)
    assert often.lost_share == pytest.approx(0.25)
    calm, spot = budget(10**9, 8, 1000.0, 2.0), budget(10**9, 8, 1000.0, 1.0, often)
    assert spot.gpu_hours == pytest.approx(calm.gpu_hours / 0.75)
    assert spot.dollars == pytest.approx(calm.dollars / 2 / 0.75)
    assert calm.gpu_hours == pytest.approx(1e9 / 1000 / 3600)
    assert calm.days == pytest.approx(calm.gpu_hours / 8 / 24)
    hopeless = Interruptions(hours_between=1.0, lost_hours=2.0)
    assert budget(10**9, 8, 1000.0, 1.0, hopeless).gpu_hours == float("inf")
