"""All schedules of a run in one place: what each step gets, as a function of the tokens consumed.

Needs no torch, so that a login node can list and draw them before the run.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from megads.config.resolve import Resolved
from megads.config.schedule import (
    PiecewiseSchedule,
    learning_rate_schedule,
    router_noise_schedule,
    value_schedule,
)
from megads.config.schema import Config, SchedulePhase


@dataclass(frozen=True)
class Scalars:
    """What the schedules give for one step; `seq_length` is in tokens."""

    learning_rate: float
    weight_decay: float
    mtp_loss_weight: float
    bias_update_rate: float
    aux_loss_weight: float
    router_temperature: float
    router_noise_std: float
    seq_length: int


@dataclass(frozen=True)
class ScheduledSetting:
    """A setting with phases: its name in the config, its value before the first phase, the phases."""

    path: str
    base: float
    phases: tuple[SchedulePhase, ...]


def scheduled_settings(config: Config) -> Iterator[ScheduledSetting]:
    """The settings that `<name>_phases` can change while training, but for the learning rate."""
    training, moe = config.training, config.model.moe
    for path, base, phases in (
        ("training.mtp_loss_weight", training.mtp_loss_weight, training.mtp_loss_weight_phases),
        ("training.seq_length", training.seq_length, training.seq_length_phases),
        ("model.moe.bias_update_rate", moe.bias_update_rate, moe.bias_update_rate_phases),
        ("model.moe.router_aux_loss_weight", moe.router_aux_loss_weight, moe.router_aux_loss_weight_phases),
        ("model.moe.router_temperature", moe.router_temperature, moe.router_temperature_phases),
        ("model.moe.router_noise_std", moe.router_noise_std, moe.router_noise_std_phases),
    ):
        yield ScheduledSetting(path, base, phases)


class Schedules:
    """`at(tokens)` gives batch size (full-length samples) and scalars of the step that begins there."""

    def __init__(self, config: Config, resolved: Resolved) -> None:
        self._weight_decay = config.training.weight_decay
        self._batch = resolved.batch
        self._learning_rate = learning_rate_schedule(config.training, resolved.total_tokens, resolved.batch)
        self._values = {
            setting.path.rpartition(".")[2]: value_schedule(setting.base, setting.phases)
            for setting in scheduled_settings(config)
        }
        self._router_noise: PiecewiseSchedule | None = None
        if not config.model.moe.router_noise_std_phases:
            noise = config.model.moe.router_noise_std
            self._router_noise = router_noise_schedule(noise, resolved.total_tokens)

    def at(self, tokens: int) -> tuple[int, Scalars]:
        """A pure function of the tokens consumed before the step."""
        after = tokens + self._batch.tokens_per_step(tokens)
        values = {name: schedule.value(after) for name, schedule in self._values.items()}
        noise = values["router_noise_std"] if self._router_noise is None else self._router_noise.value(tokens)
        scalars = Scalars(
            learning_rate=self._learning_rate.value(after),
            weight_decay=self._weight_decay,
            mtp_loss_weight=values["mtp_loss_weight"],
            bias_update_rate=values["bias_update_rate"],
            aux_loss_weight=values["router_aux_loss_weight"],
            router_temperature=values["router_temperature"],
            router_noise_std=noise,
            seq_length=round(values["seq_length"]),
        )
        return self._batch.batch_size(tokens), scalars
