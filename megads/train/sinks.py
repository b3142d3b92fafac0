"""Where records go besides the console: `metrics.jsonl`, TensorBoard, Weights & Biases.

A run that was cut after its last checkpoint has logged steps that the resumed run does again. Each
sink takes care that a step counts once: the JSON lines are cut back, TensorBoard is told to forget,
Weights & Biases keeps its first value. One process of a job writes; the others have no sinks.
"""

import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import orjson

from megads.config.schema import Config
from megads.errors import EnvironmentSetupError
from megads.mcore.imports import without_packages
from megads.publish import published
from megads.train.metrics import Record, perplexity

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"


class Sink(Protocol):
    """Takes the records of a run, in order."""

    def write(self, record: Record) -> None:
        """Take one record; see `metrics` for the kinds."""

    def close(self) -> None:
        """Write out what is held back and let go of files. No record follows."""


def open_sinks(config: Config, *, tensorboard_dir: str, resumed_step: int) -> "Sinks":
    """The sinks that `config` asks for, continuing after `resumed_step` (0: a fresh run).

    Raises EnvironmentSetupError when a package is missing or a service cannot be reached.
    """
    sinks: list[Sink] = [JsonLinesSink(Path(config.output_dir) / METRICS_FILE, resumed_step)]
    if config.logging.tensorboard.enabled:
        sinks.append(TensorBoardSink(tensorboard_dir, resumed_step))
    if config.logging.wandb.enabled:
        sinks.append(WandbSink(config))
    return Sinks(sinks)


class Sinks:
    """Several sinks as one. A sink that fails later on is reported; it does not end the training."""

    def __init__(self, sinks: Iterable[Sink]) -> None:
        self._sinks = list(sinks)
        self._failing: set[int] = set()

    def write(self, record: Record) -> None:
        """Give `record` to every sink."""
        for i, sink in enumerate(self._sinks):
            try:
                sink.write(record)
                self._failing.discard(i)
            except Exception as error:  # no full disk or lost service may cost the run
                if i not in self._failing:
                    self._failing.add(i)
                    logger.warning(
                        "%s could not write step %s, training goes on: %s",
                        type(sink).__name__,
                        record["step"],
                        error,
                    )

    def close(self) -> None:
        """Close every sink, whatever happens to the others."""
        for sink in self._sinks:
            try:
                sink.close()
            except Exception as error:  # the other sinks still have to be closed
                logger.warning("%s could not be closed: %s", type(sink).__name__, error)


class JsonLinesSink:
    """One JSON object per line, on disk as soon as it is written.

    Opening cuts the file back to the records up to `resumed_step`; what is cut (and a line that a
    crash tore) is kept in `metrics.superseded.jsonl` beside it.
    """

    def __init__(self, path: str | Path, resumed_step: int) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            _cut_back(path, resumed_step)
        self._file = path.open("ab", buffering=0)

    def write(self, record: Record) -> None:
        """Append `record` in one write, so that a reader never sees half of it."""
        line = orjson.dumps(record, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE)
        end = self._file.seek(0, os.SEEK_END)
        if self._file.write(line) != len(line):
            # The disk is full. Half a line would spoil the next record as well.
            self._file.truncate(end)
            raise OSError(f"{self._file.name}: no space for another record")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_records(path: str | Path) -> Iterator[Record]:
    """The records of a `metrics.jsonl`; a torn last line is left out."""
    with Path(path).open("rb") as lines:
        for line in lines:
            record = _parse(line)
            if record is not None:
                yield record


class TensorBoardSink:
    """TensorBoard event files in `log_dir`; steps after `resumed_step` in older files are forgotten."""

    def __init__(self, log_dir: str | Path, resumed_step: int) -> None:
        # It imports the client of an object store wherever one is installed.
        unused = () if "://" in str(log_dir) else ("botocore",)
        try:
            with without_packages(*unused):
                from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise EnvironmentSetupError(
                f"logging.tensorboard.enabled needs the package tensorboard ({error}): "
                "install it, or set logging.tensorboard.enabled to false"
            ) from None
        self._writer = SummaryWriter(str(log_dir), purge_step=resumed_step + 1)

    def write(self, record: Record) -> None:
        """Add every number as a curve `kind/name`; a `run` record as text, the experts' load as an image."""
        if record["kind"] == "run":
            text = json.dumps(record, indent=2, default=str)
            self._writer.add_text("run", f"```\n{text}\n```", record["step"])
        elif record["kind"] == "experts":
            load_LE = np.array(record["load_by_layer"])
            # A row per layer, a column per expert: grey is an even share, white twice that or more.
            grey_LE = np.clip(load_LE * load_LE.shape[1] / 2, 0.0, 1.0)
            self._writer.add_image("experts/load", grey_LE, record["step"], dataformats="HW")
        else:
            for tag, value in scalars(record):
                self._writer.add_scalar(tag, value, record["step"])
        self._writer.flush()

    def close(self) -> None:
        """Write out what is held back."""
        self._writer.close()


