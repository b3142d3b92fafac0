"""Logging of one process of a job: set up once, by `setup_logging`, before anything else speaks.

What a person reads is the console of rank 0: our own messages, colored on a terminal, one plain line
each (time, level, text) when the output is a file or a pipe. Other ranks show our warnings and errors
only, with their rank in the line. Warnings of libraries, `warnings.warn` included, do not crowd the
console: they go to the log file if there is one, and otherwise rank 0 shows each distinct one once.
Errors are always shown. Output that libraries print without `logging` or `warnings` is not caught.
"""

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from megads.errors import EnvironmentSetupError

if TYPE_CHECKING:
    from rich.console import Console

OUR_LOGGER = "megads"
LINE = "%(asctime)s %(levelname)-7s %(message)s"
TIME = "%Y-%m-%d %H:%M:%S"

_console: "Console | None" = None


def setup_logging(
    rank: int | None = None, *, log_file: str | Path | None = None, stream: TextIO | None = None
) -> None:
    """Send our log to `stream` (default: stdout) and everything, libraries too, to `log_file`.

    `rank` defaults to torchrun's RANK. `log_file` is appended to, so that a resumed run keeps its
    history; give each rank its own. A second call replaces the first. Raises EnvironmentSetupError where it
    cannot be written.
    """
    global _console
    rank = int(os.environ.get("RANK", "0")) if rank is None else rank
    stream = sys.stdout if stream is None else stream
    _console = _open_console(stream) if rank == 0 and stream.isatty() else None
    if _console is not None and _console.is_dumb_terminal:
        _console = None

    handlers = [_console_handler(rank, stream, libraries_have_a_file=log_file is not None)]
    if log_file is not None:
        handlers.append(_file_handler(Path(log_file), rank))
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()
    for handler in handlers:
        root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger(OUR_LOGGER).setLevel(logging.INFO)
    warnings.formatwarning = _one_line_warning
    logging.captureWarnings(True)


def terminal_console() -> "Console | None":
    """The rich console that our log goes to; None when this process has no terminal to draw on.

    A progress bar must use this one, so that log lines appear above the bar and not through it.
    """
    return _console


class _ConsoleFilter(logging.Filter):
    """Lets through what a person at the console should see."""

    def __init__(self, rank: int, libraries_have_a_file: bool) -> None:
        super().__init__()
        self.least_of_ours = logging.INFO if rank == 0 else logging.WARNING
        self.shows_library_warnings = rank == 0 and not libraries_have_a_file
        self.seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name == OUR_LOGGER or record.name.startswith(OUR_LOGGER + "."):
            return record.levelno >= self.least_of_ours
        if record.levelno >= logging.ERROR:
            return True
        message = record.getMessage()
        if not self.shows_library_warnings or message in self.seen:
            return False
        self.seen.add(message)
        return True


def _console_handler(rank: int, stream: TextIO, libraries_have_a_file: bool) -> logging.Handler:
    handler: logging.Handler
    if _console is not None:
        from rich.logging import RichHandler

        handler = RichHandler(
            console=_console, show_path=False, omit_repeated_times=False, log_time_format="%H:%M:%S"
        )
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler(stream)
        handler.setFormatter(_formatter(rank))
    handler.addFilter(_ConsoleFilter(rank, libraries_have_a_file))
    return handler


def _file_handler(path: Path, rank: int) -> logging.Handler:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(path, encoding="utf-8")
    except OSError as error:
        raise EnvironmentSetupError(
            f"the log {path} cannot be written: {error.strerror}. A run writes below its output_dir: give "
            "one that is a directory of yours, with space"
        ) from error
    handler.setFormatter(_formatter(rank))
    return handler


def _formatter(rank: int) -> logging.Formatter:
    return logging.Formatter(
        LINE if rank == 0 else LINE.replace(" %(message)s", f" [rank {rank}] %(message)s"), TIME
    )


def _open_console(stream: TextIO) -> "Console":
    # Rich costs tens of milliseconds to import, which a piped run need not pay.
    from rich.console import Console

    return Console(file=stream)


def _one_line_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    text = " ".join(str(message).split())
    return f"{category.__name__}: {text} ({filename}:{lineno})"
