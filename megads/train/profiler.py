"""A window of steps seen by torch's profiler: a trace file, and on CUDA the memory behind it.

The window comes from the configuration (`logging.profile`), or from outside while the run goes on:
SIGUSR2 profiles the next steps of the process that gets it. Nothing is collected outside the window.
"""

import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import torch
from torch.profiler import ProfilerActivity, profile

from megads.config.schema import Profile

logger = logging.getLogger(__name__)

MEMORY_HISTORY_ENTRIES = 200_000
TABLE_ROWS = 30


class StepProfiler:
    """Call `before_step` and `after_step` around every training step of this process.

    Files go to `directory`: `rank{R}_steps{A}-{B}.trace.json.gz` (chrome://tracing, Perfetto), `.txt` with
    the most expensive operations, and on CUDA `.memory.pickle` (PyTorch's memory viewer).
    """

    def __init__(self, settings: Profile, directory: Path, *, rank: int, cuda: bool) -> None:
        self._settings, self._directory, self._rank, self._cuda = settings, directory, rank, cuda
        self._asked = False
        self._profile: profile | None = None
        self._first = self._last = 0
        self._previous = signal.signal(signal.SIGUSR2, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def before_step(self, step: int) -> None:
        """`step` (from 1) is about to run: begin the window here if it is due."""
        settings = self._settings
        due = step == settings.start_step and self._rank in settings.ranks
        if self._profile is not None or not (due or self._asked):
            return
        self._asked = False
        self._first, self._last = step, step + settings.steps - 1
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._cuda else [])]
        self._profile = profile(activities=activities, record_shapes=True, profile_memory=settings.memory)
        if self._cuda and settings.memory:
            torch.cuda.memory._record_memory_history(max_entries=MEMORY_HISTORY_ENTRIES)
        self._profile.start()

    def after_step(self, step: int) -> None:
        """`step` has run: end the window and write its files after its last step."""
        if self._profile is not None and step >= self._last:
            self._finish(step)

    def _finish(self, step: int) -> None:
        assert self._profile is not None
        if self._cuda:
            torch.cuda.synchronize()  # the kernels of the last step belong to the window
        self._profile.stop()
        self._directory.mkdir(parents=True, exist_ok=True)
        name = self._directory / f"rank{self._rank}_steps{self._first}-{step}"
        _publish(Path(f"{name}.trace.json.gz"), self._profile.export_chrome_trace)
        averages = self._profile.key_averages()
        order = "self_cuda_time_total" if self._cuda else "self_cpu_time_total"
        Path(f"{name}.txt").write_text(averages.table(sort_by=order, row_limit=TABLE_ROWS), encoding="utf-8")
        if self._cuda and self._settings.memory:
            _publish(Path(f"{name}.memory.pickle"), torch.cuda.memory._dump_snapshot)
            torch.cuda.memory._record_memory_history(enabled=None)
        self._profile = None
        logger.info("profile of steps %d to %d: %s.trace.json.gz", self._first, step, os.path.relpath(name))

    def close(self, step: int) -> None:
        """End an open window at the end of the run, and give the signal back."""
        if self._profile is not None:
            self._finish(step)
        signal.signal(signal.SIGUSR2, self._previous)


def _publish(path: Path, write: Callable[[str], object]) -> None:
    """Let `write` make a file under another name first: viewers watch the directory while we write."""
    part = path.with_name(f".{path.name}")
    write(str(part))
    os.replace(part, path)
