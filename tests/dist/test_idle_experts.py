"""A rank whose experts get no token takes part in every collective, and the gradients are the same."""

from typing import Any

import pytest

from tests.dist import tiny
from tests.dist.harness import run_distributed


def run(settings: dict[str, Any]) -> list[dict[str, Any]]:
    step = tiny.start(settings)
    for router in step.routers:
        router.expert_bias[:4] = 100.0  # the first group, which EP2 puts on rank 0, takes every token
    return tiny.train(step, 0, 2)


@pytest.mark.parametrize("layout", ["ep2", "tp2-ep2"])
def test_a_rank_without_tokens(layout: str) -> None:
    (expected,) = run_distributed(1, run, settings={})
    assert all(sum(loads[4:]) == 0 for record in expected for loads in record["loads"].values())
    processes, settings = tiny.LAYOUTS[layout]
    for found in run_distributed(processes, run, settings=settings):
        for mine, other in zip(found, expected, strict=True):
            assert mine["losses"] == pytest.approx(other["losses"], rel=1e-5)
            assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
            assert mine["loads"] == other["loads"]
