"""`--help`, `--dry-run`, `extends` and flags: what a user meets before anything is trained."""

import json
import signal
import sys
from pathlib import Path

import pytest

from megads.errors import ConfigError
from tests.e2e.commands import ROOT, pretrain, pretrain_command, run, write_json

REPORT = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    code = end.code
heavy = sorted({"torch", "megatron", "transformers", "matplotlib", "numpy"} & sys.modules.keys())
print(f"exit {code}, imported {heavy}", file=sys.stderr)
"""


@pytest.mark.parametrize(
    "flags",
    [
        ("--help",),
        ("--config", "configs/debug.json", "--dry-run"),
        ("--config", "configs/deepseek_v3_671b.json", "--dry-run"),
    ],
)
def test_answers_without_importing_torch(flags: tuple[str, ...]) -> None:
    done = run([sys.executable, "-c", REPORT, "pretrain_megads.py", *flags])
    assert done.stderr.splitlines()[-1] == "exit 0, imported []"
    assert len(done.stdout) > 500


def test_a_wrong_configuration_is_told_without_importing_torch() -> None:
    done = run([sys.executable, "-c", REPORT, "pretrain_megads.py", "--num-layers", "0"])
    assert done.stderr.splitlines()[-1] == "exit 2, imported []"
    assert "model.num_layers" in done.stderr


def test_help_names_sections_defaults_and_megatron_flags() -> None:
    text = pretrain("--help").stdout
    for expected in ("model.moe:", "--training.learning_rate", "--lr", "--tensor-model-parallel-size"):
        assert expected in text, expected


def test_dry_run_says_what_would_run_and_touches_nothing(tmp_path: Path) -> None:
    output = tmp_path / "run"
    done = pretrain(
        "--config", "configs/debug.json", "--dry-run", "--world-size", 4, "--output_dir", output,
        "--tensor-model-parallel-size", 2, "--distributed.device", "cpu",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "4 on cpu (gloo), fp32: TP 2 with SP x PP 1 x CP 1 x DP 2" in done.stdout
    assert "distributed.tensor_parallel_size = 2" in done.stdout
    assert not output.exists()


SIGNALLED_AT_ITS_END = """
import builtins, os, runpy, signal, sys
class Late:
    def __init__(self, number):
        self.send, self.say, self.pid, self.number = os.kill, os.write, os.getpid(), number
    def __del__(self):  # when Python takes the modules down
        self.send(self.pid, self.number)
        self.say(2, b"survived")
builtins.late = Late(int(sys.argv[1]))
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_after_the_end_does_not_change_the_exit_code(number: signal.Signals) -> None:
    flags = ("--config", "configs/debug.json", "--dry-run")
    done = run([sys.executable, "-c", SIGNALLED_AT_ITS_END, int(number), "pretrain_megads.py", *flags])
    assert (done.returncode, done.stderr) == (0, "survived")


def test_processes_to_start_here_are_planned_and_not_added_to_those_of_a_launcher() -> None:
    flags = ("--config", "configs/debug.json", "--distributed.device", "cpu", "--nproc-per-node")
    assert "2 on cpu (gloo)" in pretrain(*flags, 2, "--dry-run").stdout
    command = pretrain_command(*flags, 2)
    launched = run(command, environment={"WORLD_SIZE": "2", "RANK": "0"})
    assert (launched.returncode, "WORLD_SIZE is set" in launched.stderr) == (ConfigError.exit_code, True)
    assert "must be at least 1" in pretrain(*flags, 0).stderr


def test_every_config_that_comes_with_it_can_run() -> None:
    configs = [
        path for path in sorted((ROOT / "configs").glob("*.json"))
        if path.name not in ("megads.schema.json", "deepspeed_zero1.json")
    ]  # fmt: skip
    assert len(configs) >= 8
    for path in configs:
        done = pretrain("--config", path, "--dry-run")
        assert done.returncode == 0, f"{path.name}: {done.stderr}"


def test_extends_and_flags_override_in_this_order(tmp_path: Path) -> None:
    base = write_json(tmp_path / "base.json", {
        "training": {"learning_rate": 1e-3, "seq_length": 64, "micro_batch_size": 1}, "seed": 7,
        "data": {"sources": [{"name": "code", "path": "code"}]},
    })  # fmt: skip
    child = write_json(tmp_path / "child.json", {
        "extends": base.name, "training": {"seq_length": 128, "micro_batch_size": 2},
    })  # fmt: skip
    done = pretrain("--config", child, "--micro-batch-size", 4, "--dry-run")
    assert done.returncode == 0, done.stderr
    changed = dict(
        line.strip().split(" = ", 1)
        for line in done.stdout.splitlines()
        if line.startswith("  ") and " = " in line
    )  # fmt: skip
    values = {name: json.loads(text) for name, text in changed.items()}
    assert values["training.learning_rate"] == 1e-3
    assert values["seed"] == 7
    assert values["training.seq_length"] == 128
    assert values["training.micro_batch_size"] == 4


def test_megatron_names_and_our_own_are_the_same_settings() -> None:
    pairs = [
        ("--tensor-model-parallel-size", "--distributed.tensor_parallel_size", 2),
        ("--pipeline-model-parallel-size", "--distributed.pipeline_parallel_size", 2),
        ("--expert-model-parallel-size", "--distributed.expert_parallel_size", 2),
        ("--lr", "--training.learning_rate", 1e-3),
        ("--min-lr", "--training.min_learning_rate", 1e-6),
        ("--train-iters", "--training.train_steps", 40),
        ("--global-batch-size", "--training.global_batch_size", 16),
        ("--seq-length", "--training.seq_length", 128),
        ("--num-experts", "--model.moe.num_experts", 16),
        ("--save", "--checkpointing.save_dir", "elsewhere"),
        ("--load", "--checkpointing.load", "there"),
        ("--tokenizer-model", "--data.tokenizer_path", "other.model"),
    ]
    base = ("--config", "configs/debug.json", "--dry-run", "--world-size", 4)
    theirs = pretrain(*base, *(word for megatron, _, value in pairs for word in (megatron, value)))
    ours = pretrain(*base, *(word for _, own, value in pairs for word in (own, value)))
    assert theirs.returncode == 0, theirs.stderr
    assert theirs.stdout == ours.stdout
    assert theirs.stdout != pretrain(*base).stdout
