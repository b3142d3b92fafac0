"""What a run measures between two log intervals, kept where it was computed.

`StepMeter`: adding a number launches a few small kernels and never waits for the device; one reduction and
one copy per interval bring all of them to the host. `SpeedMeter` turns tokens and time into tokens/s, MFU
and time left.
"""

import functools
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from megads.resident import peak_resident_bytes

INTERVALS_FOR_TIME_LEFT = 10


@dataclass(frozen=True)
class ExpertBalance:
    """How evenly the experts of each MoE layer were used in an interval; None where nobody knows."""

    max_vio: list[float | None]
    """MaxVio, mean over the steps."""
    dead_experts: list[int]
    """Experts that got no token in the whole interval."""
    router_entropy: list[float | None]
    """See `relative_entropy`."""
    bias_range: list[float | None]
    """Largest minus smallest expert bias at the end of the interval."""
    load: list[list[float]]
    """Each expert's share of the layer's load."""


@dataclass(frozen=True)
class Averages:
    """What `StepMeter.drain` gives: the means of an interval and how even the experts were loaded."""

    steps: int
    means: dict[str, float | None]
    """By name; None where no value was added."""
    experts: ExpertBalance | None = None
    """None for a dense model."""


class StepMeter:
    """Weighted means over the `steps` of an interval so far, accumulated on `device`.

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
        zeros = functools.partial(torch.zeros, dtype=torch.float64, device=device)
        self._values_2N = zeros(2, len(self._index))
        self._max_vio_2L, self._bias_range_2L = zeros(2, moe_layers), zeros(2, moe_layers)
        self._load_LE, self._scores_LE = zeros(moe_layers, num_experts), zeros(moe_layers, num_experts)
        self._rows_by_layers: dict[tuple[int, ...], Tensor] = {}
        self.steps = 0

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
    def add_sums(self, names: Sequence[str], totals_N: Tensor, weights_N: Tensor) -> None:
        """`add_sum` of several names at once, which must follow each other as they did at the start."""
        if names:
            first, last = self._index[names[0]], self._index[names[-1]]
            assert last - first + 1 == len(names)
            self._values_2N[0, first : last + 1] += totals_N
            self._values_2N[1, first : last + 1] += weights_N

    @torch.no_grad()
    def add_experts(
        self, load_LE: Tensor, score_sums_LE: Tensor, layers: Sequence[int] | None = None
    ) -> None:
        """Add one step's tokens per expert and sums of scores of the MoE layers that this rank holds.

        Both are `[L, num_experts]`, over the whole global batch. `layers` numbers the rows among all MoE
        layers of the model, from 0; without it the rank holds all of them. `drain` joins pipeline stages.
        """
        load_LE = load_LE.to(self._load_LE)
        rows = self._rows(layers)
        self._max_vio_2L[0].index_add_(0, rows, max_violation(load_LE))
        self._max_vio_2L[1].index_add_(0, rows, (load_LE.sum(-1) > 0).double())
        self._load_LE.index_add_(0, rows, load_LE)
        self._scores_LE.index_add_(0, rows, score_sums_LE.double())

    @torch.no_grad()
    def add_bias_ranges(self, ranges_L: Tensor, layers: Sequence[int] | None = None) -> None:
        """Add what each MoE layer's expert biases span, once an interval; `layers` as for `add_experts`."""
        rows, ranges_L = self._rows(layers), ranges_L.double()
        self._bias_range_2L[0].index_add_(0, rows, ranges_L)
        self._bias_range_2L[1].index_add_(0, rows, torch.ones_like(ranges_L))

    def _rows(self, layers: Sequence[int] | None) -> Tensor:
        """`layers` as an index on the device, copied there once: every copy waits for the device."""
        key = tuple(range(len(self._load_LE)) if layers is None else layers)
        if key not in self._rows_by_layers:
            self._rows_by_layers[key] = torch.tensor(key, dtype=torch.long, device=self._load_LE.device)
        return self._rows_by_layers[key]

    def step_done(self) -> None:
        """Count a step."""
        self.steps += 1

    @torch.no_grad()
    def drain(self, reduce: Callable[[Tensor], object] | None = None) -> Averages:
        """The means since the last call; starts anew. Waits for the device, once.

        `reduce` sums a flat tensor over all ranks in place, as `torch.distributed.all_reduce` does;
        every rank must call `drain` then.
        """
        parts = (self._values_2N, self._max_vio_2L, self._bias_range_2L, self._load_LE, self._scores_LE)
        flat = torch.cat([part.flatten() for part in parts])
        if reduce is not None:
            reduce(flat)
        pieces = flat.cpu().split_with_sizes([part.numel() for part in parts])
        values, max_vio, bias_range, load, scores = (
            piece.view(part.shape) for piece, part in zip(pieces, parts, strict=True)
        )
        averages = Averages(
            steps=self.steps,
            means=dict(zip(self._index, _means(values), strict=True)),
            experts=_expert_balance(max_vio, bias_range, load, scores) if len(load) else None,
        )
        for part in parts:
            part.zero_()
        self.steps = 0
        return averages


