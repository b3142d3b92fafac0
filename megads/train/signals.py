"""Stop requests from outside: SIGTERM (a scheduler), SIGINT (a person), SIGUSR1 (a time limit), a notice
that the machine will be taken away (`launch.notice`)."""

import math
import os
import signal
from types import FrameType

import torch
import torch.distributed as dist

from megads.config.schema import Preemption
from megads.launch.notice import NoticeWatch, build_check

NOTICE = 1000  # beyond all signals
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Remembers the first stop signal or notice; all ranks learn of it at the same step.

    Of each machine one process, local rank 0, asks for notices as `preemption` says.
    A second SIGINT ends the process at once, as a person who presses Ctrl-C twice expects.
    """

    def __init__(self, preemption: Preemption = Preemption()) -> None:  # noqa: B008  # it is frozen
        self._received: int | None = None
        check = build_check(preemption.notice, preemption.command)
        asks = check is not None and os.environ.get("LOCAL_RANK", "0") == "0"
        self._watch = NoticeWatch(check, preemption.interval_seconds) if check and asks else None
        # Its own gloo group: asking costs no wait for the device's queue.
        self._group = dist.new_group(backend="gloo")
        self._previous = {number: signal.signal(number, self._remember) for number in SIGNALS}

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._received is not None:
            os._exit(128 + number)
        self._received = number

    def agreed(self, budget_share: float = 0.0) -> tuple[str | None, float]:
        """What all ranks are to do after a step; collective, one reduction.

        First the name of the signal that any rank received, or "preemption notice", else None; then the
        largest `budget_share` of any rank.
        """
        noticed = self._watch is not None and self._watch.noticed.is_set()
        number, share = self._largest(NOTICE if noticed else self._received or 0, budget_share)
        if number == NOTICE:
            return "preemption notice", share
        return signal.Signals(int(number)).name if number else None, share

    def largest(self, value: float) -> float:
        """The largest `value` of any rank, infinite if one is not finite; collective.

        For decisions that all ranks must take alike.
        """
        return self._largest(value if math.isfinite(value) else math.inf)[0]

    def _largest(self, *values: float) -> list[float]:
        tensor = torch.tensor(values, dtype=torch.float64, device="cpu")
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self._group)
        return tensor.tolist()

    def close(self) -> None:
        """Give the signals back to whom they belonged, and ask for no notices."""
        if self._watch is not None:
            self._watch.close()
        for number, handler in self._previous.items():
            signal.signal(number, handler)
