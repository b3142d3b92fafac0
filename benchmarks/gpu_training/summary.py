"""From measurements to statements: medians over rounds, utilization, tables, and which claims hold."""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from gpu_training.kernels import GROUPS
from gpu_training.stopwatch import PHASES
from gpu_training.variant import Measured

GIB = 2**30
LEAST_UTILIZATION, LEAST_FP8_SPEEDUP, LEAST_OVER_STOCK, LEAST_OVER_TRANSFORMERS = 0.45, 1.3, 1.1, 3.0

Row = list[str]


@dataclass(frozen=True)
class Variant:
    """A contender in a precision on a shape: its rounds, and why there are no (further) ones."""

    shape: str
    precision: str
    contender: str
    rounds: list[Measured]
    problem: str | None = None

    @property
    def seconds(self) -> float:
        """Median over all steps of all rounds."""
        return statistics.median(second for found in self.rounds for second in found.seconds)

    @property
    def seconds_by_round(self) -> list[float]:
        return [statistics.median(found.seconds) for found in self.rounds]

    @property
    def tokens_per_second(self) -> float:
        return self.rounds[0].tokens_per_step / self.seconds

    @property
    def flops_per_second(self) -> float:
        """Model FLOPs with causal attention (`megads/config/flops.py`); recomputation does not count."""
        return self.tokens_per_second * self.rounds[0].flops_per_token

    @property
    def utilization(self) -> float:
        """MFU: of the dense BF16 peak, in FP8 too."""
        return self.flops_per_second / self.rounds[0].peak_flops_per_second

    @property
    def utilization_whole_square(self) -> float:
        """The same with attention's scores counted as the full square, as Megatron-LM and PaLM do."""
        first = self.rounds[0]
        return self.utilization * first.flops_per_token_whole_square / first.flops_per_token

    @property
    def peak_bytes(self) -> int | None:
        """The most that CUDA's allocator had handed out."""
        return max((found.peak_allocated_bytes or 0 for found in self.rounds), default=0) or None

    @property
    def kernels(self) -> dict[str, float]:
        return next((found.kernels for found in self.rounds if found.kernels), {})

    def phase(self, name: str) -> float:
        return statistics.median(found.phases[name] for found in self.rounds)

    def as_json(self) -> dict[str, Any]:
        """Everything measured, and what follows from it."""
        found: dict[str, Any] = {
            "shape": self.shape,
            "precision": self.precision,
            "contender": self.contender,
        }
        if self.problem:
            found["problem"] = self.problem
        if self.rounds:
            found |= {
                "seconds_per_step": self.seconds,
                "seconds_per_step_by_round": self.seconds_by_round,
                "tokens_per_second": self.tokens_per_second,
                "flops_per_second": self.flops_per_second,
                "mfu": self.utilization,
                "mfu_whole_square": self.utilization_whole_square,
                "peak_bytes": self.peak_bytes,
                "rounds": [vars(one) for one in self.rounds],
            }
        return found


def speed_rows(variants: list[Variant]) -> Iterator[Row]:
    """Headings, then a row per variant."""
    yield [
        "shape", "precision", "", "tokens/s", "TFLOP/s", "MFU", "(square)", "ms/step", "rounds",
        "peak GiB", "planned GiB", "MaxVio",
    ]  # fmt: skip
    for variant in variants:
        names = [variant.shape, variant.precision, variant.contender]
        if not variant.rounds:
            yield [*names, f"none: {variant.problem}", *[""] * 8]
            continue
        low, high = min(variant.seconds_by_round), max(variant.seconds_by_round)
        planned = variant.rounds[0].planned_bytes / GIB
        then = f"; then {variant.problem}" if variant.problem else ""
        yield [
            *names,
            f"{variant.tokens_per_second:,.0f}",
            f"{variant.flops_per_second / 1e12:.3g}",
            f"{variant.utilization:.1%}",
            f"{variant.utilization_whole_square:.1%}",
            f"{1e3 * variant.seconds:.1f}",
            f"{1e3 * low:.1f} to {1e3 * high:.1f}{then}",
            f"{variant.peak_bytes / GIB:.1f}" if variant.peak_bytes else "",
            f"{planned:.1f}" if variant.contender == "megads" else "",
            f"{statistics.median(one.max_vio for one in variant.rounds):.2f}",
        ]


def time_rows(variants: list[Variant]) -> Iterator[Row]:
    """Milliseconds per step by phase, then of the profiled steps by group of kernels."""
    yield ["shape", "precision", "", *PHASES, *GROUPS]
    for variant in variants:
        if variant.rounds:
            times = [variant.phase(phase) for phase in PHASES]
            times += [variant.kernels.get(group, 0.0) for group in GROUPS]
            names = [variant.shape, variant.precision, variant.contender]
            yield [*names, *(f"{1e3 * seconds:.1f}" for seconds in times)]


def claim_rows(variants: list[Variant]) -> Iterator[Row]:
    """What is claimed of MegaDS, what was measured, and whether it holds; only what could be measured."""
    found = {(one.shape, one.precision, one.contender): one for one in variants if one.rounds}
    yield ["claim", "measured", "holds"]
    for (shape, precision, contender), mine in found.items():
        if contender != "megads":
            continue
        label = f"{shape} {precision}"
        if shape == "v3" and precision == "bf16":
            yield _claim(f"{label}: MFU", mine.utilization, LEAST_UTILIZATION)
        if precision == "fp8" and (bf16 := found.get((shape, "bf16", "megads"))):
            speedup = mine.tokens_per_second / bf16.tokens_per_second
            yield _claim(f"{label}: over bf16", speedup, LEAST_FP8_SPEEDUP)
        for other, least in (("stock", LEAST_OVER_STOCK), ("transformers", LEAST_OVER_TRANSFORMERS)):
            if its := found.get((shape, precision, other)):
                speedup = mine.tokens_per_second / its.tokens_per_second
                yield _claim(f"{label}: over {other}", speedup, least)
        if graphs := found.get((shape, precision, "megads-graphs")):
            speedup = graphs.tokens_per_second / mine.tokens_per_second
            yield _claim(f"{label}: with CUDA graphs over without", speedup, 1.0)
        stock = found.get((shape, precision, "stock"))
        if stock and stock.peak_bytes and mine.peak_bytes:
            ratio = stock.peak_bytes / mine.peak_bytes
            yield _claim(f"{label}: stock's peak memory over ours", ratio, 1.0)


def _claim(text: str, value: float, least: float) -> Row:
    return [f"{text}, at least {least:g}", f"{value:.3f}", "yes" if value >= least else "no"]


def as_markdown(rows: list[Row]) -> str:
    """A table; the first row is the heading."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])
