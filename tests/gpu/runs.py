"""Short runs of the tests' tiny model in processes of their own, on the CPU or on GPUs.

A process takes Megatron-Core with CUDA or with the CPU substitutions, never both.
"""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
RESULT = "result: "


class Kernel(NamedTuple):
    """What a GPU did on a stream, in microseconds of its clock."""

    name: str
    stream: int
    start: float
    end: float

    def runs_beside(self, other: "Kernel") -> bool:
        return self.stream != other.stream and self.start < other.end and other.start < self.end


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
    losses: list[float] = _result([sys.executable], job, hidden)["losses"]
    return losses


def run_on_gpus(
    count: int, steps: int, settings: dict[str, Any], environment: dict[str, str] | None = None
) -> tuple[list[float], list[Kernel]]:
    """The loss of each step on `count` GPUs, and the kernels of the last step on the first of them."""
    job = {"settings": settings | {"distributed.device": "cuda"}, "steps": [0, steps], "profiled": True}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    result = _result(launcher, job, environment or {})
    return result["losses"], [Kernel(*kernel) for kernel in result["kernels"]]


def losses_and_replays(steps: range, settings: dict[str, Any]) -> tuple[list[float], int]:
    """The loss of each step on one GPU, and how often a CUDA graph was replayed."""
    job = {"settings": settings | {"distributed.device": "cuda"}, "steps": [steps.start, steps.stop]}
    result = _result([sys.executable], job, {})
    return result["losses"], result["replays"]


def _result(launcher: list[str], job: dict[str, Any], environment: dict[str, str]) -> dict[str, Any]:
    done = subprocess.run(
        [*launcher, "-m", __name__, json.dumps(job)],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    # Not the last line: what libraries print in C comes when the process ends.
    (line,) = (line for line in done.stdout.splitlines() if line.startswith(RESULT))
    result: dict[str, Any] = json.loads(line.removeprefix(RESULT))
    return result


def _run(job: dict[str, Any]) -> dict[str, Any]:
    from tests.dist import tiny
    from tests.dist.test_resume import load, save

    replays = _count_replays()
    step = tiny.start(job["settings"])
    first, end = job["steps"]
    if job.get("load_from"):
        load(step, Path(job["load_from"]), generators=False)
    records, kernels = [], []
    for index in range(first, end):
        if job.get("profiled") and index == end - 1:
            record, kernels = _profiled(lambda index=index: tiny.train(step, index, 1))  # type: ignore[misc]
        else:
            record = tiny.train(step, index, 1)
        records += record
    if job.get("save_to"):
        save(step, Path(job["save_to"]), end)
    losses = [record["losses"][0] for record in records]
    return {"losses": losses, "kernels": kernels, "replays": next(replays)}


def _count_replays() -> Iterator[int]:
    """Counts replays of CUDA graphs from now on; the next number is how many there were."""
    import torch

    counter, replay = itertools.count(), torch.cuda.CUDAGraph.replay

    def counted(graph: torch.cuda.CUDAGraph) -> None:
        next(counter)
        replay(graph)

    torch.cuda.CUDAGraph.replay = counted  # type: ignore[method-assign]
    return counter


def _profiled(function: Callable[[], Any]) -> tuple[Any, list[Kernel]]:
    import torch

    with torch.profiler.profile() as profile:
        value = function()
        torch.cuda.synchronize()
    return value, [
        Kernel(event.name, event.device_resource_id, event.time_range.start, event.time_range.end)
        for event in profile.events() or ()
        if event.device_type.name == "CUDA" and not event.is_user_annotation
    ]


if __name__ == "__main__":
    result = _run(json.loads(sys.argv[1]))
    if os.environ.get("RANK", "0") == "0":
        print(RESULT + json.dumps(result), flush=True)
