"""Draw everything that a configuration changes while training, before the run: one PNG.

    python tools/plot_schedules.py --config configs/deepseek_v3_671b.json --output schedules.png

Learning rate, batch size and every setting with phases over the training tokens, as the steps will get
them; any flag of pretrain_megads.py may follow. Needs no GPU and no torch.
"""

import argparse
import sys
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megads.config.flags import Arguments, parse_flags
from megads.config.resolve import Resolved, resolve
from megads.config.scalars import Schedules, scheduled_settings
from megads.config.schema import Config
from megads.config.stages import Stage, check_stages, load_stages, planned_processes, select
from megads.data.sources import training_shares
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
    """(tokens, values by panel) of one run: learning rate, batch, and every setting that may vary."""
    schedules, total = Schedules(config, resolved), resolved.total_tokens
    even = {total * i // POINTS for i in range(POINTS)}
    tokens = sorted(even | set(breakpoints(config, resolved)))
    at = [schedules.at(t) for t in tokens]
    return tokens, {
        "learning rate": [scalars.learning_rate for _, scalars in at],
        "batch (sequences)": [float(batch) for batch, _ in at],
        "sequence length": [float(scalars.seq_length) for _, scalars in at],
        "MTP loss weight": [scalars.mtp_loss_weight for _, scalars in at],
        "bias update rate": [scalars.bias_update_rate for _, scalars in at],
        "auxiliary loss weight": [scalars.aux_loss_weight for _, scalars in at],
        "router temperature": [scalars.router_temperature for _, scalars in at],
        "router noise": [scalars.router_noise_std for _, scalars in at],
    }


def mix(config: Config, tokens: list[int]) -> dict[str, list[float]]:
    """Share of each source at each of `tokens`; what `max_epochs` takes off it the datasets decide."""
    names, starts, shares = training_shares(config)
    phases = [bisect_right(starts, at // config.training.seq_length) - 1 for at in tokens]
    return {name: [shares[phase].get(name, 0.0) for phase in phases] for name in names}


@dataclass(frozen=True)
class Segment:
    """One stage in the figure, from `first_tokens` on."""

    name: str
    first_tokens: int
    tokens: list[int]
    panels: dict[str, list[float]]
    shares: dict[str, list[float]]


def segments(stages: Sequence[Stage], world_size: int, cuda: bool) -> tuple[list[Segment], int]:
    """The stages one after the other, and the tokens of all of them."""
    found, first = [], 0
    for stage in stages:
        resolved = resolve(stage.config, world_size, cuda)
        tokens, panels = series(stage.config, resolved)
        shifted = [first + at for at in tokens]
        found.append(Segment(stage.name, first, shifted, panels, mix(stage.config, tokens)))
        first += resolved.total_tokens
    return found, first


def shown_panels(drawn: Sequence[Segment]) -> list[str]:
    """The rate, the batch, and all that varies, within a stage or from one to the next."""
    always = ("learning rate", "batch (sequences)")
    values = {name: {value for one in drawn for value in one.panels[name]} for name in drawn[0].panels}
    return [name for name, seen in values.items() if name in always or len(seen) > 1]


def draw(title: str, drawn: Sequence[Segment], total_tokens: int, png: Path) -> None:
    """Draw all panels, one below the other over the same tokens, into `png`; stages have borders."""
    from matplotlib.figure import Figure

    names = shown_panels(drawn)
    mixes = {
        tuple(values[at] for values in one.shares.values()) for one in drawn for at in range(len(one.tokens))
    }
    with_mix = len(mixes) > 1
    rows = len(names) + with_mix
    figure = Figure(figsize=(9, 1.2 + 1.5 * rows), dpi=144, layout="constrained")
    axes = figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
    for ax, name in zip(axes, names, strict=False):
        style = "default" if name == "learning rate" else "steps-post"
        for one, end in zip(drawn, [*(later.first_tokens for later in drawn[1:]), total_tokens], strict=True):
            values = one.panels[name]
            ax.plot([*one.tokens, end], [*values, values[-1]], color=LINE, linewidth=1.6, drawstyle=style)
        ax.set_ylim(0, max(1e-12, *(value for one in drawn for value in one.panels[name])) * 1.2)
        _style(ax, name)
    if with_mix:
        _draw_mix(axes[-1], drawn)
    for ax in axes:
        for one in drawn[1:]:
            ax.axvline(one.first_tokens, color=QUIET, linewidth=0.9, linestyle=(0, (4, 3)))
    if drawn[0].name:
        _name_stages(axes[0], drawn, total_tokens)
    axes[0].set_title(title, loc="left", fontweight="bold", pad=18 if drawn[0].name else None)
    axes[-1].set_xlim(0, total_tokens)
    axes[-1].set_xlabel("training tokens")
    axes[-1].xaxis.set_major_formatter(lambda value, _: _count(value))
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png, format="png")


def _draw_mix(ax: "Axes", drawn: Sequence[Segment]) -> None:
    """Shares of the sources as bands; a source that a stage does not read has no band there."""
    names = list(dict.fromkeys(name for one in drawn for name in one.shares))
    tokens = [at for one in drawn for at in one.tokens]
    bands = [[v for one in drawn for v in one.shares.get(name, [0.0] * len(one.tokens))] for name in names]
    ax.stackplot(tokens, bands, labels=names, step="post", alpha=0.85)
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=7)
    ax.set_ylim(0, 1)
    _style(ax, "share of tokens")


def _name_stages(ax: "Axes", drawn: Sequence[Segment], total_tokens: int) -> None:
    """Names above the borders; those of stages too short for it one above the other, at the right."""
    last = -1.0
    height = 1.02
    for one in drawn:
        place = one.first_tokens / total_tokens
        height = height + 0.12 if place - last < 0.12 else 1.02
        last = place
        side = "left" if place < 0.85 else "right"
        ax.text(
            place, height, one.name, transform=ax.transAxes, ha=side, va="bottom", fontsize=8, color=QUIET
        )


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
        stages = load_stages(arguments.config, arguments.overrides, arguments.origins)
        title = stages[0].config.experiment_name.removesuffix(f"/{stages[0].name}")
        if arguments.stage is not None:
            stages = (select(stages, arguments.stage),)
        world_size, cuda = planned_processes(stages, arguments.world_size)
        check_stages(stages, world_size, cuda)
        draw(title, *segments(stages, world_size, cuda), png)
    except MegadsError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    print(png)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
