"""From the numbers of single steps to one record per log interval.

`StepMeter` keeps the numbers where they were computed: adding one launches a few small kernels and
never waits for the device; one reduction and one copy per interval bring them to the host.
`SpeedMeter` turns tokens and time into tokens/s, MFU and time left. The `*_record` functions put
together what the sinks get: flat JSON objects, told apart by `kind`.

| kind         | written                     | says                                              |
|--------------|-----------------------------|---------------------------------------------------|
| `run`        | at the start and each resume| layout, size, vocabulary, length of the run       |
| `train`      | each log interval           | losses, rate, norm, speed, expert balance         |
| `validation` | each evaluation             | loss and perplexity, together and by source       |
| `event`      | when it happens             | a spike of the loss, a rollback                   |

Lists hold one value per MoE layer. A value that is unknown or not finite is null in JSON.
"""

import math
import os
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from megads.config.scalars import Scalars
from megads.train.state import TrainState

Record = dict[str, Any]

INTERVALS_FOR_TIME_LEFT = 10


@dataclass(frozen=True)
class Averages:
    """What `StepMeter.drain` gives: the means of an interval and how even the experts were loaded."""

    steps: int
    means: dict[str, float | None]
    """By name; None where no value was added."""
    max_vio: list[float | None]
    """MaxVio by MoE layer, mean over the steps."""
    dead_experts: list[int]
    """By MoE layer, experts that got no token in the whole interval."""


