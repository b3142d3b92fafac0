"""Time by phase of an optimizer step, the same for every contender: hooks on its model and its optimizer.

On CUDA the marks are events on the device's stream, so that the time of a phase is the device's.
Recomputation is part of backward; data-parallel bookkeeping and bias updates are "other".
"""

from collections.abc import Callable
from typing import Any

import torch

from megads.train.phases import seconds_between, time_mark

PHASES = ("forward", "backward", "optimizer", "other")


class Stopwatch:
    """Seconds between two marks belong to the phase that the second one ends."""

    def __init__(self, *, cuda: bool) -> None:
        self._cuda = cuda
        self._marks: list[tuple[str, torch.cuda.Event | float]] = []

    def start(self) -> None:
        """Forget the last step."""
        self._marks = []
        self.mark("other")

    def mark(self, phase: str) -> None:
        """End `phase` here."""
        self._marks.append((phase, time_mark(self._cuda)))

    def watch_forward(self, model: torch.nn.Module) -> None:
        """Mark each call of `model`, the outermost module; what follows a forward pass is backward."""
        model.register_forward_pre_hook(lambda *_: self.mark(self._after_forward()))
        model.register_forward_hook(lambda *_: self.mark("forward"))

    def watched_optimizer(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """`step` between marks, and as a range of torch's profiler."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            self.mark(self._after_forward())
            with torch.profiler.record_function("optimizer"):
                result = step(*args, **kwargs)
            self.mark("optimizer")
            return result

        return watched

    def _after_forward(self) -> str:
        return "backward" if self._marks and self._marks[-1][0] == "forward" else "other"

    def seconds(self) -> dict[str, float]:
        """By phase, of the step since `start`. Waits for the device."""
        self.mark("other")
        found = dict.fromkeys(PHASES, 0.0)
        for (_, begin), (phase, end) in zip(self._marks, self._marks[1:], strict=False):
            found[phase] += seconds_between(begin, end)
        return found
