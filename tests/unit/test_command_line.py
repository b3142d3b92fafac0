"""How tools end: exit codes, one line for a user's mistake, and what signals do."""

import os
import signal
import subprocess
import sys
from argparse import ArgumentTypeError
from pathlib import Path

import pytest

from megads.command_line import INTERRUPTED, local_path, positive_number, run_tool
from megads.errors import CheckpointError, EnvironmentSetupError

# Says when it is at work, and what it cleans up when it is ended. Ctrl-C is as on a terminal, also where the
# tests run in the background of a script, which makes them and what they start deaf to it.
AT_WORK = """
import signal, sys, time
from megads.command_line import run_tool
signal.signal(signal.SIGINT, signal.default_int_handler)
def run():
    try:
        print("begun", flush=True)
        time.sleep(60)
    finally:
        print("cleaned up", flush=True)
sys.exit(run_tool(run, interrupted="half is done", cleans_up={cleans_up}))
"""


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (1, 1)])
def test_what_a_tool_returns_is_its_exit_code(returned: int | None, code: int) -> None:
    assert run_tool(lambda: returned) == code


def test_a_mistake_is_one_line_and_a_bug_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def mistaken() -> None:
        raise CheckpointError("it is damaged; take another")

    assert run_tool(mistaken) == CheckpointError.exit_code
    assert capsys.readouterr() == ("", "error: it is damaged; take another\n")
    with pytest.raises(ZeroDivisionError):
        run_tool(lambda: 1 // 0)


def test_a_file_system_that_refuses_is_no_bug_of_ours(capsys: pytest.CaptureFixture[str]) -> None:
    def full() -> None:
        raise OSError(28, "No space left on device", "some/file")

    assert run_tool(full) == EnvironmentSetupError.exit_code
    assert capsys.readouterr().err == "error: [Errno 28] No space left on device: 'some/file'\n"
    with pytest.raises(FileNotFoundError):
        run_tool(lambda: Path("no such file").stat().st_size)


SAYS_MUCH = """
import sys
from megads.command_line import run_tool
sys.exit(run_tool(lambda: print("\\u65e5\\n" * {lines})))
"""


@pytest.mark.parametrize("lines", [10, 1_000_000])
def test_output_that_nobody_reads_ends_a_tool_quietly(lines: int) -> None:
    reader, writer = os.pipe()
    os.close(reader)  # before it starts: what it says first may fit into the pipe
    try:
        ended = subprocess.run(
            [sys.executable, "-c", SAYS_MUCH.format(lines=lines)],
            stdout=writer, stderr=subprocess.PIPE, check=False,
        )  # fmt: skip
    finally:
        os.close(writer)
    assert (ended.returncode, ended.stderr) == (128 + signal.SIGPIPE, b"")


def test_a_terminal_without_the_characters_shows_their_numbers() -> None:
    said = subprocess.run(
        [sys.executable, "-c", SAYS_MUCH.format(lines=1)],
        env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True, check=True,
    )  # fmt: skip
    assert said.stdout == b"\\u65e5\n\n"


@pytest.mark.parametrize(
    ("number", "cleans_up", "code", "said", "complained"),
    [
        (signal.SIGINT, False, INTERRUPTED, "cleaned up\n", "half is done\n"),
        (signal.SIGTERM, True, 128 + signal.SIGTERM, "cleaned up\n", ""),
        (signal.SIGTERM, False, -signal.SIGTERM, "", ""),
    ],
)
def test_signals(tmp_path: Path, number: int, cleans_up: bool, code: int, said: str, complained: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", AT_WORK.format(cleans_up=cleans_up)], text=True, cwd=tmp_path,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        process.send_signal(number)
        assert process.communicate(timeout=60) == (said, complained)
        assert process.returncode == code


def test_what_is_written_is_no_url() -> None:
    assert local_path("some/where") == Path("some/where")
    with pytest.raises(ArgumentTypeError, match="s3://bucket/out is a URL; give a path"):
        local_path("s3://bucket/out")


def test_amounts_are_positive_and_finite() -> None:
    assert positive_number("0.5") == 0.5
    for wrong in ("0", "-1", "nan", "inf"):
        with pytest.raises(ArgumentTypeError, match=f"{wrong} is not a number above 0"):
            positive_number(wrong)
