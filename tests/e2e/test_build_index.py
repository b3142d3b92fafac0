"""tools/build_index.py as a user types it, and what training says of its data."""

import json
import sys
from pathlib import Path

from tests.e2e.commands import ROOT, pretrain_well, run, steps, tool, write_json

IMPORTED = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    code = end.code
heavy = sorted({"torch", "megatron", "transformers"} & sys.modules.keys())
print(f"exit {code}, imported {heavy}", file=sys.stderr)
"""


def test_an_index_built_offline_is_what_training_starts_with(
    config: Path, data: Path, tmp_path: Path
) -> None:
    phases = [
        {"from_tokens": 0, "weights": {"code": 3, "docs": 1}},
        {"from_tokens": 16 * 32, "weights": {"docs": 1, "manuals": 1}},
    ]
    flags = ("--config", config, "--data.phases", json.dumps(phases), "--seed", 4711)
    shown = tool("build_index.py", *flags, "--dry-run")
    assert shown.returncode == 0, shown.stderr
    assert "training data: 1,024 tokens in 32 sequences of 32" in shown.stdout
    assert "phase 2, from token 512 on:" in shown.stdout
    before = set((data / "index").glob("*.epochs"))
    built = run([sys.executable, "-c", IMPORTED, ROOT / "tools" / "build_index.py", *flags])
    assert built.stderr.splitlines()[-1] == "exit 0, imported []", built.stderr
    made = set((data / "index").glob("*.epochs")) - before
    assert {file.name.split("-train-")[0] for file in made} == {"code", "docs", "manuals"}
    times = {file: file.stat().st_mtime_ns for file in (data / "index").iterdir()}

    trained = pretrain_well(*flags)
    assert {file: file.stat().st_mtime_ns for file in (data / "index").iterdir()} == times
    table = shown.stdout.split("training data:")[1].strip()
    for line in table.splitlines():
        assert line.strip() in trained.stdout + trained.stderr
    assert steps(tmp_path / "run") == list(range(1, 9))


def test_a_longer_run_goes_on_in_the_same_order_and_other_weights_do_not(config: Path) -> None:
    warning = "samples come in another order"
    pretrain_well("--config", config, "--train-iters", 4)
    longer = pretrain_well("--config", config, "--train-iters", 6, "--load", "latest")
    assert warning not in longer.stdout + longer.stderr
    fewer = json.dumps([{"name": name, "subset": name} for name in ("code", "docs")])
    other = pretrain_well("--config", config, "--train-iters", 8, "--load", "latest", "--data.sources", fewer)
    assert warning in other.stdout + other.stderr


def test_every_stage_of_a_file_has_its_index(config: Path, data: Path, tmp_path: Path) -> None:
    short = {"name": "short", "training": {"seq_length": 16}, "data": {"preprocessing": {"shuffle_seed": 99}}}
    staged = {"extends": str(config), "stages": [short, {"name": "long"}]}
    path = write_json(tmp_path / "stages.json", staged)
    before = set((data / "index").glob("*.epochs"))
    one = tool("build_index.py", "--config", path, "--stage", "short")
    assert one.returncode == 0, one.stderr
    assert "stage short\ntraining data: 512 tokens in 32 sequences of 16" in one.stdout
    assert set((data / "index").glob("*.epochs")) - before
    both = tool("build_index.py", "--config", path)
    assert both.returncode == 0, both.stderr
    assert [line for line in both.stdout.splitlines() if line.startswith("stage ")] == [
        "stage short",
        "stage long",
    ]
    assert "index: 0 files made" in both.stdout


def test_what_cannot_be_is_told_with_its_exit_code(config: Path) -> None:
    once = json.dumps([{"name": "code", "subset": "code", "max_epochs": 0.0001}])
    capped = tool("build_index.py", "--config", config, "--data.sources", once)
    assert capped.returncode == 2
    assert "raise max_epochs, add data, or shorten the run" in capped.stderr
    missing = tool("build_index.py", "--config", config, "--data-path", "no/such/prefix")
    assert missing.returncode == 3
    assert "no/such/prefix.bin: no such file" in missing.stderr
    assert "Traceback" not in capped.stderr + missing.stderr
