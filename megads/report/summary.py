"""What a page says in words and tables: the header, the events, the evaluations, the configuration."""

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import orjson

from megads.config.flops import count_parameters
from megads.config.loader import load_config
from megads.errors import MegadsError
from megads.report.charts import Json
from megads.report.read import Record
from megads.report.run import SAVED_CONFIG, Run

MOST_TABLE_ROWS = 300
MOST_MARKS = 200
"""Of one kind of event on the loss curve."""
STATES = {
    "finished": "all its steps are done",
    "running": "it was writing when this page was made",
    "stopped": "it ended before its last step; started again, it goes on",
    "stale": "it has not written for longer than its log interval takes: killed, hanging, or out of reach",
}
_OF_EVERY_RECORD = {"kind", "step", "tokens", "event"}


def header(runs: Sequence[Run]) -> Json:
    """The card at the top; with a second run, its values beside those of the first."""
    run = runs[0]
    state = run.state()
    facts = run.facts
    details = [str(facts["layout"])] if facts.get("layout") else []
    resolved = run.saved.get("resolved", {})
    if resolved:
        details += [
            f"{resolved.get('world_size')} x {resolved.get('device')}",
            str(resolved.get("precision")),
        ]
    values = [_values(each) for each in runs]
    return {
        "name": run.name,
        "other": runs[1].name if len(runs) > 1 else None,
        "state": state,
        "state_means": STATES[state],
        "details": details,
        "directory": str(run.directory),
        "written": _time(run.written_unix_seconds),
        "made": _time(run.read_unix_seconds),
        "progress": _progress(run),
        "values": [
            {
                "label": label,
                "value": value,
                "more": more,
                "other": values[1][label][0] if len(runs) > 1 else None,
            }
            for label, (value, more) in values[0].items()
        ],
        "notices": [notice for each in runs for notice in each.notices],
    }


def _progress(run: Run) -> float | None:
    total = run.facts.get("total_tokens")
    return min(1.0, run.metrics.last.get("tokens", 0) / total) if total else None


def _values(run: Run) -> dict[str, tuple[str, str]]:
    """Label to (value, what else is to say about it)."""
    last, facts, state = run.metrics.last, run.facts, run.state()
    best = _best_validation(run)
    total, active = _parameters(run)
    seconds, left = last.get("wall_seconds"), last.get("seconds_left")
    planned_tokens, planned_steps = facts.get("total_tokens"), facts.get("train_steps")
    found = {
        "tokens": (count(last.get("tokens", 0)), f"of {count(planned_tokens)}" if planned_tokens else ""),
        "step": (f"{last.get('step', 0):,}", f"of {planned_steps:,}" if planned_steps else ""),
        "training time": (duration(seconds), ""),
        "time left": (
            "none" if state == "finished" else duration(left),
            "if it goes on" if state in ("stopped", "stale") else "",
        ),
        "training loss": (number(last.get("lm_loss")), "last log interval"),
        "best validation loss": (number(best.get("loss")), f"at step {best['step']:,}" if best else ""),
        "parameters": (total, f"{active} active per token" if active else ""),
        "speed": (
            f"{count(last['tokens_per_second'])} tokens/s" if last.get("tokens_per_second") else "-",
            f"MFU {last['mfu']:.1%}" if last.get("mfu") else "",
        ),
        "model FLOPs spent": (f"{last['total_flops']:.3g}" if last.get("total_flops") else "-", ""),
    }
    return found


def _best_validation(run: Run) -> dict[str, Any]:
    table = run.metrics.validation
    losses = table.column("loss")
    if not np.isfinite(losses).any():
        return {}
    row = int(np.nanargmin(losses))
    return {"loss": float(losses[row]), "step": int(table.column("step")[row])}


def _parameters(run: Run) -> tuple[str, str]:
    """Total and active parameters with MTP; active only where this version reads the configuration."""
    total = run.facts.get("parameters")
    try:
        counts = count_parameters(load_config(run.directory / SAVED_CONFIG))
    except (MegadsError, OSError):
        return (count(total) if total else "-"), ""
    return count(total or counts.total_with_mtp), count(counts.active_with_mtp)


def event_rows(run: Run) -> list[Json]:
    """Everything out of the ordinary, resumes included, in order; `superseded` where the run has left it."""
    records = [(record, False) for record in (*run.metrics.runs, *run.metrics.events)]
    records += [(record, True) for branch in run.branches for record in branch if record["kind"] == "event"]
    first = run.metrics.runs[:1]
    rows = [
        {
            "step": record["step"],
            "tokens": record.get("tokens", 0),
            "event": _event_name(record, is_first=record in first),
            "text": _event_text(record),
            "superseded": superseded,
        }
        for record, superseded in records
    ]
    return sorted(rows, key=lambda row: row["step"])


