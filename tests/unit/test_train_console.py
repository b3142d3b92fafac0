"""The console on a terminal and off it, and the log set-up below it."""

import io
import logging
import os
import pty
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from megads.errors import EnvironmentSetupError
from megads.log import setup_logging, terminal_console
from megads.train.console import ConsoleSink, format_count, format_seconds


@pytest.fixture(autouse=True)
def restored_logging() -> Iterator[None]:
    """`setup_logging` changes the process; leave it as pytest had it."""
    root = logging.getLogger()
    handlers, level, one_line = list(root.handlers), root.level, warnings.formatwarning
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        yield
    logging.captureWarnings(False)
    warnings.formatwarning = one_line
    root.handlers, root.level = handlers, level
    logging.getLogger("megads").setLevel(logging.NOTSET)
    setup_console_off()


def setup_console_off() -> None:
    import megads.log

    megads.log._console = None


def train(step: int, **values: Any) -> dict[str, Any]:
    return {
        "kind": "train", "step": step, "tokens": step * 2048, "lm_loss": 8.3171, "mtp_loss": 8.4,
        "learning_rate": 3e-4, "grad_norm": 1.2345, "max_vio": 0.5, "tokens_per_second": 12345.6,
        "mfu": 0.412, "seconds_left": 754.0, "skipped_steps": 0, **values,
    }  # fmt: skip


def validation(step: int, **values: Any) -> dict[str, Any]:
    return {
        "kind": "validation", "step": step, "tokens": step * 2048, "loss": 4.0, "perplexity": 54.598,
        "is_best": True, **values,
    }  # fmt: skip


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


# Lines


def piped(records: list[dict[str, Any]], train_steps: int = 1000) -> list[str]:
    stream = io.StringIO()
    setup_logging(0, stream=stream)
    with ConsoleSink(train_steps) as sink:
        for record in records:
            sink.step_done(record["step"])
            sink.write(record)
    return stream.getvalue().splitlines()


def test_one_plain_line_per_interval():
    [line] = piped([train(20)])
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d INFO +step   20/1000 \| ", line)
    for part in ("loss   8.3171", "mtp   8.4000", "lr 3.00e-04", "grad   1.234", "maxvio  0.50",
                 "12,346 tok/s", "mfu  41.2%", "left  0:12:34"):  # fmt: skip
        assert part in line
    assert "\x1b" not in line
    assert "skipped" not in line


def test_lines_are_aligned():
    lines = piped([
        train(1, lm_loss=12.0, grad_norm=105.5, mfu=0.0012, seconds_left=36000.0, tokens_per_second=9.0),
        train(10, lm_loss=None, grad_norm=None, max_vio=None),
        train(1000, lm_loss=float("nan"), seconds_left=float("inf")),
    ])  # fmt: skip
    bars = [[i for i, letter in enumerate(line) if letter == "|"] for line in lines]
    assert bars[0] == bars[1] == bars[2]
    assert "loss      nan" in lines[2]
    assert "loss        -" in lines[1]


def test_skipped_steps_show():
    [line] = piped([train(20, skipped_steps=3)])
    assert line.endswith("| skipped 3")


def test_dense_model_without_mtp():
    record = train(20)
    del record["mtp_loss"], record["max_vio"]
    [line] = piped([record])
    assert "mtp" not in line
    assert "maxvio" not in line


def test_validation_and_resume_lines():
    resumed, best, worse = piped([
        {"kind": "run", "step": 40, "tokens": 81920, "layout": "TP2 PP1"},
        validation(60, **{"loss/code": 3.5, "loss/books": 4.25}),
        validation(80, is_best=False),
    ])  # fmt: skip
    assert resumed.endswith("resumed after step 40, 81,920 tokens, TP2 PP1")
    assert best.endswith(
        "step   60/1000 | validation loss 4.0000 | perplexity 54.60 | best so far | "
        "by source, loss (perplexity): code 3.500 (33.1), books 4.250 (70.1)"
    )
    assert worse.endswith("validation loss 4.0000 | perplexity 54.60")


def test_fresh_start_is_not_a_resume():
    assert piped([{"kind": "run", "step": 0, "tokens": 0, "layout": "TP1"}]) == []


# Terminal


def test_bar_on_a_terminal():
    screen = Console(file=io.StringIO(), force_terminal=True, width=100)
    with ConsoleSink(1000, first_step=100, console=screen) as sink:
        sink.step_done(101)
        sink.write(train(250))
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.file.getvalue())
    last = text.rstrip().splitlines()[-2:]
    assert "250/1000" in last[0]
    assert "25%" in last[0]
    assert "0:12:34 left" in last[0]
    assert "loss 8.3171" in last[1]
    assert "12,346 tok/s" in last[1]
    assert "mfu 41.2%" in last[1]
    assert max(len(line) for line in last) <= 100
    assert screen.file.getvalue().rstrip().endswith("\x1b[?25h")  # the cursor is back


