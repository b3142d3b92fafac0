"""Exchanges of tokens beside computation: on the CPU, one after the other, with the losses of a run without.

The combined schedule is refused on the CPU, where nothing runs side by side; what it computes is the same.
"""

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


@pytest.mark.parametrize("layout", ["ep2", "tp2-ep2"])
def test_shared_experts_during_the_exchange(layout: str) -> None:
    assert_same_run(layout, {}, only_here=SHARED)


def combined(settings: dict[str, Any]) -> list[dict[str, Any]]:
    from megads.model import build
    from megads.model.language_model import SchedulePlan

    def translated(*args: Any) -> Any:
        config = build_config(*args)
        config.overlap_moe_expert_parallel_comm = True  # past the checks, which want 16 bits
        return config

    build_config = build.transformer_config
    with (
        mock.patch.object(build, "transformer_config", translated),
        mock.patch.object(SchedulePlan, "run", wraps=SchedulePlan.run) as run,
    ):
        records = tiny.train(tiny.start(settings), 0, STEPS)
    assert any(forward and backward for forward, backward in (call.args for call in run.call_args_list))
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
    processes, of_layout = LAYOUTS[layout]
    settings = settings | of_layout | {"training.micro_batch_size": 1}
    expected, found = (
        list(tiny.merge(run_distributed(processes, function, timeout_seconds=100, settings=settings)))
        for function in (usual, combined)
    )
    for mine, other in zip(found, expected, strict=True):
        assert mine["losses"] == pytest.approx(other["losses"], rel=1e-6)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)
        assert mine["loads"] == other["loads"]
