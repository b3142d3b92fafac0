"""Checkpoints of a run: what is recorded in them, which one a run starts from, and how it is put back."""

import logging
from typing import Any

import torch.distributed as dist

from megads.checkpoint import commit
from megads.checkpoint.compare import check_compatible
from megads.checkpoint.store import CheckpointStore
from megads.config import show
from megads.config.identity import setting_changes
from megads.config.resolve import Resolved
from megads.config.schema import Config
from megads.data.blend import Datasets
from megads.errors import CheckpointError
from megads.train.average import ParameterAverage
from megads.train.snapshot import layout_of, restore_state, sharded_state
from megads.train.state import TrainState
from megads.train.step import TrainingStep, has_delayed_scaling

logger = logging.getLogger(__name__)


def checkpoint_record(
    config: Config, resolved: Resolved, state: TrainState, datasets: Datasets
) -> dict[str, Any]:
    """What a checkpoint says of itself, readable without loading it."""
    return {
        **show.record(config, resolved),
        "tokens": state.tokens,
        "state": state.to_dict(),
        "has_optimizer": config.checkpointing.save_optimizer,
        "has_average": config.training.average_decay is not None,
        "layout": layout_of(resolved),
        "tokenizer_sha256": datasets.tokenizer_sha256,
        "data_fingerprint": datasets.fingerprint(state.samples),
    }


def find_checkpoint(
    config: Config, store: CheckpointStore, datasets: Datasets
) -> commit.CheckpointInfo | None:
    """The checkpoint to go on from, verified and of this model; None: start at token 0."""
    return _find(config.checkpointing.load, config, store, datasets, new_run=False)


def find_origin(config: Config, store: CheckpointStore, datasets: Datasets) -> commit.CheckpointInfo | None:
    """The checkpoint of another run whose weights a new run starts with, verified and fitting; None: random.

    Raises CheckpointError where its optimizer is to be kept and is not in it.
    """
    found = _find(config.checkpointing.init_from, config, store, datasets, new_run=True)
    keep = config.checkpointing.init_optimizer == "keep"
    if found is not None and keep and not commit.read_record(found.path)["has_optimizer"]:
        raise CheckpointError(
            f"{found.path}: saved without its optimizer (checkpointing.save_optimizer), so "
            'checkpointing.init_optimizer cannot be "keep": set it to "fresh"'
        )
    return found


def _find(
    source: str | None, config: Config, store: CheckpointStore, datasets: Datasets, *, new_run: bool
) -> commit.CheckpointInfo | None:
    found = store.find(source) if source is not None else None
    if found is not None:
        record = commit.read_record(found.path)
        allowed = config.checkpointing.allow_changed
        check_compatible(record, config, datasets.tokenizer_sha256, allowed, new_run=new_run)
        if not new_run:
            _check_sequences(found, record, config)
    return found


def _check_sequences(found: commit.CheckpointInfo, record: dict[str, Any], config: Config) -> None:
    """Raises CheckpointError where the place in the data, a number of sequences, would mean another one."""
    then, now = record["config"]["training"]["seq_length"], config.training.seq_length
    if then != now:
        raise CheckpointError(
            f"{found.path}: its run has read sequences of {then} tokens (training.seq_length), and this "
            f"one's have {now}: its place in the data would be lost. Set it to {then} "
            "(training.seq_length_phases cuts sequences shorter), or start a new run with the weights "
            "(checkpointing.init_from)"
        )


def initialize(
    config: Config,
    store: CheckpointStore,
    origin: commit.CheckpointInfo,
    step: TrainingStep,
    average: ParameterAverage | None,
) -> TrainState:
    """Fill the model of a new run with the weights of `origin`; its counters and generators are its own.

    The optimizer comes along with `checkpointing.init_optimizer` "keep", the average of the weights where
    both runs have one.
    """
    record = commit.read_record(origin.path)
    optimizer = config.checkpointing.init_optimizer == "keep"
    _load(store, origin, record, step, optimizer=optimizer, generators=False, average=average)
    if average is not None and record["has_average"]:
        interval = record["config"]["training"]["average_interval"]
        average.earlier_updates += origin.step // interval
    if dist.get_rank() == 0:
        what = "weights and optimizer state" if optimizer else "weights"
        logger.info("a new run on the %s of %s", what, origin.path)
    return TrainState()


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
    _load(store, found, record, step, optimizer=optimizer, generators=generators, average=average)
    state = TrainState.from_dict(record["state"])
    if dist.get_rank() == 0:
        _tell_differences(record, step.config, datasets, optimizer, state)
    return state


