"""Exchanges of tokens beside computation: on the CPU, one after the other, with the losses of a run without.

The combined schedule is refused on the CPU, where nothing runs side by side; what it computes is the same.
"""

from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import pytest

from tests.dist import tiny
from tests.dist.harness import run_distributed
from tests.dist.test_layout_parity import assert_same_run
from tests.dist.tiny import LAYOUTS

SHARED = {"distributed.overlap_shared_experts": True}
STEPS = 3
MTP_OF_DEPTH_1 = {"training.num_predict_tokens": 2}
RECOMPUTED = {
    "training.gradient_checkpointing": "selective",
    "training.recompute_modules": ["mla_up_proj", "moe_act", "mlp", "shared_experts"],
}


@pytest.mark.parametrize("layout", ["ep2", "tp2-ep2"])
def test_shared_experts_during_the_exchange(layout: str) -> None:
    assert_same_run(layout, {}, only_here=SHARED)


def combined(settings: dict[str, Any], delayed: bool = False) -> list[dict[str, Any]]:
    """Past the checks, which want 16 bits and, where weight gradients are `delayed`, Transformer Engine."""
    from megads.model import build
    from megads.model.language_model import SchedulePlan
    from megads.optim import build as optimizer_build
    from tests.dist.delaying_layers import Delaying, delaying

    def translated(*args: Any) -> Any:
        config = transformer_config(*args)
        config.overlap_moe_expert_parallel_comm, config.delay_wgrad_compute = True, delayed
        return config

    transformer_config, ddp_config, modules = (
        build.transformer_config,
        optimizer_build.ddp_config,
        build.backend_modules,
    )
    with (
        mock.patch.object(build, "transformer_config", translated),
        mock.patch.object(build, "backend_modules", delaying if delayed else modules),
        mock.patch.object(
            optimizer_build,
            "ddp_config",
            lambda *args: replace(ddp_config(*args), delay_wgrad_compute=delayed),
        ),
        mock.patch.object(SchedulePlan, "run", wraps=SchedulePlan.run) as run,
    ):
        step = tiny.start(settings)
        records = tiny.train(step, 0, STEPS)
    assert any(forward and backward for forward, backward in (call.args for call in run.call_args_list))
    of_model = [module for chunk in step.chunks for module in chunk.modules() if isinstance(module, Delaying)]
    assert bool(of_model) == delayed
    assert not any(module.put_off for module in of_model)
    return records


def usual(settings: dict[str, Any]) -> list[dict[str, Any]]:
    return tiny.train(tiny.start(settings), 0, STEPS)


@pytest.mark.parametrize(
    ("layout", "settings"),
    [
        ("ep2", MTP_OF_DEPTH_1),
        ("ep2", {"training.use_mtp": False, "data.document_mask": True}),
        ("pp2-ep2", MTP_OF_DEPTH_1 | {"distributed.virtual_pipeline_parallel_size": 2}),
    ],
)
def test_the_combined_schedule(layout: str, settings: dict[str, Any]) -> None:
    assert_losses_of_the_usual_schedule(layout, settings, delayed=False)


@pytest.mark.parametrize(
    ("layout", "settings"),
    [
        ("ep2", MTP_OF_DEPTH_1 | {"model.mla.q_lora_rank": None}),
        ("pp2-ep2", MTP_OF_DEPTH_1 | {"distributed.virtual_pipeline_parallel_size": 2} | RECOMPUTED),
    ],
)
def test_weight_gradients_after_those_of_the_inputs(layout: str, settings: dict[str, Any]) -> None:
    """Layers of the tests' own delay them, since none but Transformer Engine's do, which need a GPU."""
    assert_losses_of_the_usual_schedule(layout, settings, delayed=True)


def assert_losses_of_the_usual_schedule(layout: str, settings: dict[str, Any], *, delayed: bool) -> None:
    processes, of_layout = LAYOUTS[layout]
    settings = settings | of_layout | {"training.micro_batch_size": 1}
    expected, found = (
        list(tiny.merge(run_distributed(processes, function, settings=settings)))
        for function in (usual, partial(combined, delayed=delayed))
    )
    for mine, other in zip(found, expected, strict=True):
        assert mine["losses"] == pytest.approx(other["losses"], rel=1e-6)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)
        assert mine["loads"] == other["loads"]
