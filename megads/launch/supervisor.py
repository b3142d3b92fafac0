"""Runs a command, and starts it again from its newest checkpoint until it is finished.

Nothing that the command started outlives it: processes whose parent died are inherited by the supervisor
(`PR_SET_CHILD_SUBREAPER` of Linux; torchrun starts its workers in sessions of their own, so a process group
would miss them), and the command ends when the supervisor does.
"""

import collections
import ctypes
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import IO

import psutil

from megads import errors
from megads.config.flags import parse_flags
from megads.config.resolve import checkpoint_directory
from megads.config.schema import Preemption
from megads.config.stages import load_stages
from megads.errors import (
    BudgetReached,
    ConfigError,
    DataError,
    EnvironmentSetupError,
    MegadsError,
    RunStopped,
    TrainingError,
)
from megads.launch.local_ranks import end_with
from megads.launch.options import parse_options
from megads.launch.progress import saved_checkpoints

logger = logging.getLogger(__name__)

SCRIPTS = ("pretrain_megads.py", "run_training.py")
# What the same start would only end with again.
FINAL = (ConfigError, DataError, EnvironmentSetupError, BudgetReached)
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
TAIL_LINES, SHOWN_LINES = 500, 30  # torchrun writes a long report after the error itself
SECONDS_FOR_ORPHANS = 10.0
_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
KINDS: dict[str, type[MegadsError]] = {
    name: kind
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, MegadsError) and kind is not MegadsError
}
# As pretrain_megads.py prints it, after the name of a host where there are several.
_ERROR = re.compile(rf"(?:\S+: )?(?:rank \d+: )?({'|'.join(KINDS)}): ")


@dataclass(frozen=True)
class Policy:
    """How often and how soon to start again. `stop_seconds`: from a signal to the end by force."""

    tries_without_progress: int = 3
    backoff_seconds: float = 10.0
    longest_backoff_seconds: float = 300.0
    stop_seconds: float = 600.0

    def backoff(self, without_progress: int) -> float:
        """Before the next try: twice as long after each that came no further."""
        doubled = self.backoff_seconds * 2.0 ** max(0, min(without_progress, 32) - 1)
        return min(doubled, self.longest_backoff_seconds)


@dataclass(frozen=True)
class Run:
    """A supervised command: where its checkpoints are, and what to add once there are new ones."""

    directories: tuple[Path, ...]
    again: tuple[str, ...] = ()
    preemption: Preemption = field(default_factory=Preemption)


def describe_run(command: Sequence[str], directories: Sequence[Path] = ()) -> Run:
    """From a command of pretrain_megads.py or run_training.py; others must say where their checkpoints are.

    Raises ConfigError, also for what the script itself would refuse.
    """
    at = next((n for n, word in enumerate(command) if os.path.basename(word) in SCRIPTS), None)
    if at is None:
        if not directories:
            raise ConfigError(
                f"the command has none of {', '.join(SCRIPTS)} in it: give --checkpoints DIRECTORY, where "
                "its checkpoints are"
            )
        return Run(tuple(directories))
    arguments: Sequence[str] = command[at + 1 :]
    # What the user named was where the first try started; later ones go on from what has come since.
    again: tuple[str, ...] = ("--checkpointing.load=latest",)
    if os.path.basename(command[at]) == "run_training.py":
        options = parse_options(arguments)
        if options.submit or options.script:
            raise ConfigError("a SLURM job starts again by itself: leave supervise.py out")
        arguments, again = options.arguments, ("--resume", "latest")
    given = parse_flags(arguments)
    stages = load_stages(given.config, given.overrides, given.origins)
    own = tuple(Path(checkpoint_directory(stage.config)) for stage in stages)
    return Run(tuple(directories) or own, again, stages[0].config.checkpointing.preemption)


@dataclass(frozen=True)
class Ended:
    """How a try ended: its exit code, and the last lines that it wrote to standard error."""

    code: int
    tail: tuple[str, ...]

    @property
    def error(self) -> type[MegadsError] | None:
        """The error of ours that ended it; a launcher like torchrun has a code of its own for all of them."""
        if (line := self.error_line) is not None and (match := _ERROR.match(line)):
            return KINDS[match[1]]
        return next((kind for kind in KINDS.values() if kind.exit_code == self.code), None)

    @property
    def error_line(self) -> str | None:
        """The line in which that was said."""
        return next((line for line in reversed(self.tail) if _ERROR.match(line)), None)


