"""Compare the losses of two precisions: the same data, the same initial weights, one run after the other.

    python tools/compare_precision.py configs/debug.json --steps 300 --a bf16 --b fp8 --output compare_fp8

Precisions are fp32, bf16, fp16 and fp8 (beside BF16); on a CPU BF16 runs are FP32 and FP8 is emulated. Prints
the relative difference (b - a) / a of the training loss, of single steps and of the loss smoothed by an
exponential average, as a table, and writes OUTPUT/comparison.json and .png. In DeepSeek-V3 FP8 stayed within
0.25% of BF16 (arXiv:2412.19437, section 3.3 and appendix B.1); --max-difference makes that, or another bound,
decide the exit code: 1 where the smoothed difference is larger anywhere in the second half of the run.

Further flags are those of pretrain_megads.py and go to both runs (--training.fp8.recipe tensorwise); --b-set
NAME=VALUE is for the second one alone. It also tells how far apart two runs come that should be equal, below
which no difference means anything: --a fp32 --b fp32 --b-set training.micro_batch_size=2 changes the order of
sums only.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that it runs from a checkout that is not installed

from megads.command_line import run_tool  # noqa: E402
from megads.errors import DataError, EnvironmentSetupError, TrainingError  # noqa: E402

PAPERS_BOUND_PERCENT = 0.25
PRECISIONS = {
    "fp32": {"use_bf16": False, "use_fp16": False, "use_fp8": False},
    "bf16": {"use_bf16": True, "use_fp16": False, "use_fp8": False},
    "fp16": {"use_bf16": False, "use_fp16": True, "use_fp8": False},
    "fp8": {"use_bf16": True, "use_fp16": False, "use_fp8": True},
}


@dataclass(frozen=True)
class Comparison:
    """Losses in nats per token, differences (b - a) / a in percent; one value per step."""

    a: str
    b: str
    decay: float
    loss_a: list[float]
    loss_b: list[float]
    difference_percent: list[float]
    smoothed_difference_percent: list[float]

    @property
    def largest_percent(self) -> float:
        """Of the smoothed difference, in the second half of the run."""
        half = len(self.smoothed_difference_percent) // 2
        return max(abs(value) for value in self.smoothed_difference_percent[half:])


def averaged(values: list[float], decay: float) -> list[float]:
    """Exponential moving average whose weights add up to 1 from the first value on."""
    total, weight, found = 0.0, 0.0, []
    for value in values:
        total, weight = decay * total + (1 - decay) * value, decay * weight + (1 - decay)
        found.append(total / weight)
    return found


def compare(a: str, b: str, loss_a: list[float], loss_b: list[float], decay: float) -> Comparison:
    """Raises DataError where a run has no losses, or the two are not of the same steps."""
    if not loss_a or len(loss_a) != len(loss_b):
        raise DataError(
            f"{a} has losses of {len(loss_a)} steps, {b} of {len(loss_b)}: both must have the same"
        )
    smooth_a, smooth_b = averaged(loss_a, decay), averaged(loss_b, decay)
    return Comparison(
        a, b, decay, loss_a, loss_b,
        [100 * (y - x) / x for x, y in zip(loss_a, loss_b, strict=True)],
        [100 * (y - x) / x for x, y in zip(smooth_a, smooth_b, strict=True)],
    )  # fmt: skip


def table(comparison: Comparison, rows: int = 10) -> str:
    """About `rows` steps of it, for people."""
    steps = len(comparison.loss_a)
    lines = [f"a: {comparison.a}, b: {comparison.b}"]
    lines += [f"{'step':>8}  {'loss of a':>10}  {'loss of b':>10}  {'difference':>11}  {'smoothed':>9}"]
    for row in range(1, min(rows, steps) + 1):
        at = steps * row // min(rows, steps) - 1
        of_step, smoothed = comparison.difference_percent[at], comparison.smoothed_difference_percent[at]
        lines.append(
            f"{at + 1:>8}  {comparison.loss_a[at]:>10.4f}  {comparison.loss_b[at]:>10.4f}  "
            f"{of_step:>+10.3f}%  {smoothed:>+8.3f}%"
        )
    lines.append(
        f"largest smoothed difference in the second half: {comparison.largest_percent:.3f}% (the paper's "
        f"bound: {PAPERS_BOUND_PERCENT}%)"
    )
    return "\n".join(lines)


def draw(comparison: Comparison, png: Path) -> None:
    """Both losses above, their smoothed difference and the bound below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    losses, difference = figure.subplots(2, 1, sharex=True)
    steps = range(1, len(comparison.loss_a) + 1)
    for name, values in ((comparison.a, comparison.loss_a), (comparison.b, comparison.loss_b)):
        losses.plot(steps, averaged(values, comparison.decay), label=name, linewidth=1)
    losses.set_ylabel("training loss (nats per token)")
    losses.legend(frameon=False)
    difference.plot(steps, comparison.difference_percent, color="#c9ced6", linewidth=0.5)
    difference.plot(steps, comparison.smoothed_difference_percent, color="#1f5fa8", linewidth=1.2)
    for bound in (-PAPERS_BOUND_PERCENT, PAPERS_BOUND_PERCENT):
        difference.axhline(bound, color="#d1495b", linewidth=0.8, linestyle="--")
    difference.set_ylabel(f"({comparison.b} - {comparison.a}) / {comparison.a} (%)")
    difference.set_xlabel("step")
    figure.savefig(png, dpi=120)


