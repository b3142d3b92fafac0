"""Errors in what changes while training: phases that leave gaps, or lie beyond the end of the run."""

from collections.abc import Iterator
from itertools import pairwise

from megads.config.scalars import scheduled_settings
from megads.config.schedule import value_schedule
from megads.config.schema import Config, SchedulePhase
from megads.errors import ConfigError


def phase_problems(config: Config, total_tokens: int) -> Iterator[str]:
    """What is wrong with the phases of any setting, for a run of `total_tokens`."""
    if config.training.lr_decay_style == "phases":  # their order is the learning rate's business
        yield from _covers_run("training.lr_phases", config.training.lr_phases, total_tokens)
    for setting in scheduled_settings(config):
        path = f"{setting.path}_phases"
        yield from _covers_run(path, setting.phases, total_tokens)
        try:
            value_schedule(setting.base, setting.phases)
        except ConfigError as error:
            yield f"{path}: {error}"


def _covers_run(path: str, phases: tuple[SchedulePhase, ...], total_tokens: int) -> Iterator[str]:
    """Phases that leave the end of the run without a value, or that the run never reaches."""
    if phases and phases[-1].until_tokens < total_tokens:
        yield (
            f"{path} ends at {phases[-1].until_tokens:,} tokens but the run has {total_tokens:,}: add a "
            "phase for the rest, or shorten the run"
        )
    for earlier, later in pairwise(phases):
        if total_tokens <= earlier.until_tokens < later.until_tokens:
            yield (
                f"{path}: the run ends at {total_tokens:,} tokens, before the phase until "
                f"{later.until_tokens:,} tokens begins: lengthen the run or take the phase out "
                "(training.exit_step stops a longer run early)"
            )
            return
    # A constant phase that goes on beyond the end has the same value before it.
    if phases and phases[-1].shape != "constant" and phases[-1].until_tokens > total_tokens:
        yield (
            f"{path}: the run ends at {total_tokens:,} tokens, on the way to {phases[-1].to:g} at "
            f"{phases[-1].until_tokens:,} tokens: end the phase where the run ends, or lengthen the run "
            "(training.exit_step stops a longer run early)"
        )


def unreached(config: Config, total_tokens: int) -> Iterator[str]:
    """A batch ramp or a mix of the data that lies beyond the end of the run."""
    training = config.training
    if training.batch_size_rampup_tokens >= total_tokens:
        yield (
            f"training.batch_size_rampup_tokens = {training.batch_size_rampup_tokens:,}, but the run has "
            f"{total_tokens:,} tokens and never gets to global_batch_size = {training.global_batch_size}: "
            "shorten the ramp, or leave it and batch_size_rampup_start out"
        )
    for number, phase in enumerate(config.data.phases, 1):
        if phase.from_tokens >= total_tokens:
            yield (
                f"data.phases, phase {number} begins at {phase.from_tokens:,} tokens but the run ends at "
                f"{total_tokens:,}: take it out, or lengthen the run"
            )


def sequence_length_problems(config: Config) -> Iterator[str]:
    """A curriculum of sequence lengths must be of pieces of whole samples that the layout can hold."""
    full, phases, distributed = (
        config.training.seq_length,
        config.training.seq_length_phases,
        config.distributed,
    )
    cp = distributed.context_parallel_size
    parts = distributed.tensor_parallel_size * (2 * cp if cp > 1 else 1)
    for phase in phases:
        length = round(phase.to)
        if phase.shape != "constant" or length != phase.to or length < 2 or full % length:
            yield (
                f"training.seq_length_phases: {phase.to:g} ({phase.shape}) until {phase.until_tokens:,} "
                f'tokens; each phase is "constant", and its `to` divides training.seq_length = {full}'
            )
        elif length % parts:
            yield (
                f"training.seq_length_phases: {length} tokens cannot be split in {parts} equal parts over "
                "the tensor- and context-parallel ranks: use longer sequences or less parallelism"
            )
    if phases and phases[-1].to != full:
        yield (
            f"training.seq_length_phases ends at {phases[-1].to:g} tokens, training.seq_length is {full}: "
            "let the last phase have the full length"
        )
