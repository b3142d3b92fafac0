"""The processes of a job on one machine, forked from one that has loaded what they need.

In torchrun's place: without its own import of torch, for which its processes wait as long as they then take
to import it themselves; with their exit codes, where torchrun has 1 for all; and what was imported before the
fork is loaded once and in memory once. No rendezvous and no restarts: see `tools/supervise.py`.
"""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType

from megads.ports import free_port

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
# Exit codes that all processes have agreed on (errors.RunStopped and BudgetReached): each ends by itself.
AGREED = (75, 7)
SECONDS_TO_END = 30.0  # from SIGTERM to SIGKILL, as torchrun has it
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def fork_ranks(processes: int, load: Callable[[], None]) -> int | None:
    """Fork the processes of a job after `load`, which imports what they share.

    Returns None in each of them, with torchrun's environment variables. In the launcher, when all have ended,
    the exit code of the first that failed, 128 + N when signal N ended it; 0 if none did.

    `load` must start no threads and leave CUDA alone: neither is there after a fork.
    """
    shared = {
        "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
        "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
    }  # fmt: skip
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
    if processes > 1:
        # Each would take all cores; torchrun's default too. Libraries read it when they are imported.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    load()
    os.environ |= shared | {"MASTER_PORT": str(free_port())}
    ranks = _Ranks()
    return ranks.wait() if ranks.fork(processes) else None


@dataclass
class _Rank:
    """A forked process; `code` as `subprocess` has it, -N when signal N ended it, None while it runs."""

    pid: int
    code: int | None = None

    def poll(self) -> int | None:
        if self.code is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if ended else None
        return self.code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


class _Ranks:
    """The processes; in sessions of their own, so that Ctrl-C reaches the launcher alone."""

    def __init__(self) -> None:
        self._ranks: list[_Rank] = []
        self._cause = ""
        self._signals: list[int] = []

    def fork(self, processes: int) -> bool:
        """Whether this is still the launcher."""
        sys.stdout.flush()
        sys.stderr.flush()
        launcher = os.getpid()
        # Held back until each side has its own handlers, so that none is lost or handled by the wrong one.
        signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
        for rank in range(processes):
            pid = os.fork()
            if not pid:
                os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(rank)
                os.setsid()
                end_with(launcher)
                signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
                return False
            self._ranks.append(_Rank(pid))
        for number in PASSED_ON:
            signal.signal(number, self._remember)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
        return True

    def wait(self) -> int:
        """The exit code of the job, when all have ended."""
        code = 0
        while not code and any(rank.poll() is None for rank in self._ranks):
            code = self._first_failure()
            self._pass_on_signals()
            time.sleep(0.05)
        code = code or self._first_failure()
        if code in AGREED:
            self._wait_for_all(SECONDS_TO_END)
        self._signal_all(signal.SIGTERM)
        self._wait_for_all(SECONDS_TO_END)
        for number, rank in enumerate(self._ranks):
            if rank.poll() is None:
                _say(
                    f"rank {number} does not end: killed. If others timed out, it is the one they waited for"
                )
        self._signal_all(signal.SIGKILL)
        if self._cause and len(self._ranks) > 1:
            # Tracebacks of the others, which lost a peer, stand between this and what was said at once.
            _say(f"the job ended with exit code {code}: {self._cause}")
        return code

    def _first_failure(self) -> int:
        for number, rank in enumerate(self._ranks):
            if code := rank.poll():
                if code < 0:
                    self._cause = f"rank {number} was ended by {signal.Signals(-code).name}"
                    _say(f"{self._cause}; stopping the others")
                elif code == 1:
                    self._cause = f"rank {number} failed first; its traceback is above"
                return code if code > 0 else 128 - code
        return 0

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._signals.append(number)

    def _pass_on_signals(self) -> None:
        while self._signals:
            self._signal_all(self._signals.pop(0))

    def _signal_all(self, number: int) -> None:
        for rank in self._ranks:
            rank.send_signal(number)

    def _wait_for_all(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while any(rank.poll() is None for rank in self._ranks) and time.monotonic() < deadline:
            self._pass_on_signals()
            time.sleep(0.05)


def end_with(launcher: int) -> None:
    """Have SIGTERM sent to this process when the launcher is killed: it would run on unseen."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != launcher:  # killed before
        os.kill(os.getpid(), signal.SIGTERM)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
