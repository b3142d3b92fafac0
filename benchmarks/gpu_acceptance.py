"""What a GPU is asked first: whether the GPU path does what it is said to, with time and memory.

    python benchmarks/gpu_acceptance.py [--part tests demo precision tiny memory compile] [--output DIR]

- tests: `pytest tests/gpu`.
- demo: `tools/demo.py` on all GPUs of this machine.
- precision: the loss in FP8 beside that in BF16, --steps steps of configs/demo.json on the demo's data; the
  largest smoothed difference in the second half stays below DeepSeek-V3's 0.25%.
- tiny: configs/train_config_tiny.json (about 100M parameters), --steps steps on text that this machine has
  installed: its loss falls from about 10 to about 5 in 1,000.
- memory: what the planner predicts for slices of published models, beside what CUDA's allocator hands out.
- compile: what torch.compile would gain on elementwise parts of the model (`compile.py`); it judges nothing.

Each part has --part-seconds, so that parts can be run in calls of less than ten minutes;
OUTPUT/acceptance.json and .md keep the parts of earlier calls. The exit code is 1 where a part failed.
Without CUDA (--device cpu --steps 3 --mb 2 --vocab-size 2000) the tests skip themselves, the demo and what
needs its data are left out, and memory is not measured: a test of this script.
"""

import argparse
import json
import math
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from gpu_training.processes import ROOT, Ended, run_limited, run_variant
from gpu_training.summary import GIB, as_markdown
from gpu_training.variant import Job

from megads.command_line import run_tool
from megads.errors import EnvironmentSetupError

TINY = ROOT / "configs" / "train_config_tiny.json"
LEARNED_STEPS, LEARNED_LOSS = 1000, 5.5
# DeepSeek-V3, section 3.3.
FP8_DIFFERENCE_PERCENT = 0.25
# How far the planner's memory may be from the allocator's.
MEMORY_TOLERANCE = 0.15
MEMORY_CASES = (("v3", "bf16"), ("v3", "fp8"), ("v2-lite", "bf16"), ("moonlight", "bf16"))

Facts = dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """What a part showed; `problem` is None where it passed."""

    command: str
    seconds: float
    problem: str | None
    facts: Facts


class PartFailed(Exception):
    """A part did not do what it should; the message says what, `facts` what it found nevertheless."""

    def __init__(self, problem: str, facts: Facts | None = None) -> None:
        super().__init__(problem)
        self.facts = facts or {}


