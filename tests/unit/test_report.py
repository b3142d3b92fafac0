"""The report's data: what is read from whole, growing and damaged files, and what becomes of it."""

import json
import math
import os
import random
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from megads.errors import DataError, EnvironmentSetupError
from megads.report.charts import Axes, build_groups
from megads.report.page import write_report
from megads.report.read import EXPERT_FRAMES, HEAT_COLUMNS, read_metrics
from megads.report.run import Run, load_run
from megads.report.summary import configuration, count, duration, event_rows, header, marks
from megads.report.thin import MOST_POINTS, Thinning, smooth
from tests.report_runs import (
    SOURCES,
    TOKENS_PER_STEP,
    event_record,
    run_record,
    train_record,
    write_run,
)


def charts(*runs: Run) -> dict[str, dict[str, Any]]:
    """By id."""
    return {chart["id"]: chart for group in build_groups(runs, Axes()) for chart in group["charts"]}


def append(directory: Path, *records: dict[str, Any]) -> None:
    with (directory / "metrics.jsonl").open("ab") as file:
        file.writelines(orjson.dumps(record) + b"\n" for record in records)


def page_data(page: Path) -> dict[str, Any]:
    text = page.read_text(encoding="utf-8")
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_every_number_of_the_records_is_drawn_or_said(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path / "run", records=60))
    groups = build_groups([run], Axes())
    titles = {group["title"]: [chart["title"] for chart in group["charts"]] for group in groups}
    assert list(titles) == ["Loss", "Schedules", "Optimization", "Throughput", "Experts", "Data"]
    drawn = charts(run)
    assert {s["name"] for s in drawn["train-mtp_loss"]["series"]} == {"mtp loss", "mtp loss 1", "mtp loss 2"}
    assert {s["name"] for s in drawn["train-loss/web"]["series"]} == set(SOURCES)
    assert {s["name"] for s in drawn["validation-loss/web"]["series"]} == set(SOURCES)
    assert {c["title"] for c in groups[1]["constants"]} >= {"Weight decay", "Router temperature"}
    assert len(drawn["heat-max_vio_by_layer"]["z"]) == 4
    assert len(drawn["expert-load"]["frames"][-1]["z"]) == 4


def test_unknown_fields_are_shown_and_absent_ones_leave_no_chart(tmp_path: Path) -> None:
    append(tmp_path, run_record(0, 100))
    plain = {"kind": "train", "step": 1, "tokens": 10, "lm_loss": 3.0}
    append(tmp_path, plain, plain | {"step": 2, "tokens": 20, "humidity": 0.5, "damp_by_layer": [1, 2]})
    found = charts(load_run(tmp_path))
    assert set(found) == {"loss", "train-humidity", "heat-damp_by_layer"}
    assert found["train-humidity"]["series"][0]["y"] == [None, 0.5]


def test_columns_when_fields_come_go_and_change_their_type(tmp_path: Path) -> None:
    rows = [{"a": 1}, {"a": None, "b": 2.5}, {"a": "x", "b": 3}, {"b": True}, {"a": 5, "b": [1]}, {"a": 6}]
    append(tmp_path, *({"kind": "train", "step": i, "tokens": i} | row for i, row in enumerate(rows)))
    table = read_metrics(tmp_path / "metrics.jsonl").train
    np.testing.assert_equal(table.column("a"), [1, math.nan, math.nan, math.nan, 5, 6])
    np.testing.assert_equal(table.column("b"), [math.nan, 2.5, 3, math.nan, math.nan, math.nan])
    assert np.isnan(table.column("nothing")).all()


def test_damaged_lines_are_counted_and_a_half_line_is_left_out(tmp_path: Path) -> None:
    write_run(tmp_path, records=10)
    metrics = tmp_path / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines(keepends=True)
    damaged = [b"\n", b"\xff\xfe\n", b'{"kind":"train"}\n', b"[1,2]\n", b'{"kind":"train","step":"1"}\n']
    damaged += [b'{"kind":"experts","step":1,"load_by_layer":[[1],[2,3]]}\n', b"\0" * 50 + b"\n"]
    metrics.write_bytes(b"".join(lines[:5] + damaged + lines[5:]) + lines[3][:40])
    run = load_run(tmp_path)
    assert run.metrics.damaged_lines == len(damaged)
    assert run.metrics.train.rows == 10
    [notice] = header([run])["notices"]
    assert f"{len(damaged)} lines are damaged" in notice


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "holds no metrics.jsonl"), (b"", "no record of a run"), (b"hello\n", "1 lines are no records")],
)
def test_directories_without_a_run(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_run(tmp_path)
    with pytest.raises(DataError, match="is not a directory"):
        load_run(tmp_path / "nowhere")


def test_a_page_that_cannot_be_written(tmp_path: Path) -> None:
    write_run(tmp_path / "run", records=5)
    (tmp_path / "file").touch()
    with pytest.raises(EnvironmentSetupError, match="choose another --output"):
        write_report(tmp_path / "run", tmp_path / "file" / "report.html")


def test_a_signal_while_the_page_is_written_leaves_no_part_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path / "run", records=5)
    before = sorted(run.iterdir())

    def stop(*paths: object) -> None:
        raise SystemExit(143)

    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, stop)
    with pytest.raises(SystemExit):
        write_report(run, run / "report.html")
    assert sorted(run.iterdir()) == before


