"""What a run says while it goes on: one place that knows meters, sinks, console and health.

The loop tells it what happened; who is told, and on which ranks, is decided here.
"""

import functools
import logging
import math
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megads.config import show
from megads.config.flops import count_parameters, training_flops_per_token
from megads.config.resolve import Resolved
from megads.config.scalars import Scalars
from megads.config.schema import Config
from megads.errors import DataError
from megads.model.router import bias_ranges
from megads.train.console import ConsoleSink
from megads.train.curve import draw_curve
from megads.train.health import HealthWatch
from megads.train.matmul_rate import peak_rate
from megads.train.meters import SpeedMeter, StepMeter, used_memory
from megads.train.metrics import (
    Record,
    event_record,
    experts_record,
    run_record,
    train_record,
    validation_record,
)
from megads.train.phases import PHASES
from megads.train.sinks import METRICS_FILE, Sinks, open_sinks
from megads.train.state import TrainState
from megads.train.step import StepResult, TrainingStep

logger = logging.getLogger(__name__)

CURVE_FILE = "loss_curve.png"


class Reporter:
    """Every rank has one and tells it the same; rank 0 writes. `close` it at the end."""

    def __init__(self, config: Config, resolved: Resolved, step: TrainingStep, state: TrainState) -> None:
        self._config, self._resolved, self._step = config, resolved, step
        self._leads = dist.get_rank() == 0
        dist.barrier()  # so that all processes of a host measure their matmul rate at once
        peak = peak_rate(resolved.device)
        self._speed = SpeedMeter(peak_flops_per_second=peak.flops_per_second, processes=resolved.world_size)
        self._losses = ["lm_loss", *(f"mtp_loss_{k}" for k in range(1, step.depths))]
        self._meter = self._step_meter()
        self._router_rows = [router.index_among(resolved.shape.is_moe) for router in step.routers]
        self._health = HealthWatch(config.logging.health, vocab_size=config.model.vocab_size)
        self._sinks = Sinks([])
        self._console: ConsoleSink | None = None
        if not self._leads:
            return
        show.save(config, resolved, config.output_dir)
        self._open_sinks(state)
        logger.info("MFU counts %.3g FLOP/s per process as 100%%: %s", peak.flops_per_second, peak.source)
        self._console = ConsoleSink(resolved.train_steps, first_step=state.step)
        self._write(
            run_record(
                state,
                total_tokens=resolved.total_tokens,
                train_steps=resolved.train_steps,
                vocab_size=config.model.vocab_size,
                layout=layout_text(resolved),
                parameters=count_parameters(config).total_with_mtp,
                flops_per_token=training_flops_per_token(config),
            )
        )

    def _step_meter(self) -> StepMeter:
        config, shape = self._config, self._resolved.shape
        moe_layers = sum(shape.is_moe)
        mtp_layers = shape.mtp_depth if shape.mtp_is_moe else 0
        names = [*self._losses, *self._step.contents.names, "grad_norm", "squared_param_norm"]
        names += ["loss_scale"] if self._resolved.precision == "fp16" else []
        names += ["mtp_loss"] if shape.mtp_depth else []
        names += ["aux_loss"] if moe_layers and config.model.moe.balance_loss_type != "none" else []
        names += [f"seconds/{phase}" for phase in PHASES]
        return StepMeter(
            names,
            moe_layers=moe_layers + mtp_layers,
            num_experts=config.model.moe.num_experts if moe_layers else 0,
            device=torch.device(self._resolved.device),
        )

    def _open_sinks(self, state: TrainState) -> None:
        """Write after the step of `state`; what the sinks held beyond it is set aside."""
        self._sinks = open_sinks(
            self._config, tensorboard_dir=self._resolved.tensorboard_dir, resumed_step=state.step
        )

    def go_back(self, state: TrainState) -> None:
        """Go on after the step of `state`, which is behind; what was measured since then is set aside."""
        self._meter.drain()
        self._step.phases.drain()
        if self._leads:
            self._sinks.close()
            self._open_sinks(state)

    def step_time(self, tokens: int, flops: float) -> float:
        """Count a step of so many tokens and model FLOPs (of the job); the seconds it took."""
        return self._speed.step_done(tokens, flops)

    def not_training(self) -> AbstractContextManager[None]:
        """What runs inside does not count as training time."""
        return self._speed.excluded()

    def step_done(self, result: StepResult, state: TrainState) -> None:
        """Take in what a step measured."""
        meter = self._meter
        meter.add_sums(self._losses, result.loss_sums, result.token_counts)
        meter.add_sums(self._step.contents.names, *result.contents)
        if self._resolved.shape.mtp_depth:
            meter.add_sum("mtp_loss", result.loss_sums[1:].sum(), result.token_counts[1:].sum())
        if result.grad_norm is not None:
            meter.add("grad_norm", result.grad_norm)
        if result.loss_scale is not None:
            meter.add("loss_scale", result.loss_scale)
        if len(result.balance_losses):
            if self._config.model.moe.balance_loss_type != "none":
                meter.add_sum("aux_loss", result.balance_losses.sum(), len(result.balance_losses))
            meter.add_experts(result.loads, result.score_sums, self._router_rows)
        meter.step_done()
        if self._console is not None:
            self._console.step_done(state.step)

    def interval(
        self, state: TrainState, scalars: Scalars, batch_size: int, sampled: Mapping[str, int]
    ) -> None:
        """Write a log interval; collective. `sampled`: sequences of each source so far."""
        self._measure_state()
        averages = self._meter.drain(dist.all_reduce)
        averages.means["param_norm"] = math.sqrt(averages.means.pop("squared_param_norm") or 0.0)
        memory = used_memory(self._resolved.device, functools.partial(dist.all_reduce, op=dist.ReduceOp.MAX))
        speed = self._speed.interval(self._resolved.total_tokens - state.tokens)
        if not self._leads:
            return
        record = train_record(
            state, averages, speed, scalars=scalars, batch_size=batch_size, memory=memory, sampled=sampled
        )
        self._write(record)
        if averages.experts is not None and self._expert_load_due(state.step):
            self._write(experts_record(state, averages.experts))
        for name, text in self._health.look(record):
            self.event(state.step, state.tokens, "health", {"trouble": name, "text": text}, text)

    def _measure_state(self) -> None:
        """Add to the interval what need not be measured at every step; collective."""
        step, meter = self._step, self._meter
        seconds = step.phases.drain()
        for phase in PHASES:
            every_step = phase in ("data", "forward_backward", "optimizer")
            meter.add(f"seconds/{phase}", seconds[phase] / (meter.steps if every_step else 1))
        # All ranks' shares add up; the weights must add up to 1.
        meter.add_sum("squared_param_norm", step.squared_parameter_norm_share(), float(self._leads))
        if step.routers and self._config.model.moe.use_aux_loss_free:
            meter.add_bias_ranges(bias_ranges(step.routers), self._router_rows)

    def _expert_load_due(self, step: int) -> bool:
        every = self._config.logging.expert_load_interval
        return every > 0 and step // self._config.training.log_interval % every == 0

    def evaluation(
        self,
        state: TrainState,
        loss: float,
        by_source: Mapping[str, float],
        average_loss: float | None,
        is_best: bool,
    ) -> None:
        """Write an evaluation."""
        self._write(
            validation_record(
                state, loss, loss_by_source=by_source, average_loss=average_loss, is_best=is_best
            )
        )

    def event(self, step: int, tokens: int, event: str, facts: Mapping[str, Any], text: str) -> None:
        """Write something out of the ordinary; `text` is the warning for people."""
        if self._leads:
            logger.warning("step %d: %s", step, text)
        self._write(event_record(step, tokens, event, facts))

    def end(self, state: TrainState, completed: bool, checkpoint: Path | None) -> None:
        """Draw the loss curve, and say where everything lies."""
        if not self._leads:
            return
        output = Path(self._config.output_dir)
        what = "finished" if completed else "stopped; start it again to go on"
        logger.info("step %d of %d, %s", state.step, self._resolved.train_steps, what)
        if checkpoint is not None:
            logger.info("checkpoint   %s", os.path.relpath(checkpoint))
        if state.step >= self._config.training.log_interval:
            try:
                title = self._config.experiment_name
                curve = draw_curve(output / METRICS_FILE, output / CURVE_FILE, title=title)
                logger.info("loss curve   %s", os.path.relpath(curve))
            except (DataError, OSError) as error:  # no picture is worth the run
                logger.warning("no loss curve: %s", error)
        if self._config.logging.tensorboard.enabled:
            logger.info(
                "TensorBoard  tensorboard --logdir %s", os.path.relpath(self._resolved.tensorboard_dir)
            )

    def _write(self, record: Record) -> None:
        if self._leads:
            self._sinks.write(record)
            if self._console is not None:
                self._console.write(record)

    def close(self) -> None:
        """Close sinks and console."""
        self._sinks.close()
        if self._console is not None:
            self._console.close()


def layout_text(resolved: Resolved) -> str:
    """The parallel layout for people: the sizes that are not 1."""
    sizes = {
        "TP": resolved.tp,
        "PP": resolved.pp,
        "VPP": resolved.vpp or 1,
        "CP": resolved.cp,
        "EP": resolved.ep,
        "ETP": resolved.etp,
        "DP": resolved.dp,
    }
    named = [f"{name}{size}" for name, size in sizes.items() if size > 1]
    return " ".join(named) if named else "one process"
