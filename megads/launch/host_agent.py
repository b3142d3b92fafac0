"""Runs one command on a host for a launcher elsewhere, and ends it, with all it started, when that is gone.

`python host_agent.py COMMAND...`, started through ssh. Standard input is the tie to the launcher: it says
nothing there, but the end of the input means that it, or the connection, is no more. sshd does not end what
it started when a connection breaks, so without this a lost launcher would leave GPUs taken.

The file stands for itself, so that a host needs no more than Python, psutil and this checkout.
"""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from types import FrameType

import psutil

# torchrun gives its own processes 30 s from SIGTERM to SIGKILL, in which a run saves its checkpoint.
SECONDS_TO_STOP = 45.0
_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


def main(command: Sequence[str]) -> int:
    """Run `command` to its end, or until the launcher is gone; the exit code is the command's."""
    if sys.platform == "linux":  # what its children leave behind is found among its own
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    gone = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        gone.set()

    def watch() -> None:
        while os.read(0, 1):
            pass
        gone.set()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, on_signal)
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    threading.Thread(target=watch, daemon=True).start()
    while process.poll() is None and not gone.wait(0.1):
        pass
    if gone.is_set():
        _stop(process)
    code = process.wait()
    return 128 - code if code < 0 else code


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """SIGTERM, time to save, SIGKILL for what is left of all that it started."""
    deadline = time.monotonic() + SECONDS_TO_STOP
    # Taken down before too: without a subreaper the children of a process that is gone are not found.
    known = psutil.Process().children(recursive=True)
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(SECONDS_TO_STOP)
    left = {*known, *psutil.Process().children(recursive=True)}
    if process.returncode is not None:
        _signal(left, signal.SIGTERM)  # it may have ended before it could pass it on
    _, alive = psutil.wait_procs(left, timeout=max(0.0, deadline - time.monotonic()))
    _signal(alive, signal.SIGKILL)


def _signal(processes: Iterable[psutil.Process], number: int) -> None:
    for one in processes:
        with suppress(psutil.NoSuchProcess):
            one.send_signal(number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