def test_a_run_without_a_training_record_has_a_page(tmp_path: Path) -> None:
    append(tmp_path, run_record(0, 100))
    write_report(tmp_path, tmp_path / "report.html")
    data = page_data(tmp_path / "report.html")
    assert data["groups"] == []
    assert any("no training record yet" in notice for notice in data["header"]["notices"])


def test_states(tmp_path: Path) -> None:
    assert load_run(write_run(tmp_path / "finished", records=10)).state() == "finished"
    directory = write_run(tmp_path / "run", records=10, done=0.5)
    assert load_run(directory).state() == "running"
    an_hour_ago = time.time() - 3600
    os.utime(directory / "metrics.jsonl", (an_hour_ago, an_hour_ago))
    assert load_run(directory).state() == "stale"
    lease = directory / "checkpoints" / ".lease"
    lease.parent.mkdir()
    lease.write_text('{"host": "a", "pid": 1}')
    assert load_run(directory).state() == "stale"
    lease.write_text("")  # released
    assert load_run(directory).state() == "stopped"


def test_events_of_a_rollback(tmp_path: Path) -> None:
    """What came after the checkpoint is superseded; an earlier run in the directory is none of it."""
    write_run(tmp_path, records=40)
    append(tmp_path, event_record(200, "rollback", from_step=230, loss=7.25))
    noise = random.Random(1)
    earlier = [run_record(0, 400), *(train_record(10 * i, 400, 4, noise) for i in range(1, 30))]
    left = [
        *(train_record(200 + 10 * i, 400, 4, noise) for i in (1, 2, 3)),
        event_record(230, "spike", loss=7.25),
    ]
    (tmp_path / "metrics.superseded.jsonl").write_bytes(
        b"".join(orjson.dumps(record) + b"\n" for record in [*earlier, *left]) + b'{"torn'
    )
    run = load_run(tmp_path)
    [branch] = run.branches
    assert [record["step"] for record in branch] == [210, 220, 230, 230]
    rows = event_rows(run)
    assert [(row["event"], row["step"], row["superseded"]) for row in rows] == [
        ("start", 0, False),
        ("spike", 130, False),
        ("health", 130, False),
        ("resume", 200, False),
        ("rollback", 200, False),
        ("spike", 230, True),
    ]
    assert rows[4]["text"] == "from step 230, loss 7.25"
    [superseded] = [s for s in charts(run)["loss"]["series"] if s["name"] == "superseded"]
    assert len([y for y in superseded["y"] if y is not None]) == 3
    by_kind = {mark["event"]: mark for mark in marks(run, rows)}
    assert set(by_kind) == {"spike", "health", "resume", "rollback"}
    assert by_kind["rollback"]["tokens"] == [200 * TOKENS_PER_STEP]


def test_a_long_run_is_thinned_and_keeps_its_outliers(tmp_path: Path) -> None:
    records = 20_000
    directory = write_run(tmp_path / "long", records=records, layers=3)
    metrics = directory / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines()
    at = next(i for i, line in enumerate(lines) if orjson.loads(line)["step"] == 123_450)
    lines[at] = orjson.dumps(orjson.loads(lines[at]) | {"grad_norm": 777.0})
    metrics.write_bytes(b"\n".join(lines) + b"\n")
    found = charts(load_run(directory))
    values = next(s for s in found["train-grad_norm"]["series"] if s["style"] == "values")
    assert len(values["y"]) == MOST_POINTS
    assert max(values["y"]) == 777.0
    assert all(len(row) <= HEAT_COLUMNS + 1 for row in found["heat-max_vio_by_layer"]["z"])
    assert len(found["expert-load"]["frames"]) == EXPERT_FRAMES
    assert found["expert-load"]["frames"][-1]["step"] == 10 * records


def test_thinning_keeps_ends_order_and_means() -> None:
    values = np.concatenate([np.linspace(9, 1, 5000), np.linspace(1, 3, 5000)])
    values[7000] = math.nan
    thinning = Thinning(len(values))
    positions = thinning.positions(np.arange(10_000.0))
    assert (positions[0], positions[-1]) == (0, 9999)
    assert positions == sorted(positions, key=lambda x: x or 0.0)
    extremes = thinning.extremes(values)
    assert (extremes[0], extremes[-1]) == (9, 3)
    assert None not in extremes
    assert np.mean(np.array(thinning.means(values), float)) == pytest.approx(np.nanmean(values), rel=1e-3)
    few = np.array([1.0, math.nan, math.inf])
    assert Thinning(3).extremes(few) == [1.0, None, None]


