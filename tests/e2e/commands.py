"""Command lines as a user types them, in a process of their own, on the CPU."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from tests.waiting import LONGEST_SECONDS

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    # A terminal width that does not depend on where the tests run.
    "COLUMNS": "120",
    "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
}
Finished = subprocess.CompletedProcess[str]


def run(
    command: Sequence[object], *, cwd: Path = ROOT, environment: Mapping[str, str] | None = None
) -> Finished:
    """Runs to the end; both outputs as text."""
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=os.environ | ENVIRONMENT | (environment or {}),
        capture_output=True,
        text=True,
        timeout=LONGEST_SECONDS,
        check=False,
    )


def pretrain_command(*flags: object, processes: int = 1) -> list[str]:
    """`pretrain_megads.py` by itself, or under torchrun on a port of its own."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [*launcher, "pretrain_megads.py", *map(str, flags)]


def pretrain(*flags: object, processes: int = 1) -> Finished:
    return run(pretrain_command(*flags, processes=processes))


def pretrain_well(*flags: object, processes: int = 1) -> Finished:
    """Runs and must succeed."""
    done = pretrain(*flags, processes=processes)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def tool(name: str, *arguments: object) -> Finished:
    return run([sys.executable, ROOT / "tools" / name, *arguments])


def write_json(path: Path, content: Mapping[str, Any]) -> Path:
    """At once: a run may be about to read it."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(content), encoding="utf-8")
    return part.replace(path)


def records(output: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """What a run wrote into `metrics.jsonl`."""
    every = [orjson.loads(line) for line in (output / "metrics.jsonl").read_bytes().splitlines()]
    return [record for record in every if kind in (None, record["kind"])]


def steps(output: Path) -> list[int]:
    return [record["step"] for record in records(output, "train")]
