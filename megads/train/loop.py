"""A run from its first step, or the one after its checkpoint, to its last.

What changes while training is in one `TrainState` and the tensors of `snapshot`; everything else follows
from the configuration and the tokens consumed. So a run that is stopped anywhere and resumed is the same
run, bit by bit where the layout is the same.
"""

import functools
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from megads.checkpoint import commit
from megads.checkpoint.manifest import read_manifest
from megads.checkpoint.mirror import build_mirror
from megads.checkpoint.store import CheckpointStore
from megads.config.flops import training_flops_per_token
from megads.config.resolve import Resolved
from megads.config.scalars import Schedules
from megads.config.schema import Config
from megads.data.blend import build_datasets
from megads.data.loader import Loader, build_loader
from megads.data.sources import sample_counts
from megads.errors import BudgetReached, RunStopped, TrainingError
from megads.optim.build import release_data_parallel
from megads.train.average import ParameterAverage
from megads.train.budget import BudgetWatch
from megads.train.contents import Contents
from megads.train.evaluate import Validation
from megads.train.preflight import run_preflight
from megads.train.profiler import StepProfiler
from megads.train.reporter import Reporter
from megads.train.resume import checkpoint_record, find_checkpoint, find_origin, initialize, restore
from megads.train.rollback import roll_back
from megads.train.signals import StopRequest
from megads.train.snapshot import sharded_state
from megads.train.stability import SpikeWatch, Verdict
from megads.train.state import TrainState
from megads.train.step import StepResult, TrainingStep

logger = logging.getLogger(__name__)


def train(config: Config, resolved: Resolved) -> bool:
    """Run the training that `config` describes; the process groups must exist. See `Run.to_the_end`.

    Raises EnvironmentSetupError, DataError, CheckpointError, TrainingError or RunStopped, on every rank.
    """
    run_preflight(config, resolved)
    with CheckpointStore(
        resolved.checkpoint_dir,
        keep_last_n=config.checkpointing.keep_last_n,
        keep_best=config.checkpointing.keep_best,
        async_save=config.checkpointing.async_save,
        mirror=build_mirror(config.checkpointing.mirror),
    ) as store:
        run = Run(config, resolved, store)
        try:
            return run.to_the_end()
        finally:
            run.step.release_graphs()
            release_data_parallel(run.step.chunks)


@dataclass
class _Progress:
    """What the loop itself has to remember between steps; nothing of it outlives the process."""

    skipped_in_a_row: int = 0
    validation_loss: float | None = None
    validated_step: int = -1
    saved_step: int = -1


def _progress(found: commit.CheckpointInfo | None) -> _Progress:
    """What is done already of a run that goes on from a checkpoint."""
    if found is None:
        return _Progress()
    loss = read_manifest(found.path).metrics.get(commit.BEST_METRIC)
    validated_step = -1 if loss is None else found.step
    return _Progress(validation_loss=loss, validated_step=validated_step, saved_step=found.step)