def _load(
    store: CheckpointStore,
    found: commit.CheckpointInfo,
    record: dict[str, Any],
    step: TrainingStep,
    *,
    optimizer: bool,
    generators: bool,
    average: ParameterAverage | None,
) -> None:
    """Tensors of a checkpoint into their places; an average that it does not hold begins with the weights."""
    if optimizer:
        check_optimizer_format(found, record, step)
    parts: dict[str, Any] = {
        "optimizer": optimizer,
        "generators": generators,
        "fp8_histories": generators
        and step.delayed_scaling
        and has_delayed_scaling(record["config"]["training"]),
        "average": average if record.get("has_average") else None,
    }
    loaded = store.load(found.path, sharded_state(step, **parts, loading=True))
    if loaded is None:
        raise CheckpointError(f"{found.path} disappeared while it was being loaded")
    has_scales = restore_state(step, loaded[0], **parts)
    if step.delayed_scaling and not has_scales and dist.get_rank() == 0:
        logger.warning("the checkpoint lacks FP8 scales of this layout and backend: they start afresh")
    if average is not None and parts["average"] is None:
        average.start_from_weights()
        if dist.get_rank() == 0:
            logger.warning("the checkpoint holds no average of the weights: it starts from these weights")


def check_optimizer_format(found: commit.CheckpointInfo, record: dict[str, Any], step: TrainingStep) -> None:
    """Raises CheckpointError where Megatron-Core's optimizers do not read each other's state.

    The sharded one, the same for `zero_stage` 1 to 3, has FP32 weights in any precision, the other one only
    beside 16-bit weights.
    """
    then, now = record["config"]["distributed"]["zero_stage"], step.config.distributed.zero_stage
    precisions = record["resolved"]["precision"], step.resolved.precision
    if (then == 0) != (now == 0):
        raise CheckpointError(
            f"{found.path}: its optimizer is of distributed.zero_stage = {then}, and this run has {now}: set "
            f"it to {then}, or start a new run with the weights alone (checkpointing.init_from)"
        )
    if now == 0 and precisions[0] != precisions[1] and "fp32" in precisions:
        raise CheckpointError(
            f"{found.path}: its optimizer is of a run in {precisions[0]}, this one is in {precisions[1]}, "
            "and with distributed.zero_stage = 0 their states differ: start a new run with the weights alone "
            "(checkpointing.init_from). Runs with zero_stage = 1 may change their precision"
        )


def _tell_differences(
    record: dict[str, Any], config: Config, datasets: Datasets, optimizer: bool, state: TrainState
) -> None:
    if not optimizer:
        logger.warning("the checkpoint holds no optimizer state: the optimizer starts afresh")
    if record["data_fingerprint"] != datasets.fingerprint(state.samples):
        logger.warning(
            "the data, their weights or the seed differ from the checkpoint's: samples come in another order "
            "from here on, and some may be seen twice"
        )
    if record.get("has_average") and config.training.average_decay is None:
        logger.warning(
            "the checkpoint holds an average of the weights, and this run keeps none: it is not in the "
            "checkpoints to come (training.average_decay)"
        )
    then = record["config"]
    if changes := list(setting_changes(then, config.model_dump(mode="json"))):
        logger.info("settings that differ from the checkpoint's:\n%s", "\n".join(f"  {c}" for c in changes))
    before = then["training"]["global_batch_size"] * then["validation"]["eval_steps"]
    now = config.training.global_batch_size * config.validation.eval_steps
    if before != now and state.best_validation_loss is not None:
        logger.warning(
            "validation reads %d sequences now and has read %d before (training.global_batch_size x "
            "validation.eval_steps): its losses, and which checkpoint is the best, do not compare",
            now,
            before,
        )
