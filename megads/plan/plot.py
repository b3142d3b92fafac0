"""Memory of every pipeline stage as a stacked bar chart, against what a GPU has."""

from pathlib import Path

from matplotlib.figure import Figure

from megads.errors import EnvironmentSetupError
from megads.plan.planner import Plan

GIB = 2**30
# Okabe and Ito's palette, which the color-blind can tell apart; what lies there always is blue.
COLORS = {
    "weights": "#0072B2",
    "gradients": "#56B4E9",
    "optimizer": "#A6D5F2",
    "activations": "#D55E00",
    "dispatch": "#E69F00",
    "mtp": "#CC79A7",
    "logits": "#009E73",
    "workspace": "#F0E442",
    "runtime": "#6B7280",
    "margin": "#D1D5DB",
}


def draw_memory(plan: Plan, png: Path) -> None:
    """Writes `png`. Raises EnvironmentSetupError where it cannot be written."""
    stages = plan.stages
    figure = Figure(figsize=(max(7.0, 2.6 + 0.45 * len(stages)), 4.6), dpi=130, layout="constrained")
    ax = figure.subplots()
    bottoms = [0.0] * len(stages)
    for part, color in COLORS.items():
        sizes = [stage.parts()[part] / GIB for stage in stages]
        if not any(sizes):
            continue
        ax.bar([stage.stage for stage in stages], sizes, bottom=bottoms, color=color, label=part, width=0.75)
        bottoms = [bottom + size for bottom, size in zip(bottoms, sizes, strict=True)]
    if plan.gpu is not None:
        limit = plan.gpu.memory_bytes / GIB
        ax.axhline(limit, color="#111827", linewidth=1.2, linestyle="--")
        ax.annotate(
            f"{plan.gpu.name.upper()}: {limit:.1f} GiB", (0.995, limit), xycoords=("axes fraction", "data"),
            xytext=(0, 3), textcoords="offset points", ha="right", va="bottom", fontsize=8,
        )  # fmt: skip
        ax.set_ylim(0, max(*bottoms, limit) * 1.1)
    ax.set_title(f"{plan.config.experiment_name}: memory by pipeline stage", loc="left", fontweight="bold")
    ax.set_xlabel("pipeline stage")
    ax.set_ylabel("GiB per process")
    ax.set_xticks([stage.stage for stage in stages])
    ax.set_xlim(-0.75, len(stages) - 0.25)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="#e5e7eb", linewidth=0.8)
    ax.set_axisbelow(True)
    handles, labels = ax.get_legend_handles_labels()
    # In the order of the bars, from top to bottom.
    figure.legend(handles[::-1], labels[::-1], loc="outside right center", frameon=False, fontsize=8)
    try:
        png.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(png, format="png")
    except OSError as error:
        raise EnvironmentSetupError(f"--plot {png}: cannot be written ({error.strerror or error})") from None
