"""A published recipe at a size that a laptop can run: every schedule, with fewer tokens and smaller batches.

What changes while training keeps its shape: all token counts shrink by one factor, batches by another,
sequence lengths by a third. Values (learning rates, weights, rates of the bias) stay as they are. The
model, the data and the layout are another configuration's.
"""

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from megads.config.resolve import batch_schedule, run_length
from megads.config.scalars import scheduled_settings
from megads.config.schedule import BatchSchedule
from megads.config.schema import Config, SchedulePhase
from megads.errors import ConfigError

# What belongs to a recipe whatever the model and the machine are.
TRAINING = (
    "learning_rate", "min_learning_rate", "lr_decay_style", "lr_wsd_decay_fraction", "lr_wsd_decay_style",
    "lr_multistep", "weight_decay", "grad_clip", "optimizer", "adam_beta1", "adam_beta2", "adam_eps",
    "sgd_momentum", "use_mtp", "num_predict_tokens", "mtp_loss_weight", "average_decay", "average_interval",
)  # fmt: skip
MOE = (
    "use_aux_loss_free", "bias_update_rate", "bias_update_centered", "balance_loss_type",
    "router_aux_loss_weight", "router_z_loss_weight", "router_temperature", "router_noise_std",
)  # fmt: skip
LENGTHS = "training.seq_length"


def rehearsal(recipe: Config, like: Config, total_tokens: int, batch_size: int) -> dict[str, Any]:
    """Overrides for `like` that make it go through all of `recipe` in `total_tokens`, ending at `batch_size`.

    Raises ConfigError where a batch or a sequence would not be whole, or a phase would have no step.
    """
    planned_tokens, _ = run_length(recipe)
    tokens = total_tokens / planned_tokens
    batches = batch_size / recipe.training.global_batch_size
    lengths = like.training.seq_length / recipe.training.seq_length
    settings: dict[str, Any] = {f"training.{name}": getattr(recipe.training, name) for name in TRAINING}
    settings |= {f"model.moe.{name}": getattr(recipe.model.moe, name) for name in MOE}
    settings["training.train_steps"] = None
    settings["training.total_training_tokens"] = total_tokens
    settings["training.global_batch_size"] = batch_size
    settings["training.lr_phases"] = _scaled(recipe.training.lr_phases, tokens)
    for setting in scheduled_settings(recipe):
        values = lengths if setting.path == LENGTHS else 1.0
        settings[f"{setting.path}_phases"] = _scaled(setting.phases, tokens, values)
    if (start := recipe.training.batch_size_rampup_start) is not None:
        settings["training.batch_size_rampup_start"] = _whole(start * batches, "batch_size_rampup_start")
        settings["training.batch_size_rampup_tokens"] = round(
            recipe.training.batch_size_rampup_tokens * tokens
        )
    batch = BatchSchedule(
        final=batch_size,
        start=settings.get("training.batch_size_rampup_start"),
        ramp_tokens=settings.get("training.batch_size_rampup_tokens", 0),
        seq_length=like.training.seq_length,
    )
    settings["training.micro_batch_size"] = math.gcd(like.training.micro_batch_size, batch.batch_size(0))
    warmup_steps = recipe.training.lr_warmup_steps
    if recipe.training.lr_decay_style != "phases":  # which have the warm-up in them
        warmup_tokens = batch_schedule(recipe.training).tokens_after(warmup_steps)
        warmup_steps = batch.steps_for(round(warmup_tokens * tokens))
    settings["training.lr_warmup_steps"] = warmup_steps
    if problems := list(_lost(settings, batch)):
        raise ConfigError(
            f"{total_tokens:,} tokens are too few for this recipe: {'; '.join(problems)}. Give more tokens, "
            "or a smaller batch"
        )
    return settings


def _scaled(phases: tuple[SchedulePhase, ...], tokens: float, values: float = 1.0) -> list[dict[str, Any]]:
    return [
        {"until_tokens": max(1, round(p.until_tokens * tokens)), "to": p.to * values, "shape": p.shape}
        for p in phases
    ]


def _whole(value: float, name: str) -> int:
    if value < 1 or abs(value - round(value)) > 1e-6:
        raise ConfigError(
            f"training.{name} would be {value:g}: give a final batch size of which it is a whole part"
        )
    return round(value)


def _lost(settings: dict[str, Any], batch: BatchSchedule) -> Iterator[str]:
    """What no step would see: a phase that ends before a step does, a batch size that is passed over."""
    for path, phases in settings.items():
        if not path.endswith("_phases"):
            continue
        ends = [0, *(phase["until_tokens"] for phase in phases)]
        for begin, end in pairwise(ends):
            # A step is in the phase that it ends in; the last step of a run may end beyond the last phase.
            if batch.tokens_after(batch.steps_for(begin + 1)) > end and (end != ends[-1] or begin >= end):
                yield f"the phase of {path} until {end:,} tokens has no step"
    start = batch.start or batch.final
    if len(batch.stages) < batch.final // start:
        yield f"the batch would skip {batch.final // start - len(batch.stages)} of its sizes"
