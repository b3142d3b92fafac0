"""`metrics.jsonl` to columns, in one pass and in memory that hardly depends on the number of layers.

A run may be writing the file: a half-written last line is left out. Lines that are no records are
counted. Values by layer are averaged into at most `HEAT_COLUMNS` columns while reading, and of the big
records of kind `experts` only `EXPERT_FRAMES` are parsed. The kinds of records are those of docs/metrics.md.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from megads.errors import DataError

METRICS_FILE = "metrics.jsonl"
SUPERSEDED_FILE = "metrics.superseded.jsonl"
ROWS_AT_ONCE = 2048
HEAT_COLUMNS = 300
EXPERT_FRAMES = 16
BY_LAYER = "_by_layer"
EXPERTS_PREFIX = b'{"kind":"experts"'  # records are written with their kind first

Record = dict[str, Any]
Floats = NDArray[np.float64]


class Table:
    """Records of one kind as columns of one length; what a record lacks, or has as null, is NaN.

    Rows are turned into columns many at a time, as long as records have the same fields.
    """

    def __init__(self) -> None:
        self._pieces: dict[str, list[tuple[int, Floats]]] = {}
        self._fields: list[str] = []
        self._numbers: list[str] = []
        self._pending: list[list[Any]] = []
        self.rows = 0

    def add(self, record: Record) -> None:
        """Append the numbers of a record."""
        fields = list(record)
        if fields != self._fields:
            self._flush()
            self._fields = fields
            self._numbers = [name for name, value in record.items() if type(value) in (int, float, NoneType)]
        self._pending.append([record[name] for name in self._numbers])
        self.rows += 1
        if len(self._pending) == ROWS_AT_ONCE:
            self._flush()

    def _flush(self) -> None:
        if not self._pending:
            return
        try:
            values = np.array(self._pending, dtype=np.float64)
        except (TypeError, ValueError):  # a field that was a number is none in some row
            numbers = (int, float)
            plain = [[v if type(v) in numbers else None for v in row] for row in self._pending]
            values = np.array(plain, dtype=np.float64)
        for i, name in enumerate(self._numbers):
            self._put(name, self.rows - len(self._pending), values[:, i])
        self._pending.clear()

    def _put(self, name: str, row: int, values: Floats) -> None:
        if np.isfinite(values).any():
            self._pieces.setdefault(name, []).append((row, values))

    @property
    def names(self) -> list[str]:
        """Of the columns that have a finite value, in the order of their first one."""
        self._flush()
        return list(self._pieces)

    def column(self, name: str) -> Floats:
        """The values of a field, `[rows]`; all NaN where no record has it."""
        self._flush()
        whole = np.full(self.rows, math.nan)
        for row, values in self._pieces.get(name, ()):
            whole[row : row + len(values)] = values
        return whole

    def append(self, other: "Table", offsets: Mapping[str, float]) -> None:
        """Append the rows of another table, with `offsets` added to its columns of these names."""
        self._flush()
        for name in other.names:
            self._put(name, self.rows, other.column(name) + offsets.get(name, 0.0))
        self.rows += other.rows


@dataclass
class HeatMap:
    """Values by layer and time, `values` of shape [layers, columns]; a column is the mean of some records."""

    step: list[float] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)
    columns: list[Floats] = field(default_factory=list)

    def values(self) -> Floats:
        """[layers, columns]; NaN where a layer was unknown."""
        layers = max(len(column) for column in self.columns)
        padded = np.full((layers, len(self.columns)), math.nan)
        for i, column in enumerate(self.columns):
            padded[: len(column), i] = column
        return padded


@dataclass
class Metrics:
    """What a run has written so far."""

    train: Table = field(default_factory=Table)
    validation: Table = field(default_factory=Table)
    runs: list[Record] = field(default_factory=list)
    events: list[Record] = field(default_factory=list)
    experts: list[Record] = field(default_factory=list)
    heat: dict[str, HeatMap] = field(default_factory=dict)
    last: Record = field(default_factory=dict)
    """The last training record."""
    damaged_lines: int = 0
    borders: list[tuple[str, float, float]] = field(default_factory=list)
    """(name, step, tokens) where stages begin, for a run that has them."""


def read_metrics(path: Path) -> Metrics:
    """All records of a `metrics.jsonl`. Raises DataError when it cannot be read or holds no record."""
    metrics = Metrics()
    try:
        with path.open("rb") as file:
            lines = sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(1 << 22), b""))
            file.seek(0)
            _read_lines(metrics, file, lines)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    if not (metrics.runs or metrics.train.rows or metrics.validation.rows):
        damage = f"; {metrics.damaged_lines} lines are no records" if metrics.damaged_lines else ""
        raise DataError(f"{path} holds no record of a run{damage}: is it the metrics.jsonl of a MegaDS run?")
    return metrics


def _read_lines(metrics: Metrics, file: Any, lines: int) -> None:
    layers = _Layers(metrics.heat, records_per_column=max(1, math.ceil(lines / HEAT_COLUMNS)))
    expert_offsets: list[tuple[int, int]] = []
    offset = 0
    for _ in range(lines):
        line = file.readline()
        if _is_of_experts(line):
            expert_offsets.append((offset, len(line)))
        elif (record := parse(line)) is None:
            metrics.damaged_lines += 1
        else:
            _sort_in(metrics, layers, record)
        offset += len(line)
    layers.flush()
    for begin, length in _spread(expert_offsets, EXPERT_FRAMES):
        file.seek(begin)
        record = parse(file.read(length))
        if record is None or not _is_matrix(record.get("load" + BY_LAYER)):
            metrics.damaged_lines += 1
        else:
            metrics.experts.append(record)


def _sort_in(metrics: Metrics, layers: "_Layers", record: Record) -> None:
    kind = record["kind"]
    if kind == "train":
        metrics.train.add(record)
        layers.add(record)
        metrics.last = record
    elif kind == "validation":
        metrics.validation.add(record)
    elif kind == "run":
        metrics.runs.append(record)
    else:  # events, and kinds that a later version may write: shown as they are
        metrics.events.append(record)


def parse(line: bytes) -> Record | None:
    """The record on a line; None for anything that is not a whole one."""
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        return None
    step, tokens = record.get("step"), record.get("tokens", 0)
    return record if type(step) is int and type(tokens) in (int, float) else None


class _Layers:
    """Averages the lists of training records over runs of records, into `heat`."""

    def __init__(self, heat: dict[str, HeatMap], records_per_column: int) -> None:
        self._heat, self._most = heat, records_per_column
        self._fields: list[str] = []
        self._lists: list[str] = []
        self._rows: dict[str, list[list[float | None]]] = {}
        self._at: list[tuple[float, float]] = []

    def add(self, record: Record) -> None:
        """Take in the lists of a record."""
        self._at.append((record["step"], record.get("tokens", 0)))
        fields = list(record)
        if fields != self._fields:
            self._fields, self._lists = fields, [name for name in record if type(record[name]) is list]
        for name in self._lists:
            self._rows.setdefault(name, []).append(record[name])
        if len(self._at) >= self._most:
            self.flush()

    def flush(self) -> None:
        """Close the current column."""
        for name, rows in self._rows.items():
            means = _means(rows)
            if means is not None:
                heat = self._heat.setdefault(name, HeatMap())
                heat.columns.append(means)
                heat.step.append(float(np.mean([step for step, _ in self._at])))
                heat.tokens.append(float(np.mean([tokens for _, tokens in self._at])))
        self._rows.clear()
        self._at.clear()


def _means(rows: list[list[float | None]]) -> Floats | None:
    """Means over the rows, entries that are None left out; None where the rows are not lists of numbers."""
    try:
        width = max(len(row) for row in rows)
        values = np.array([row + [None] * (width - len(row)) for row in rows], dtype=np.float64)
    except (TypeError, ValueError):
        return None
    known = np.isfinite(values)
    if values.ndim != 2 or not width:
        return None
    sums, counts = np.where(known, values, 0).sum(axis=0), known.sum(axis=0)
    return np.where(counts > 0, sums / np.maximum(counts, 1), math.nan)


def _is_matrix(rows: Any) -> bool:
    try:
        return np.array(rows, dtype=np.float64).ndim == 2
    except (TypeError, ValueError):
        return False


def _spread[T](items: Sequence[T], most: int) -> list[T]:
    """At most `most` of the items, evenly, the last one included."""
    if len(items) <= most:
        return list(items)
    return [items[i] for i in sorted({round(i * (len(items) - 1) / (most - 1)) for i in range(most)})]


def read_superseded(path: Path) -> list[list[Record]]:
    """Branches that the run has left, each in order: what was logged after a checkpoint it went back to.

    An earlier run in the same directory, which the file keeps as well, begins with a run record of step 0;
    it is no branch of this run.
    """
    branches: list[list[Record]] = []
    try:
        with path.open("rb") as file:
            for record in _ordered(file):
                if not branches or record["step"] < branches[-1][-1]["step"]:
                    branches.append([])
                branches[-1].append(record)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    foreign = [i for i, branch in enumerate(branches) if any(_begins_a_run(record) for record in branch)]
    return branches[foreign[-1] + 1 :] if foreign else branches


def _begins_a_run(record: Record) -> bool:
    return bool(record["kind"] == "run" and record["step"] == 0)


def _ordered(lines: Iterable[bytes]) -> Iterator[Record]:
    for line in lines:
        if not _is_of_experts(line) and (record := parse(line)) is not None:
            yield record


def _is_of_experts(line: bytes) -> bool:
    return line[: 2 * len(EXPERTS_PREFIX)].replace(b" ", b"").startswith(EXPERTS_PREFIX)
