"""Training speed on one GPU: MegaDS against Megatron-Core's own modules and transformers, in one run.

    python benchmarks/train_gpu.py [--shape v3] [--precision bf16 fp8] [--against stock transformers]
                                   [--rounds 2] [--output DIR] [--section.setting VALUE ...]

Each contender trains the same slice of a published model (`gpu_training/shapes.py`) at its real widths, on
the same tokens, distributed as words of a language are, through its real router; MTP is off for all. Every
variant has a process of its own in every round, and a time limit: it begins with an empty device, and one
that fails is reported and takes no other one down. Rounds alternate in their order; medians over all their
steps are compared. Everything together stays below --total-seconds.

TFLOP/s count 3 x (2 x weights of the matrix products that a token takes part in + attention over the keys
that it may see) per token (`megads/config/flops.py`), recomputation not included; MFU divides that by the
GPU's dense BF16 peak (989 TFLOP/s for H100 and H200), in FP8 too. "(square)" counts attention as the full
square. Peak memory is what CUDA's allocator has handed out, beside the planner's prediction for MegaDS.

--against megads-graphs is MegaDS once more, with CUDA graphs: the ratio is a claim of its own.

--plan measures nothing and needs no GPU: it shows the slices that fit a GPU of the planner's table, and the
speed, memory and bounds that it predicts. OUTPUT gets results.json, results.md, speed.png and log.txt (what
the processes said). Any flag of pretrain_megads.py changes the slice for all contenders. On a CPU only the
benchmark itself can be tried: --shape tiny --device cpu --precision fp32.
"""

import argparse
import json
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from gpu_training.contenders import CONTENDERS
from gpu_training.figure import draw
from gpu_training.plan import plan_rows
from gpu_training.processes import run_variant
from gpu_training.shapes import PRECISIONS, SHAPES, Overrides
from gpu_training.summary import Row, Variant, as_markdown, claim_rows, speed_rows, time_rows
from gpu_training.variant import Job, Measured
from rich.console import Console
from rich.table import Table

from megads.command_line import run_tool
from megads.config.flags import parse_flags
from megads.errors import EnvironmentSetupError
from megads.plan.hardware import GPUS

LEAST_SECONDS = 30
"""Below which no variant is begun."""


@dataclass
class Session:
    """One run of the benchmark: what is asked for, where results go, and the time there is."""

    options: argparse.Namespace
    changes: Overrides
    begun: float = field(default_factory=time.monotonic)

    @property
    def output(self) -> Path:
        return Path(self.options.output)

    def seconds_left(self) -> float:
        return float(self.options.total_seconds - (time.monotonic() - self.begun))

    def variants(self) -> list[Variant]:
        """All of them, without results."""
        options = self.options
        return [
            Variant(shape, precision, contender, [])
            for shape in options.shape
            for precision in options.precision
            for contender in ("megads", *options.against)
        ]

    def run(self, variant: Variant, number: int) -> Variant:
        """`variant` with a further round, or with the reason why it has none."""
        options, limit = self.options, min(self.options.variant_seconds, self.seconds_left())
        if limit < LEAST_SECONDS:
            return replace(variant, problem="no time was left (--total-seconds)")
        job = Job(
            variant.shape, variant.contender, variant.precision, options.device, options.steps,
            options.micro_batches, number == 0, self.changes,
        )  # fmt: skip
        found = run_variant(job, limit, self.output / "log.txt")
        if "problem" in found:
            return replace(variant, problem=found["problem"])
        return replace(variant, rounds=[*variant.rounds, Measured(**found)])

    def write(self, variants: list[Variant]) -> None:
        """All there is so far: a run that is cut off leaves what it has."""
        results = {
            "device": self.options.device,
            "torch": torch.__version__,
            "options": vars(self.options),
            "changes": self.changes,
            "variants": [variant.as_json() for variant in variants],
        }
        (self.output / "results.json").write_text(json.dumps(results, indent=2), encoding="utf-8")
        tables = [as_markdown(list(rows)) for rows in tables_of(variants, self.options.device).values()]
        (self.output / "results.md").write_text("\n\n".join(tables) + "\n", encoding="utf-8")


def tables_of(variants: list[Variant], device: str) -> dict[str, list[Row]]:
    """Title to rows; claims are about GPUs."""
    tables = {
        "Speed and memory": list(speed_rows(variants)),
        "Milliseconds per step, by phase and by kernels": list(time_rows(variants)),
    }
    if device == "cuda":
        tables["Claims"] = list(claim_rows(variants))
    return tables


def show(variants: list[Variant], device: str) -> None:
    console = Console(width=max(160, Console().width))
    for title, (headings, *rows) in tables_of(variants, device).items():
        table = Table(title=title)
        for heading in headings:
            table.add_column(heading, overflow="fold")
        for row in rows:
            table.add_row(*row)
        console.print(table)


def parse_arguments(argv: list[str]) -> tuple[argparse.Namespace, Overrides]:
    """Our own options, and settings in the names of pretrain_megads.py."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    others = [name for name in CONTENDERS if name != "megads"]
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["v3"])
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=["bf16", "fp8"])
    parser.add_argument("--against", nargs="*", choices=others, default=["stock", "transformers"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8, help="timed steps per round")
    parser.add_argument("--micro-batches", type=int, default=4, help="per optimizer step")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--variant-seconds", type=float, default=150, help="limit of each process")
    parser.add_argument("--total-seconds", type=float, default=560)
    parser.add_argument("--output", default="outputs/train_gpu")
    parser.add_argument("--plan", nargs="?", const="h200", choices=GPUS, metavar="GPU")
    options, rest = parser.parse_known_args(argv)
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    return options, parse_flags(rest, "benchmarks/train_gpu.py").overrides


def main() -> int:
    options, changes = parse_arguments(sys.argv[1:])
    if options.plan is not None:
        gpu = GPUS[options.plan]
        rows = plan_rows(options.shape, options.precision, gpu, options.micro_batches, changes)
        print(as_markdown(list(rows)))
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        raise EnvironmentSetupError("no CUDA device is visible here: --device cpu with --shape tiny")
    session = Session(options, changes)
    session.output.mkdir(parents=True, exist_ok=True)
    (session.output / "log.txt").write_text("", encoding="utf-8")
    variants = session.variants()
    for number in range(options.rounds):
        order = range(len(variants)) if number % 2 == 0 else range(len(variants) - 1, -1, -1)
        for index in order:
            if variants[index].problem is None:
                variants[index] = session.run(variants[index], number)
                session.write(variants)
    show(variants, options.device)
    draw(variants, session.output / "speed.png")
    ours = [variant for variant in variants if variant.contender == "megads"]
    return 0 if all(variant.rounds for variant in ours) else 1


if __name__ == "__main__":
    sys.exit(run_tool(main))
