"""The launcher as a user types it: one process, hosts of a file, DeepSpeed's launcher, a dry run."""

import os
import re
import shlex
import sys
from pathlib import Path

import pytest

from megads.errors import DataError
from megads.ports import free_port
from tests.e2e.commands import ENVIRONMENT, ROOT, Finished, records, run, steps
from tests.unit.test_launch_hosts import SSH

FAKE_DEEPSPEED = """
import json, pathlib, sys
pathlib.Path({record!r}).write_text(json.dumps(sys.argv[1:]))
sys.exit(7)
"""


def launch(*arguments: object, **environment: str) -> Finished:
    return run([sys.executable, ROOT / "tools" / "run_training.py", *arguments], environment=environment)


@pytest.fixture
def ssh(tmp_path: Path) -> str:
    """A PATH on which ssh stays at home."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "ssh").write_text(SSH)
    (programs / "ssh").chmod(0o755)
    return os.pathsep.join([str(programs), ENVIRONMENT["PATH"]])


def test_one_process_and_resume(config: Path, tmp_path: Path) -> None:
    first = launch("--config", config, "--training.exit_step", 3)
    assert first.returncode == 0, first.stderr
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000003"
    again = ("--training.exit_step", 4, "--resume", checkpoint, "--output_dir", tmp_path / "other")
    second = launch("--config", config, *again)
    assert "resumed after step 3" in second.stdout, second.stderr
    assert steps(tmp_path / "other") == [4]


def test_two_processes_here_and_the_exit_code_of_their_error(config: Path, tmp_path: Path) -> None:
    done = launch("--config", config, "--gpus", 2, "--training.exit_step", 2)
    assert done.returncode == 0, done.stderr
    (start,) = records(tmp_path / "run", "run")
    assert (start["layout"], steps(tmp_path / "run")) == ("DP2", [1, 2])
    failed = launch("--config", config, "--gpus", 2, "--data.tokenizer_path", tmp_path / "gone")
    assert failed.returncode == DataError.exit_code
    assert failed.stderr.count("DataError") == 1


def test_two_hosts_of_a_file(config: Path, tmp_path: Path, ssh: str) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("127.0.0.1 slots=1\nlocalhost slots=1\n")
    flags = ("--config", config, "--hostfile", hostfile, "--port", free_port(), "--training.exit_step", 3)
    shown = launch(*flags, "--dry-run", PATH=ssh)
    assert shown.returncode == 0, shown.stderr
    commands = [shlex.split(line) for line in shown.stdout.splitlines() if line.startswith("ssh ")]
    assert [words[-2] for words in commands] == ["127.0.0.1", "localhost"]
    assert not (tmp_path / "run").exists()

    done = launch(*flags, PATH=ssh)
    assert done.returncode == 0, done.stdout + done.stderr
    (start,) = records(tmp_path / "run", "run")
    assert start["layout"] == "DP2"
    assert steps(tmp_path / "run") == [1, 2, 3]
    # Rank 0, which speaks for all, is on the first host.
    assert re.search(r"^127\.0\.0\.1: .* step +3/8 ", done.stdout, re.MULTILINE)

    failed = launch(*flags[:-1], 6, "--data.tokenizer_path", tmp_path / "gone", PATH=ssh)
    assert failed.returncode != 0
    assert "stopping the other hosts" in failed.stderr
    assert "DataError" in failed.stdout


def test_deepspeeds_launcher_gets_its_words(config: Path, tmp_path: Path) -> None:
    package = tmp_path / "packages" / "deepspeed" / "launcher"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").write_text("")
    record = tmp_path / "words.json"
    (package / "runner.py").write_text(FAKE_DEEPSPEED.format(record=str(record)))
    flags = ("--config", config, "--deepspeed", "--gpus", 2)
    done = launch(*flags, PYTHONPATH=str(tmp_path / "packages"))
    assert done.returncode == 7, "the exit code is the launcher's"
    words = record.read_text()
    assert '"--num_gpus", "2", "--no_local_rank"' in words
    assert f'"{ROOT / "pretrain_megads.py"}", "--config", "{config}"]' in words


def test_settings_that_waste_a_run_are_refused(config: Path, tmp_path: Path) -> None:
    unbalanced = ("--no-model.moe.use_aux_loss_free", "--model.moe.balance_loss_type", "none")
    flags = ("--config", config, *unbalanced, "--training.exit_step", 1)
    refused = launch(*flags)
    assert refused.returncode == 2
    assert "[router-unbalanced; " in refused.stderr
    assert "nothing was started" in refused.stderr
    assert not (tmp_path / "run").exists()
    silent = launch(*flags, "--no-lint")
    assert silent.returncode == 0, silent.stderr
    assert "router-unbalanced" not in silent.stderr


def test_mistakes_take_one_screen(config: Path, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("a slots=2\na slots=2\n")
    done = launch("--config", config, "--hostfile", tmp_path / "hosts")
    assert done.returncode == 2
    assert "hosts:2: a is in line 1 already" in done.stderr
    done = launch("--config", config, "--submit", PATH=str(tmp_path))
    assert done.returncode == 5
    assert "there is no SLURM to submit to" in done.stderr
    assert not (tmp_path / "run").exists()
