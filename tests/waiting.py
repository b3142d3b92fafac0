"""Waiting for other processes: for what is so in the end, however slow the machine is."""

import time
from collections.abc import Callable
from pathlib import Path

LONGEST_SECONDS = 600.0  # bounds a hang: on a busy machine all takes long


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + LONGEST_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.02)


def content_of(file: Path) -> str:
    """What another process writes there in one piece, once it has."""
    until(lambda: file.exists() and file.read_text())
    return file.read_text()


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not waited for does not. Linux only."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # gone before the file is opened, or read
        return False