def test_narrow_terminal_does_not_wrap():
    screen = Console(file=io.StringIO(), force_terminal=True, width=60)
    with ConsoleSink(1000, console=screen) as sink:
        sink.write(train(250))
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.file.getvalue()).rstrip().splitlines()
    assert "step" in lines[-2]
    assert lines[-1].startswith("loss 8.3171")
    assert len(lines[-1]) <= 60


TERMINAL_RUN = """
import logging, warnings
from megads.log import setup_logging
from megads.train.console import ConsoleSink
setup_logging()
log = logging.getLogger("megads.train.loop")
with ConsoleSink(50) as sink:
    for step in range(1, 51):
        sink.step_done(step)
        if step == 25:
            log.info("half of it is done")
"""


def test_log_lines_appear_above_the_bar_on_a_real_terminal():
    """Under a pseudo-terminal, as a person sees it: the line is whole and the bar is below it."""
    master, slave = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-c", TERMINAL_RUN],
        stdout=slave, stderr=slave, stdin=slave,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "30"},
    )  # fmt: skip
    os.close(slave)
    output = b""
    while True:
        try:
            chunk = os.read(master, 65536)
        except OSError:  # Linux says so when the child's end is closed
            break
        if not chunk:
            break
        output += chunk
    os.close(master)
    assert child.wait() == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output.decode())
    assert re.search(r"INFO +half of it is done", text)
    assert text.index("half of it is done") < text.index("50/50")


# Log


def test_other_ranks_only_warn():
    stream = io.StringIO()
    setup_logging(3, stream=stream)
    log = logging.getLogger("megads.data")
    log.info("not shown")
    log.warning("shown")
    [line] = stream.getvalue().splitlines()
    assert line.endswith("WARNING [rank 3] shown")


def test_rank_comes_from_torchrun(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "2")
    stream = io.StringIO()
    setup_logging(stream=stream)
    logging.getLogger("megads").warning("careful")
    assert "[rank 2] careful" in stream.getvalue()


def test_each_library_warning_is_shown_once_on_rank_0():
    stream = io.StringIO()
    setup_logging(0, stream=stream)
    for _ in range(3):
        warnings.warn("old\n  style", DeprecationWarning, stacklevel=1)
        logging.getLogger("some.library").warning("slow path")
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2
    assert "DeprecationWarning: old style" in lines[0]
    assert lines[1].endswith("slow path")


def test_library_warnings_go_to_the_file_where_there_is_one(tmp_path):
    stream, file = io.StringIO(), tmp_path / "logs" / "rank0.log"
    setup_logging(0, stream=stream, log_file=file)
    warnings.warn("old style", UserWarning, stacklevel=1)
    logging.getLogger("some.library").error("broken")
    logging.getLogger("megads").info("step 1")
    shown, written = stream.getvalue(), file.read_text()
    assert "old style" not in shown
    assert "broken" in shown
    assert "step 1" in shown
    assert all(text in written for text in ("old style", "broken", "step 1"))


def test_log_file_is_appended_to_and_second_setup_replaces_the_first(tmp_path):
    file = tmp_path / "rank0.log"
    first, second = io.StringIO(), io.StringIO()
    setup_logging(0, stream=first, log_file=file)
    logging.getLogger("megads").info("one")
    setup_logging(0, stream=second, log_file=file)
    logging.getLogger("megads").info("two")
    assert "two" not in first.getvalue()
    assert second.getvalue().count("two") == 1
    assert [line.split()[-1] for line in file.read_text().splitlines()] == ["one", "two"]


def test_only_rank_0_draws_on_a_terminal(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TERM", "xterm")
    setup_logging(1, stream=Terminal())
    assert terminal_console() is None
    setup_logging(0, stream=Terminal())
    assert terminal_console() is not None
    monkeypatch.setenv("TERM", "dumb")
    setup_logging(0, stream=Terminal())
    assert terminal_console() is None


def test_log_needs_no_torch_and_a_pipe_needs_no_rich():
    code = (
        "import sys, megads.log; megads.log.setup_logging(); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'rich')))"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=False).returncode == 0


# Numbers


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (950, "950"), (12_300, "12.3K"), (999_999, "1M"), (999_400, "999K"), (4_560_000, "4.56M"),
     (14.8e12, "14.8T"), (671e9, "671B")],
)  # fmt: skip
def test_format_count(number: float, text: str):
    assert format_count(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00:00"), (65.4, "0:01:05"), (3599.6, "1:00:00"), (172_799, "47:59:59"), (266_400, "3d02h"),
     (float("inf"), "?")],
)  # fmt: skip
def test_format_seconds(seconds: float, text: str):
    assert format_seconds(seconds) == text


def test_a_log_that_cannot_be_written_is_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EnvironmentSetupError, match=r"file/rank0.log cannot be written: .*output_dir"):
        setup_logging(0, log_file=tmp_path / "file" / "rank0.log")