class StepMeter:
    """Weighted means over the steps of an interval, accumulated on `device`.

    `names` must be the same on all ranks. A rank adds what it knows: losses exist on the last
    pipeline stage only, and `drain` joins the ranks.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        moe_layers: int = 0,
        num_experts: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self._index = {name: i for i, name in enumerate(names)}
        # Float64, so that sums of token counts stay exact and the order of ranks hardly matters.
        self._values_2N = torch.zeros(2, len(self._index), dtype=torch.float64, device=device)
        self._max_vio_2L = torch.zeros(2, moe_layers, dtype=torch.float64, device=device)
        self._load_LE = torch.zeros(moe_layers, num_experts, dtype=torch.float64, device=device)
        self._rows_by_layers: dict[tuple[int, ...], Tensor] = {}
        self._steps = 0

    def add(self, name: str, value: Tensor | float, weight: Tensor | float = 1.0) -> None:
        """Add a scalar of this step; the interval's mean is sum(value * weight) / sum(weight).

        Ranks that hold copies of one value (tensor parallelism) may all add it. A value that is not
        finite makes the mean so: leave out what must not show, such as the norm of a skipped step.
        """
        self.add_sum(name, value * weight, weight)

    @torch.no_grad()
    def add_sum(self, name: str, total: Tensor | float, weight: Tensor | float) -> None:
        """Add `total`, a sum over `weight` things: a loss summed over tokens, and their number."""
        column = self._values_2N[:, self._index[name]]
        column[0] += total
        column[1] += weight

    @torch.no_grad()
    def add_expert_load(self, load_LE: Tensor, layers: Sequence[int] | None = None) -> None:
        """Add one step's tokens per expert of the MoE layers that this rank holds, `[L, num_experts]`.

        The tokens are those of the whole global batch. `layers` numbers the rows among all MoE layers
        of the model, from 0; without it the rank holds all of them. `drain` joins pipeline stages.
        """
        load_LE = load_LE.to(self._load_LE)
        rows = self._rows(range(len(self._load_LE)) if layers is None else layers)
        self._max_vio_2L[0].index_add_(0, rows, max_violation(load_LE))
        self._max_vio_2L[1].index_add_(0, rows, (load_LE.sum(-1) > 0).double())
        self._load_LE.index_add_(0, rows, load_LE)

    def _rows(self, layers: Sequence[int]) -> Tensor:
        """`layers` as an index on the device, copied there once: every copy waits for the device."""
        key = tuple(layers)
        if key not in self._rows_by_layers:
            self._rows_by_layers[key] = torch.tensor(key, dtype=torch.long, device=self._load_LE.device)
        return self._rows_by_layers[key]

    def step_done(self) -> None:
        """Count a step."""
        self._steps += 1

    @torch.no_grad()
    def drain(self, reduce: Callable[[Tensor], object] | None = None) -> Averages:
        """The means since the last call; starts anew. Waits for the device, once.

        `reduce` sums a flat tensor over all ranks in place, as `torch.distributed.all_reduce` does;
        every rank must call `drain` then.
        """
        parts = (self._values_2N, self._max_vio_2L, self._load_LE)
        flat = torch.cat([part.flatten() for part in parts])
        if reduce is not None:
            reduce(flat)
        pieces = flat.cpu().split_with_sizes([part.numel() for part in parts])
        values, max_vio, load = (piece.view(part.shape) for piece, part in zip(pieces, parts, strict=True))
        averages = Averages(
            steps=self._steps,
            means=dict(zip(self._index, _means(values), strict=True)),
            max_vio=_means(max_vio),
            dead_experts=(load == 0).sum(-1).tolist(),
        )
        for part in parts:
            part.zero_()
        self._steps = 0
        return averages


def max_violation(load_LE: Tensor) -> Tensor:
    """MaxVio by layer `[L]`: the largest load of an expert over the mean one, minus 1 (arXiv:2408.15664).

    0 is perfect balance, number of experts - 1 is everything on one expert; 0 for a layer without load.
    """
    mean_L = load_LE.mean(-1)
    return torch.where(mean_L > 0, load_LE.amax(-1) / mean_L.clamp(min=1e-30) - 1, torch.zeros_like(mean_L))


@dataclass(frozen=True)
class Speed:
    """How fast an interval was, over all processes of the job."""

    step_seconds: float
    tokens_per_second: float
    model_flops_per_second: float
    mfu: float
    """Share of the peak, 0 to 1."""
    seconds_left: float


class SpeedMeter:
    """Tokens per second, model FLOPs utilization and time left.

    MFU = training FLOPs per second / (peak FLOP/s of a process * processes). The FLOPs are
    those that the model needs, forward and backward (`config.flops`), recomputation not counted; the
    peak is `matmul_rate.peak_rate`'s. Definition: PaLM, arXiv:2204.02311, appendix B.
    """

    def __init__(
        self,
        *,
        peak_flops_per_second: float,
        processes: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._peak = peak_flops_per_second * processes
        self._clock = clock
        self._last = clock()
        self._steps = self._tokens = 0
        self._seconds = self._flops = 0.0
        self._history: deque[tuple[int, float]] = deque(maxlen=INTERVALS_FOR_TIME_LEFT)

    def step_done(self, tokens: int, flops: float) -> float:
        """Count a step of `tokens` tokens and their model FLOPs (of the whole job); the seconds it took."""
        now = self._clock()
        seconds = now - self._last
        self._last = now
        self._steps += 1
        self._tokens += tokens
        self._flops += flops
        self._seconds += seconds
        return seconds

    @contextmanager
    def excluded(self) -> Iterator[None]:
        """What runs inside (evaluation, a blocking save) does not count as training time.

        Enter it after `StepMeter.drain`, which waits for the steps that a GPU still has queued.
        """
        start = self._clock()
        try:
            yield
        finally:
            self._last += self._clock() - start

    def interval(self, tokens_left: int) -> Speed:
        """The speed since the last call; `tokens_left` to the end of the run."""
        assert self._steps > 0, "no step since the last interval"
        seconds = max(self._seconds, 1e-9)
        tokens_per_second = self._tokens / seconds
        self._history.append((self._tokens, seconds))
        recent_rate = sum(tokens for tokens, _ in self._history) / sum(spent for _, spent in self._history)
        flops_per_second = self._flops / seconds
        speed = Speed(
            step_seconds=seconds / self._steps,
            tokens_per_second=tokens_per_second,
            model_flops_per_second=flops_per_second,
            mfu=flops_per_second / self._peak,
            seconds_left=max(tokens_left, 0) / recent_rate,
        )
        self._steps = self._tokens = 0
        self._seconds = self._flops = 0.0
        return speed


def train_record(
    state: TrainState,
    averages: Averages,
    speed: Speed,
    *,
    scalars: Scalars,
    batch_size: int,
    sampled: Mapping[str, int] | None = None,
    peak_memory_bytes: int | None = None,
) -> Record:
    """The record of a log interval that ended with `state`; `scalars` are those of its last step.

    `sampled` are the sequences of each source so far: their shares show the mix that was really seen.
    """
    record: Record = {
        "kind": "train",
        "step": state.step,
        "tokens": state.tokens,
        "samples": state.samples,
        "interval_steps": averages.steps,
        **averages.means,
        **asdict(scalars),
        "batch_size": batch_size,
        **asdict(speed),
        "skipped_steps": state.skipped_steps,
        "wall_seconds": state.wall_seconds,
        "total_flops": state.flops,
    }
    seen = sum((sampled or {}).values())
    record |= {f"share/{name}": count / seen for name, count in (sampled or {}).items() if seen}
    if peak_memory_bytes is not None:
        record["peak_memory_bytes"] = peak_memory_bytes
    if averages.max_vio:
        known = [value for value in averages.max_vio if value is not None]
        record["max_vio"] = sum(known) / len(known) if known else None
        record["dead_experts"] = sum(averages.dead_experts)
        record["max_vio_by_layer"] = averages.max_vio
        record["dead_experts_by_layer"] = averages.dead_experts
    return record


def validation_record(
    state: TrainState,
    loss: float,
    *,
    loss_by_source: Mapping[str, float],
    is_best: bool,
    average_loss: float | None = None,
) -> Record:
    """The record of an evaluation; losses are in nats per token, `average_loss` the averaged weights'."""
    of_average = {} if average_loss is None else {"average_loss": average_loss}
    return {
        "kind": "validation",
        "step": state.step,
        "tokens": state.tokens,
        "loss": loss,
        "perplexity": perplexity(loss),
        **of_average,
        "is_best": is_best,
        **{f"loss/{name}": value for name, value in loss_by_source.items()},
    }


def event_record(step: int, tokens: int, event: str, facts: Mapping[str, Any]) -> Record:
    """The record of something out of the ordinary at a step: a spike, a rollback."""
    return {"kind": "event", "step": step, "tokens": tokens, "event": event, **facts}


def run_record(
    state: TrainState, *, total_tokens: int, train_steps: int, vocab_size: int, layout: str, **facts: Any
) -> Record:
    """The record of a start (state at step 0) or a resume; `layout` is for people, as "TP2 PP1 EP1 DP1"."""
    return {
        "kind": "run",
        "step": state.step,
        "tokens": state.tokens,
        "total_tokens": total_tokens,
        "train_steps": train_steps,
        "vocab_size": vocab_size,
        "layout": layout,
        **facts,
    }


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that does not fit a float."""
    return math.exp(loss) if loss < 700 else math.inf


def peak_memory_bytes(device: torch.device | str) -> int:
    """The most memory this process has used: allocated on a GPU, resident for a process on the CPU."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident if sys.platform == "darwin" else resident * 1024


def memory_bytes(device: torch.device | str) -> int:
    """All memory that `peak_memory_bytes` is to be compared with: of the GPU, or of the host."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _means(sum_and_weight: Tensor) -> list[float | None]:
    sums, weights = sum_and_weight.tolist()
    return [total / weight if weight else None for total, weight in zip(sums, weights, strict=True)]
