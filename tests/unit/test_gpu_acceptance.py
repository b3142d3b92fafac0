"""The GPU acceptance run without a GPU: what it reads from tests and runs, and when a part has failed."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import gpu_acceptance
from gpu_acceptance import Acceptance, PartFailed, parse_arguments
from gpu_training.processes import Ended
from gpu_training.summary import GIB

from megads.config.loader import load_config

REPORT = """<testsuites><testsuite>
<testcase name="test_a"/><testcase name="test_b"><failure message="no"/></testcase>
<testcase name="test_c"><skipped message="needs two CUDA devices"/></testcase>
<testcase name="test_d"><skipped message="needs two CUDA devices"/></testcase>
</testsuite></testsuites>"""


@pytest.fixture
def acceptance(tmp_path: Path) -> Acceptance:
    return Acceptance(parse_arguments(["--output", str(tmp_path), "--device", "cuda"]))


def ends_with(monkeypatch: pytest.MonkeyPatch, ended: Ended, report: str | None = None) -> None:
    """Programs end so, and pytest leaves this report."""

    def run(command: list[str], *_: Any) -> Ended:
        for word in command:
            if report and word.startswith("--junitxml="):
                Path(word.partition("=")[2]).write_text(report)
        return ended

    monkeypatch.setattr(gpu_acceptance, "run_limited", run)


def test_tests_are_counted_with_their_reasons_and_failures_named(
    acceptance: Acceptance, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends_with(monkeypatch, Ended(0, ""), REPORT.replace('<failure message="no"/>', ""))
    facts = {"passed": 2, "failed": 0, "skipped": 2, "skipped: needs two CUDA devices": 2}
    assert acceptance.run("tests").facts == facts
    ends_with(monkeypatch, Ended(1, "1 failed"), REPORT)
    outcome = acceptance.run("tests")
    assert outcome.problem == "exit code 1: 1 failed; failed: test_b"
    assert outcome.facts == facts | {"passed": 1, "failed": 1}
    ends_with(monkeypatch, Ended(None, "collecting"))  # and what an earlier run has left does not count
    assert acceptance.run("tests").problem == "stopped after --part-seconds: collecting"


def test_a_program_that_fails_or_hangs_fails_its_part(
    acceptance: Acceptance, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends_with(monkeypatch, Ended(1, "loss is nan"))
    assert acceptance.run("demo").problem == "exit code 1: loss is nan"
    ends_with(monkeypatch, Ended(None, "step 7"))
    assert acceptance.run("demo").problem == "stopped after --part-seconds: step 7"


def test_what_compiling_gains_is_told_by_group(
    acceptance: Acceptance, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {"group": "router", "way": "now", "seconds": 3e-3, "first_seconds": 0.1},
        {"group": "router", "way": "compiled", "seconds": 2e-3, "first_seconds": 8.04},
    ]
    (acceptance.output / "compile.json").write_text(json.dumps(rows))
    ends_with(monkeypatch, Ended(0, ""))
    outcome = acceptance.run("compile")
    assert outcome.problem is None
    assert outcome.facts == {"router: times as fast": 1.5, "router: seconds to compile": 8.0}


def metrics(path: Path, losses: list[float], last_step: int) -> None:
    every = last_step // len(losses)
    lines = [
        {
            "kind": "train", "step": (index + 1) * every, "lm_loss": loss, "tokens_per_second": 100 * index,
            "peak_memory_bytes": GIB * (1 + index),
        }
        for index, loss in enumerate(losses)
    ]  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(line) for line in [{"kind": "run"}, *lines]))


@pytest.mark.parametrize(
    ("losses", "last_step", "problem"),
    [
        ([10.0, 6.0, 4.9], 999, None),
        ([10.0, 6.0, 5.9], 999, "the loss fell from 10.0 to 5.9 only"),
        ([10.0, 6.0, 4.9], 600, "it ended at step 600 with loss 4.9"),
    ],
)
def test_the_tiny_configuration_must_learn_and_reach_its_end(
    acceptance: Acceptance,
    monkeypatch: pytest.MonkeyPatch,
    losses: list[float],
    last_step: int,
    problem: str | None,
) -> None:
    (acceptance.output / "data" / "corpus").mkdir(parents=True)

    def train(command: list[str], *_: Any) -> Ended:
        if "pretrain_megads.py" in command:
            metrics(acceptance.output / "tiny" / "metrics.jsonl", losses, last_step)
        return Ended(0, "")

    monkeypatch.setattr(gpu_acceptance, "run_limited", train)
    acceptance.options.steps = 999
    monkeypatch.setattr(gpu_acceptance, "LEARNED_STEPS", 999)
    outcome = acceptance.run("tiny")
    assert outcome.problem == problem
    if problem is None:
        assert outcome.facts == {
            "steps": 999, "first loss": 10.0, "last loss": 4.9, "tokens per second": 100, "peak GiB": 3.0,
        }  # fmt: skip


def test_precisions_are_compared_with_the_papers_bound(
    acceptance: Acceptance, monkeypatch: pytest.MonkeyPatch
) -> None:
    largest = [0.2449, 0.2551]

    def compare(command: list[str], *_: Any) -> Ended:
        output = Path(command[command.index("--output") + 1])
        output.mkdir()  # refused by the tool where an earlier one is left
        found: dict[str, Any] = {"loss_a": [6.0, 5.0], "loss_b": [6.0, 5.01]}
        found["largest_smoothed_difference_percent"] = largest.pop(0)
        (output / "comparison.json").write_text(json.dumps(found))
        return Ended(0, "")

    monkeypatch.setattr(gpu_acceptance, "run_limited", compare)
    below, above = acceptance.run("precision"), acceptance.run("precision")
    assert below.facts == {"BF16 loss": 5.0, "FP8 loss": 5.01, "largest difference, %": 0.245}
    assert below.problem is None
    assert above.problem == "the smoothed losses differ by more than 0.25%"
    assert above.facts["largest difference, %"] == 0.255


def test_sources_weigh_what_they_hold_and_the_configuration_loads(tmp_path: Path) -> None:
    for name, size in (("code", 30), ("docs", 10)):
        (tmp_path / "corpus" / name).mkdir(parents=True)
        (tmp_path / "corpus" / name / "0.jsonl.gz").write_bytes(b"x" * size)
    options = parse_arguments(["--device", "cpu", "--steps", "7"])
    made = gpu_acceptance.tiny_config(tmp_path / "corpus", tmp_path / "t.model", tmp_path / "run", options)
    (tmp_path / "tiny.json").write_text(json.dumps(made))
    config = load_config(tmp_path / "tiny.json")
    assert {source.name: source.weight for source in config.data.sources} == {"code": 30, "docs": 10}
    assert config.model == load_config(gpu_acceptance.TINY).model
    assert config.training.train_steps == 7


def test_memory_is_held_against_the_plan(acceptance: Acceptance, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = {"v3": 100, "v2-lite": 100, "moonlight": 130}

    def measured(job: Any, *_: Any) -> dict[str, Any]:
        return {"planned_bytes": planned[job.shape] * GIB, "peak_allocated_bytes": 100 * GIB}

    monkeypatch.setattr(gpu_acceptance, "run_variant", measured)
    outcome = acceptance.run("memory")
    assert outcome.problem == "off by more than 15%: moonlight bf16"
    assert outcome.facts["moonlight bf16: planned GiB"] == 130
    planned["moonlight"] = 110
    outcome = acceptance.run("memory")
    assert outcome.problem is None
    assert outcome.facts["v3 fp8: measured GiB"] == 100
    monkeypatch.setattr(gpu_acceptance, "run_variant", lambda *_: {"problem": "out of memory"})
    assert acceptance.run("memory").problem == "v3 bf16: out of memory"


def test_parts_of_earlier_calls_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def call(part: str) -> int:
        words = ["gpu_acceptance.py", "--device", "cpu", "--output", str(tmp_path), "--part", part]
        monkeypatch.setattr(sys, "argv", words)
        return gpu_acceptance.main()

    def passes(self: Acceptance) -> dict[str, Any]:
        return {"steps": 3}

    def fails(self: Acceptance) -> dict[str, Any]:
        raise PartFailed("too slow")

    monkeypatch.setattr(Acceptance, "tiny", passes)
    monkeypatch.setattr(Acceptance, "memory", fails)
    assert call("tiny") == 0
    assert call("memory") == 1
    parts = json.loads((tmp_path / "acceptance.json").read_text())["parts"]
    assert {name: part["problem"] for name, part in parts.items()} == {"tiny": None, "memory": "too slow"}
    table = (tmp_path / "acceptance.md").read_text()
    assert "| yes |" in table
    assert "| no: too slow |" in table
    assert table.count("\n") == 4


def test_a_cpu_leaves_out_the_demo_and_what_needs_its_data() -> None:
    assert parse_arguments(["--device", "cpu"]).part == ["tests", "tiny", "memory", "compile"]
    assert parse_arguments(["--device", "cuda"]).part == [
        "tests", "demo", "precision", "tiny", "memory", "compile",
    ]  # fmt: skip
