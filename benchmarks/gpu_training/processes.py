"""Processes with a time limit, whose failures are results and not exceptions."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from gpu_training.variant import Job

ROOT = Path(__file__).resolve().parents[2]
SHOWN_LINES, SHOWN_CHARACTERS = 3, 300


class Ended(NamedTuple):
    """`said` is everything that it wrote; `code` is None where it ran into its limit."""

    code: int | None
    said: str

    @property
    def last_words(self) -> str:
        return " / ".join(self.said.strip().splitlines()[-SHOWN_LINES:])[-SHOWN_CHARACTERS:]


def run_limited(command: list[str], limit_seconds: float, log: Path) -> Ended:
    """Run `command` in the repository and append what it says to `log`; nothing of it is left afterwards."""
    paths = [str(ROOT), str(ROOT / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    code: int | None = None
    try:
        said, _ = process.communicate(timeout=limit_seconds)
        code = process.returncode
    except subprocess.TimeoutExpired:
        _kill_group(process)
        said, _ = process.communicate()
    finally:
        _kill_group(process)
    with log.open("a", encoding="utf-8") as file:
        file.write(f"=== {' '.join(command)}\n{said}\n")
    return Ended(code, said)


def _kill_group(process: "subprocess.Popen[str]") -> None:
    """The process and the workers that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def run_variant(job: Job, limit_seconds: float, log: Path) -> dict[str, Any]:
    """The fields of `Measured`, or a `problem`."""
    command = [sys.executable, "-m", "gpu_training.variant", json.dumps(asdict(job))]
    ended = run_limited(command, limit_seconds, log)
    if ended.code is None:
        return {"problem": f"stopped after {limit_seconds:.0f} s"}
    if ended.code != 0 or not ended.said.strip():
        return {"problem": f"exit code {ended.code}: {ended.last_words}"}
    return dict(json.loads(ended.said.strip().splitlines()[-1]))
