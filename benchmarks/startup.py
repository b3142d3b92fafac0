"""From the command to the first training step: how long it takes, and what the time goes into.

    python benchmarks/startup.py [--processes 2] [--repeats 5] [--compare CHECKOUT] [--json FILE]

Starts a configuration as its users do, through torchrun and through tools/run_training.py, and reads the
clock when the lines of its log arrive; after the line of step 1 the run is ended. Beside the wall time the
CPU time of all its processes is read (user + system, from /proc): it depends less on the load of the
machine. For scale, two programs that do nothing: one only imports torch, one is an empty file under torchrun.

`--compare` measures another checkout too, such as a `git worktree` of an earlier commit. Everything takes
turns, so that the noise of the machine hits all; medians are shown, and the least wall time, which comes
nearest to an idle machine. Linux only.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
FIRST_STEP = "first step"
# What has been done when a line that contains the text appears.
MARKS = {
    "configuration (*": "imports, process groups",
    "training data:": "preflight, data",
    "MFU counts": "model, optimizer",
    "step   1/": FIRST_STEP,
}
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Spent:
    """Seconds since the command was given."""

    wall_seconds: float
    cpu_seconds: float


@dataclass(frozen=True)
class Way:
    """A checkout, and the command that starts something in it."""

    name: str
    checkout: Path
    command: list[str]


def ways(arguments: argparse.Namespace, output_dir: str) -> list[Way]:
    """All that takes turns, without the two empty programs."""
    flags = ["--config", arguments.config, "--output_dir", output_dir, "--training.log_interval", "1"]
    processes = str(arguments.processes)
    launchers = {
        "torchrun": [*TORCHRUN, processes, "pretrain_megads.py"],
        "run_training.py": [sys.executable, "tools/run_training.py", "--no-lint", "--gpus", processes],
    }
    checkouts = {"": ROOT}
    if arguments.compare:
        checkouts = {"before: ": arguments.compare.resolve(), "after: ": ROOT}
    return [
        Way(f"{label}{launcher}", checkout, [*command, *flags])
        for launcher, command in launchers.items()
        for label, checkout in checkouts.items()
    ]


def start(way: Way, threads: int) -> "subprocess.Popen[str]":
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(way.checkout)}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    return subprocess.Popen(
        way.command, cwd=way.checkout, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def time_to_first_step(way: Way, threads: int) -> dict[str, Spent]:
    """What had been spent at each of MARKS; raises RuntimeError if the run ends before its first step."""
    began = time.perf_counter()
    process = start(way, threads)
    spent: dict[str, Spent] = {}
    lines: list[str] = []
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        part = next((part for text, part in MARKS.items() if text in line), None)
        if part is None:
            continue
        wall_seconds = time.perf_counter() - began
        tree = cpu_seconds_of_tree(process.pid)
        spent[part] = Spent(wall_seconds, sum(tree.values()))
        if part == FIRST_STEP:
            for pid in tree:  # the launcher first, which then has nothing to say about the others
                os.kill(pid, signal.SIGKILL)
            process.stdout.close()
            break
    process.wait()
    if FIRST_STEP not in spent:
        raise RuntimeError(f"{' '.join(way.command)} in {way.checkout}:\n{''.join(lines[-100:])}")
    return spent


def cpu_seconds_of_tree(root: int) -> dict[int, float]:
    """User and system seconds of a process and all below it, with those of children that have ended."""
    children: dict[int, list[int]] = {}
    seconds: dict[int, float] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = stat.read_text()
        except OSError:
            continue  # it has just ended
        pid, fields = int(stat.parent.name), text[text.rindex(")") + 2 :].split()
        children.setdefault(int(fields[1]), []).append(pid)
        # utime, stime, cutime, cstime of proc(5)
        seconds[pid] = sum(map(int, fields[11:15])) / TICKS_PER_SECOND
    tree = [root]
    for pid in tree:
        tree += children.get(pid, [])
    return {pid: seconds[pid] for pid in tree}


def empty_program(command: list[str], threads: int) -> dict[str, Spent]:
    """What a whole command takes."""
    before, began = os.times(), time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(command, check=True, env=environment, capture_output=True)
    wall_seconds, after = time.perf_counter() - began, os.times()
    cpu_seconds = after.children_user + after.children_system - before.children_user - before.children_system
    return {"the whole": Spent(wall_seconds, cpu_seconds)}


def measure(arguments: argparse.Namespace) -> dict[str, list[dict[str, Spent]]]:
    """Per name of what is measured, its repeats; a first round, which fills the caches, is left out."""
    threads = max(1, len(os.sched_getaffinity(0)) // arguments.processes)
    with tempfile.TemporaryDirectory() as directory:
        nothing = Path(directory) / "nothing.py"
        nothing.write_text("")
        runs: dict[str, Callable[[], dict[str, Spent]]] = {
            "python -c 'import torch'": lambda: empty_program(
                [sys.executable, "-c", "import torch"], threads
            ),
            "torchrun of an empty file": lambda: empty_program(
                [*TORCHRUN, str(arguments.processes), str(nothing)], threads
            ),
        }
        for way in ways(arguments, str(Path(directory) / "run")):
            runs[way.name] = lambda way=way: time_to_first_step(way, threads)  # type: ignore[misc]
        found: dict[str, list[dict[str, Spent]]] = {name: [] for name in runs}
        for repeat in range(arguments.repeats + 1):
            for name, run in runs.items():
                spent = run()
                print(
                    f"round {repeat}: {name}: {list(spent.values())[-1].wall_seconds:.2f} s", file=sys.stderr
                )
                if repeat:
                    found[name].append(spent)
    return found


def medians(repeats: list[dict[str, Spent]]) -> dict[str, Spent]:
    return {
        part: Spent(
            statistics.median(spent[part].wall_seconds for spent in repeats),
            statistics.median(spent[part].cpu_seconds for spent in repeats),
        )
        for part in repeats[0]
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/debug.json", help="default: %(default)s")
    parser.add_argument("--processes", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=5, help="of everything (default: %(default)s)")
    parser.add_argument(
        "--compare", type=Path, help="a checkout of another revision, measured beside this one"
    )
    parser.add_argument("--json", type=Path, help="also write all repeats here")
    arguments = parser.parse_args()
    found = measure(arguments)
    print("seconds since the command was given: wall (CPU of all processes), medians of", arguments.repeats)
    for name, repeats in found.items():
        spent = medians(repeats)
        parts = ", ".join(f"{part} {s.wall_seconds:.2f} ({s.cpu_seconds:.2f})" for part, s in spent.items())
        least = min(list(spent.values())[-1].wall_seconds for spent in repeats)
        print(f"{name}: {parts}; least {least:.2f}")
    if arguments.json:
        record = {
            name: [{part: vars(s) for part, s in spent.items()} for spent in repeats]
            for name, repeats in found.items()
        }
        arguments.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
