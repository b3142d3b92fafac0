"""Where the time of a run goes: data, forward and backward, optimizer, checkpoints, evaluation.

On a GPU the marks are CUDA events, which the device passes when it gets there: nothing waits for them
before `drain`. A phase is then the time that the device took, or stood idle, between its marks. On a CPU
they are readings of the clock.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

PHASES = ("data", "forward_backward", "optimizer", "checkpoint", "evaluation")


class _Phase(NamedTuple):
    name: str
    around: str | None
    """The phase that it interrupts: what is inside does not count twice."""
    begin: "torch.cuda.Event | float"
    end: "torch.cuda.Event | float"


class PhaseClock:
    """Seconds by phase. Phases may be nested; each has only what no phase inside it has."""

    def __init__(self, *, cuda: bool) -> None:
        self._cuda = cuda
        self._open: list[str] = []
        self._done: list[_Phase] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What runs inside belongs to this phase, one of PHASES."""
        around = self._open[-1] if self._open else None
        begin = time_mark(self._cuda)
        self._open.append(name)
        try:
            yield
        finally:
            self._open.pop()
            self._done.append(_Phase(name, around, begin, time_mark(self._cuda)))

    def each[T](self, name: str, items: Iterator[T]) -> Iterator[T]:
        """`items`, the waiting for each of which belongs to a phase."""
        nothing = object()
        while True:
            with self.phase(name):
                item = next(items, nothing)
            if item is nothing:
                return
            yield item  # type: ignore[misc]

    def drain(self) -> dict[str, float]:
        """Seconds of each phase since the last call, 0 for those that did not occur. Waits for the device."""
        seconds = dict.fromkeys(PHASES, 0.0)
        for phase in self._done:
            spent = seconds_between(phase.begin, phase.end)
            seconds[phase.name] += spent
            if phase.around is not None:
                seconds[phase.around] -= spent
        self._done.clear()
        return seconds


def time_mark(cuda: bool) -> "torch.cuda.Event | float":
    """Now, on the device's own clock."""
    if not cuda:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(begin: "torch.cuda.Event | float", end: "torch.cuda.Event | float") -> float:
    """From one `time_mark` to another; waits until a device has passed both."""
    if isinstance(begin, float):
        assert isinstance(end, float)
        return end - begin
    assert isinstance(end, torch.cuda.Event)
    end.synchronize()
    return begin.elapsed_time(end) / 1000
