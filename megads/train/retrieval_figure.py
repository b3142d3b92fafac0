"""Retrieval as a table and as heat maps, one beside the other. No torch."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson

from megads.errors import DataError


@dataclass(frozen=True)
class Result:
    """Share of answered prompts [lengths, depths]; depths from 0, the start of the haystack, to 1."""

    title: str
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    accuracy: list[list[float]]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def read_result(path: Path) -> Result:
    """What tools/evaluate_retrieval.py wrote. Raises DataError for anything else."""
    try:
        content = orjson.loads(path.read_bytes())
        result = Result(*(content[name] for name in ("title", "lengths", "depths", "accuracy")))
        rows = [len(row) for row in result.accuracy]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path}: no result of tools/evaluate_retrieval.py: {error!r}") from None
    if rows != [len(result.depths)] * len(result.lengths):
        raise DataError(f"{path}: a result whose rows are not its lengths and depths")
    return result


def table(result: Result) -> str:
    """Lines of text: a row per length, a column per depth, and the mean."""
    lines = ["tokens  " + "".join(f"{depth:>7.0%}" for depth in result.depths) + "   mean"]
    for length, row in zip(result.lengths, result.accuracy, strict=True):
        mean = sum(row) / len(row)
        lines.append(f"{length:>6}  " + "".join(f"{share:>7.1%}" for share in row) + f" {mean:>6.1%}")
    return "\n".join([f"{result.title}: answered, by depth of the fact", *lines])


def draw(results: Sequence[Result], png: Path) -> None:
    """A heat map per result, all with the same colours: lengths to the right, depth downwards."""
    from matplotlib.figure import Figure

    widths = [max(2, len(result.lengths)) for result in results]
    figure = Figure(
        figsize=(1.6 + 0.85 * sum(widths) + 0.3 * len(results), 3.4), dpi=144, layout="constrained"
    )
    panels = figure.subplots(1, len(results), squeeze=False, width_ratios=widths)[0]
    for number, (axes, result) in enumerate(zip(panels, results, strict=True)):
        by_depth = [list(column) for column in zip(*result.accuracy, strict=True)]
        image = axes.imshow(by_depth, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        for y, row in enumerate(by_depth):
            for x, share in enumerate(row):
                axes.text(x, y, f"{share:.0%}", ha="center", va="center", fontsize=8)
        axes.set_xticks(range(len(result.lengths)), [str(length) for length in result.lengths])
        axes.set_yticks(range(len(result.depths)), [f"{depth:.0%}" for depth in result.depths])
        axes.set_title(result.title, fontsize=9)
        axes.set_xlabel("prompt (tokens)", fontsize=9)
        axes.tick_params(labelsize=8, length=0)
        if number == 0:
            axes.set_ylabel("depth of the fact", fontsize=9)
    figure.colorbar(
        image, ax=list(panels), label="answered", shrink=0.9, format=lambda share, _: f"{share:.0%}"
    )
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png, format="png")
