"""Which source each sample comes from: a pure function of weights and the sample's number.

Within a phase, sample j (from 0) of a source of weight w is due at (j + 1/2) / w, and samples come in the
order in which they are due (ties: in the order of sources). This is the divisor method of Webster and
Sainte-Lague: after n samples of K sources each has n w samples to within (1 + K w) / 2, at every n. It
does what Megatron-Core's `build_blending_indices` does ("the one that lags most is next"), but sample n
is found without the n - 1 before it, so there is no index to build, to store or to damage, and the order
does not depend on how many samples a run asks for.

A change of phase changes the weights; each source goes on where it was.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from megads.errors import ConfigError

BLOCK_SAMPLES = 1 << 16

Counts = NDArray[np.int64]


@dataclass(frozen=True)
class MixPhase:
    """From sample `first_sample` on, sources come in proportion to `weights` (sum 1; 0: not at all)."""

    first_sample: int
    weights: tuple[float, ...]


class Mix:
    """An endless sequence of (source, sample of that source); sources are numbered as in the weights."""

    def __init__(self, phases: Sequence[MixPhase]) -> None:
        assert phases[0].first_sample == 0
        self.phases = tuple(phases)
        self._before = [np.zeros(len(phases[0].weights), dtype=np.int64)]
        for phase, following in pairwise(phases):
            assert phase.first_sample < following.first_sample
            taken = _counts(phase.weights, following.first_sample - phase.first_sample)
            self._before.append(self._before[-1] + taken)
        self._block: tuple[int, int, NDArray[np.int32], Counts] | None = None

    def counts(self, samples: int) -> Counts:
        """Samples of each source among the first `samples` [sources]."""
        number = self._phase_of(max(0, samples - 1))
        phase = self.phases[number]
        return self._before[number] + _counts(phase.weights, samples - phase.first_sample)

    def locate(self, sample: int) -> tuple[int, int]:
        """(source, number of the sample within that source) of a sample, both from 0."""
        held = self._block
        if held is None or not held[0] <= sample < held[1]:
            held = self._block = self._block_of(sample)
        at = sample - held[0]
        return int(held[2][at]), int(held[3][at])

    def _block_of(self, sample: int) -> tuple[int, int, NDArray[np.int32], Counts]:
        """The run of samples around `sample` that is worked out at once: first, end, sources, numbers."""
        number = self._phase_of(sample)
        phase = self.phases[number]
        skipped = (sample - phase.first_sample) // BLOCK_SAMPLES * BLOCK_SAMPLES
        first = phase.first_sample + skipped
        end = first + BLOCK_SAMPLES
        if number + 1 < len(self.phases):
            end = min(end, self.phases[number + 1].first_sample)
        taken = _counts(phase.weights, skipped)
        sources, numbers = _following(phase.weights, taken, skipped, end - first)
        return first, end, sources, numbers + self._before[number][sources]

    def _phase_of(self, sample: int) -> int:
        return max(i for i, phase in enumerate(self.phases) if phase.first_sample <= sample)


def _counts(weights: Sequence[float], samples: int) -> Counts:
    """Samples of each source among the first `samples` of a phase."""
    weight = np.array(weights)
    active = weight > 0
    # Up to `due`, no more than `samples` are due: each source has at most w * due + 1/2.
    due = float(max(0, samples - int(active.sum())))
    taken = np.where(active, np.floor(due * weight + 0.5), 0).astype(np.int64)
    with np.errstate(divide="ignore", invalid="ignore"):  # rounding, where a sample is due just then
        taken -= active & ((taken - 0.5) / weight > due)
        taken += active & ((taken + 0.5) / weight <= due)
    rest = samples - int(taken.sum())
    assert rest >= 0
    sources, _ = _following(weights, taken, samples - rest, rest)
    return taken + np.bincount(sources, minlength=weight.size)


def _following(
    weights: Sequence[float], taken: Counts, passed: int, samples: int
) -> tuple[NDArray[np.int32], Counts]:
    """Sources and numbers of the next `samples` samples, when `passed` = sum of `taken` are gone."""
    active = [source for source, weight in enumerate(weights) if weight > 0]
    # By then at least `samples` more are due: each source has at least w * until - 1/2.
    until = passed + samples + len(active)
    due, sources, numbers = [], [], []
    for source in active:
        first = int(taken[source])
        count = max(0, math.floor(until * weights[source]) + 2 - first)
        number = np.arange(first, first + count)
        due.append((number + 0.5) / weights[source])
        sources.append(np.full(count, source, dtype=np.int32))
        numbers.append(number)
    # lexsort's last key leads; equal ones keep the order of sources.
    order = np.lexsort((np.concatenate(sources), np.concatenate(due)))[:samples]
    assert order.size == samples
    return np.concatenate(sources)[order], np.concatenate(numbers)[order]


def normalized(weights: dict[str, float], temperature: float) -> dict[str, float]:
    """w^temperature over the sum, as for multilingual data in arXiv:1911.02116; weights of 0 are left out."""
    # Twelve digits: `pow` may differ in the last bit between machines, and the order must not.
    powered = {name: float(f"{weight**temperature:.12g}") for name, weight in weights.items() if weight > 0}
    total = math.fsum(powered.values())
    return {name: value / total for name, value in powered.items()}


def phases_within_caps(
    names: Sequence[str],
    starts: Sequence[int],
    shares: Sequence[dict[str, float]],
    samples: int,
    most_samples: dict[str, int],
) -> tuple[MixPhase, ...]:
    """Phases of a run of `samples` in which no source gives more than its `most_samples`.

    `shares` (sum 1) hold from sample `starts` on. A source that would give too much gives proportionally
    less in every phase; the others take over in proportion to their shares. Raises ConfigError when all
    sources of a phase are capped below what it needs.
    """  # fmt: skip
    limits = dict(most_samples)
    while True:
        phases = _capped(names, starts, shares, samples, limits)
        given = dict(zip(names, Mix(phases).counts(samples).tolist(), strict=True))
        excess = {name: given[name] - most for name, most in most_samples.items() if given[name] > most}
        if not excess:
            return phases
        for name, count in excess.items():  # a sample or so, by rounding
            limits[name] -= count


def _capped(
    names: Sequence[str], starts: Sequence[int], shares: Sequence[dict[str, float]], samples: int,
    limits: dict[str, int],
) -> tuple[MixPhase, ...]:  # fmt: skip
    starts = [start for start in starts if start < samples]  # later phases are not reached
    lengths = [min(end, samples) - start for start, end in zip(starts, [*starts[1:], samples], strict=True)]
    shares = shares[: len(starts)]
    now = [{name: share.get(name, 0.0) for name in names} for share in shares]
    capped: set[str] = set()
    while True:
        totals = {
            name: math.fsum(n * share[name] for n, share in zip(lengths, now, strict=True)) for name in names
        }
        over = [
            name for name in names if name in limits and name not in capped and totals[name] > limits[name]
        ]
        if not over:
            return tuple(
                MixPhase(start, tuple(share[name] for name in names))
                for start, share in zip(starts, now, strict=True)
            )
        capped.update(over)
        for number, share in enumerate(now):
            for name in over:
                share[name] *= max(0, limits[name]) / totals[name]
            _spread(number, share, capped, lengths[number])


def _spread(number: int, share: dict[str, float], capped: set[str], length: int) -> None:
    """Let the sources that are not capped fill what the capped ones leave."""
    free = math.fsum(value for name, value in share.items() if name not in capped)
    left = 1.0 - math.fsum(value for name, value in share.items() if name in capped)
    if free <= 0 and left * length >= 1:
        named = ", ".join(sorted(name for name, value in share.items() if name in capped and value > 0))
        raise ConfigError(
            f"data.sources: phase {number + 1} needs {length:,} sequences, but max_epochs of its sources "
            f"({named}) leaves {math.floor((1 - left) * length):,}: raise max_epochs, add data, or shorten "
            "the run"
        )
    for name in share:
        if free <= 0:  # what is left is less than a sequence
            share[name] /= 1.0 - left
        elif name not in capped:
            share[name] *= left / free
