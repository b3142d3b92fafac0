"""The results as a figure: speed, memory, and where the time of a step goes."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gpu_training.kernels import GROUPS
from gpu_training.summary import GIB, Variant

# Okabe and Ito's palette, which the color-blind can tell apart.
CONTENDER_COLORS = {
    "megads": "#0072B2", "megads-graphs": "#56B4E9", "stock": "#E69F00", "transformers": "#999999",
}  # fmt: skip
GROUP_COLORS = dict(
    zip(
        GROUPS,
        ("#0072B2", "#D55E00", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#F0E442", "#6B7280", "#D1D5DB"),
        strict=True,
    )
)


def draw(variants: list[Variant], png: Path) -> None:
    """Write `png`: a row per shape, of those variants that could be measured."""
    measured = [variant for variant in variants if variant.rounds]
    shapes = list(dict.fromkeys(variant.shape for variant in measured))
    if not shapes:
        return
    figure = Figure(figsize=(13, 0.8 + 3.2 * len(shapes)), dpi=130, layout="constrained")
    rows = figure.subplots(len(shapes), 3, squeeze=False)
    for shape, axes in zip(shapes, rows, strict=True):
        of_shape = [variant for variant in measured if variant.shape == shape]
        _bars(axes[0], of_shape, [variant.tokens_per_second for variant in of_shape], f"{shape}: tokens/s")
        _bars(
            axes[1], of_shape, [(variant.peak_bytes or 0) / GIB for variant in of_shape], "peak memory, GiB"
        )
        _kernels(axes[2], of_shape)
    handles, labels = rows[0][2].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8)
    figure.savefig(png, format="png")


def _bars(axes: Axes, variants: list[Variant], values: list[float], title: str) -> None:
    colors = [CONTENDER_COLORS[variant.contender] for variant in variants]
    bars = axes.bar(_labels(axes, variants), values, color=colors)
    axes.bar_label(bars, labels=[f"{value:,.0f}" for value in values], fontsize=8)
    _finish(axes, title)


def _kernels(axes: Axes, variants: list[Variant]) -> None:
    places, bottoms = _labels(axes, variants), [0.0] * len(variants)
    for group in GROUPS:
        values = [1e3 * variant.kernels.get(group, 0.0) for variant in variants]
        axes.bar(places, values, bottom=bottoms, color=GROUP_COLORS[group], label=group)
        bottoms = [bottom + value for bottom, value in zip(bottoms, values, strict=True)]
    _finish(axes, "time of kernels, ms per step")


def _labels(axes: Axes, variants: list[Variant]) -> list[int]:
    places = list(range(len(variants)))
    names = [f"{variant.contender}\n{variant.precision}" for variant in variants]
    axes.set_xticks(places, names, fontsize=7)
    return places


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
