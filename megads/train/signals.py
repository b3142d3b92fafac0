"""Stop requests from outside: SIGTERM (a scheduler), SIGINT (a person), SIGUSR1 (a time limit)."""

import math
import os
import signal
from types import FrameType

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Remembers the first stop signal; all ranks learn of it at the same step.

    A second SIGINT ends the process at once, as a person who presses Ctrl-C twice expects.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        # Its own gloo group: asking costs no wait for the device's queue.
        self._group = dist.new_group(backend="gloo")
        self._previous = {number: signal.signal(number, self._remember) for number in SIGNALS}

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._received is not None:
            os._exit(128 + number)
        self._received = number

    def agreed(self) -> str | None:
        """The name of the signal that any rank received, else None; collective."""
        flag = torch.tensor([self._received or 0], dtype=torch.int32, device="cpu")
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        return signal.Signals(int(flag)).name if flag else None

    def largest(self, value: float) -> float:
        """The largest `value` of any rank, infinite if one is not finite; collective.

        For decisions that all ranks must take alike.
        """
        known = value if math.isfinite(value) else math.inf
        tensor = torch.tensor([known], dtype=torch.float64, device="cpu")
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self._group)
        return float(tensor)

    def close(self) -> None:
        """Give the signals back to whom they belonged."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
