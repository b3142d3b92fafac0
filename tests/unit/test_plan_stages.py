"""Memory of pipeline stages: what is in flight by the schedules' papers, and what a layout changes."""

from pathlib import Path
from typing import Any

import pytest

from megads.config.loader import load_config
from megads.config.memory import stage_memory
from megads.config.resolve import Resolved, resolve
from megads.config.schema import Config
from megads.plan.activations import SavedActivations
from megads.plan.hardware import gpu_named
from megads.plan.memory import StageBytes, in_flight, memory_by_stage

CONFIGS = Path(__file__).parents[2] / "configs"


def shipped(name: str, gpus: int, **changes: Any) -> tuple[Config, Resolved]:
    config = load_config(CONFIGS / f"{name}.json", changes)
    return config, resolve(config, gpus, cuda=True)


def heaviest(config: Config, resolved: Resolved) -> StageBytes:
    return max(memory_by_stage(config, resolved), key=lambda stage: stage.total)


def test_in_flight_without_interleaving() -> None:
    """1F1B: stage r of p has p - r micro-batches in flight, if there are so many."""
    for rank in range(4):
        assert max(in_flight(rank, 4, 1, 100)) == (4 - rank,)
        assert max(in_flight(rank, 4, 1, 2)) == (min(4 - rank, 2),)
    assert in_flight(0, 1, 1, 50) == ((1,),)


def test_in_flight_with_interleaving() -> None:
    """arXiv:2104.04473: on the first rank p + (p - 1) / v micro-batches' worth, v p + p - 1 chunks."""
    pp, vpp = 4, 2
    assert max(map(sum, in_flight(0, pp, vpp, 16))) == vpp * pp + pp - 1
    assert max(map(sum, in_flight(pp - 1, pp, vpp, 16))) == (vpp - 1) * pp + 1
    assert max(map(sum, in_flight(0, pp, vpp, pp))) == vpp * pp, "no more than there are"
    assert max(map(sum, in_flight(0, pp, vpp, 16, combined=True))) == vpp * pp + pp


def test_deepseek_v3_fits_its_gpus() -> None:
    """PP 16, EP 64, ZeRO 1 on 2048 H800: with full recomputation, and with MoE layers recomputed whole.

    V3 recomputed less, in FP8. Here the inputs of SwiGLU stay in BF16, which takes that beyond 80 GB.
    """
    limit, fp8 = gpu_named("h800").memory_bytes, {"training.use_fp8": True}
    selective: dict[str, Any] = {"training.gradient_checkpointing": "selective"}
    moe = selective | {"training.recompute_modules": ["mla_up_proj", "layernorm", "moe"]}
    totals = [
        heaviest(*shipped("deepseek_v3_671b", 2048, **changes)).total
        for changes in ({}, moe | fp8, moe, selective | fp8, selective)
    ]
    assert totals == sorted(totals)
    assert totals[0] < limit / 2
    assert totals[2] < limit < totals[3]


def test_deepseek_v3_static_memory_by_hand() -> None:
    """A middle stage: 4 MoE layers with 4 of the 256 experts each, ZeRO over 128 and 2 replicas."""
    config, resolved = shipped("deepseek_v3_671b", 2048)
    attention = 7168 * (1536 + 512 + 64) + 1536 * 128 * 192 + 512 * 128 * 256 + 128 * 128 * 7168
    norms = 2 * 7168 + 1536 + 512
    expert = 3 * 7168 * 2048
    dense, experts = 4 * (attention + norms + 256 * 7168 + expert), 4 * 4 * expert
    memory = stage_memory(config, resolved, 7)
    assert memory.parameters == dense + experts
    assert memory.expert_parameters == experts
    assert memory.weights_bytes == 2 * (dense + experts)
    assert memory.gradients_bytes == 4 * (dense + experts)
    assert memory.optimizer_bytes == pytest.approx(12 * dense / 128 + 12 * experts / 2)
    bf16 = {"training.adam_exp_avg_dtype": "bf16", "training.adam_exp_avg_sq_dtype": "bf16"}
    smaller = stage_memory(*shipped("deepseek_v3_671b", 2048, **bf16), 7)
    assert smaller.optimizer_bytes == pytest.approx(memory.optimizer_bytes * 8 / 12)


def test_stages_of_the_same_layers_need_less_toward_the_end() -> None:
    config, resolved = shipped("deepseek_v3_671b", 2048)
    stages = memory_by_stage(config, resolved)
    assert [stage.stage for stage in stages] == list(range(16))
    totals = [stage.total for stage in stages[1:15]]
    assert totals == sorted(totals, reverse=True)
    assert [stage.micro_batches for stage in stages] == [16 - rank for rank in range(16)]
    last = stages[-1]
    assert last.mtp > 0
    assert last.logits > 0
    assert all(stage.mtp == stage.logits == 0 for stage in stages[:-1])
    # One micro-batch: two predictions of 4096 tokens over 129,280 words in BF16 are most of it.
    assert last.logits == pytest.approx(2 * 4096 * 129280 * 2, rel=0.1)


def test_user_buffers_hold_the_hidden_states_of_a_micro_batch() -> None:
    def runtime(**changes: Any) -> int:
        layout = {"distributed.tensor_parallel_size": 2, "training.micro_batch_size": 2}
        return memory_by_stage(*shipped("deepseek_v2_lite", 64, **layout | changes))[0].runtime

    overlap = {"distributed.tp_comm_overlap": True}
    fp8 = overlap | {"training.use_fp8": True, "training.fp8.recipe": "tensorwise"}
    hidden_states, without = 2 * 4096 * 2048, runtime()
    assert runtime(**overlap) - without == 12 * hidden_states * 2
    assert runtime(**fp8) - without == 8 * hidden_states + 4 * hidden_states * 2
    both = runtime(**fp8, **{"training.fp8.bf16_last_layers": 1}) - without
    assert both == (12 * 2 + 8 + 4 * 2) * hidden_states


def test_recomputation_saves_and_needs_a_workspace() -> None:
    by_setting = {
        setting: heaviest(*shipped("deepseek_v2_lite", 64, **{"training.gradient_checkpointing": setting}))
        for setting in (False, "selective", "full")
    }
    kept = [by_setting[setting].activations for setting in (False, "selective", "full")]
    assert kept[0] > kept[1] > kept[2]
    assert by_setting["full"].workspace > by_setting[False].workspace


def test_tensor_and_context_parallelism_divide_activations() -> None:
    def of_layer(**changes: Any) -> int:
        saved = SavedActivations(*shipped("deepseek_v2_lite", 64, **changes))
        return saved.layer(False).total()

    one = of_layer()
    assert of_layer(**{"distributed.tensor_parallel_size": 4}) == pytest.approx(one / 4, rel=0.01)
    # Keys and values of the whole sequence are made on every rank of context parallelism.
    assert one / 4 < of_layer(**{"distributed.context_parallel_size": 4}) < one / 2


def test_the_cpu_has_no_runtime_and_no_margin() -> None:
    config = load_config(CONFIGS / "debug.json")
    (stage,) = memory_by_stage(config, resolve(config, 1, cuda=False))
    assert stage.runtime == stage.margin == 0
    (on_gpu,) = memory_by_stage(config, resolve(config, 1, cuda=True))
    assert on_gpu.runtime > 0
    assert on_gpu.margin > 0