class Run:
    """One process's part of a run, ready to train: data, model, state restored."""

    def __init__(self, config: Config, resolved: Resolved, store: CheckpointStore) -> None:
        self.config, self.resolved, self.store = config, resolved, store
        self.leads = dist.get_rank() == 0
        self._training_samples = 0
        began = time.monotonic()
        # Data first: it fails fast, before a model is allocated.
        self.build_datasets(sample_counts(config, resolved).train)
        if self.leads:
            logger.info("%s", self.datasets.table)
        found = find_checkpoint(config, store, self.datasets)
        saved = commit.read_record(found.path)["state"] if found else None
        if saved is not None:
            self.resolved = resolved = self._going_on(saved["step"], saved["tokens"])
        self.budget = BudgetWatch(config, resolved.world_size, began, saved)
        if found is None or found.step < resolved.train_steps:
            self.budget.refuse_if_spent()
        origin = None if found else find_origin(config, store, self.datasets)
        contents = Contents(
            self.datasets.source_names, self.datasets.corpus.eod_id, self.datasets.fim_begin_id
        )
        self.step = TrainingStep(config, resolved, contents)
        self.average: ParameterAverage | None = None
        if (decay := config.training.average_decay) is not None:
            self.average = ParameterAverage(self.step, decay, config.training.average_interval)
        if origin is not None:
            self.state = initialize(config, store, origin, self.step, self.average)
        else:
            self.state = restore(resolved, store, found, self.step, self.datasets, self.average)
        self.build_datasets(self._samples_needed())
        self.watch = SpikeWatch(config.training.stability, self.state.recent_losses)
        self.verdict: Verdict | None = None
        self.loader: Iterator[dict[str, Tensor]] | None = None
        self.schedules = Schedules(config, resolved)
        self._flops_per_token = functools.cache(
            lambda seq_length: training_flops_per_token(config, seq_length=seq_length)
        )
        self.validation = Validation(config, self.datasets, self.step)
        self.progress = _progress(found)
        self.reporter = Reporter(config, resolved, self.step, self.state)

    def go_back_to(self, state: TrainState) -> None:
        """Go on from `state`, which the tensors are in already, and save it as a checkpoint of its own."""
        self.state = state
        self.watch = SpikeWatch(self.config.training.stability, state.recent_losses)
        validated_step = -1 if state.best_validation_step is None else state.best_validation_step
        self.progress = _Progress(validation_loss=state.best_validation_loss, validated_step=validated_step)
        self.resolved = self.resolved.going_on(state.step, state.tokens)
        self.build_datasets(self._samples_needed())
        self.open_loader()
        self.save()
        self.store.wait()
        self.reporter.go_back(state)

    def build_datasets(self, training_samples: int) -> None:
        """The data of the run, where they are not built for so many samples already."""
        if training_samples == self._training_samples:
            return
        self._training_samples = training_samples
        counts = replace(sample_counts(self.config, self.resolved), train=training_samples)
        self.datasets = build_datasets(self.config, self.resolved, counts)

    def _samples_needed(self) -> int:
        """From the first to the last; rollbacks have left some out, batches may have had another size."""
        resolved, state = self.resolved, self.state
        tokens = resolved.batch.tokens_at_end(resolved.total_tokens, state.tokens)
        return state.samples + (tokens - state.tokens) // self.config.training.seq_length

    def _going_on(self, step: int, tokens: int) -> Resolved:
        """The run as it goes on from a checkpoint. Told where that ends it at another step than planned."""
        planned, resolved = self.resolved.train_steps, self.resolved.going_on(step, tokens)
        if self.leads and resolved.train_steps == step > planned:
            logger.warning(
                "the checkpoint, %s tokens, is beyond the end of this run, %s tokens: nothing is left to do. "
                "To train on, make the run longer (training.train_steps or total_training_tokens)",
                f"{tokens:,}", f"{resolved.total_tokens:,}",
            )  # fmt: skip
        elif self.leads and resolved.train_steps != planned:
            logger.warning(
                "the steps before the checkpoint had other batch sizes than now: the run's %s tokens end "
                "with step %d, not with step %d",
                f"{resolved.total_tokens:,}", resolved.train_steps, planned,
            )  # fmt: skip
        return resolved

    def to_the_end(self) -> bool:
        """All remaining steps; then the last checkpoint, the last evaluation and the loss curve.

        False where `training.exit_step` cut it. Raises BudgetReached where `budget` did, and RunStopped after
        a stop request, also one that came while the last step was being saved: what follows, like a further
        stage, is to wait.
        """
        self.stop = StopRequest(self.config.checkpointing.preemption)
        profiler = StepProfiler(
            self.config.logging.profile,
            Path(self.config.output_dir) / "profile",
            rank=dist.get_rank(),
            cuda=self.resolved.device == "cuda",
        )
        self.open_loader()
        limit = None
        try:
            while self.state.step < self._last_step():
                profiler.before_step(self.state.step + 1)
                self._one_step()
                profiler.after_step(self.state.step)
                if self.verdict is not None and self.verdict.action == "rollback":
                    roll_back(self, self.verdict)
                else:
                    self._after_step()
                signal_name, share = self.stop.agreed(self.budget.share(self.state))
                if signal_name:
                    logger.info(
                        "%s received: saving and stopping after step %d", signal_name, self.state.step
                    )
                    break
                if limit := self.budget.check(self.state, share, self._tell_budget):
                    break
            completed = self.state.step >= self.resolved.train_steps
            self._finish(completed)
            if signal_name := self.stop.agreed()[0]:
                raise RunStopped(
                    f"{signal_name}: saved after step {self.state.step}; the same command goes on from there"
                )
            if limit and not completed:
                raise BudgetReached(
                    f"{limit}: saved after step {self.state.step}; raise it to go on from there"
                )
            return completed
        finally:
            self.budget.close()
            profiler.close(self.state.step)
            self.stop.close()
            if isinstance(self.loader, Loader):
                self.loader.close()
            self.reporter.close()

    def open_loader(self) -> None:
        """Batches from the position of the state on, for the ranks that need any."""
        if isinstance(self.loader, Loader):
            self.loader.close()
        if not self.step.needs_data:
            return
        data = self.config.data
        self.loader = build_loader(
            self.datasets.train,
            micro_batch_size=self.config.training.micro_batch_size,
            dp_rank=self.step.data_parallel_rank,
            dp_size=self.resolved.dp,
            consumed_samples=self.state.samples,
            num_workers=data.num_workers,
            prefetch_factor=data.prefetch_factor,
            pin_memory=data.pin_memory and self.resolved.device == "cuda",
        )

    def _one_step(self) -> None:
        batch_size, scalars = self.schedules.at(self.state.tokens)
        scalars = replace(scalars, learning_rate=scalars.learning_rate * self.state.lr_factor)
        micro_batches = batch_size // (self.config.training.micro_batch_size * self.resolved.dp)
        # To warn, the loss is judged after the update: by then it is on the host, without a wait of its own.
        after = self.config.training.stability.spike_policy == "warn"
        result = self.step.train(self.loader, micro_batches, scalars, None if after else self._accept)
        if after:
            self._accept(result.loss)
        tokens = batch_size * self.config.training.seq_length
        flops = tokens * self._flops_per_token(scalars.seq_length)
        seconds = self.reporter.step_time(tokens, flops)
        self.state.advance(
            samples=batch_size,
            tokens=tokens,
            flops=flops,
            seconds=seconds,
            skipped=not result.applied,
        )
        self.budget.charge(self.state)
        if self.average is not None and result.applied:
            self.average.update(self.state.step)
        self._count_skipped(result)
        self.reporter.step_done(result, self.state)
        if self.state.step % self.config.training.log_interval == 0:
            sampled = self.datasets.sampled(self.state.samples)
            self.reporter.interval(self.state, scalars, batch_size, sampled)

    def _tell_budget(self, facts: dict[str, Any], text: str) -> None:
        self.reporter.event(self.state.step, self.state.tokens, "budget", facts, text)

    def _accept(self, loss: float) -> bool:
        """Judge the loss of the step that is under way: whether its update is to be made."""
        if self.config.training.stability.spike_policy != "warn":
            loss = self.stop.largest(loss)  # what is done must be the same on every rank
        self.verdict = self.watch.judge(self.state.step + 1, loss)
        if self.verdict.action == "accept":
            return True
        self.state.spikes += 1
        self.reporter.event(
            self.state.step + 1, self.state.tokens, "spike", self.verdict.facts(), self.verdict.text()
        )
        return self.verdict.action == "warn"

    def _count_skipped(self, result: StepResult) -> None:
        if result.applied:
            self.progress.skipped_in_a_row = 0
            return
        assert self.verdict is not None
        if result.settling:
            # No sign of divergence: it ends once the scale fits, or has reached its least value.
            text = f"skipped: gradients overflowed FP16; the loss scale is {result.loss_scale:g} now"
            self.reporter.event(self.state.step, self.state.tokens, "overflow", {}, text)
            return
        self.progress.skipped_in_a_row += 1
        not_finite = self.verdict.action in ("accept", "warn")
        if not_finite:
            text = "skipped: its gradients are not finite"
            self.reporter.event(self.state.step, self.state.tokens, "skip", {}, text)
        most = self.config.training.stability.max_skipped_steps
        if self.progress.skipped_in_a_row >= most and self.verdict.action != "rollback":
            what = "gradients that are not finite" if not_finite else "losses far above the recent ones"
            raise TrainingError(
                f"{most} steps in a row, up to step {self.state.step}, had {what}; no update was made by "
                "them. Resume from the last checkpoint with a lower training.learning_rate, or look at the "
                'data read since then; training.stability.spike_policy = "rollback" does both'
            )

    def _last_step(self) -> int:
        """Of this job."""
        exit_step = self.config.training.exit_step
        return min(self.resolved.train_steps, exit_step or self.resolved.train_steps)

    def _after_step(self) -> None:
        """Evaluation and checkpoints that are due, but for those of the last step."""
        step, training = self.state.step, self.config.training
        phases = self.step.phases
        with phases.phase("checkpoint"):
            self.store.poll()
        if step == self._last_step():
            return
        with self.reporter.not_training():
            if training.eval_interval and step % training.eval_interval == 0:
                with phases.phase("evaluation"):
                    self._evaluate()
            if self._save_is_due():
                with phases.phase("checkpoint"):
                    self.save()

    def _save_is_due(self) -> bool:
        """Once in every `save_interval` steps; later, while updates are left out.

        What cannot take a step is nothing to go on from: to save it would push better checkpoints out, and
        let a run that fails again and again look as if it got ahead.
        """
        interval = self.config.training.save_interval
        if not interval or self.progress.skipped_in_a_row:
            return False
        return self.state.step // interval > max(self.progress.saved_step, 0) // interval

    def _finish(self, completed: bool) -> None:
        # A run that was cut will be evaluated where its schedule says; only the end gets one of its own.
        due = self.config.training.eval_interval
        if (
            due
            and self.progress.validated_step != self.state.step
            and (completed or self.state.step % due == 0)
        ):
            self._evaluate()
        if self.progress.saved_step != self.state.step:
            self.save()
        self.store.wait()
        if self.store.failure is not None:
            raise TrainingError(
                f"{self.store.failure}. Make room in or mend {self.store.directory}, then start again: the "
                "run goes on from its newest checkpoint"
            )
        last = self.store.last_saved
        self.reporter.end(self.state, completed, last.path if last else None)

    def _evaluate(self) -> None:
        if self.datasets.valid is None:
            return
        loss, by_source = self.validation.run()
        average_loss = None
        if self.average is not None:
            with self.average.in_place_of_weights():
                average_loss, _ = self.validation.run(by_source=False)
        is_best = self.state.record_validation(loss)
        self.progress.validation_loss, self.progress.validated_step = loss, self.state.step
        self.reporter.evaluation(self.state, loss, by_source, average_loss, is_best)

    def save(self) -> None:
        """Save the state after its step."""
        self.budget.charge(self.state)
        checkpointing = self.config.checkpointing
        self.step.gather_parameters()
        metrics = {}
        if self.progress.validated_step == self.state.step and self.progress.validation_loss is not None:
            metrics[commit.BEST_METRIC] = self.progress.validation_loss
        self.state.recent_losses = self.watch.recent.as_tuple()
        record = checkpoint_record(self.config, self.resolved, self.state, self.datasets)
        state = sharded_state(
            self.step,
            optimizer=checkpointing.save_optimizer,
            generators=True,
            fp8_histories=self.step.delayed_scaling,
            average=self.average,
        )
        self.store.save(self.state.step, state, record, metrics)
        self.progress.saved_step = self.state.step
