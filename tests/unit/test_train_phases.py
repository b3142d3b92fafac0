"""Time by phase: nothing is counted twice, whatever is inside what."""

import time
from collections.abc import Iterator
from typing import Any

import pytest

from megads.train.phases import PHASES, PhaseClock


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands still unless a test moves it."""
    clock = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    return clock


def seconds(**named: float) -> dict[str, float]:
    return dict.fromkeys(PHASES, 0.0) | named


def test_phases_inside_others_count_once(now: list[float]) -> None:
    clock = PhaseClock(cuda=False)
    for _ in range(2):
        with clock.phase("forward_backward"):
            now[0] += 1
            with clock.phase("data"):
                now[0] += 0.5
            now[0] += 1
        now[0] += 10  # belongs to nothing
        with clock.phase("optimizer"):
            now[0] += 0.25
    assert clock.drain() == seconds(forward_backward=4, data=1, optimizer=0.5)
    assert clock.drain() == seconds()


def test_a_phase_that_fails_is_counted_and_closed(now: list[float]) -> None:
    clock = PhaseClock(cuda=False)

    def failing_update() -> None:
        with clock.phase("optimizer"):
            now[0] += 1
            raise RuntimeError

    with pytest.raises(RuntimeError):
        failing_update()
    with clock.phase("evaluation"):
        now[0] += 2
    assert clock.drain() == seconds(optimizer=1, evaluation=2)


def test_waiting_for_items(now: list[float]) -> None:
    """Only the waiting counts, not what is done with an item; the end of the items is an item's end too."""

    def slow() -> Iterator[int]:
        for number in range(3):
            now[0] += 1
            yield number
        now[0] += 1

    clock = PhaseClock(cuda=False)
    found = []
    for number in clock.each("data", slow()):
        now[0] += 100
        found.append(number)
    assert found == [0, 1, 2]
    assert clock.drain() == seconds(data=4)


def test_on_a_gpu_nothing_waits_before_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for CUDA's events: recorded in a phase, waited for and read by `drain` alone."""
    log: list[str] = []

    class Event:
        recorded = 0

        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("record")
            self.number = Event.recorded = Event.recorded + 1

        def synchronize(self) -> None:
            log.append("synchronize")

        def elapsed_time(self, end: Any) -> float:
            return 1000.0 * (end.number - self.number)

    monkeypatch.setattr("torch.cuda.Event", Event)
    clock = PhaseClock(cuda=True)
    with clock.phase("forward_backward"), clock.phase("data"):
        pass
    assert log == ["record"] * 4
    assert clock.drain() == seconds(forward_backward=2, data=1)
    assert log.count("synchronize") == 2