class Acceptance:
    """The parts, each a method that gives its facts or raises `PartFailed`."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.output = options, Path(options.output).resolve()
        self.output.mkdir(parents=True, exist_ok=True)
        self.parts: dict[str, tuple[str, Callable[[], Facts]]] = {
            "tests": ("pytest tests/gpu", self.tests),
            "demo": ("python tools/demo.py", self.demo),
            "precision": (f"python tools/compare_precision.py, {options.steps} steps", self.precision),
            "tiny": (f"pretrain_megads.py with configs/{TINY.name}, {options.steps} steps", self.tiny),
            "memory": ("the slices of train_gpu.py, a few steps each", self.memory),
            "compile": ("python benchmarks/compile.py", self.compile),
        }

    def run(self, name: str) -> Outcome:
        command, part = self.parts[name]
        self._ends = time.monotonic() + self.options.part_seconds
        begun, problem = time.monotonic(), None
        facts: Facts = {}
        try:
            facts = part()
        except PartFailed as failure:
            problem, facts = str(failure), failure.facts
        return Outcome(command, time.monotonic() - begun, problem, facts)

    def _seconds_left(self) -> float:
        return max(1.0, self._ends - time.monotonic())

    def _call(self, *command: object) -> Ended:
        """A Python program of the repository. Raises PartFailed unless it succeeds."""
        words = [sys.executable, *map(str, command)]
        ended = run_limited(words, self._seconds_left(), self.output / "log.txt")
        if ended.code is None:
            raise PartFailed(f"stopped after --part-seconds: {ended.last_words}")
        if ended.code != 0:
            raise PartFailed(f"exit code {ended.code}: {ended.last_words}")
        return ended

    def tests(self) -> Facts:
        """Every GPU test; those that cannot run say why."""
        report = self.output / "tests.xml"
        report.unlink(missing_ok=True)
        # They start processes of their own, most of whose time is imports.
        side_by_side = ["-n", "4", "--dist", "loadfile"] if find_spec("xdist") else []
        try:
            self._call("-m", "pytest", "tests/gpu", f"--junitxml={report}", *side_by_side)
        except PartFailed as failure:
            if not report.is_file():
                raise
            failed = ", ".join(_failed_tests(report))
            raise PartFailed(f"{failure}; failed: {failed}", _counted_tests(report)) from None
        return _counted_tests(report)

    def demo(self) -> Facts:
        """Train, stop, resume: judged by the demo itself."""
        self._call("tools/demo.py")
        return training_facts(ROOT / "outputs" / "demo" / "metrics.jsonl")

    def precision(self) -> Facts:
        """FP8 against BF16 on the same data."""
        compared = self.output / "precision"
        shutil.rmtree(compared, ignore_errors=True)
        self._call(
            "tools/compare_precision.py", "configs/demo.json", "--steps", self.options.steps, "--a", "bf16",
            "--b", "fp8", "--output", compared,
        )  # fmt: skip
        found = json.loads((compared / "comparison.json").read_text(encoding="utf-8"))
        last = {name: round(found[f"loss_{name}"][-1], 3) for name in ("a", "b")}
        largest = found["largest_smoothed_difference_percent"]
        facts = {"BF16 loss": last["a"], "FP8 loss": last["b"], "largest difference, %": round(largest, 3)}
        if largest > FP8_DIFFERENCE_PERCENT:
            raise PartFailed(f"the smoothed losses differ by more than {FP8_DIFFERENCE_PERCENT}%", facts)
        return facts

    def tiny(self) -> Facts:
        """The guide's smallest configuration on a sample corpus."""
        options, data = self.options, self.output / "data"
        corpus, tokenizer = data / "corpus", data / "tokenizer.model"
        if not tokenizer.is_file():
            self._call("tools/make_sample_corpus.py", "--output", corpus, "--mb", options.mb, "--overwrite")
            self._call(
                "tools/train_tokenizer.py", "--input", corpus, "--output", tokenizer,
                "--vocab-size", options.vocab_size,
            )  # fmt: skip
        self._call(
            "tools/preprocess_dolma.py", "--input-root", corpus, "--output-root", data,
            "--tokenizer", tokenizer,
        )  # fmt: skip
        config = self.output / "tiny.json"
        run = self.output / "tiny"
        shutil.rmtree(run, ignore_errors=True)  # or it would be resumed
        config.write_text(json.dumps(tiny_config(corpus, tokenizer, run, options)), encoding="utf-8")
        self._call("pretrain_megads.py", "--config", config)
        facts = training_facts(run / "metrics.jsonl")
        if not math.isfinite(facts["last loss"]) or facts["steps"] != options.steps:
            raise PartFailed(f"it ended at step {facts['steps']} with loss {facts['last loss']}", facts)
        if options.steps >= LEARNED_STEPS and facts["last loss"] > LEARNED_LOSS:
            raise PartFailed(f"the loss fell from {facts['first loss']} to {facts['last loss']} only", facts)
        return facts

    def memory(self) -> Facts:
        """The planner's bytes of tensors beside the allocator's peak, and their ratio."""
        cuda, far = self.options.device == "cuda", []
        facts: Facts = {}
        for shape, precision in MEMORY_CASES if cuda else (("tiny", "fp32"),):
            job = Job(shape, "megads", precision, self.options.device, 2, 2, False, {})
            found = run_variant(job, self._seconds_left(), self.output / "log.txt")
            if "problem" in found:
                raise PartFailed(f"{shape} {precision}: {found['problem']}", facts)
            planned, peak = found["planned_bytes"], found["peak_allocated_bytes"]
            name = f"{shape} {precision}"
            facts[f"{name}: planned GiB"] = round(planned / GIB, 2)
            if peak is not None:
                facts[f"{name}: measured GiB"] = round(peak / GIB, 2)
                far += [name] if abs(planned / peak - 1) > MEMORY_TOLERANCE else []
        if far:
            raise PartFailed(f"off by more than {MEMORY_TOLERANCE:.0%}: {', '.join(far)}", facts)
        return facts

    def compile(self) -> Facts:
        """How many times as fast each group is when it is compiled, and how long that takes."""
        file = self.output / "compile.json"
        self._call("benchmarks/compile.py", "--device", self.options.device, "--json", file)
        ways = {(one["group"], one["way"]): one for one in json.loads(file.read_text(encoding="utf-8"))}
        facts: Facts = {}
        for (group, way), compiled in ways.items():
            if way == "compiled":
                facts[f"{group}: times as fast"] = round(
                    ways[group, "now"]["seconds"] / compiled["seconds"], 2
                )
                facts[f"{group}: seconds to compile"] = round(compiled["first_seconds"], 1)
        return facts