def read_losses(metrics_jsonl: Path) -> list[float]:
    """The training loss of each step, from a run that logs every step."""
    records = [json.loads(line) for line in metrics_jsonl.read_text(encoding="utf-8").splitlines()]
    return [record["lm_loss"] for record in records if record["kind"] == "train"]


def train(own: argparse.Namespace, name: str, precision: str, flags: list[str]) -> list[float]:
    """Run the configuration in one precision from its first step; its losses."""
    output = own.output / name
    settings = {f"training.{name}": str(value).lower() for name, value in PRECISIONS[precision].items()} | {
        "output_dir": str(output),
        "training.train_steps": str(own.steps),
        "training.total_training_tokens": "null",
        "training.log_interval": "1",
        "training.eval_interval": "0",
        "training.save_interval": "0",
        "checkpointing.load": "null",
    }
    command = [sys.executable, str(ROOT / "tools" / "run_training.py"), "--config", str(own.config)]
    command += ["--gpus", str(own.processes), *flags]
    command += [word for setting, value in settings.items() for word in (f"--{setting}", value)]
    print(f"{name}: {precision}, {output}", flush=True)
    log = own.output / f"{name}.log"
    with log.open("w", encoding="utf-8") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    if code != 0:
        said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise TrainingError(
            f"run {name} ({precision}) ended with exit code {code}; the end of {log}:\n"
            + "\n".join(said[-5:])
        )
    return read_losses(output / "metrics.jsonl")


def parse_arguments(arguments: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("config", type=Path)
    add("--steps", type=int, required=True, help="optimizer steps of each run")
    add("--a", choices=PRECISIONS, default="bf16", help="what is compared with (default: %(default)s)")
    add("--b", choices=PRECISIONS, default="fp8", help="what is compared (default: %(default)s)")
    add("--b-set", action="append", default=[], metavar="NAME=VALUE", help="a setting of b alone; repeatable")
    add("--processes", type=int, default=1, help="of a run, on this machine (default: %(default)s)")
    add("--decay", type=float, default=0.9, help="of the smoothing average (default: %(default)s)")
    add("--max-difference", type=float, metavar="PERCENT", help="exit with 1 above it")
    add("--output", type=Path, default=Path("outputs/compare_precision"), help="default: %(default)s")
    own, flags = parser.parse_known_args(arguments)
    if own.steps < 2 or not 0 <= own.decay < 1:
        parser.error("--steps must be 2 or more, --decay in [0, 1)")
    if own.a == own.b and not own.b_set:
        parser.error("--a and --b are the same: give two precisions, or --b-set")
    if not all(name and equals for name, equals, _ in (setting.partition("=") for setting in own.b_set)):
        parser.error("--b-set is NAME=VALUE: --b-set training.fp8.recipe=tensorwise")
    return own, flags


def run(own: argparse.Namespace, flags: list[str]) -> int:
    if any((own.output / name).exists() for name in ("a", "b")):
        raise EnvironmentSetupError(
            f"{own.output} holds runs of an earlier comparison: give another --output"
        )
    own.output.mkdir(parents=True, exist_ok=True)
    of_b = flags + [word for setting in own.b_set for word in (f"--{setting}".split("=", 1))]
    losses = train(own, "a", own.a, flags), train(own, "b", own.b, of_b)
    comparison = compare(own.a, " ".join((own.b, *own.b_set)), *losses, own.decay)
    print(table(comparison))
    report = asdict(comparison) | {
        "largest_smoothed_difference_percent": comparison.largest_percent,
        "papers_bound_percent": PAPERS_BOUND_PERCENT,
    }
    (own.output / "comparison.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    draw(comparison, own.output / "comparison.png")
    print(f"written: {own.output / 'comparison.json'} and .png")
    exceeded = own.max_difference is not None and comparison.largest_percent > own.max_difference
    return 1 if exceeded else 0


def main(arguments: list[str] | None = None) -> int:
    own, flags = parse_arguments(arguments)
    return run_tool(lambda: run(own, flags))


if __name__ == "__main__":
    sys.exit(main())
