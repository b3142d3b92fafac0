"""The whole way in a few minutes: corpus, tokenizer, datasets, training, and a resume in another layout.

Runs on two CPU processes, or on the GPUs of this machine (a power of two of them, 8 at most). Data goes to
data/sample, where `configs/debug.json` finds it too, the run to outputs/demo, replacing the demo's earlier
one. Exits with 1 when the model did not learn or the resume was not the same run going on.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

ROOT = Path(__file__).resolve().parent.parent
CONFIG = Path("configs/demo.json")
DATA, OUTPUT = Path("data/sample"), Path("outputs/demo")
CORPUS_MB, VOCAB_SIZE = 12, 4096
STOP_STEP = 100
BATCH_SEQUENCES = 8
LEAST_FALL_NATS = 1.5
"""How much the training loss must fall; a run that learns falls by more than twice that."""
SHOWN = re.compile(r" (WARNING|ERROR) |\| (loss|validation loss) |resumed after step|^\w*Error: ")

Record = dict[str, Any]


class DemoFailed(Exception):
    """A stage failed, or what it made is not what it should be."""


@dataclass(frozen=True)
class Plan:
    """Which processes train, in which two layouts."""

    processes: int
    hardware: str
    first: tuple[str, ...]
    first_text: str
    second: tuple[str, ...]
    second_text: str


def plan_for(gpus: int) -> Plan:
    """Two layouts for `gpus` GPUs; 0: two processes on the CPU."""
    if gpus == 1:
        same = "one process; one GPU knows no other layout"
        return Plan(1, "1 GPU", (), "one process", (), same)
    processes = 2 if gpus == 0 else min(8, 1 << (gpus.bit_length() - 1))
    micro_batch = BATCH_SEQUENCES // processes
    return Plan(
        processes,
        "2 CPU processes" if gpus == 0 else f"{processes} GPUs",
        ("--micro-batch-size", str(micro_batch), "--expert-model-parallel-size", str(processes)),
        f"EP{processes} x DP{processes}: the experts spread over the processes",
        ("--micro-batch-size", str(2 * micro_batch), "--tensor-model-parallel-size", "2"),
        "TP2 with sequence parallelism: every matrix split in two",
    )


def count_gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


class Demo:
    """The stages, each announced by a line that says when it began and what it shows."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.begun = time.monotonic()

    def announce(self, text: str) -> None:
        seconds = int(time.monotonic() - self.begun)
        print(f"\n[{seconds // 60}:{seconds % 60:02d}] {text}", flush=True)

    def run(self) -> None:
        self.prepare_data()
        shutil.rmtree(OUTPUT, ignore_errors=True)
        plan, stop = self.plan, ("--training.exit_step", str(STOP_STEP))
        self.announce(f"Pre-training: MLA, MoE (8 experts, top 2), MTP on {plan.hardware}, {plan.first_text}")
        self.train((*plan.first, *stop))
        self.announce(f"Stopped at step {STOP_STEP}. Resuming from its checkpoint: {plan.second_text}")
        self.train(plan.second)
        records = read_metrics(OUTPUT / "metrics.jsonl")
        problems = judge(records)
        self.announce("What happened")
        if not problems:
            print_summary(records)
        if problems:
            raise DemoFailed("the run is not what it should be:\n" + "\n".join(f"  {p}" for p in problems))

    def prepare_data(self) -> None:
        self.announce(
            f"Data: {CORPUS_MB} MB of real text in 6 domains, from what this machine has installed; a "
            f"sentencepiece BPE tokenizer with {VOCAB_SIZE:,} pieces; an indexed dataset per domain"
        )
        tool = ("tools/make_sample_data.py", "--output", str(DATA), "--overwrite")
        size = ("--mb", str(CORPUS_MB), "--vocab-size", str(VOCAB_SIZE))
        if code := subprocess.run([sys.executable, *tool, *size], check=False).returncode:
            raise DemoFailed(f"tools/make_sample_data.py ended with exit code {code}")

    def train(self, flags: Sequence[str]) -> None:
        """One torchrun; its step lines are shown, everything goes to a log."""
        script = ["pretrain_megads.py", "--config", str(CONFIG), *flags]
        print(f"$ torchrun --nproc-per-node {self.plan.processes} {' '.join(script)}", flush=True)
        threads = max(1, (os.cpu_count() or 1) // self.plan.processes)
        log = OUTPUT / "demo.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(self.plan.processes), *script]
        with (
            log.open("a", encoding="utf-8") as file,
            subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"},
            ) as process,
        ):
            assert process.stdout is not None
            for line in process.stdout:
                file.write(line)
                if SHOWN.search(line):
                    print(re.sub(r"^\d{4}-\d\d-\d\d | INFO   ", "", line), end="", flush=True)
        if process.returncode:
            tail = "".join(log.read_text(encoding="utf-8").splitlines(keepends=True)[-30:])
            raise DemoFailed(f"training ended with exit code {process.returncode}; the end of {log}:\n{tail}")


# ------------------------------------------------------------------ what the run shows


def read_metrics(path: Path) -> list[Record]:
    if not path.is_file():
        raise DemoFailed(f"{path} was not written")
    return [orjson.loads(line) for line in path.read_bytes().splitlines()]


