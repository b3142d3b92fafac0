"""The directory of a run: its metrics, the configuration saved beside them, and whether it still runs."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from megads.errors import DataError
from megads.report.read import (
    METRICS_FILE,
    SUPERSEDED_FILE,
    Floats,
    HeatMap,
    Metrics,
    Record,
    read_metrics,
    read_superseded,
)

SAVED_FILE, SAVED_CONFIG = "run.json", "config.json"
LEASE = Path("checkpoints", ".lease")
SILENT_INTERVALS = 10
"""A run that has been silent for so many log intervals is not taken for a running one."""
LEAST_SILENCE_SECONDS = 180.0
COUNTS = {
    "step": "step", "train_steps": "step", "from_step": "step", "first_bad_step": "step",
    "tokens": "tokens", "total_tokens": "tokens", "wall_seconds": "wall_seconds",
    "total_flops": "total_flops",
}  # fmt: skip
"""Fields that begin at 0 in each stage of a run, with the field whose end they continue at."""


@dataclass
class Run:
    """What is known of a run, or of its stages as one run."""

    directory: Path
    metrics: Metrics
    branches: list[list[Record]]
    """What was logged and then superseded, by a rollback or a resume from an earlier checkpoint."""
    saved: dict[str, Any]
    """Configuration and provenance as `config.show.record` saved them; empty if they are not there."""
    notices: list[str]
    """What a reader must know about the input."""
    written_unix_seconds: float
    read_unix_seconds: float

    @property
    def name(self) -> str:
        """The experiment's name, else the directory's."""
        named = self.saved.get("config", {}).get("experiment_name")
        if named and self.metrics.borders:
            named = named.removesuffix(f"/{self.metrics.borders[-1][0]}")
        return str(named or self.directory.resolve().name)

    @property
    def facts(self) -> Record:
        """The record of the last start or resume."""
        return self.metrics.runs[-1] if self.metrics.runs else {}

    def state(self) -> str:
        """finished, running, stopped (it let go of its checkpoints), or stale (silent, nobody knows why)."""
        last, planned = self.metrics.last, self.facts.get("train_steps")
        if planned and last.get("step", 0) >= planned:
            return "finished"
        silence = self.read_unix_seconds - self.written_unix_seconds
        if _lease_is_released(self.directory):
            return "stopped"
        interval_seconds = last.get("interval_steps", 1) * (last.get("step_seconds") or 0.0)
        usual = max(LEAST_SILENCE_SECONDS, SILENT_INTERVALS * interval_seconds)
        return "running" if silence <= usual else "stale"

    def hours(self, steps: Sequence[float] | Floats) -> Floats:
        """Training time after each of `steps`, interpolated between training records."""
        train = self.metrics.train
        seconds = train.column("wall_seconds")
        known = np.isfinite(seconds)
        if not known.any():
            return np.full(len(steps), np.nan)
        return np.interp(steps, train.column("step")[known], seconds[known]) / 3600


def load_run(directory: Path) -> Run:
    """The run that wrote into `directory`; where that holds stages, all of them as one.

    Raises DataError when there is no run, or nothing that can be read.
    """
    if not directory.is_dir():
        raise DataError(f"{directory} is not a directory: give the output_dir of a run")
    if (directory / METRICS_FILE).is_file():
        return _load_one(directory)
    stages = [path.parent for path in sorted(directory.glob(f"*/{METRICS_FILE}"))]
    if not stages:
        raise DataError(
            f"{directory} holds no {METRICS_FILE}, nor does a directory of a stage in it: give the "
            "output_dir of a run that has begun (a run writes its first line when training starts)"
        )
    return _join(directory, [_load_one(stage) for stage in _in_order(directory, stages)])


def _in_order(directory: Path, stages: list[Path]) -> list[Path]:
    """Stages as they follow one another: each starts from the checkpoints of the one before."""
    names = {stage.name for stage in stages}
    before = {stage: _stage_before(stage) for stage in stages}
    first = [stage for stage in stages if before[stage] not in names]
    after = {name: stage for stage, name in before.items()}
    ordered: list[Path] = []
    following = first[0] if len(first) == 1 else None
    while following is not None:
        ordered.append(following)
        following = after.get(following.name)
    if len(ordered) != len(stages):
        raise DataError(
            f"{directory} holds several runs, which are not the stages of one: {', '.join(sorted(names))}. "
            "Give the directory of one of them, and with --compare another"
        )
    return ordered


def _stage_before(stage: Path) -> str | None:
    """The name of the directory whose checkpoints a stage started from."""
    saved, _ = _load_saved(stage)
    start = (saved.get("config", {}).get("checkpointing") or {}).get("init_from")
    if not start:
        return None
    place = Path(start)  # .../STAGE/checkpoints/step_N; with a save_dir of the file's, SAVE_DIR/STAGE/step_N
    place = place.parent if place.name.startswith("step_") else place
    return place.parent.name if place.name == LEASE.parent.name else place.name


def _load_saved(directory: Path) -> tuple[dict[str, Any], list[str]]:
    """The saved configuration, empty where it cannot be read, and what must be said about that."""
    try:
        saved = orjson.loads((directory / SAVED_FILE).read_bytes())
    except FileNotFoundError:
        return {}, [f"{directory / SAVED_FILE} is missing: nothing is known about the configuration."]
    except (OSError, orjson.JSONDecodeError) as error:
        return {}, [f"{directory / SAVED_FILE} cannot be read ({error})."]
    whole = isinstance(saved, dict) and isinstance(saved.get("config", {}), dict)
    return (saved, []) if whole else ({}, [f"{directory / SAVED_FILE} is not what a run has saved."])


def _load_one(directory: Path) -> Run:
    path = directory / METRICS_FILE
    # The clock before the file: what is written in between must not look as if from the future.
    now = time.time()
    metrics = read_metrics(path)
    notices = []
    if metrics.damaged_lines:
        lines = "1 line is" if metrics.damaged_lines == 1 else f"{metrics.damaged_lines:,} lines are"
        notices.append(f"{lines} damaged in {path} and left out here.")
    saved, complaints = _load_saved(directory)
    notices += complaints
    if not metrics.train.rows:
        notices.append("There is no training record yet: the first comes after training.log_interval steps.")
    return Run(
        directory,
        metrics,
        read_superseded(directory / SUPERSEDED_FILE),
        saved,
        notices,
        written_unix_seconds=path.stat().st_mtime,
        read_unix_seconds=now,
    )


def _lease_is_released(directory: Path) -> bool:
    """Whether the last holder of the checkpoints let go of them: it empties the file then."""
    try:
        return (directory / LEASE).stat().st_size == 0
    except OSError:
        return False


def _join(directory: Path, stages: list[Run]) -> Run:
    """Stages one after the other, steps, tokens and time counted through."""
    joined = Metrics()
    branches: list[list[Record]] = []
    ends: Record = {}
    for stage in stages:
        metrics = stage.metrics
        offsets = {name: float(ends.get(end, 0)) for name, end in COUNTS.items()}
        joined.borders.append((stage.directory.name, offsets["step"], offsets["tokens"]))
        joined.train.append(metrics.train, offsets)
        joined.validation.append(metrics.validation, offsets)
        for into, records in (
            (joined.runs, metrics.runs),
            (joined.events, metrics.events),
            (joined.experts, metrics.experts),
        ):
            into += _shifted(records, offsets)
        branches += [_shifted(branch, offsets) for branch in stage.branches]
        for name, heat in metrics.heat.items():
            joined_heat = joined.heat.setdefault(name, HeatMap())
            joined_heat.step += [step + offsets["step"] for step in heat.step]
            joined_heat.tokens += [tokens + offsets["tokens"] for tokens in heat.tokens]
            joined_heat.columns += heat.columns
        if metrics.last:
            [joined.last] = _shifted([metrics.last], offsets)
            ends = joined.last
    last = stages[-1]
    return Run(
        directory,
        joined,
        branches,
        last.saved,
        [notice for stage in stages for notice in stage.notices],
        written_unix_seconds=last.written_unix_seconds,
        read_unix_seconds=last.read_unix_seconds,
    )


def _shifted(records: list[Record], offsets: dict[str, float]) -> list[Record]:
    """Copies of the records with `offsets` added to their counts; counts stay whole numbers."""
    return [
        record
        | {
            name: type(record[name])(record[name] + offset)
            for name, offset in offsets.items()
            if type(record.get(name)) in (int, float)
        }
        for record in records
    ]
