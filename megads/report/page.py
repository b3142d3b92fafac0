"""The page: one HTML file with data, styles, code and plotly.js (MIT licence) in it; it opens from disk."""

import html
from importlib.resources import files
from pathlib import Path

import orjson
from plotly.offline import get_plotlyjs

from megads.errors import EnvironmentSetupError
from megads.publish import published
from megads.report import summary
from megads.report.charts import Axes, build_groups
from megads.report.run import load_run

REPORT_FILE = "report.html"


def write_report(
    directory: Path, output: Path, *, compare: Path | None = None, reload_seconds: float | None = None
) -> str:
    """Write the report of the run in `directory` to `output`, at once; returns the state of the run.

    With `reload_seconds` the page loads itself again after so many seconds, until the run has finished.
    Raises DataError when there is nothing to report, EnvironmentSetupError when `output` cannot be written.
    """
    runs = [load_run(path) for path in (directory, compare) if path is not None]
    axes = Axes()
    groups = build_groups(runs, axes)
    events = summary.event_rows(runs[0])
    state = runs[0].state()
    data = {
        "header": summary.header(runs),
        "axes": axes.as_json,
        "groups": groups,
        "marks": summary.marks(runs[0], events),
        "borders": summary.borders(runs[0]),
        "events": summary.latest(events),
        "evaluations": summary.latest(summary.evaluation_rows(runs[0])),
        "configuration": summary.configuration(runs),
        "reload_seconds": reload_seconds if state != "finished" else None,
    }
    _replace(output, page(f"{runs[0].name}: report", orjson.dumps(data).decode()))
    return state


def page(title: str, data_json: str) -> str:
    """The HTML of a page that shows `data_json`."""
    ours = files(__package__)
    # "<" in JSON is only ever in strings; escaped, no text of a run can end the script element.
    data = data_json.replace("<", "\\u003c")
    parts = {
        "TITLE": html.escape(title),
        "STYLE": ours.joinpath("page.css").read_text(encoding="utf-8"),
        "DATA": data,
        "PLOTLY": get_plotlyjs(),
        "SCRIPT": ours.joinpath("charts.js").read_text(encoding="utf-8")
        + ours.joinpath("page.js").read_text(encoding="utf-8"),
    }
    pieces = ours.joinpath("page.html").read_text(encoding="utf-8").split("{{")
    return pieces[0] + "".join(
        parts[name] + rest for name, rest in (piece.split("}}", 1) for piece in pieces[1:])
    )


def _replace(path: Path, text: str) -> None:
    """Write a file so that a browser that loads it finds the old one or the new one, whole."""
    try:
        with published(path) as file:
            file.write(text.encode())
    except OSError as error:
        raise EnvironmentSetupError(
            f"cannot write {path}: {error.strerror or error}; choose another --output"
        ) from None
