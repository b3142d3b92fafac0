"""What a person sees while a run trains: a progress bar on a terminal, aligned lines elsewhere.

The lines are made for `grep` and `awk`: one per record, fields divided by " | ", each with its name
in front, the same width every time. They go through our logger, so they carry the time.
"""

import logging
import math
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from megads.log import terminal_console
from megads.train.metrics import Record, perplexity

if TYPE_CHECKING:
    from rich.console import Console

logger = logging.getLogger(__name__)

# Losses of a training record that the console shows, with their short names.
LOSSES = {"lm_loss": "loss", "mtp_loss": "mtp", "aux_loss": "aux"}


class ConsoleSink:
    """Shows records to a person. `step_done` moves the bar between log intervals.

    `console` is the terminal to draw on; by default the one `setup_logging` found, if any.
    """

    def __init__(self, train_steps: int, *, first_step: int = 0, console: "Console | None" = None) -> None:
        self._train_steps = train_steps
        console = terminal_console() if console is None else console
        self._bar = None if console is None else _Bar(console, train_steps, first_step)

    def step_done(self, step: int) -> None:
        """Show that `step` optimizer steps are done."""
        if self._bar is not None:
            self._bar.advance(step)

    def write(self, record: Record) -> None:
        """Show a record; on a terminal training records live in the bar, others stay as lines."""
        if record["kind"] == "train":
            if self._bar is None:
                logger.info(train_line(record, self._train_steps))
            else:
                self._bar.show(record)
        elif record["kind"] == "validation":
            logger.info(validation_line(record, self._train_steps))
        elif record["kind"] == "run" and record["step"]:
            logger.info(
                "resumed after step %s, %s tokens, %s",
                record["step"],
                f"{record['tokens']:,}",
                record["layout"],
            )

    def close(self) -> None:
        """Leave the terminal as it was found; the bar stays as its last state."""
        if self._bar is not None:
            self._bar.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Bar:
    """Two rows at the bottom of the terminal: progress and time left; the last record's numbers."""

    def __init__(self, console: "Console", train_steps: int, first_step: int) -> None:
        # Imported here: a piped run pays nothing for rich.
        from rich.console import Group
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.text import Text

        self._progress = Progress(
            TextColumn("[bold]step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[left]}"),
            console=console,
            expand=True,
        )
        self._task = self._progress.add_task("", total=train_steps, completed=first_step, left="")
        self._numbers = Text("", overflow="ellipsis", no_wrap=True)
        self._live = Live(Group(self._progress, self._numbers), console=console, refresh_per_second=4)
        self._live.start()

    def advance(self, step: int) -> None:
        self._progress.update(self._task, completed=step)

    def show(self, record: Record) -> None:
        left = f"{format_seconds(record['seconds_left'])} left"
        self._progress.update(self._task, completed=record["step"], left=left)
        self._numbers.plain = ""
        for name, text in train_fields(record):
            if name:
                self._numbers.append(f"{name} ", style="dim")
            self._numbers.append(text.strip() + "  ")

    def stop(self) -> None:
        self._live.stop()


def train_fields(record: Record) -> list[tuple[str, str]]:
    """(name, value) pairs of a training record, each value of a fixed width; names may be empty."""
    fields = [(short, _number(record[name], 8, 4)) for name, short in LOSSES.items() if name in record]
    fields.append(("lr", f"{record['learning_rate']:.2e}"))
    if "grad_norm" in record:
        fields.append(("grad", _number(record["grad_norm"], 7, 3)))
    if "max_vio" in record:
        fields.append(("maxvio", _number(record["max_vio"], 5, 2)))
    fields.append(("", f"{record['tokens_per_second']:>9,.0f} tok/s"))
    fields.append(("mfu", f"{100 * record['mfu']:>5.1f}%"))
    return fields


def train_line(record: Record, train_steps: int) -> str:
    """One log interval on one line."""
    fields = [f"{name} {text}" if name else text for name, text in train_fields(record)]
    fields.append(f"left {format_seconds(record['seconds_left']):>8}")
    if record["skipped_steps"]:
        fields.append(f"skipped {record['skipped_steps']}")
    return " | ".join([_step(record, train_steps), *fields])


def validation_line(record: Record, train_steps: int) -> str:
    """One evaluation on one line, sources at the end."""
    sources = [
        f"{key.removeprefix('loss/')} {_number(record[key], 1, 3)} ({_number(perplexity(record[key]), 1, 1)})"
        for key in record
        if key.startswith("loss/")
    ]
    fields = [
        _step(record, train_steps),
        f"validation loss {_number(record['loss'], 1, 4)}",
        f"perplexity {_number(record['perplexity'], 1, 2)}",
        *(["best so far"] if record["is_best"] else []),
        *(["by source, loss (perplexity): " + ", ".join(sources)] if sources else []),
    ]
    return " | ".join(fields)


def format_count(number: float) -> str:
    """A count in at most five characters, as 950, 12.3K, 4.56M, 14.8T."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        # Half a unit of the third digit early, so that 999,999 is 1M and not 1000K.
        if number >= size * 0.9995:
            return f"{number / size:.3g}{letter}"
    return f"{number:.0f}"


def format_seconds(seconds: float) -> str:
    """Hours, minutes and seconds, as 0:01:05; days in front when there are any, as 3d02h."""
    if not math.isfinite(seconds):
        return "?"
    whole = round(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    if hours >= 48:
        return f"{hours // 24}d{hours % 24:02d}h"
    return f"{hours}:{minutes:02d}:{whole % 60:02d}"


def _step(record: Record, train_steps: int) -> str:
    return f"step {record['step']:>{len(str(train_steps))}}/{train_steps}"


def _number(value: Any, width: int, digits: int) -> str:
    """`value` with so many digits behind the point; a dash for a value that nobody knows."""
    return f"{'-':>{width}}" if value is None else f"{value:>{width}.{digits}f}"
