"""Troubles of a run are told once when they begin."""

import math
from typing import Any

from megads.config.schema import Health
from megads.train.health import HealthWatch

GIB = 2**30


def watch(**settings: Any) -> HealthWatch:
    return HealthWatch(Health(**settings), vocab_size=1000)


def names(found: list[tuple[str, str]]) -> list[str]:
    return [name for name, _ in found]


def record(**values: Any) -> dict[str, Any]:
    return {"lm_loss": 3.0, "grad_norm": 1.0, **values}


def test_a_healthy_run_is_not_talked_about() -> None:
    healthy = watch()
    for step in range(300):
        found = healthy.look(
            record(lm_loss=7 - step / 100, grad_norm=1 + 0.3 * (step % 5), memory_share=0.5,
                   max_vio_by_layer=[0.5, None], dead_experts_by_layer=[0, 0])
        )  # fmt: skip
        assert found == []


def test_each_trouble_is_named() -> None:
    assert names(watch().look(record(lm_loss=math.log(1000) + 0.6))) == ["high_loss"]
    [(name, text)] = watch().look(record(memory_share=0.95, peak_memory_bytes=9.5 * GIB))
    assert (name, text) == ("memory", "95% of the memory has been in use (9.5 GiB)")
    [(name, text)] = watch().look(record(dead_experts_by_layer=[0, 2, 1]))
    assert name == "dead_experts"
    assert "3 experts" in text
    assert "layers 1, 2" in text
    [(name, text)] = watch().look(record(max_vio_by_layer=[0.1, 6.25]))
    assert (name, "1: 6.25" in text) == ("max_vio", True)


def test_gradient_norm_is_compared_with_the_usual() -> None:
    normal = watch()
    for _ in range(10):
        assert normal.look(record(grad_norm=2.0)) == []
    assert names(normal.look(record(grad_norm=25.0))) == ["grad_norm"]
    assert normal.look(record(grad_norm=None)) == []


def test_a_stalled_loss() -> None:
    stalled = watch(stalled_intervals=50)
    found = [names(stalled.look(record(lm_loss=3.0 + 0.01 * (i % 2)))) for i in range(60)]
    assert found.index(["stalled"]) == 50
    assert sum(map(len, found)) == 1
    assert stalled.look(record(lm_loss=2.9)) == []


def test_a_lasting_trouble_is_told_once_and_again_when_it_returns() -> None:
    returning = watch()
    uneven, even = record(max_vio_by_layer=[9.0]), record(max_vio_by_layer=[0.1])
    found = [names(returning.look(each)) for each in (uneven, uneven, even, uneven)]
    assert found == [["max_vio"], [], [], ["max_vio"]]
