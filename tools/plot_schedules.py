"""Draw everything that a configuration changes while training, before the run: one PNG.

    python tools/plot_schedules.py --config configs/deepseek_v3_671b.json --output schedules.png

Learning rate, batch size and every setting with phases over the training tokens, as the steps will get
them; any flag of pretrain_megads.py may follow. Needs no GPU and no torch.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megads.config.flags import Arguments, parse_flags
from megads.config.loader import load_config
from megads.config.resolve import Resolved, planned_hardware, resolve
from megads.config.scalars import Schedules, scheduled_settings
from megads.config.schema import Config
from megads.config.validate import check
from megads.errors import MegadsError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

POINTS = 1500
LINE, QUIET = "#1f5fa8", "#6b7280"


def breakpoints(config: Config, resolved: Resolved) -> list[int]:
    """Tokens at which some schedule turns, each with the step before it, within the run."""
    step = resolved.batch.final * resolved.batch.seq_length
    phases = [*config.training.lr_phases, *(p for s in scheduled_settings(config) for p in s.phases)]
    turns = {phase.until_tokens for phase in phases}
    turns |= {stage.first_tokens for stage in resolved.batch.stages}
    turns |= {phase.from_tokens for phase in config.data.phases}
    around = {turn + offset for turn in turns for offset in (-2 * step, -step, 0, step)}
    return sorted(tokens for tokens in around if 0 <= tokens < resolved.total_tokens)


def series(config: Config, resolved: Resolved) -> tuple[list[int], dict[str, list[float]]]:
    """(tokens, values by panel); only what is shown: the rate, the batch, and all that varies."""
    schedules, total = Schedules(config, resolved), resolved.total_tokens
    even = {total * i // POINTS for i in range(POINTS)}
    tokens = sorted(even | set(breakpoints(config, resolved)))
    at = [schedules.at(t) for t in tokens]
    panels = {
        "learning rate": [scalars.learning_rate for _, scalars in at],
        "batch (sequences)": [float(batch) for batch, _ in at],
        "sequence length": [float(scalars.seq_length) for _, scalars in at],
        "MTP loss weight": [scalars.mtp_loss_weight for _, scalars in at],
        "bias update rate": [scalars.bias_update_rate for _, scalars in at],
        "auxiliary loss weight": [scalars.aux_loss_weight for _, scalars in at],
        "router temperature": [scalars.router_temperature for _, scalars in at],
        "router noise": [scalars.router_noise_std for _, scalars in at],
    }
    always = ("learning rate", "batch (sequences)")
    return tokens, {n: v for n, v in panels.items() if n in always or min(v) != max(v)}


def mix(config: Config, tokens: list[int]) -> dict[str, list[float]]:
    """Share of each source at each of `tokens`, where the mix has phases."""
    if not config.data.phases:
        return {}
    shares: dict[str, list[float]] = {source.name: [] for source in config.data.sources}
    for at in tokens:
        current = max((p for p in config.data.phases if p.from_tokens <= at), key=lambda p: p.from_tokens)
        total = sum(current.weights.values())
        for name, values in shares.items():
            values.append(current.weights.get(name, 0.0) / total)
    return shares


def draw(config: Config, resolved: Resolved, png: Path) -> None:
    """Draw all panels, one below the other over the same tokens, into `png`."""
    from matplotlib.figure import Figure

    tokens, panels = series(config, resolved)
    shares = mix(config, tokens)
    rows = len(panels) + bool(shares)
    figure = Figure(figsize=(9, 1.2 + 1.5 * rows), dpi=144, layout="constrained")
    axes = figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
    for ax, (name, values) in zip(axes, panels.items(), strict=False):
        smooth = name == "learning rate"
        ax.plot(tokens, values, color=LINE, linewidth=1.6, drawstyle="default" if smooth else "steps-post")
        ax.set_ylim(0, max(*values, 1e-12) * 1.2)
        _style(ax, name)
    if shares:
        axes[-1].stackplot(tokens, list(shares.values()), labels=list(shares), step="post", alpha=0.85)
        axes[-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=7)
        axes[-1].set_ylim(0, 1)
        _style(axes[-1], "share of tokens")
    axes[0].set_title(config.experiment_name, loc="left", fontweight="bold")
    axes[-1].set_xlim(0, resolved.total_tokens)
    axes[-1].set_xlabel("training tokens")
    axes[-1].xaxis.set_major_formatter(lambda value, _: _count(value))
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png, format="png")


def _style(ax: "Axes", name: str) -> None:
    ax.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9, color=QUIET)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(color="#e5e7eb", linewidth=0.8)
    ax.set_axisbelow(True)


def _count(value: float) -> str:
    """A number of tokens for an axis: 2.5T, 469B, 12M."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def parse_arguments(argv: list[str]) -> tuple[Path, Arguments]:
    """The PNG to draw, and what is left: the arguments of pretrain_megads.py."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("schedules.png"), help="default: %(default)s")
    options, rest = parser.parse_known_args(argv)
    return options.output, parse_flags(rest)


def main(argv: list[str]) -> int:
    try:
        png, arguments = parse_arguments(argv)
        config = load_config(arguments.config, arguments.overrides, arguments.origins)
        world_size, cuda = planned_hardware(config, arguments.world_size)
        check(config, world_size, cuda)
        draw(config, resolve(config, world_size, cuda), png)
    except MegadsError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    print(png)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