def _event_name(record: Record, *, is_first: bool) -> str:
    if record["kind"] == "run":
        return "start" if is_first else "resume"
    return str(record.get("event", record["kind"]))


def _event_text(record: Record) -> str:
    if record["kind"] == "run":
        return str(record.get("layout", ""))
    if isinstance(record.get("text"), str):
        return str(record["text"])
    facts = {name: value for name, value in record.items() if name not in _OF_EVERY_RECORD}
    return ", ".join(f"{name.replace('_', ' ')} {_short(value)}" for name, value in facts.items())


def marks(run: Run, rows: list[Json]) -> list[Json]:
    """The events by kind, as marks on the loss curve."""
    train = run.metrics.train
    losses = train.column("lm_loss")
    known = np.isfinite(losses)
    if not known.any():
        return []
    found = []
    for event in dict.fromkeys(row["event"] for row in rows if row["event"] != "start"):
        every = [row for row in rows if row["event"] == event and not row["superseded"]]
        some = every[:: max(1, math.ceil(len(every) / MOST_MARKS))]
        steps = [row["step"] for row in some]
        if some:
            found.append(
                {
                    "event": event,
                    "steps": steps,
                    "tokens": [row["tokens"] for row in some],
                    "hours": run.hours(steps).tolist(),
                    "y": np.interp(steps, train.column("step")[known], losses[known]).tolist(),
                    "texts": [row["text"] for row in some],
                }
            )
    return found


def borders(run: Run) -> list[Json]:
    """Where the stages of a run begin, the first left out."""
    return [
        {"name": name, "steps": step, "tokens": tokens, "hours": float(run.hours([step])[0])}
        for name, step, tokens in run.metrics.borders[1:]
    ]


def evaluation_rows(run: Run) -> list[Json]:
    """Evaluations, oldest first; the best is marked."""
    table = run.metrics.validation
    columns = {name: table.column(name) for name in ("step", "tokens", "loss", "perplexity")}
    best = _best_validation(run).get("step")
    return [
        {
            **{name: _finite(values[row]) for name, values in columns.items()},
            "best": bool(columns["step"][row] == best),
        }
        for row in range(table.rows)
    ]


def latest(rows: list[Json]) -> Json:
    """The last rows of a table, and how many came before them."""
    return {"rows": rows[-MOST_TABLE_ROWS:], "left_out": max(0, len(rows) - MOST_TABLE_ROWS)}


def configuration(runs: Sequence[Run]) -> Json:
    """The settings that differ from their defaults, those that differ between the runs, the code that ran."""
    saved = runs[0].saved
    changed = saved.get("non_defaults") or {}
    found: Json = {
        "non_defaults": [[path, _compact(value)] for path, value in changed.items()],
        "provenance": [[name, str(value)] for name, value in _flat(saved.get("provenance") or {}).items()],
        "differences": None,
    }
    if len(runs) > 1:
        mine, theirs = (
            _flat({"config": run.saved.get("config"), "provenance": run.saved.get("provenance")})
            for run in runs
        )
        paths = [path for path in dict.fromkeys([*mine, *theirs]) if mine.get(path) != theirs.get(path)]
        found["differences"] = [
            [path.removeprefix("config."), _compact(mine.get(path)), _compact(theirs.get(path))]
            for path in paths
        ]
    return found


def _flat(tree: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict) or not tree:
        return {path: tree} if path else {}
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= _flat(value, f"{path}.{name}" if path else str(name))
    return found


def _compact(value: Any) -> str:
    return orjson.dumps(value).decode()


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def count(value: float) -> str:
    """A large number for people: 14.8T, 671B, 1.23M."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= size:
            return f"{value / size:.3g}{letter}" if value / size < 1000 else f"{value / size:,.0f}{letter}"
    return f"{value:.3g}"


def number(value: float | None) -> str:
    """A loss for people."""
    return "-" if value is None else f"{value:.4f}"


def duration(seconds: float | None) -> str:
    """Seconds for people: 3 d 4 h, 2 h 05 min, 41 s."""
    if seconds is None or not math.isfinite(seconds):
        return "-"
    minutes, hours, days = seconds / 60, seconds / 3600, seconds / 86400
    if days >= 1:
        return f"{int(days)} d {int(hours) % 24} h"
    if hours >= 1:
        return f"{int(hours)} h {int(minutes) % 60:02} min"
    return f"{int(minutes)} min {int(seconds) % 60:02} s" if minutes >= 1 else f"{seconds:.0f} s"


def _time(unix_seconds: float) -> str:
    return datetime.fromtimestamp(unix_seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
