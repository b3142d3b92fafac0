"""Validation: the loss on held-out samples, together and by source, always on the same samples."""

from collections.abc import Iterator

import torch
from torch import Tensor

from megads.config.schema import Config
from megads.data.blend import Datasets
from megads.data.loader import build_loader
from megads.data.samples import PackedSamples
from megads.train.step import TrainingStep

Batches = Iterator[dict[str, Tensor]]


class Validation:
    """Evaluates a model on the validation split; collective.

    `valid` is read from its start each time, `validation.eval_steps` global batches of it. Each source is
    evaluated on as many samples of its own.
    """

    def __init__(self, config: Config, datasets: Datasets, step: TrainingStep) -> None:
        self._config, self._step = config, step
        self._valid = datasets.valid
        self._by_source = datasets.valid_by_source

    def run(self, *, by_source: bool = True) -> tuple[float, dict[str, float]]:
        """(loss, loss by source), next-token cross-entropy in nats per token; there must be a split."""
        assert self._valid is not None
        sources = self._by_source if by_source else {}
        return self._evaluate(self._valid), {name: self._evaluate(s) for name, s in sources.items()}

    def _evaluate(self, samples: PackedSamples) -> float:
        training, resolved = self._config.training, self._step.resolved
        micro_batches = len(samples) // (training.micro_batch_size * resolved.dp)
        batches: Batches | None = None
        if self._step.needs_data:
            batches = build_loader(
                samples,
                micro_batch_size=training.micro_batch_size,
                dp_rank=self._step.data_parallel_rank,
                dp_size=resolved.dp,
                consumed_samples=0,
                num_workers=0,
                prefetch_factor=self._config.data.prefetch_factor,
                pin_memory=False,
            )
        sums, counts = self._step.evaluate(batches, micro_batches)
        return float(sums[0] / torch.clamp(counts[0], min=1))
