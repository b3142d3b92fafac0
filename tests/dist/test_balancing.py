"""The router's bias evens out a skewed start, where nothing else does."""

import importlib.util
from pathlib import Path
from typing import Any

from tests.dist.harness import run_distributed

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "balancing.py"
STEPS = 45


def max_vios(steps: int) -> tuple[list[float], list[float]]:
    """MaxVio of every step with and without the bias."""
    spec = importlib.util.spec_from_file_location("balancing", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    balancing: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(balancing)
    balancing.BATCH = 8
    of_batch = {"training.global_batch_size": 8, "training.micro_batch_size": 8}
    fast = balancing.WITH_BIAS | {"model.moe.bias_update_rate": 0.03}
    return (
        balancing.run(of_batch | fast, steps)["max_vio"],
        balancing.run(of_batch, steps)["max_vio"],
    )


def test_the_bias_balances_what_starts_skewed() -> None:
    [(with_bias, without)] = run_distributed(1, max_vios, steps=STEPS)
    assert with_bias[0] == without[0] > 6  # two of 16 experts take nearly all
    assert sum(with_bias[-5:]) / 5 < 1.5
    assert min(without) > 2
