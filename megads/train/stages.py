"""Runs the stages of a configuration, one after the other, in the same processes.

Each stage has its own process groups, model and optimizer, so that its layout can be another one. What is
done already is read from the checkpoints: a stage is finished when its newest is at its last step.
"""

import logging
import os
from collections.abc import Sequence
from functools import partial

from megads.checkpoint import commit
from megads.config import show
from megads.config.resolve import Resolved, batch_schedule, checkpoint_directory, resolve, run_length
from megads.config.schema import Config
from megads.config.stages import Stage
from megads.config.validate import notes
from megads.data.sources import plan_corpus, sample_counts
from megads.errors import CheckpointError, ConfigError, DataError, RunStopped
from megads.log import setup_logging
from megads.mcore.groups import (
    decided_by_rank_0,
    destroy_process_groups,
    initialize_device,
    initialize_process_groups,
)
from megads.mcore.imports import without_garbage_collection

logger = logging.getLogger(__name__)


def run_stages(stages: Sequence[Stage], world_size: int, cuda: bool, only: str | None = None) -> None:
    """Run what is left of the stages, or of the `only` one; `training.exit_step` in any of them ends it all.

    Raises DataError, CheckpointError, TrainingError or RunStopped, on every rank.
    """
    rank, ran = int(os.environ.get("RANK", "0")), False
    for stage in stages:
        # A stage whose data are missing is not to be told after days of the one before it.
        if stage.name and only in (None, stage.name):
            resolved = resolve(stage.config, world_size, cuda)
            decided_by_rank_0(partial(_check_data, stage, resolved), stage.config.distributed.timeout_minutes)
    for number, stage in enumerate(stages):
        if only not in (None, stage.name):
            continue
        config, resolved = stage.config, resolve(stage.config, world_size, cuda)
        setup_logging(log_file=stage.log_file)
        if stage.name:
            decide = partial(_where_to_start, stages, number)
            skipped, origin = decided_by_rank_0(decide, config.distributed.timeout_minutes)
            if rank == 0:
                what = f"skipped, {skipped}" if skipped else f"number {number + 1} of {len(stages)}"
                logger.info("stage %s: %s", stage.name, what)
            if skipped:
                continue
            if origin is not None:
                start = config.checkpointing.model_copy(update={"init_from": origin})
                config = config.model_copy(update={"checkpointing": start})
        ran = True
        if not _run(config, resolved, leads=rank == 0):
            return
    if rank == 0 and not ran:
        logger.info("nothing is left to do")


def _run(config: Config, resolved: Resolved, leads: bool) -> bool:
    """One run with process groups of its own; whether it came to its end."""
    with without_garbage_collection():
        initialize_device(resolved.device, config.training.deterministic)
        # Imports Megatron-Core, which must find the substitutions of a CPU run in place.
        from megads.train.loop import train
    initialize_process_groups(resolved, config.distributed.timeout_minutes, config.seed)
    if leads:
        logger.info("configuration (* differs from the default):\n%s", show.render(config))
        for note in notes(config):
            logger.info("note: %s", note)
    try:
        completed = train(config, resolved)
    except RunStopped:
        # All ranks agreed on it: none is left waiting in a collective, as one may be after another error.
        destroy_process_groups()
        raise
    destroy_process_groups()
    return completed


def _where_to_start(stages: Sequence[Stage], number: int) -> tuple[str, str | None]:
    """(why a stage is skipped, or nothing; the checkpoint of the stage before it that it starts from).

    Raises CheckpointError where what lies in the directories of the stages does not fit together.
    """
    stage, own = stages[number], _newest(stages[number])
    begun = next((later for later in stages[number + 1 :] if _newest(later) is not None), None)
    if stage.config.checkpointing.load is None and begun is not None:
        logger.warning(
            "stage %s starts afresh, and stage %s after it has checkpoints in %s, which go on from its "
            "earlier weights: start that one afresh too, or move them away",
            stage.name, begun.name, checkpoint_directory(begun.config),
        )  # fmt: skip
    if stage.config.checkpointing.load is not None:
        if own is not None and own.step >= _last_step(stage, own):
            return f"finished at step {own.step}", None
        if begun is not None and own is None:
            return f"its checkpoints are gone and stage {begun.name} has begun", None
        if begun is not None and own is not None:
            raise CheckpointError(
                f"stage {stage.name} is at step {own.step} of {_last_step(stage, own)}, but stage "
                f"{begun.name} after it has checkpoints in {checkpoint_directory(begun.config)}: move them "
                f"away to run it again on the longer stage {stage.name}, or give that its old length"
            )
        if own is not None:
            return "", None
    if number == 0:
        return "", None
    before = stages[number - 1]
    origin = _newest(before)
    last_step = _last_step(before, origin)
    if origin is None or origin.step < last_step:
        found = (
            "there is no checkpoint" if origin is None else f"its newest checkpoint is of step {origin.step}"
        )
        raise CheckpointError(
            f"stage {stage.name} starts from step {last_step} of stage {before.name}, but in "
            f"{checkpoint_directory(before.config)} {found}: run stage {before.name} to its end first"
        )
    return "", str(origin.path)


def _check_data(stage: Stage, resolved: Resolved) -> None:
    """Raises DataError or ConfigError where a stage that is not finished cannot have the data it asks for."""
    own = _newest(stage)
    if own is not None and own.step >= _last_step(stage, own):
        return
    try:
        plan_corpus(stage.config, sample_counts(stage.config, resolved))
    except (ConfigError, DataError) as error:
        raise type(error)(f"stage {stage.name}: {error}") from None


def _newest(stage: Stage) -> commit.CheckpointInfo | None:
    # Contents are verified when one is loaded; here the listing and the sizes must do.
    return commit.newest_good(checkpoint_directory(stage.config), hasher=None, move_bad=False)


def _last_step(stage: Stage, newest: commit.CheckpointInfo | None) -> int:
    """Of a stage that goes on from its newest checkpoint, whatever batches it had before."""
    total_tokens, train_steps = run_length(stage.config)
    if newest is None:
        return train_steps
    consumed_tokens = commit.read_record(newest.path)["tokens"]
    return newest.step + batch_schedule(stage.config.training).steps_for(total_tokens, consumed_tokens)