class Supervisor:
    """Supervises one command. `leaving`: whether this machine is about to be taken away."""

    def __init__(
        self, command: Sequence[str], run: Run, policy: Policy, leaving: Callable[[], bool] | None = None
    ) -> None:
        self._command, self._run, self._policy, self._leaving = list(command), run, policy, leaving
        self._signals: list[int] = []
        self._wake = threading.Event()

    def supervise(self) -> int:
        """The exit code: 0 finished, 75 stopped, or a mistake's. Raises TrainingError when it gives up."""
        _become_subreaper()
        before = first = saved_checkpoints(self._run.directories)
        without_progress, tries = 0, 0
        with self._handlers():
            while True:
                tries += 1
                command = self._command + (list(self._run.again) if before - first else [])
                logger.info("try %d: %s", tries, " ".join(command))
                ended = self._one_try(command)
                if ended.code == 0:
                    logger.info("finished after %d tries", tries)
                    return 0
                after = saved_checkpoints(self._run.directories)
                without_progress = 0 if after - before else without_progress + 1
                before = after
                if (code := self._last_code(ended)) is not None:
                    return code
                if without_progress >= self._policy.tries_without_progress:
                    raise TrainingError(_gave_up(ended, without_progress))
                pause = self._policy.backoff(without_progress)
                where = f"step {max(after).step}" if after else "the start"
                logger.warning("%s; again in %.0f s from %s", _how(ended), pause, where)
                if self._wake.wait(pause):
                    return self._stopped(ended)

    def _last_code(self, ended: Ended) -> int | None:
        """The exit code where another try is not to be made."""
        if self._signals:
            return self._stopped(ended)
        if ended.error is not None and issubclass(ended.error, FINAL):
            logger.error("%s: %s is not mended by another try", _how(ended), ended.error.__name__)
            return ended.error.exit_code
        if ended.error is RunStopped and self._leaving is not None and self._says_leaving():
            logger.info("stopped with a checkpoint: this machine is about to be taken away")
            return RunStopped.exit_code
        return None

    def _says_leaving(self) -> bool:
        assert self._leaving is not None
        try:
            return self._leaving()
        except (OSError, subprocess.SubprocessError) as error:
            logger.warning("preemption notices cannot be asked for: %s", error)
            return False

    def _stopped(self, ended: Ended) -> int:
        name = signal.Signals(self._signals[0]).name
        if ended.error is not None and issubclass(ended.error, RunStopped):
            logger.info("%s: the run has saved and stopped", name)
            return RunStopped.exit_code
        logger.warning("%s: stopped, %s", name, _how(ended))
        return 128 + self._signals[0]

    # ------------------------------------------------------------------ one try

    def _one_try(self, command: Sequence[str]) -> Ended:
        try:
            process = subprocess.Popen(
                command,
                stderr=subprocess.PIPE,
                start_new_session=True,
                preexec_fn=partial(_end_with, os.getpid()),
            )
        except OSError as error:
            raise EnvironmentSetupError(f"{command[0]} cannot be started: {error}") from error
        tail: collections.deque[str] = collections.deque(maxlen=TAIL_LINES)
        reader = threading.Thread(target=_pass_on, args=(process.stderr, tail), daemon=True)
        reader.start()
        told, deadline = 0, float("inf")
        try:
            while process.poll() is None:
                time.sleep(0.1)
                if told < len(self._signals):
                    _tell(process, self._signals[told])
                    # A second one is of somebody who does not want to wait.
                    deadline = time.monotonic() + (self._policy.stop_seconds if told == 0 else 0.0)
                    told += 1
                if time.monotonic() > deadline:
                    logger.warning("it does not stop: ending it by force")
                    process.kill()
                    deadline = float("inf")
        finally:
            _end_descendants()
        reader.join(timeout=5)
        code = process.returncode
        return Ended(code if code >= 0 else 128 - code, tuple(tail))

    @contextmanager
    def _handlers(self) -> Iterator[None]:
        def remember(number: int, frame: FrameType | None) -> None:
            self._signals.append(number)
            self._wake.set()

        previous = {number: signal.signal(number, remember) for number in PASSED_ON}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def _tell(process: "subprocess.Popen[bytes]", number: int) -> None:
    """Pass a signal on. SIGUSR1 goes to those who handle it: it would end a launcher like torchrun."""
    logger.info("%s is passed on", signal.Signals(number).name)
    if number != signal.SIGUSR1:
        process.send_signal(number)
        return
    handlers = [one for one in psutil.Process().children(recursive=True) if _catches(one.pid, number)]
    for one in handlers:
        os.kill(one.pid, number)
    if not handlers:
        process.terminate()


def _catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal; proc(5), SigCgt."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return False
    found = re.search(r"^SigCgt:\s*([0-9a-f]+)$", status, re.MULTILINE)
    return found is not None and bool(int(found[1], 16) >> (number - 1) & 1)


def _pass_on(stream: IO[bytes], tail: "collections.deque[str]") -> None:
    for line in stream:
        sys.stderr.buffer.write(line)
        sys.stderr.buffer.flush()
        tail.append(line.decode(errors="replace").rstrip())


def _how(ended: Ended) -> str:
    if ended.error is RunStopped:
        return "stopped before its end"
    if ended.code > 128 and ended.code - 128 in signal.valid_signals():
        return f"ended by {signal.Signals(ended.code - 128).name}"
    return f"failed with exit code {ended.code}"


def _gave_up(ended: Ended, tries: int) -> str:
    shown = ended.tail[-SHOWN_LINES:]
    if ended.error_line is not None and ended.error_line not in shown:
        shown = (ended.error_line, "...", *shown)
    lines = "\n".join(f"    {line}" for line in shown) or "    (nothing on standard error)"
    return (
        f"given up: {tries} tries in a row saved no checkpoint; the last one {_how(ended)}. Mend what "
        f"it says, or let it save more often (training.save_interval). Its last lines:\n{lines}"
    )


def _end_descendants() -> None:
    """End whatever the command left behind: SIGTERM, then SIGKILL."""
    left = psutil.Process().children(recursive=True)
    for one in left:
        logger.warning("left behind, ended: %d", one.pid)
        _signal(one, signal.SIGTERM)
    _, alive = psutil.wait_procs(left, timeout=SECONDS_FOR_ORPHANS)
    for one in alive:
        _signal(one, signal.SIGKILL)
    psutil.wait_procs(alive, timeout=SECONDS_FOR_ORPHANS)


def _signal(process: psutil.Process, number: int) -> None:
    with suppress(psutil.NoSuchProcess):
        process.send_signal(number)


def _become_subreaper() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _end_with(supervisor: int) -> None:
    """In the child, before it runs the command: have it ended when the supervisor is killed."""
    # Until then the supervisor's own handler is there, and would swallow the signal.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end_with(supervisor)
