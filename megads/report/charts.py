"""The charts of a page as JSON for page.js: series over named axes, maps over time, groups of them."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from megads.report.panels import ALWAYS_DRAWN, GROUPS, HEAT, HEAT_GROUP, SHOWN_ELSEWHERE, HeatPanel, Panel
from megads.report.read import BY_LAYER, Table
from megads.report.run import Run
from megads.report.thin import Thinning, as_json, smooth

Json = dict[str, Any]

MOST_LINES_WITH_VALUES = 3
"""A chart of more lines shows the smoothed ones only."""
OUTLIERS = (1.0, 99.0)
"""Percentiles that a map's colours span."""


@dataclass
class Source:
    """The records of one kind of one run, thinned to points on an axis that its series share."""

    run: int
    axis: str
    table: Table
    thinning: Thinning
    border_rows: list[int]


class Axes:
    """The x positions that series refer to by name: tokens, steps and hours of training."""

    def __init__(self) -> None:
        self.as_json: dict[str, Json] = {}

    def source(self, number: int, run: Run, kind: str) -> Source:
        """The `kind` ("train", "validation") records of a run, with an axis of their own."""
        table = run.metrics.train if kind == "train" else run.metrics.validation
        thinning = Thinning(table.rows)
        steps, tokens = table.column("step"), table.column("tokens")
        name = f"{number}.{kind}"
        self.as_json[name] = {
            "tokens": thinning.positions(tokens),
            "steps": thinning.positions(steps),
            "hours": thinning.positions(run.hours(steps)),
        }
        borders = [int(np.searchsorted(steps, step, side="right")) for _, step, _ in run.metrics.borders]
        return Source(number, name, table, thinning, borders)

    def add(self, name: str, run: Run, steps: Sequence[float], tokens: Sequence[float]) -> str:
        """An axis of its own for a few points; NaN divides lines. Returns `name`."""
        self.as_json[name] = {
            "tokens": as_json(np.array(tokens, float), digits=15),
            "steps": as_json(np.array(steps, float), digits=15),
            "hours": as_json(run.hours(steps)),
        }
        return name


def build_groups(runs: Sequence[Run], axes: Axes) -> list[Json]:
    """All groups that have something to show; `runs`: the one reported, and one to compare it with."""
    sources = {
        kind: [axes.source(number, run, kind) for number, run in enumerate(runs)]
        for kind in ("train", "validation")
    }
    drawn = {kind: set(names) for kind, names in SHOWN_ELSEWHERE.items()}
    groups: list[Json] = []
    for title, panels in GROUPS.items():
        charts: list[Json] = [_loss_chart(runs, sources, axes)] if title == "Loss" else []
        constants: list[Json] = []
        for panel in panels:
            fields = _fields(panel, sources[panel.table], drawn[panel.table])
            drawn[panel.table].update(fields)
            if not fields:
                continue
            value = _constant(fields, sources[panel.table]) if panel.style == "exact" else None
            if value is not None and not ALWAYS_DRAWN & {*fields}:
                text = f"{100 * value:.4g}%" if panel.percent else f"{value / panel.per_unit:.6g}"
                constants.append({"title": panel.title, "value": text, "unit": panel.unit})
            else:
                charts.append(_panel_chart(panel, fields, sources[panel.table]))
        if title == HEAT_GROUP:
            charts += _expert_load(runs[0])
            charts += _heat_charts(runs[0], axes)
        groups.append({"title": title, "charts": [c for c in charts if c], "constants": constants})
    groups.append({"title": "Other", "charts": list(_others(sources, drawn)), "constants": []})
    return [group for group in groups if group["charts"] or group["constants"]]


def _loss_chart(runs: Sequence[Run], sources: dict[str, list[Source]], axes: Axes) -> Json:
    """Training and validation loss, the level of guessing, and the branches that the run has left."""
    series: list[Json] = []
    for source in sources["train"]:
        series += _noisy(source, "lm_loss", "training", color=0, with_values=True)
    for source in sources["validation"]:
        series += _as_they_are(source, "loss", "validation", color=1, style="points")
    if not series:
        return {}
    run = runs[0]
    branches = [
        [record for record in branch if record["kind"] == "train" and _is_number(record.get("lm_loss"))]
        for branch in run.branches
    ]
    if points := [record for branch in branches for record in (*branch, None) if branch]:
        steps, tokens, losses = (
            [math.nan if record is None else record.get(name, math.nan) for record in points]
            for name in ("step", "tokens", "lm_loss")
        )
        axis = axes.add("branches", run, steps, tokens)
        y = as_json(np.array(losses, float))
        series.append({"name": "superseded", "run": 0, "axis": axis, "y": y, "style": "exact", "color": -1})
    vocab_size = run.facts.get("vocab_size")
    level = {"value": math.log(vocab_size), "name": f"guessing: ln {vocab_size:,}"} if vocab_size else None
    return {
        "kind": "lines",
        "id": "loss",
        "title": "Training and validation loss",
        "unit": "nats per token",
        "about": "",
        "series": series,
        "level": level,
        "wide": True,
        "marks": True,
        "percent": False,
    }


