"""tools/quickstart.py as a user types it: checks, the interview on a terminal, and the run that it starts."""

import os
import pty
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megads.errors import ConfigError, EnvironmentSetupError
from tests.e2e.commands import ENVIRONMENT, ROOT, steps, tool, write_json
from tests.waiting import LONGEST_SECONDS

PROGRAM = [sys.executable, str(ROOT / "tools" / "quickstart.py")]


def answered(answers: str, *flags: object, cwd: Path = ROOT) -> tuple[int, str]:
    """(exit code, output) when a person at a terminal types `answers`."""
    keyboard, terminal = pty.openpty()
    try:
        with subprocess.Popen(
            [*PROGRAM, *map(str, flags)], stdin=terminal, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, cwd=cwd, env=os.environ | ENVIRONMENT,
        ) as process:  # fmt: skip
            os.write(keyboard, answers.encode())
            text, _ = process.communicate(timeout=LONGEST_SECONDS)
        return process.returncode, text
    finally:
        os.close(keyboard)
        os.close(terminal)


def test_check_says_what_is_wrong_and_exits_by_it(config: Path, tmp_path: Path) -> None:
    sound = tool("quickstart.py", "--check", "--config", config)
    assert sound.returncode == 0, sound.stdout + sound.stderr
    assert "0 errors" in sound.stdout
    wrong = tool("quickstart.py", "--check", "--config", config, "--data.cache_dir", tmp_path / "nowhere")
    assert wrong.returncode == EnvironmentSetupError.exit_code
    assert "no dataset (.idx) of code, docs, manuals" in wrong.stdout
    assert "-> make them with tools/preprocess_dolma.py" in wrong.stdout


def test_without_a_terminal_nobody_is_asked() -> None:
    done = subprocess.run(
        PROGRAM,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | ENVIRONMENT,
    )
    assert done.returncode == ConfigError.exit_code
    assert "standard input is no terminal" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_interview_ends_in_a_run(config: Path, tmp_path: Path) -> None:
    code, text = answered("1\nyes\n", "--config", config, "--train-iters", 2)
    assert code == 0, text
    assert "Data: 3 sources below" in text
    assert steps(tmp_path / "run") == [1, 2]


def test_bad_answers_are_asked_again_and_no_is_no(config: Path, data: Path, tmp_path: Path) -> None:
    elsewhere = write_json(
        tmp_path / "elsewhere.json",
        {"extends": str(config), "data": {"cache_dir": str(tmp_path / "nowhere")}},
    )
    prefix = next((data / "code").glob("*.idx")).with_suffix("")
    code, text = answered(f"no.json\n99\n{elsewhere}\n/no/prefix\n{prefix}.bin\n0\n3\n2\n\n")
    assert code == 0, text
    assert "no.json: a number from 1 to" in text
    assert "99: a number from 1 to" in text
    assert "Data: no dataset of code, docs, manuals" in text
    assert "/no/prefix.idx: no such file" in text
    assert "0: a number from 1 on" in text
    assert "nothing was started" in text
    assert not (tmp_path / "run").exists()
    [command] = [line for line in text.splitlines() if "run_training.py" in line]
    words = shlex.split(command)
    assert words[2:] == ["--config", str(elsewhere), "--data-path", str(prefix), "--gpus", "2"]


def test_the_shown_command_is_one_that_the_launcher_takes(config: Path) -> None:
    code, text = answered("2\nno\n", "--config", config, "--expert-model-parallel-size", 2)
    assert code == 0, text
    [command] = [line for line in text.splitlines() if "run_training.py" in line]
    dry = subprocess.run(
        [*shlex.split(command), "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert dry.returncode == 0, dry.stderr
    assert "--nproc-per-node 2" in dry.stdout


@pytest.mark.parametrize("keys", ["\x04", "\x03"])
def test_ctrl_d_and_ctrl_c_start_nothing(keys: str, config: Path, tmp_path: Path) -> None:
    """Ctrl-C is a signal only for whom the terminal belongs to, so here it is sent as one."""
    keyboard, terminal = pty.openpty()
    with subprocess.Popen(
        [*PROGRAM, "--config", str(config)], stdin=terminal, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, cwd=ROOT, env=os.environ | ENVIRONMENT | {"PYTHONUNBUFFERED": "1"},
        # A shell's background jobs ignore Ctrl-C, and so would all that they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:  # fmt: skip
        assert process.stdout is not None
        read = ""
        while "Processes" not in read:
            character = process.stdout.read(1)
            assert character, read
            read += character
        if keys == "\x03":
            process.send_signal(signal.SIGINT)
        else:
            os.write(keyboard, keys.encode())
        text, _ = process.communicate(timeout=LONGEST_SECONDS)
    os.close(keyboard)
    os.close(terminal)
    assert process.returncode == (130 if keys == "\x03" else ConfigError.exit_code), text
    assert "nothing was started" in text
    assert "Traceback" not in text
