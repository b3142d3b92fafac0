"""Checkpoints of a run: what is recorded in them, which one a run starts from, and how it is put back."""

import logging
from typing import Any

import torch.distributed as dist

from megads.checkpoint import commit
from megads.checkpoint.compare import check_compatible
from megads.checkpoint.store import CheckpointStore
from megads.config import show
from megads.config.resolve import Resolved
from megads.config.schema import Config
from megads.data.blend import Datasets
from megads.errors import CheckpointError
from megads.train.average import ParameterAverage
from megads.train.snapshot import layout_of, restore_state, sharded_state
from megads.train.state import TrainState
from megads.train.step import TrainingStep

logger = logging.getLogger(__name__)


def checkpoint_record(
    config: Config, resolved: Resolved, state: TrainState, datasets: Datasets
) -> dict[str, Any]:
    """What a checkpoint says of itself, readable without loading it."""
    checkpointing = config.checkpointing
    return {
        **show.record(config, resolved),
        "tokens": state.tokens,
        "state": state.to_dict() if checkpointing.save_scheduler else None,
        "has_optimizer": checkpointing.save_optimizer,
        "has_average": config.training.average_decay is not None,
        "layout": layout_of(resolved),
        "tokenizer_sha256": datasets.tokenizer_sha256,
        "data_fingerprint": datasets.fingerprint(state.samples),
    }


def find_checkpoint(
    config: Config, store: CheckpointStore, datasets: Datasets
) -> commit.CheckpointInfo | None:
    """The checkpoint to start from, verified and of this model; None: start afresh."""
    source = config.checkpointing.load
    if source is None:
        return None
    found = store.find(source)
    if found is not None:
        record = commit.read_record(found.path)
        allowed = config.checkpointing.allow_changed
        check_compatible(record, config, datasets.tokenizer_sha256, allowed)
    return found


def restore(
    resolved: Resolved,
    store: CheckpointStore,
    found: commit.CheckpointInfo | None,
    step: TrainingStep,
    datasets: Datasets,
    average: ParameterAverage | None,
) -> TrainState:
    """Fill model, optimizer, generators and average from a checkpoint; the state it was saved in."""
    if found is None:
        return TrainState()
    record = commit.read_record(found.path)
    optimizer, generators = bool(record["has_optimizer"]), record["layout"] == layout_of(resolved)
    saved_average = average if record.get("has_average") else None
    loaded = store.load(
        found.path,
        sharded_state(step, optimizer=optimizer, generators=generators, average=saved_average, loading=True),
    )
    if loaded is None:
        raise CheckpointError(f"{found.path} disappeared while it was being loaded")
    restore_state(step, loaded[0], optimizer=optimizer, generators=generators, average=saved_average)
    if average is not None and saved_average is None:
        average.start_from_weights()
        if dist.get_rank() == 0:
            logger.warning("the checkpoint holds no average of the weights: it starts from these weights")
    state = TrainState.from_dict(record["state"]) if record["state"] is not None else TrainState()
    if dist.get_rank() == 0:
        _tell_differences(record, datasets, optimizer, state)
    return state


def _tell_differences(record: dict[str, Any], datasets: Datasets, optimizer: bool, state: TrainState) -> None:
    if not optimizer:
        logger.warning("the checkpoint holds no optimizer state: the optimizer starts afresh")
    if record["state"] is None:
        logger.warning("the checkpoint holds no training state: steps and schedules start at 0")
    if record["state"] is not None and record["data_fingerprint"] != datasets.fingerprint(state.samples):
        logger.warning(
            "the data, their weights or the seed differ from the checkpoint's: samples come in another order "
            "from here on, and some may be seen twice"
        )