def test_smoothing() -> None:
    assert smooth(np.ones(10)) is None
    line = np.linspace(0, 1, 1000)
    line[500] = math.nan
    smoothed = smooth(line)
    assert smoothed is not None
    # A straight line stays one, up to where the window narrows on one side.
    np.testing.assert_allclose(smoothed[:950], np.linspace(0, 1, 1000)[:950], atol=1e-3)
    step = np.repeat([5.0, 1.0], 500)
    np.testing.assert_array_equal(smooth(step, borders=[500]), step)
    assert not np.array_equal(smooth(step), step)


def test_stages_are_one_run(tmp_path: Path) -> None:
    write_run(tmp_path / "pretrain", records=40)
    start = {
        "checkpointing.init_from": "elsewhere/pretrain/checkpoints/step_00000100",
        "experiment_name": "V3/extend",
    }
    write_run(tmp_path / "extend", records=40, settings=start)
    run = load_run(tmp_path)
    assert run.name == "V3"
    assert run.metrics.borders == [("pretrain", 0.0, 0.0), ("extend", 400.0, 400.0 * TOKENS_PER_STEP)]
    steps = run.metrics.train.column("step")
    np.testing.assert_array_equal(steps, np.arange(10.0, 801.0, 10.0))
    assert (np.diff(run.hours(steps)) > 0).all()
    assert (run.metrics.last["step"], run.facts["train_steps"], run.state()) == (800, 800, "finished")
    assert run.metrics.experts[-1]["step"] == 800
    assert len(charts(run)["heat-max_vio_by_layer"]["z"][0]) == 80


def test_runs_side_by_side_are_no_stages(tmp_path: Path) -> None:
    write_run(tmp_path / "one", records=5)
    write_run(tmp_path / "two", records=5)
    with pytest.raises(DataError, match="not the stages of one: one, two"):
        load_run(tmp_path)
    write_run(tmp_path / "one", records=5, settings={"checkpointing.init_from": "two/checkpoints"})
    write_run(tmp_path / "two", records=5, settings={"checkpointing.init_from": "one/checkpoints"})
    with pytest.raises(DataError, match="not the stages of one"):
        load_run(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", '{"config": 3}', '{"config": {}}'])
def test_a_damaged_saved_configuration(tmp_path: Path, content: str) -> None:
    write_run(tmp_path, records=5)
    (tmp_path / "run.json").write_text(content)
    write_report(tmp_path, tmp_path / "report.html")
    notices = page_data(tmp_path / "report.html")["header"]["notices"]
    assert bool(notices) == (content != '{"config": {}}')


def test_two_runs(tmp_path: Path) -> None:
    one = load_run(write_run(tmp_path / "one", records=40, settings={"model.num_layers": 4}))
    two = load_run(write_run(tmp_path / "two", records=50, settings={"training.seed": [1]}))
    found = configuration([one, two])
    assert found["differences"] == [
        ["experiment_name", '"one"', '"two"'],
        ["model.num_layers", "4", "null"],
        ["training.seed", "null", "[1]"],
    ]
    loss = charts(one, two)["loss"]["series"]
    assert {(s["name"], s["run"]) for s in loss} == {
        ("training", 0),
        ("training", 1),
        ("validation", 0),
        ("validation", 1),
    }
    styles = {s["style"] for s in charts(one, two)["train-share/web"]["series"]}
    assert styles == {"exact"}  # two stacks would lie on one another
    by_label = {entry["label"]: entry for entry in header([one, two])["values"]}
    assert (by_label["step"]["value"], by_label["step"]["other"]) == ("400", "500")


def test_the_page_is_one_file_that_no_text_can_break(tmp_path: Path) -> None:
    hostile = "</script><script>alert(1)</script>{{DATA}}<!--"
    directory = write_run(tmp_path / "run", records=10, settings={"experiment_name": hostile})
    append(directory, event_record(5, "health", text=hostile))
    page = tmp_path / "pages" / "report.html"
    assert write_report(directory, page) == "finished"
    data = page_data(page)
    assert data["header"]["name"] == hostile
    assert data["events"]["rows"][1]["text"] == hostile
    text = page.read_text(encoding="utf-8")
    assert not re.findall(
        r"<(?:script|link|img|iframe)[^>]*\b(?:src|href)=[\"'](?!data:)", text.split("<script>")[0]
    )
    assert "alert(1)</script>" not in text
    assert [path.name for path in page.parent.iterdir()] == ["report.html"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(41.4, "41 s"), (215, "3 min 35 s"), (7500, "2 h 05 min"), (277_200, "3 d 5 h"), (None, "-")],
)
def test_durations(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(14.8e12, "14.8T"), (671e9, "671B"), (999, "999"), (1234, "1.23K"), (2.5e15, "2,500T")],
)
def test_counts(value: float, text: str) -> None:
    assert count(value) == text
