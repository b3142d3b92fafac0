"""Loss spikes: which steps are out of line with the recent past, and what is done about them.

A loss is compared with the median of the last accepted ones, in units of their median absolute
deviation: neither is moved by the spikes themselves, and a loss that falls only makes the test milder.
PaLM (arXiv:2204.02311, section 5.1) restarted about 100 steps before a spike and skipped the data around
it; the same batches from another state did not spike.
"""

import bisect
import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from megads.config.schema import Stability

MAD_TO_STD = 1.4826  # of a normal distribution
FEWEST_LOSSES = 16


class RecentLosses:
    """The last `window` accepted losses, with their median at hand."""

    def __init__(self, window: int, losses: Iterable[float] = ()) -> None:
        self._in_order: deque[float] = deque(maxlen=window)
        self._sorted: list[float] = []
        for loss in losses:
            self.append(loss)

    def __len__(self) -> int:
        return len(self._in_order)

    def append(self, loss: float) -> None:
        """Accept a finite loss; the oldest goes when the window is full."""
        if len(self._in_order) == self._in_order.maxlen:
            del self._sorted[bisect.bisect_left(self._sorted, self._in_order[0])]
        self._in_order.append(loss)
        bisect.insort(self._sorted, loss)

    def median(self) -> float:
        return _middle(self._sorted)

    def deviation(self) -> float:
        """Robust standard deviation: the median absolute deviation, scaled."""
        median = self.median()
        return MAD_TO_STD * _middle(sorted(abs(loss - median) for loss in self._in_order))

    def as_tuple(self) -> tuple[float, ...]:
        """Oldest first, for the training state."""
        return tuple(self._in_order)


def _middle(ordered: list[float]) -> float:
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def is_spike(loss: float, recent: RecentLosses, settings: Stability) -> bool:
    """Whether `loss` is out of line: not finite, or above median + max(threshold x deviation, least)."""
    if not math.isfinite(loss):
        return True
    if len(recent) < FEWEST_LOSSES:
        return False
    excess = loss - recent.median()
    # The cheap test first: sorting the deviations is for the few losses that stand out at all.
    return excess > settings.spike_least_increase and excess > settings.spike_threshold * recent.deviation()


@dataclass(frozen=True)
class Verdict:
    """What is to happen to a step: `action` of "accept", "warn", "skip", "rollback"."""

    action: str
    loss: float
    median: float
    first_bad_step: int

    def facts(self) -> dict[str, object]:
        """For the record of the event."""
        return {"loss": self.loss, "median_loss": self.median, "action": self.action}

    def text(self) -> str:
        """For the log."""
        finite = math.isfinite(self.loss)
        made = "the update is made" if finite else "the update is made if its gradients are finite"
        done = {"warn": made, "skip": "the update is left out"}.get(self.action, "going back")
        if not finite:
            return f"the loss is {self.loss}: {done}"
        return f"the loss {self.loss:.4f} is far above the recent {self.median:.4f}: {done}"


class SpikeWatch:
    """Judges each step's loss; what it remembers is `recent` and the current row of spikes.

    A rollback needs `spike_patience` spikes in a row: one bad batch is no reason for it.
    """

    def __init__(self, settings: Stability, recent: Iterable[float] = ()) -> None:
        self.settings = settings
        self.recent = RecentLosses(settings.spike_window, recent)
        self._in_a_row = 0
        self._first_bad_step = 0

    def judge(self, step: int, loss: float) -> Verdict:
        """What to do about step `step` (from 1) with this loss of the main prediction, in nats per token."""
        median = self.recent.median() if len(self.recent) else math.nan
        if not is_spike(loss, self.recent, self.settings):
            self._in_a_row = 0
            self.recent.append(loss)
            return Verdict("accept", loss, median, step)
        if self._in_a_row == 0:
            self._first_bad_step = step
        self._in_a_row += 1
        policy = self.settings.spike_policy
        if policy == "rollback":
            action = "rollback" if self._in_a_row >= self.settings.spike_patience else "warn"
        else:
            action = policy
        if policy == "warn" and math.isfinite(loss):
            self.recent.append(loss)  # nothing will be undone: this is where training is now
        return Verdict(action, loss, median, self._first_bad_step)
