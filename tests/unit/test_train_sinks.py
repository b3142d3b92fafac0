"""Each sink writes every record once, also over a crash and a resume."""

import io
import json
import logging
import math
import resource
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from megads.config.schema import Config
from megads.errors import EnvironmentSetupError
from megads.train.sinks import (
    JsonLinesSink,
    Sinks,
    TensorBoardSink,
    open_sinks,
    read_records,
    scalars,
)


def train(step: int, **values: Any) -> dict[str, Any]:
    return {"kind": "train", "step": step, "tokens": step * 100, "lm_loss": 8.0 / step, **values}


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


# metrics.jsonl


def test_lines_are_on_disk_at_once(tmp_path: Path):
    path = tmp_path / "new" / "metrics.jsonl"
    sink = JsonLinesSink(path, resumed_step=0)
    sink.write(train(1))
    assert [json.loads(line) for line in path.read_text().splitlines()] == [train(1)]
    sink.write(train(2, lm_loss=0.1 + 0.2, bad=math.nan))
    second = list(read_records(path))[1]
    assert second["lm_loss"].hex() == (0.1 + 0.2).hex()
    assert second["bad"] is None
    sink.close()


def test_resume_has_each_step_once(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    sink = JsonLinesSink(path, 0)
    for step in range(1, 8):
        sink.write(train(step, attempt=1))
    sink.close()
    sink = JsonLinesSink(path, resumed_step=4)
    sink.write({"kind": "run", "step": 4, "tokens": 400})
    for step in range(5, 9):
        sink.write(train(step, attempt=2))
    sink.close()
    records = [record for record in read_records(path) if record["kind"] == "train"]
    assert [(record["step"], record["attempt"]) for record in records] == [
        (1, 1), (2, 1), (3, 1), (4, 1), (5, 2), (6, 2), (7, 2), (8, 2)
    ]  # fmt: skip
    assert steps(tmp_path / "metrics.superseded.jsonl") == [5, 6, 7]


def test_line_torn_by_a_crash_is_cut(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(train(1)) + "\n" + json.dumps(train(2))[:-5])
    assert [record["step"] for record in read_records(path)] == [1]
    sink = JsonLinesSink(path, resumed_step=5)
    sink.write(train(6))
    sink.close()
    assert steps(path) == [1, 6]


def test_fresh_run_in_a_used_directory_keeps_the_old_numbers_aside(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    sink = JsonLinesSink(path, 0)
    sink.write({"kind": "run", "step": 0, "tokens": 0})
    sink.write(train(1))
    sink.close()
    JsonLinesSink(path, resumed_step=0).close()
    assert path.read_bytes() == b""
    assert steps(tmp_path / "metrics.superseded.jsonl") == [0, 1]


def test_nothing_to_cut_leaves_the_file_alone(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(train(1)) + "\n")
    inode = path.stat().st_ino
    JsonLinesSink(path, resumed_step=1).close()
    assert path.stat().st_ino == inode
    assert list(tmp_path.iterdir()) == [path]


def test_full_disk_leaves_no_half_line(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    sink = JsonLinesSink(path, 0)
    sink.write(train(1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, hard))
    try:
        with pytest.raises(OSError, match="no space"):
            sink.write(train(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    sink.write(train(3))
    sink.close()
    assert steps(path) == [1, 3]


# TensorBoard


def curves(directory: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(directory))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_curves(tmp_path: Path):
    sink = TensorBoardSink(tmp_path, 0)
    sink.write({"kind": "run", "step": 0, "tokens": 0, "layout": "TP1"})
    sink.write(train(10, max_vio_by_layer=[0.5, None, 1.5]))
    sink.write({"kind": "validation", "step": 10, "tokens": 1000, "loss": 2.0, "is_best": True})
    sink.close()
    assert curves(tmp_path) == {
        "train/tokens": [(10, 1000.0)],
        "train/lm_loss": [(10, pytest.approx(0.8))],
        "train/perplexity": [(10, pytest.approx(math.exp(0.8)))],
        "train_by_layer/max_vio/000": [(10, 0.5)],
        "train_by_layer/max_vio/002": [(10, 1.5)],
        "validation/tokens": [(10, 1000.0)],
        "validation/loss": [(10, 2.0)],
    }


def test_tensorboard_shows_the_load_of_experts(tmp_path: Path):
    sink = TensorBoardSink(tmp_path, 0)
    sink.write({
        "kind": "experts", "step": 10, "tokens": 9, "load_by_layer": [[0.25] * 4, [0.0, 0.0, 0.125, 0.875]],
    })  # fmt: skip
    sink.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    [event] = events.Images("experts/load")
    grey = np.asarray(PIL.Image.open(io.BytesIO(event.encoded_image_string)).convert("L"))
    assert event.step == 10
    assert grey.tolist() == [[127] * 4, [0, 0, 63, 255]]


def test_tensorboard_forgets_what_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # Files of one second and process are read by these numbers, as texts.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    for resumed_step, last, loss in ((0, 7, 1.0), (4, 9, 2.0)):
        sink = TensorBoardSink(tmp_path, resumed_step)
        for step in range(resumed_step + 1, last + 1):
            sink.write(train(step, lm_loss=loss))
        sink.close()
    assert curves(tmp_path)["train/lm_loss"] == [(step, 1.0 if step <= 4 else 2.0) for step in range(1, 10)]


# Weights & Biases, with a stand-in for the package


class FakeRun:
    def __init__(self, run_id: str) -> None:
        self.id = run_id
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.summary: dict[str, Any] = {}
        self.finished = False

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished = True


def fake_wandb(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, Any], FakeRun]]:
    started: list[tuple[dict[str, Any], FakeRun]] = []

    def init(**arguments: Any) -> FakeRun:
        run = FakeRun(arguments["id"] or f"made-{len(started)}")
        started.append((arguments, run))
        return run

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))  # type: ignore[arg-type]
    return started


def wandb_config(tmp_path: Path) -> Config:
    return Config.model_validate({
        "experiment_name": "exp",
        "output_dir": str(tmp_path / "out"),
        "logging": {
            "wandb": {"enabled": True, "project": "p", "tags": ["a"]},
            "tensorboard": {"enabled": False},
        },
    })  # fmt: skip


def test_wandb_gets_every_record_and_a_resume_continues_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    started = fake_wandb(monkeypatch)
    config = wandb_config(tmp_path)
    for resumed_step in (0, 5):
        sinks = open_sinks(config, tensorboard_dir="unused", resumed_step=resumed_step)
        sinks.write({"kind": "run", "step": resumed_step, "tokens": 0, "layout": "TP1"})
        sinks.write(train(resumed_step + 5))
        sinks.close()
    (first, first_run), (second, second_run) = started
    assert (first["project"], first["name"], first["tags"], first["id"]) == ("p", "exp", ["a"], None)
    assert first["config"]["training"]["learning_rate"] == config.training.learning_rate
    assert second["id"] == first_run.id == "made-0"
    perplexity = pytest.approx(math.exp(1.6))
    assert first_run.logged == [
        (5, {"train/tokens": 500.0, "train/lm_loss": 1.6, "train/perplexity": perplexity})
    ]
    assert first_run.summary["run/layout"] == "TP1"
    assert second_run.finished


def test_wandb_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(EnvironmentSetupError, match=r"pip install megads\[wandb\]"):
        open_sinks(wandb_config(tmp_path), tensorboard_dir="unused", resumed_step=0)


def test_wandb_that_cannot_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def init(**_: Any) -> None:
        raise RuntimeError("no API key")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))  # type: ignore[arg-type]
    with pytest.raises(EnvironmentSetupError, match=r"no API key.*WANDB_MODE=offline"):
        open_sinks(wandb_config(tmp_path), tensorboard_dir="unused", resumed_step=0)


