"""Warnings about a run that goes on but not well, from the records of its log intervals.

Each is given when it begins and again only after it had ended, so that a lasting trouble is one line.
"""

import math
from collections import deque
from collections.abc import Iterator
from statistics import median

from megads.config.schema import Health
from megads.train.metrics import Record

NORMS = 20
"""Intervals whose gradient norms are the measure for the next."""
FEWEST_NORMS = 5


class HealthWatch:
    """Looks at each training record; `vocab_size` is of the run."""

    def __init__(self, settings: Health, *, vocab_size: int) -> None:
        self._settings = settings
        self._ignorance = math.log(vocab_size)
        self._norms: deque[float] = deque(maxlen=NORMS)
        self._best_loss = math.inf
        self._intervals_since_best = 0
        self._active: set[str] = set()

    def look(self, record: Record) -> list[tuple[str, str]]:
        """(name, sentence) of the troubles that begin with this record."""
        found = dict(self._troubles(record))
        begun = [(name, text) for name, text in found.items() if name not in self._active]
        self._active = set(found)
        return begun

    def _troubles(self, record: Record) -> Iterator[tuple[str, str]]:
        loss, norm = record.get("lm_loss"), record.get("grad_norm")
        if loss is not None:
            yield from self._of_loss(loss)
        if norm is not None and math.isfinite(norm):
            usual = median(self._norms) if len(self._norms) >= FEWEST_NORMS else math.inf
            if norm > self._settings.grad_norm_factor * usual:
                yield "grad_norm", f"the gradient norm is {norm:.3g}, usual is {usual:.3g}"
            self._norms.append(norm)
        yield from self._of_experts(record)
        share = record.get("memory_share")
        if share is not None and share > self._settings.memory_share:
            used = record["peak_memory_bytes"]
            yield "memory", f"{share:.0%} of the memory has been in use ({used / 2**30:.1f} GiB)"

    def _of_loss(self, loss: float) -> Iterator[tuple[str, str]]:
        if loss > self._ignorance + self._settings.loss_above_ignorance:
            yield (
                "high_loss",
                f"the loss {loss:.3f} is above that of guessing, ln(vocabulary) = {self._ignorance:.3f}",
            )
        improved = loss < self._best_loss
        self._best_loss = min(loss, self._best_loss)
        self._intervals_since_best = 0 if improved else self._intervals_since_best + 1
        if self._intervals_since_best >= self._settings.stalled_intervals:
            yield "stalled", f"the loss has not been below {self._best_loss:.4f} for a long time"

    def _of_experts(self, record: Record) -> Iterator[tuple[str, str]]:
        dead = record.get("dead_experts_by_layer")
        if dead and sum(dead):
            layers = [str(layer) for layer, count in enumerate(dead) if count]
            yield "dead_experts", f"{sum(dead)} experts got no token (MoE layers {', '.join(layers)})"
        uneven = [
            f"{layer}: {value:.2f}"
            for layer, value in enumerate(record.get("max_vio_by_layer") or ())
            if value is not None and value > self._settings.max_vio
        ]
        if uneven:
            yield "max_vio", f"experts are loaded unevenly: MaxVio by MoE layer is {', '.join(uneven)}"
