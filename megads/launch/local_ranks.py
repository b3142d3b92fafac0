"""Runs a script as the processes of a job on this machine, with torchrun's environment variables.

`python local_ranks.py PROCESSES SCRIPT ARGUMENTS...`, in torchrun's place where there is one machine: without
its own import of torch, for which the processes wait as long as they then take to import it themselves; and
with their exit codes, where torchrun has 1 for all. No rendezvous and no restarts: see `tools/supervise.py`.

The file stands for itself: it starts in hundredths of a second, and nothing else is held in memory.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
# Exit codes that all processes have agreed on (errors.RunStopped and BudgetReached): each ends by itself.
AGREED = (75, 7)
SECONDS_TO_END = 30.0  # from SIGTERM to SIGKILL, as torchrun has it
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Ranks:
    """The processes of the job; in sessions of their own, so that Ctrl-C reaches this process alone."""

    def __init__(self, processes: int, command: Sequence[str]) -> None:
        self._signals: list[int] = []
        for number in PASSED_ON:
            signal.signal(number, self._remember)
        shared = {
            **os.environ, "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
            "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
        }  # fmt: skip
        shared.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
        if processes > 1:
            # Each would take all cores; torchrun's default too.
            shared.setdefault("OMP_NUM_THREADS", "1")
        prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
        self._processes = [
            subprocess.Popen(
                command,
                env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                start_new_session=True,
                # Were this process killed, they would run on unseen.
                preexec_fn=prctl and (lambda: prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)),
            )
            for rank in range(processes)
        ]

    def wait(self) -> int:
        """The exit code of the first process that failed, when all have ended; 0 if none did.

        128 + N when signal N ended it.
        """
        code = 0
        while not code and any(process.poll() is None for process in self._processes):
            code = self._first_failure()
            self._pass_on_signals()
            time.sleep(0.05)
        code = code or self._first_failure()
        if code in AGREED:
            self._wait_for_all(SECONDS_TO_END)
        self._signal_all(signal.SIGTERM)
        self._wait_for_all(SECONDS_TO_END)
        self._signal_all(signal.SIGKILL)
        return code

    def _first_failure(self) -> int:
        for rank, process in enumerate(self._processes):
            if code := process.poll():
                if code < 0:
                    name = signal.Signals(-code).name
                    print(
                        f"rank {rank} was ended by {name}; stopping the others", file=sys.stderr, flush=True
                    )
                return code if code > 0 else 128 - code
        return 0

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._signals.append(number)

    def _pass_on_signals(self) -> None:
        while self._signals:
            self._signal_all(self._signals.pop(0))

    def _signal_all(self, number: int) -> None:
        for process in self._processes:
            process.send_signal(number)  # not to one that has ended

    def _wait_for_all(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while any(process.poll() is None for process in self._processes) and time.monotonic() < deadline:
            self._pass_on_signals()
            time.sleep(0.05)


def free_port() -> int:
    """A port where rank 0 can open the store of the job."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    sys.exit(Ranks(int(sys.argv[1]), [sys.executable, *sys.argv[2:]]).wait())
