"""The loss curve of a run as a PNG, drawn from its `metrics.jsonl` alone.

Above: training loss (thin: each log interval; thick: smoothed) and validation loss over tokens, the
loss of a model that knows nothing (ln of the vocabulary size), and where the run was resumed. Below:
the learning rate.
"""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megads.errors import DataError
from megads.train.console import format_count
from megads.train.metrics import Record
from megads.train.sinks import read_records

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TRAINING, VALIDATION, RATE, QUIET = "#1f5fa8", "#d1495b", "#3a7d44", "#6b7280"
FEWEST_POINTS_TO_SMOOTH = 30
SMOOTHING_SHARE = 0.03
"""Half the smoothing window, as a share of the records."""
LABEL_SHARE = 0.25
"""Width kept free for the label of a resume, as a share of the figure's."""


def draw_curve(metrics_jsonl: str | Path, png: str | Path, *, title: str = "") -> Path:
    """Draw the loss curve of `metrics_jsonl` into `png`, replacing it at once; returns its path.

    Raises DataError when the file is missing or holds no training record.
    """
    path = Path(metrics_jsonl)
    if not path.is_file():
        raise DataError(f"{path} does not exist: a run writes it at its first log interval")
    records = list(read_records(path))
    train = [record for record in records if record["kind"] == "train" and _known(record.get("lm_loss"))]
    if not train:
        raise DataError(
            f"{path} holds no training loss yet: a run writes one every training.log_interval steps"
        )
    validation = [
        record for record in records if record["kind"] == "validation" and _known(record.get("loss"))
    ]
    runs = [record for record in records if record["kind"] == "run"]
    return _draw(train, validation, runs, Path(png), title)


def smooth(values: Sequence[float], half_width: int) -> list[float]:
    """Centered moving average over 2 * `half_width` + 1 values, narrower towards both ends.

    The window stays symmetric, so that a steep start is not dragged behind as an exponential average
    would drag it.
    """
    sums = list(itertools.accumulate(values, initial=0.0))
    smoothed = []
    for i in range(len(values)):
        reach = min(half_width, i, len(values) - 1 - i)
        smoothed.append((sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1))
    return smoothed


def _draw(train: list[Record], validation: list[Record], runs: list[Record], png: Path, title: str) -> Path:
    # Imported here: half a second that only the end of a run needs. Figure without pyplot draws with
    # Agg into the file and touches neither a display nor global state.
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(9, 5.6), dpi=144, layout="constrained")
    losses, rates = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [4, 1]})
    rates.set_xlim(0, max(record["tokens"] for record in (*train, *validation)) * 1.02)
    _draw_losses(losses, train, validation)
    _draw_ignorance(losses, runs)
    _draw_resumes(losses, rates, runs)
    _draw_rates(rates, train)
    if title:
        losses.set_title(title, loc="left", fontweight="bold", pad=18)
    for axes in (losses, rates):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
        axes.set_axisbelow(True)
    rates.set_xlabel("training tokens")
    rates.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: format_count(tokens)))
    return _save(figure, png)


def _draw_losses(axes: "Axes", train: list[Record], validation: list[Record]) -> None:
    tokens = [record["tokens"] for record in train]
    values = [record["lm_loss"] for record in train]
    if len(train) < FEWEST_POINTS_TO_SMOOTH:
        axes.plot(tokens, values, color=TRAINING, linewidth=1.8, marker="o", markersize=3, label="training")
    else:
        smoothed = smooth(values, max(1, round(SMOOTHING_SHARE * len(values))))
        axes.plot(tokens, values, color=TRAINING, linewidth=0.8, alpha=0.35)
        axes.plot(tokens, smoothed, color=TRAINING, linewidth=2, label="training")
    if validation:
        axes.plot(
            [record["tokens"] for record in validation],
            [record["loss"] for record in validation],
            color=VALIDATION,
            linewidth=1,
            linestyle=(0, (4, 2)),
            marker="o",
            markersize=5,
            markeredgecolor="white",
            label="validation",
        )
        last = validation[-1]
        axes.annotate(
            f"{last['loss']:.3f}\nperplexity {last['perplexity']:.4g}",
            (last["tokens"], last["loss"]),
            xytext=(0, 12),
            textcoords="offset points",
            ha="right",
            va="bottom",
            color=VALIDATION,
            fontsize=9,
            bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1},
        )
    axes.set_ylabel("loss (nats per token)")
    axes.legend(loc="upper right", frameon=False, bbox_to_anchor=(1, 0.93))


def _draw_ignorance(axes: "Axes", runs: list[Record]) -> None:
    """The loss of guessing every token with equal probability."""
    vocab_sizes = [record["vocab_size"] for record in runs if record.get("vocab_size")]
    if not vocab_sizes:
        return
    level = math.log(vocab_sizes[-1])
    axes.axhline(level, color=QUIET, linewidth=1, linestyle="--")
    axes.annotate(
        f"ln {vocab_sizes[-1]:,} = {level:.2f}",
        (1, level),
        xycoords=("axes fraction", "data"),
        xytext=(-2, 3),
        textcoords="offset points",
        ha="right",
        va="bottom",
        color=QUIET,
        fontsize=9,
    )


def _draw_resumes(losses: "Axes", rates: "Axes", runs: list[Record]) -> None:
    begin, end = losses.get_xlim()
    label_from = -math.inf
    for record in runs:
        if not record["step"]:
            continue
        for axes in (losses, rates):
            axes.axvline(record["tokens"], color=QUIET, linewidth=1, linestyle=":")
        if record["tokens"] < label_from:
            continue  # its label would lie on the one before
        label_from = record["tokens"] + LABEL_SHARE * (end - begin)
        losses.annotate(
            f"resumed: {record['layout']}" if record.get("layout") else "resumed",
            (record["tokens"], 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 4),
            textcoords="offset points",
            ha="center",
            va="bottom",
            color=QUIET,
            fontsize=8,
        )


def _draw_rates(axes: "Axes", train: list[Record]) -> None:
    tokens = [record["tokens"] for record in train]
    values = [record["learning_rate"] for record in train]
    axes.plot(tokens, values, color=RATE, linewidth=1.6)
    axes.fill_between(tokens, values, color=RATE, alpha=0.15, linewidth=0)
    axes.set_ylim(0, max(*values, 1e-12) * 1.15)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)
    axes.set_ylabel("learning rate")


def _save(figure: "Figure", png: Path) -> Path:
    png.parent.mkdir(parents=True, exist_ok=True)
    part = png.with_name(png.name + ".part")
    figure.savefig(part, format="png")
    part.replace(png)
    return png


def _known(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
