"""Runs one command on a host for a launcher elsewhere, and ends it, with all it started, when that is gone.

`python host_agent.py COMMAND...`, started through ssh. Standard input is the tie to the launcher: it says
nothing there, but the end of the input means that it, or the connection, is no more. sshd does not end what
it started when a connection breaks, so without this a lost launcher would leave GPUs taken.

The file stands for itself, so that a host needs no more than Python, psutil and this checkout.
"""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from types import FrameType

import psutil

# torchrun gives its own processes 30 s from SIGTERM to SIGKILL, in which a run saves its checkpoint.
SECONDS_TO_STOP = 45.0


def main(command: Sequence[str]) -> int:
    """Run `command` to its end, or until the launcher is gone; the exit code is the command's."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    gone = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        gone.set()

    def watch() -> None:
        while os.read(0, 1):
            pass
        gone.set()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, on_signal)
    threading.Thread(target=watch, daemon=True).start()
    while process.poll() is None and not gone.wait(0.1):
        pass
    if gone.is_set():
        _stop(process)
    code = process.wait()
    return 128 - code if code < 0 else code


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """SIGTERM, time to save, SIGKILL for what is left of the whole tree."""
    try:
        # Taken down first: the children of a process that is gone cannot be found any more.
        tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    process.terminate()
    _, alive = psutil.wait_procs(tree, timeout=SECONDS_TO_STOP)
    for one in alive:
        one.kill()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
