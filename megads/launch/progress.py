"""What a run has saved: whether a job that ended got ahead, and where another try goes on.

Progress is a checkpoint that was not there before, whatever its step: a run that went back after a spike
saves an earlier one. Times of commits are only compared for equality, so clocks that differ do no harm.
"""

import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

_NAME = re.compile(r"step_(\d{8,})(?:-(\d+))?")


class Saved(NamedTuple):
    """A committed checkpoint; the greatest is the one that a run goes on from."""

    stage: int
    step: int
    generation: int
    committed_ns: int


def saved_checkpoints(directories: Sequence[Path]) -> frozenset[Saved]:
    """Those committed in the directories, one for each stage in order; not verified."""
    found = set()
    for stage, directory in enumerate(directories):
        for manifest in directory.glob("step_*/COMMIT.json"):
            # A job that runs on another machine may be deleting it.
            with suppress(FileNotFoundError):
                if match := _NAME.fullmatch(manifest.parent.name):
                    number, time = int(match[2] or 1), manifest.stat().st_mtime_ns
                    found.add(Saved(stage, int(match[1]), number, time))
    return frozenset(found)