def _panel_chart(panel: Panel, fields: list[str], sources: list[Source]) -> Json:
    series: list[Json] = []
    stacked = panel.style == "stacked" and len(sources) == 1
    for source in sources:
        for color, name in enumerate(fields):
            label = _label(name)
            if panel.style == "noisy":
                with_values = len(fields) <= MOST_LINES_WITH_VALUES
                series += _noisy(source, name, label, color, panel.per_unit, with_values=with_values)
            else:
                style = {"stacked": "stacked" if stacked else "exact"}.get(panel.style, panel.style)
                series += _as_they_are(source, name, label, color, panel.per_unit, style=style)
    return {
        "kind": "lines",
        "id": f"{panel.table}-{fields[0]}",
        "title": panel.title,
        "unit": panel.unit,
        "about": panel.about,
        "series": series,
        "percent": panel.percent,
    }


def _noisy(
    source: Source, field: str, label: str, color: int, per_unit: float = 1.0, *, with_values: bool
) -> list[Json]:
    """The smoothed line, over the values themselves; only these where there are few."""
    values = source.table.column(field) / per_unit
    if not np.isfinite(values).any():
        return []
    common = {"name": label, "run": source.run, "axis": source.axis, "color": color}
    smoothed = smooth(values, source.border_rows)
    if smoothed is None:
        return [{**common, "y": source.thinning.extremes(values), "style": "points"}]
    found: list[Json] = []
    if with_values and source.run == 0:
        found.append({**common, "y": source.thinning.extremes(values), "style": "values"})
    return [*found, {**common, "y": source.thinning.means(smoothed), "style": "exact"}]


def _as_they_are(
    source: Source, field: str, label: str, color: int, per_unit: float = 1.0, *, style: str
) -> list[Json]:
    values = source.table.column(field) / per_unit
    if not np.isfinite(values).any():
        return []
    y = source.thinning.means(values) if style == "stacked" else source.thinning.extremes(values)
    return [{"name": label, "run": source.run, "axis": source.axis, "y": y, "style": style, "color": color}]


def _fields(panel: Panel, sources: list[Source], drawn: set[str]) -> list[str]:
    """The fields of a panel that the runs have and no panel before has drawn."""
    found: list[str] = []
    for field in panel.fields:
        for name in dict.fromkeys(name for source in sources for name in source.table.names):
            if fnmatchcase(name, field) and name not in drawn and name not in found:
                found.append(name)
    # mtp_loss_10 after mtp_loss_9; names of sources keep the order of the records.
    return sorted(found, key=len) if panel.fields[0] == "mtp_loss" else found


def _label(name: str) -> str:
    """A field's name for people; sources keep the names that users gave them."""
    kind, _, rest = name.rpartition("/")
    return rest if kind in ("loss", "share") else rest.replace("_", " ")


def _constant(fields: list[str], sources: list[Source]) -> float | None:
    """The one value that the fields have in all runs, if they have one."""
    values = np.concatenate([source.table.column(field) for source in sources for field in fields])
    known = values[np.isfinite(values)]
    return float(known[0]) if len(known) and (known == known[0]).all() else None


def _others(sources: dict[str, list[Source]], drawn: dict[str, set[str]]) -> Iterator[Json]:
    for kind, of_runs in sources.items():
        for name in dict.fromkeys(name for source in of_runs for name in source.table.names):
            if name not in drawn[kind]:
                suffix = " (validation)" if kind == "validation" else ""
                panel = Panel(name + suffix, (name,), style="points" if suffix else "exact", table=kind)  # type: ignore[arg-type]
                yield _panel_chart(panel, [name], of_runs)


def _expert_load(run: Run) -> list[Json]:
    """The load of every expert, in multiples of an even share, at some points in time."""
    frames = []
    for record in run.metrics.experts:
        shares = np.array(record["load" + BY_LAYER], float)
        load = shares / np.maximum(np.nanmean(shares, axis=1, keepdims=True), 1e-30)
        frames.append(
            {
                "step": record["step"],
                "tokens": record.get("tokens", 0),
                "z": [as_json(row, digits=3) for row in load],
            }
        )
    if not frames:
        return []
    return [
        {
            "kind": "load",
            "id": "expert-load",
            "title": "Load of every expert",
            "frames": frames,
            "wide": True,
            "unit": "times an even share",
            "about": "Share of the tokens of a layer; 1 is even, 0 is a dead expert",
        }
    ]


def _heat_charts(run: Run, axes: Axes) -> Iterator[Json]:
    for name, heat in run.metrics.heat.items():
        panel = HEAT.get(name) or HeatPanel(name.replace("_", " "), from_zero=False)
        values = heat.values()
        if not np.isfinite(values).any():
            continue
        low, high = np.nanpercentile(values, OUTLIERS)
        low = min(low, 0.0) if panel.from_zero else low
        yield {
            "kind": "heat",
            "id": f"heat-{name}",
            "title": panel.title,
            "about": panel.about,
            "unit": "",
            "axis": axes.add(f"heat.{name}", run, heat.step, heat.tokens),
            "z": [as_json(row, digits=3) for row in values],
            "range": [float(low), float(high if high > low else low + 1)],
        }


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]
