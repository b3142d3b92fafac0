"""Short runs of the tests' tiny model in processes of their own, on the CPU or on one GPU.

A process takes Megatron-Core with CUDA or with the CPU substitutions, never both.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def losses_of(
    device: str,
    steps: range,
    settings: dict[str, Any],
    *,
    load_from: Path | None = None,
    save_to: Path | None = None,
) -> list[float]:
    """The loss of each step; from a checkpoint, and with one after the last, where directories are given.

    Losses come back bit by bit.
    """
    job = {
        "settings": settings | {"distributed.device": device},
        "steps": [steps.start, steps.stop],
        "load_from": load_from and str(load_from),
        "save_to": save_to and str(save_to),
    }
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    done = subprocess.run(
        [sys.executable, "-m", __name__, json.dumps(job)],
        cwd=ROOT,
        env=os.environ | hidden,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    losses: list[float] = json.loads(done.stdout.splitlines()[-1])
    return losses


def _run(job: dict[str, Any]) -> list[float]:
    from tests.dist import tiny
    from tests.dist.test_resume import load, save

    step = tiny.start(job["settings"])
    first, end = job["steps"]
    if job["load_from"]:
        load(step, Path(job["load_from"]), generators=False)
    losses = [record["losses"][0] for record in tiny.train(step, first, end - first)]
    if job["save_to"]:
        save(step, Path(job["save_to"]), end)
    return losses


if __name__ == "__main__":
    print(json.dumps(_run(json.loads(sys.argv[1]))))
