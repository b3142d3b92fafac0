"""Schedules as pure functions of the tokens consumed: batch size, learning rate, any scheduled setting.

Nothing here counts steps while training: the tokens consumed say where a run is, so a stop and a
resume, or another parallel layout, cannot shift a schedule. Steps appear only where a user gives
them (`lr_warmup_steps`, `train_steps`); the batch schedule turns them into tokens.

Convention for the learning rate: a step uses `value(tokens consumed once that step is done)`.
Step n of a W-step warm-up thus runs at n / W of the peak (the first step is not lost to a rate of
0, as it is in Megatron-LM and in torch's LambdaLR recipes), step W runs at the peak, and the last
step of a run at exactly the final value.
"""

import math
from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Literal

from megads.config.schema import SchedulePhase, Training
from megads.errors import ConfigError

Shape = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class BatchStage:
    """Consecutive steps of one size: they begin at `first_step` (from 0) and `first_tokens`."""

    first_step: int
    first_tokens: int
    tokens_per_step: int


@dataclass(frozen=True)
class BatchSchedule:
    """Sequences per optimizer step, growing with the tokens consumed from `start` to `final`.

    The batch grows in increments of `start`, evenly over `ramp_tokens`: with n = final / start - 1
    increments it is `start * (1 + floor(tokens * n / ramp_tokens))`, and `final` from `ramp_tokens`
    on. DeepSeek-V3 (arXiv:2412.19437, section 4.2): 3072 to 15360 over 469B tokens, in 4 increments.
    Which batch a step has depends on nothing but tokens, never on the parallel layout.

    Raises ValueError for sizes that no ramp can have.
    """

    final: int
    start: int | None
    ramp_tokens: int
    seq_length: int

    def __post_init__(self) -> None:
        if self.final < 1 or self.seq_length < 1 or self.ramp_tokens < 0:
            raise ValueError("batch size and sequence length must be positive, ramp tokens not negative")
        if (self.start is None) != (self.ramp_tokens == 0):
            raise ValueError(
                f"a batch-size ramp needs both its start (given: {self.start}) and its length in tokens "
                f"(given: {self.ramp_tokens}); give both or neither"
            )
        if self.start is not None and (self.start < 1 or self.final % self.start != 0):
            raise ValueError(
                f"the final batch size {self.final} is not a multiple of the ramp's start {self.start}: "
                "the ramp grows in increments of its start"
            )

    @property
    def _increments(self) -> int:
        return 0 if self.start is None else self.final // self.start - 1

    def batch_size(self, tokens: int) -> int:
        """Sequences in the step that begins when `tokens` have been consumed."""
        if self.start is None or tokens >= self.ramp_tokens:
            return self.final
        return self.start * (1 + max(tokens, 0) * self._increments // self.ramp_tokens)

    def tokens_per_step(self, tokens: int) -> int:
        """Tokens in the step that begins when `tokens` have been consumed."""
        return self.batch_size(tokens) * self.seq_length

    @cached_property
    def stages(self) -> tuple[BatchStage, ...]:
        """The runs of equal steps, one per batch size that occurs; the last one has no end."""
        stages: list[BatchStage] = []
        step = tokens = 0
        while True:
            size = self.tokens_per_step(tokens)
            stages.append(BatchStage(step, tokens, size))
            if (grows_at := self._grows_at(tokens)) is None:
                return tuple(stages)
            steps = _ceil_divide(grows_at - tokens, size)
            step += steps
            tokens += steps * size

    def _grows_at(self, tokens: int) -> int | None:
        """The least number of tokens at which the batch is larger than at `tokens`; None: never."""
        batch = self.batch_size(tokens)
        if self.start is None or batch == self.final:
            return None
        return _ceil_divide(batch // self.start * self.ramp_tokens, self._increments)

    def tokens_after(self, steps: int) -> int:
        """Tokens consumed by the first `steps` steps."""
        if steps < 0:
            raise ValueError(f"a number of steps cannot be negative: {steps}")
        index = bisect_left(self.stages, steps + 1, key=lambda stage: stage.first_step) - 1
        stage = self.stages[index]
        return stage.first_tokens + (steps - stage.first_step) * stage.tokens_per_step

    def steps_for(self, total_tokens: int, consumed_tokens: int = 0) -> int:
        """The smallest number of steps from `consumed_tokens` on that reaches at least `total_tokens`.

        `consumed_tokens` may be any number: a run that goes on may have had batches of other sizes before.
        """
        return self._walk(consumed_tokens, total_tokens)[0]

    def tokens_at_end(self, total_tokens: int, consumed_tokens: int) -> int:
        """Tokens consumed when those steps are done; the last one may pass `total_tokens`."""
        return self._walk(consumed_tokens, total_tokens)[1]

    def _walk(self, tokens: int, total_tokens: int) -> tuple[int, int]:
        """(steps, tokens consumed then) of the way from `tokens` to at least `total_tokens`."""
        steps = 0
        while tokens < total_tokens:
            size = self.tokens_per_step(tokens)
            grows_at = self._grows_at(tokens)
            end = total_tokens if grows_at is None else min(grows_at, total_tokens)
            more = _ceil_divide(end - tokens, size)
            steps += more
            tokens += more * size
        return steps, tokens


@dataclass(frozen=True)
class Phase:
    """One piece of a schedule: from `start` to `end`, which is reached at `until_tokens`.

    A phase holds its own end and not its beginning: (end of the phase before, `until_tokens`].
    """

    until_tokens: int
    start: float
    end: float
    shape: Shape

    def value(self, progress: float) -> float:
        """The value at `progress` in [0, 1] of the phase; exactly `end` at 1."""
        if self.shape == "constant" or progress >= 1:
            return self.end
        if self.shape == "linear":
            return self.start + (self.end - self.start) * progress
        return self.end + (self.start - self.end) * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class PiecewiseSchedule:
    """A value as a function of tokens, in phases; the last phase's end holds for ever after.

    Raises ValueError unless the phases end at increasing, positive tokens.
    """

    phases: tuple[Phase, ...]

    def __post_init__(self) -> None:
        ends = [0, *(phase.until_tokens for phase in self.phases)]
        if not self.phases or any(later <= earlier for earlier, later in pairwise(ends)):
            raise ValueError(f"phases must end at increasing numbers of tokens; they end at {ends[1:]}")

    def value(self, tokens: int) -> float:
        """The value at `tokens`; see the module for which tokens a training step asks with."""
        index = bisect_left(self.phases, tokens, key=lambda phase: phase.until_tokens)
        if index == len(self.phases):
            return self.phases[-1].end
        begin = self.phases[index - 1].until_tokens if index else 0
        phase = self.phases[index]
        return phase.value(max(tokens - begin, 0) / (phase.until_tokens - begin))


def learning_rate_schedule(training: Training, total_tokens: int, batch: BatchSchedule) -> PiecewiseSchedule:
    """The learning rate of `training.lr_decay_style`, over a run of `total_tokens`.

    Sources: cosine, linear: the usual ones, from the end of warm-up to the end of the run, ending at
    `min_learning_rate`; wsd: MiniCPM, arXiv:2404.06395; multistep: DeepSeek LLM, arXiv:2401.02954,
    section 2.3 (shares of the whole run, warm-up included); phases: DeepSeek-V3, arXiv:2412.19437,
    section 4.2 (`lr_phases` is the whole schedule; warm-up and peak settings have no part in it).
    `min_learning_rate` has no part in constant and multistep, whose values follow from the peak.

    Raises ConfigError when warm-up does not fit the run or the phases are not in order.
    """
    if training.lr_decay_style == "phases":
        return _from_lr_phases(training)
    if training.lr_phases:
        raise ConfigError(
            "training.lr_phases is given but training.lr_decay_style is "
            f'"{training.lr_decay_style}": set the style to "phases", or leave lr_phases out'
        )
    peak = training.learning_rate
    warmup_tokens = batch.tokens_after(training.lr_warmup_steps)
    warmup = [Phase(warmup_tokens, 0.0, peak, "linear")] if warmup_tokens else []
    decay = _decay_phases(training, total_tokens)
    room_tokens = decay[0].until_tokens
    if warmup_tokens > room_tokens:
        raise ConfigError(
            f"training.lr_warmup_steps = {training.lr_warmup_steps} is {warmup_tokens:,} tokens, but the "
            f"{training.lr_decay_style} schedule of this run has room for {room_tokens:,}: "
            "shorten the warm-up or lengthen the run"
        )
    return PiecewiseSchedule((*warmup, *(phase for phase in decay if phase.until_tokens > warmup_tokens)))


def router_noise_schedule(router_noise_std: float, total_tokens: int) -> PiecewiseSchedule:
    """Standard deviation of the router's noise: falls linearly from `router_noise_std` to 0 at the end.

    A step asks with the tokens consumed before it, so that the first one has the full noise.
    """
    return PiecewiseSchedule((Phase(total_tokens, router_noise_std, 0.0, "linear"),))


def value_schedule(base: float, phases: tuple[SchedulePhase, ...]) -> PiecewiseSchedule:
    """A setting of value `base` that `phases` change: the first linear or cosine one starts at `base`.

    Without phases, `base` for ever. Asked as the learning rate is: a step that ends beyond a phase is in
    the next one.

    Raises ConfigError unless the phases end at increasing tokens.
    """
    pieces: list[Phase] = []
    before = base
    for phase in phases:
        start = phase.to if phase.shape == "constant" else before
        pieces.append(Phase(phase.until_tokens, start, phase.to, phase.shape))
        before = phase.to
    try:
        return PiecewiseSchedule(tuple(pieces) or (Phase(1, base, base, "constant"),))
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _decay_phases(training: Training, total_tokens: int) -> list[Phase]:
    """What follows warm-up, up to `total_tokens`."""
    peak, floor = training.learning_rate, training.min_learning_rate
    if training.lr_decay_style == "constant":
        return [Phase(total_tokens, peak, peak, "constant")]
    if training.lr_decay_style in ("cosine", "linear"):
        shape: Shape = "cosine" if training.lr_decay_style == "cosine" else "linear"
        return [Phase(total_tokens, peak, floor, shape)]
    if training.lr_decay_style == "wsd":
        stable_tokens = round(total_tokens * (1 - training.lr_wsd_decay_fraction))
        decay = Phase(total_tokens, peak, floor, training.lr_wsd_decay_style)
        return [Phase(stable_tokens, peak, peak, "constant"), decay] if stable_tokens else [decay]
    assert training.lr_decay_style == "multistep"
    shares = [0.0, *(share for share, _ in training.lr_multistep), 1.0]
    if any(later <= earlier for earlier, later in pairwise(shares)):
        raise ConfigError(
            f"training.lr_multistep = {training.lr_multistep}: shares of the run must increase "
            "and lie between 0 and 1"
        )
    values = [peak, *(peak * factor for _, factor in training.lr_multistep)]
    return [
        Phase(round(total_tokens * share), value, value, "constant")
        for share, value in zip(shares[1:], values, strict=True)
    ]


def _from_lr_phases(training: Training) -> PiecewiseSchedule:
    if not training.lr_phases:
        raise ConfigError(
            'training.lr_decay_style is "phases" but training.lr_phases is empty: list the phases'
        )
    try:
        return value_schedule(0.0, training.lr_phases)
    except ConfigError as error:
        raise ConfigError(f"training.lr_phases: {error}") from None


def _ceil_divide(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)