def _expert_balance(
    max_vio_2L: Tensor, bias_range_2L: Tensor, load_LE: Tensor, scores_LE: Tensor
) -> ExpertBalance:
    entropies = [
        entropy if total else None
        for entropy, total in zip(
            relative_entropy(scores_LE).tolist(), scores_LE.sum(-1).tolist(), strict=True
        )
    ]
    return ExpertBalance(
        max_vio=_means(max_vio_2L),
        dead_experts=(load_LE == 0).sum(-1).tolist(),
        router_entropy=entropies,
        bias_range=_means(bias_range_2L),
        load=(load_LE / load_LE.sum(-1, keepdim=True).clamp(min=1)).tolist(),
    )


def relative_entropy(weights_LE: Tensor) -> Tensor:
    """Entropy of each row's weights, as shares of their sum, over ln E `[L]`: 1 is even, 0 is all on one."""
    shares_LE = weights_LE / weights_LE.sum(-1, keepdim=True).clamp(min=1e-30)
    return torch.special.entr(shares_LE).sum(-1) / math.log(max(2, weights_LE.shape[-1]))


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
    tokens_per_second_per_device: float
    tflops_per_device: float
    """Model TFLOP/s."""
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
        self._peak_per_process, self._processes = peak_flops_per_second, processes
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
        flops_per_second = self._flops / seconds / self._processes
        speed = Speed(
            step_seconds=seconds / self._steps,
            tokens_per_second=tokens_per_second,
            tokens_per_second_per_device=tokens_per_second / self._processes,
            tflops_per_device=flops_per_second / 1e12,
            mfu=flops_per_second / self._peak_per_process,
            seconds_left=max(tokens_left, 0) / recent_rate,
        )
        self._steps = self._tokens = 0
        self._seconds = self._flops = 0.0
        return speed


@dataclass(frozen=True)
class Memory:
    """The most memory that a process of the job has used so far, and as a share of what its device has."""

    peak_bytes: int
    share: float


def used_memory(device: torch.device | str, reduce: Callable[[Tensor], object] | None = None) -> Memory:
    """The memory of the fullest rank; `reduce` takes the maximum over all ranks in place, collectively."""
    peak = peak_memory_bytes(device)
    both = torch.tensor([peak, peak / memory_bytes(device)], dtype=torch.float64, device=device)
    if reduce is not None:
        reduce(both)
    most, share = both.tolist()
    return Memory(int(most), share)


def peak_memory_bytes(device: torch.device | str) -> int:
    """The most memory this process has used: allocated on a GPU, resident for a process on the CPU."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_resident_bytes()


def memory_bytes(device: torch.device | str) -> int:
    """All memory that `peak_memory_bytes` is to be compared with: of the GPU, or of the host."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _means(sum_and_weight: Tensor) -> list[float | None]:
    sums, weights = sum_and_weight.tolist()
    return [total / weight if weight else None for total, weight in zip(sums, weights, strict=True)]
