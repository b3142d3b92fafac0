"""Long columns brought down to what a screen can show, and smoothing.

A screen has about a thousand columns of pixels. Each bucket of records keeps its least and its greatest
value, so that a spike of one record among a hundred thousand is still to be seen.
"""

import math
from collections.abc import Sequence

import numpy as np

from megads.report.read import Floats

MOST_POINTS = 2000
FEWEST_POINTS_TO_SMOOTH = 30
SMOOTHING_SHARE = 0.02
"""Half the smoothing window, as a share of the records."""
SIGNIFICANT_DIGITS = 6


class Thinning:
    """For columns of so many rows: which points stay."""

    def __init__(self, rows: int) -> None:
        self._edges = (
            None if rows <= MOST_POINTS else np.linspace(0, rows, MOST_POINTS // 2 + 1).astype(np.intp)
        )

    def positions(self, values: Floats) -> list[float | None]:
        """Where the points lie: each bucket's first and last row."""
        if self._edges is not None:
            values = _in_turn(values[self._edges[:-1]], values[self._edges[1:] - 1])
        return as_json(values, digits=15)  # counts: exact

    def extremes(self, values: Floats) -> list[float | None]:
        """Least and greatest value of each bucket, in the order that the bucket rises or falls."""
        if self._edges is None:
            return as_json(values)
        starts = self._edges[:-1]
        least, greatest = np.fmin.reduceat(values, starts), np.fmax.reduceat(values, starts)
        falls = values[starts] > values[self._edges[1:] - 1]
        return as_json(_in_turn(np.where(falls, greatest, least), np.where(falls, least, greatest)))

    def means(self, values: Floats) -> list[float | None]:
        """Each bucket's mean, twice."""
        if self._edges is None:
            return as_json(values)
        known = np.isfinite(values)
        sums = np.add.reduceat(np.where(known, values, 0), self._edges[:-1])
        counts = np.add.reduceat(known.astype(np.intp), self._edges[:-1])
        means = np.where(counts > 0, sums / np.maximum(counts, 1), math.nan)
        return as_json(_in_turn(means, means))


def smooth(values: Floats, borders: Sequence[int] = ()) -> Floats | None:
    """Centred moving average, not over `borders` (rows at which something else begins); None for few rows.

    At the beginning the window narrows on both sides, so that a steep start is not dragged behind; at the
    end on the far side only, so that the last values are no noisier than the rest. What is not finite is
    left out.
    """
    if len(values) < FEWEST_POINTS_TO_SMOOTH:
        return None
    half_width = max(1, round(SMOOTHING_SHARE * len(values)))
    pieces = np.split(values, sorted(row for row in set(borders) if 0 < row < len(values)))
    return np.concatenate([_moving_average(piece, half_width) for piece in pieces])


def _moving_average(values: Floats, half_width: int) -> Floats:
    rows = np.arange(len(values))
    reach = np.minimum(half_width, rows)
    first, end = rows - reach, np.minimum(rows + reach + 1, len(values))
    known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    inside, total = counts[end] - counts[first], sums[end] - sums[first]
    return np.where(inside > 0, total / np.maximum(inside, 1), math.nan)


def as_json(values: Floats, digits: int = SIGNIFICANT_DIGITS) -> list[float | None]:
    """The values with so many significant digits; what is not finite is None."""
    return [float(f"{value:.{digits}g}") if math.isfinite(value) else None for value in values.tolist()]


def _in_turn(first: Floats, second: Floats) -> Floats:
    return np.stack([first, second], axis=1).ravel()