class WandbSink:
    """Weights & Biases (`pip install megads[wandb]`); key and mode come from its own environment variables.

    The run's id lies in `output_dir/wandb_run_id`, so a resume continues the same run. Steps that are
    done again keep the values of the first time: the service cannot take values back.
    """

    def __init__(self, config: Config) -> None:
        try:
            import wandb
        except ImportError:
            raise EnvironmentSetupError(
                "logging.wandb.enabled needs the package wandb: pip install megads[wandb], "
                "or set logging.wandb.enabled to false"
            ) from None
        settings = config.logging.wandb
        id_file = Path(config.output_dir) / "wandb_run_id"
        id_file.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._run = wandb.init(
                project=settings.project,
                entity=settings.entity,
                name=settings.name or config.experiment_name,
                tags=list(settings.tags),
                config=config.model_dump(mode="json"),
                dir=config.output_dir,
                id=id_file.read_text().strip() if id_file.exists() else None,
                resume="allow",
            )
        except Exception as error:  # wandb has no common base for its errors
            raise EnvironmentSetupError(
                f"Weights & Biases could not start ({error}): set WANDB_API_KEY, or WANDB_MODE=offline, "
                "or logging.wandb.enabled to false"
            ) from error
        with published(id_file) as file:
            file.write(self._run.id.encode())

    def write(self, record: Record) -> None:
        """Log every number under `kind/name`; a `run` record goes to the run's summary.

        The load of each expert is not sent: TensorBoard and `metrics.jsonl` have it.
        """
        if record["kind"] == "run":
            self._run.summary.update(
                {f"run/{name}": value for name, value in record.items() if name != "kind"}
            )
        elif numbers := dict(scalars(record)):
            self._run.log(numbers, step=record["step"])

    def close(self) -> None:
        """Wait until everything is uploaded."""
        self._run.finish()


def scalars(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """(tag, number) pairs of a record; a list gives one tag per entry, unknown values give none.

    A loss brings its perplexity along. NaN and infinity are passed on: a curve should show where they were.
    """
    kind = record["kind"]
    for name, value in record.items():
        if name in ("kind", "step"):
            continue
        if isinstance(value, list):
            for i, entry in enumerate(value):
                if isinstance(entry, int | float):
                    yield f"{kind}_by_layer/{name.removesuffix('_by_layer')}/{i:03d}", float(entry)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{kind}/{name}", float(value)
            if name == "lm_loss":
                yield f"{kind}/perplexity", perplexity(value)
            elif name.startswith("loss/"):
                yield f"{kind}/perplexity/{name.removeprefix('loss/')}", perplexity(value)


def _cut_back(path: Path, resumed_step: int) -> None:
    """Keep the records of `path` up to `resumed_step`; append the others to the superseded ones."""
    kept: list[bytes] = []
    cut: list[bytes] = []
    for line in path.read_bytes().splitlines(keepends=True):
        record = _parse(line)
        # A fresh run has no past: even the start of the earlier run, at step 0, is not its own.
        keep = record is not None and resumed_step > 0 and record["step"] <= resumed_step
        (kept if keep else cut).append(line)
    if not cut:
        return
    with path.with_suffix(".superseded.jsonl").open("ab") as superseded:
        superseded.writelines(line.rstrip(b"\n") + b"\n" for line in cut)
    with published(path) as file:
        file.writelines(kept)


def _parse(line: bytes) -> Record | None:
    """The record on a line; None for anything that is not a whole one."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    whole = isinstance(record, dict) and isinstance(record.get("step"), int) and "kind" in record
    return record if whole else None