def tiny_config(corpus: Path, tokenizer: Path, output: Path, options: argparse.Namespace) -> dict[str, Any]:
    """train_config_tiny.json on the sample corpus, whose parts weigh what they hold."""
    sources = [
        {
            "name": directory.name,
            "subset": directory.name,
            "weight": sum(file.stat().st_size for file in directory.iterdir()),
        }
        for directory in sorted(corpus.iterdir())
        if directory.is_dir()
    ]
    return {
        "extends": str(TINY),
        "output_dir": str(output),
        "data": {
            "cache_dir": str(corpus.parent),
            "tokenizer_path": str(tokenizer),
            "split": "95,5,0",
            "sources": sources,
        },
        "distributed": {"device": options.device},
        "training": {
            "train_steps": options.steps,
            "lr_warmup_steps": min(100, options.steps // 2),
            "log_interval": max(1, options.steps // 100),
            "eval_interval": options.steps,
            "save_interval": options.steps,
        },
        "validation": {"eval_steps": 2},
    }


def training_facts(metrics: Path) -> Facts:
    """Of a run: losses in nats per token, tokens per second (median), peak memory."""
    records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    train = [record for record in records if record["kind"] == "train"]
    if not train:
        raise PartFailed(f"{metrics} has no step")
    return {
        "steps": train[-1]["step"],
        "first loss": round(train[0]["lm_loss"], 3),
        "last loss": round(train[-1]["lm_loss"], 3),
        "tokens per second": round(statistics.median(record["tokens_per_second"] for record in train)),
        "peak GiB": round(max(record["peak_memory_bytes"] for record in train) / GIB, 2),
    }


def _cases(report: Path) -> list[ElementTree.Element]:
    return list(ElementTree.parse(report).getroot().iter("testcase"))


def _failed_tests(report: Path) -> list[str]:
    return [
        case.get("name", "?")
        for case in _cases(report)
        if case.find("failure") is not None or case.find("error") is not None
    ]


def _counted_tests(report: Path) -> Facts:
    """Passed, failed and skipped tests, and why they were skipped."""
    cases, failed = _cases(report), len(_failed_tests(report))
    reasons = [skipped.get("message", "") for case in cases if (skipped := case.find("skipped")) is not None]
    passed = len(cases) - len(reasons) - failed
    facts: Facts = {"passed": passed, "failed": failed, "skipped": len(reasons)}
    return facts | {f"skipped: {reason}": reasons.count(reason) for reason in sorted(set(reasons))}


def as_table(parts: dict[str, dict[str, Any]]) -> str:
    """Of all parts that are known, for docs/gpu-results.md."""
    rows = [["part", "command", "passed", "seconds", "found"]]
    for name, part in parts.items():
        facts = "; ".join(f"{key}: {value}" for key, value in part["facts"].items())
        passed = "yes" if part["problem"] is None else f"no: {part['problem']}"
        rows.append([name, part["command"], passed, f"{part['seconds']:.0f}", facts])
    return as_markdown(rows)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parts = ("tests", "demo", "precision", "tiny", "memory", "compile")
    with_data = ("demo", "precision")
    parser.add_argument("--part", nargs="+", choices=parts, help="default: all that this device can do")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--steps", type=int, default=LEARNED_STEPS, help="of the runs that it makes")
    parser.add_argument("--mb", type=int, default=32, help="megabytes of text that it trains on")
    parser.add_argument("--vocab-size", type=int, default=32768, help="of their tokenizer")
    parser.add_argument("--part-seconds", type=float, default=540, help="limit of each part")
    parser.add_argument("--output", default="outputs/gpu_acceptance")
    options = parser.parse_args(argv)
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.part is None:
        options.part = [part for part in parts if part not in with_data or options.device == "cuda"]
    return options


def main() -> int:
    options = parse_arguments(sys.argv[1:])
    cuda = options.device == "cuda"
    if cuda and not torch.cuda.is_available():
        raise EnvironmentSetupError("no CUDA device is visible here: --device cpu --steps 3 tries the script")
    acceptance = Acceptance(options)
    file = acceptance.output / "acceptance.json"
    known = json.loads(file.read_text(encoding="utf-8"))["parts"] if file.is_file() else {}
    for name in options.part:
        print(f"{name}: {acceptance.parts[name][0]} ...", flush=True)
        known[name] = asdict(acceptance.run(name))
        device = torch.cuda.get_device_name() if cuda else "CPU"
        found = {"device": device, "torch": torch.__version__, "parts": known}
        file.write_text(json.dumps(found, indent=2), encoding="utf-8")
        file.with_suffix(".md").write_text(as_table(known) + "\n", encoding="utf-8")
        print(as_table({name: known[name]}), flush=True)
    return 1 if any(known[name]["problem"] for name in options.part) else 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