def test_tensorboard_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(EnvironmentSetupError, match=r"logging\.tensorboard\.enabled"):
        TensorBoardSink(tmp_path, 0)


# All together


def test_open_sinks_follows_the_config(tmp_path: Path):
    config = Config.model_validate({"output_dir": str(tmp_path / "out")})
    sinks = open_sinks(config, tensorboard_dir=str(tmp_path / "tb"), resumed_step=0)
    sinks.write(train(3))
    sinks.close()
    assert steps(tmp_path / "out" / "metrics.jsonl") == [3]
    assert curves(tmp_path / "tb")["train/tokens"] == [(3, 300.0)]


def test_failing_sink_is_reported_once_and_training_goes_on(caplog: pytest.LogCaptureFixture):
    class Failing:
        broken = True

        def write(self, record: dict[str, Any]) -> None:
            if self.broken:
                raise OSError("disk full")

        def close(self) -> None:
            raise OSError("still full")

    class Collecting:
        def __init__(self) -> None:
            self.records: list[dict[str, Any]] = []
            self.closed = False

        def write(self, record: dict[str, Any]) -> None:
            self.records.append(record)

        def close(self) -> None:
            self.closed = True

    failing, collecting = Failing(), Collecting()
    sinks = Sinks([failing, collecting])
    with caplog.at_level(logging.WARNING):
        for step in (1, 2):
            sinks.write(train(step))
        assert [record.getMessage() for record in caplog.records] == [
            "Failing could not write step 1, training goes on: disk full"
        ]
        failing.broken = False
        sinks.write(train(3))
        failing.broken = True
        sinks.write(train(4))
        sinks.close()
    assert [record["step"] for record in collecting.records] == [1, 2, 3, 4]
    assert collecting.closed
    assert [record.getMessage() for record in caplog.records[1:]] == [
        "Failing could not write step 4, training goes on: disk full",
        "Failing could not be closed: still full",
    ]


def test_losses_bring_their_perplexities():
    tags = dict(scalars({"kind": "validation", "step": 1, "loss/code": 2.0, "load_by_layer": [[0.5, 0.5]]}))
    assert tags == {"validation/loss/code": 2.0, "validation/perplexity/code": pytest.approx(math.exp(2))}


def test_scalars_pass_on_nan_and_leave_out_the_unknown():
    tags = dict(scalars({"kind": "train", "step": 1, "lm_loss": math.nan, "grad_norm": None, "flag": True}))
    assert list(tags) == ["train/lm_loss", "train/perplexity"]
    assert math.isnan(tags["train/perplexity"])
    assert math.isnan(tags["train/lm_loss"])