def of_kind(records: Sequence[Record], kind: str) -> list[Record]:
    return [record for record in records if record["kind"] == kind]


def judge(records: Sequence[Record], stop_step: int = STOP_STEP) -> list[str]:
    """What is wrong with a run that was stopped at `stop_step` and resumed; empty when nothing is."""
    runs, train, validation = (of_kind(records, kind) for kind in ("run", "train", "validation"))
    if [run["step"] for run in runs] != [0, stop_step]:
        return [f"it began at steps {[run['step'] for run in runs]}, not at 0 and, resumed, at {stop_step}"]
    problems = []
    done = [record["step"] - record["interval_steps"] for record in train]
    if done != [0, *(record["step"] for record in train[:-1])]:
        problems.append("its log intervals have gaps or overlap: some steps were left out or done twice")
    if not train or train[-1]["step"] != runs[-1]["train_steps"]:
        problems.append(f"it did not reach its last step, {runs[-1]['train_steps']}")
    if len(validation) < 2 or validation[-1]["step"] <= stop_step:
        problems.append("it was not evaluated before the stop and at the end")
    if problems:
        return problems
    start, end = train[0]["lm_loss"], train[-1]["lm_loss"]
    before = next(record for record in train if record["step"] == stop_step)
    after = next(record for record in train if record["step"] > stop_step)
    if not end < start - LEAST_FALL_NATS:
        problems.append(f"the training loss fell from {start:.3f} to {end:.3f} only")
    # A model that had lost its weights or its optimizer's state would stand out by far more.
    if not abs(after["lm_loss"] - before["lm_loss"]) < 0.1 * before["lm_loss"]:
        problems.append(f"the resume jumped from loss {before['lm_loss']:.3f} to {after['lm_loss']:.3f}")
    if not validation[-1]["loss"] < validation[0]["loss"]:
        problems.append("the validation loss did not fall")
    worst = max(record["max_vio"] for record in train)
    if not train[-1]["max_vio"] < worst / 2:
        problems.append(
            f"balance did not improve: MaxVio {worst:.2f} at worst, {train[-1]['max_vio']:.2f} now"
        )
    return problems


def print_summary(records: Sequence[Record]) -> None:
    import math

    from rich.console import Console
    from rich.table import Table

    runs, train, validation = (of_kind(records, kind) for kind in ("run", "train", "validation"))
    stop = runs[-1]["step"]
    before = next(record for record in train if record["step"] == stop)
    after = next(record for record in train if record["step"] > stop)
    table = Table(title="training: mean of a log interval")
    for heading in ("", "step", "loss", "MTP loss", "MaxVio", "tokens/s"):
        table.add_column(heading, justify="left" if not heading else "right")
    table.add_row(
        "knowing nothing: ln(vocabulary)", "0", f"{math.log(runs[0]['vocab_size']):.3f}", "", "", ""
    )
    points = (("start", train[0]), (f"before the stop ({runs[0]['layout']})", before))
    for name, record in (*points, (f"resumed ({runs[-1]['layout']})", after), ("end", train[-1])):
        table.add_row(
            name, str(record["step"]), f"{record['lm_loss']:.3f}", f"{record['mtp_loss']:.3f}",
            f"{record['max_vio']:.2f}", f"{record['tokens_per_second']:,.0f}",
        )  # fmt: skip
    perplexities = Table(title="validation perplexity")
    perplexities.add_column("source")
    perplexities.add_column("knowing nothing", justify="right")
    for record in validation:
        perplexities.add_column(f"step {record['step']}", justify="right")
    for name in ["", *(key for key in validation[-1] if key.startswith("loss/"))]:
        values = [math.exp(record[name or "loss"]) for record in validation]
        perplexities.add_row(
            name.removeprefix("loss/") or "all", f"{runs[0]['vocab_size']:,}", *(f"{v:,.1f}" for v in values)
        )
    console = Console() if sys.stdout.isatty() else Console(width=100)
    console.print(table, perplexities)
    print("MaxVio: load of the busiest expert over the mean, minus 1; 0 is perfect balance.")


def print_ways_on(plan: Plan, seconds: float) -> None:
    checkpoints = sorted((OUTPUT / "checkpoints").glob("step_*"))
    print(f"""
loss curve    {OUTPUT / "loss_curve.png"}
checkpoint    {checkpoints[-1] if checkpoints else "none"}
all numbers   {OUTPUT / "metrics.jsonl"}
TensorBoard   {Path(sys.executable).parent / "tensorboard"} --logdir {OUTPUT / "tensorboard"}
try next      .venv/bin/torchrun --nproc-per-node {plan.processes} pretrain_megads.py \\
                --config {CONFIG} --output_dir outputs/longer --train-iters 1000
              (or first, to see what that is: .venv/bin/python pretrain_megads.py --config {CONFIG} --dry-run)
done in {int(seconds) // 60}:{int(seconds) % 60:02d}""")


def main(arguments: list[str] | None = None) -> int:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args(arguments)
    os.chdir(ROOT)
    demo = Demo(plan_for(count_gpus()))
    try:
        demo.run()
    except DemoFailed as failure:
        print(f"\nthe demo failed: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    print_ways_on(demo.plan, time.monotonic() - demo.begun)
    return 0


if __name__ == "__main__":
    sys.exit(main())
