"""An exponential moving average of the weights, kept in host memory, saved, and evaluable.

DeepSeek-V3 (arXiv:2412.19437, section 3.2.2) keeps one in CPU memory to see early how the model will do
after the learning rate has decayed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from megads.checkpoint.companions import companions
from megads.model.build import unwrap
from megads.optim.fully_sharded import FullyShardedChunk
from megads.optim.state import local_weights, sharded_companions, whole_parameters
from megads.train.step import TrainingStep

PREFIX = "average."
EARLIER_UPDATES = "earlier_updates"


def effective_decay(decay: float, updates: int) -> float:
    """The decay of an update when `updates` came before: less at first, to forget the random start.

    (1 + n) / (10 + n), TensorFlow's rule, until that exceeds `decay`.
    """
    return min(decay, (1 + updates) / (10 + updates))


class ParameterAverage:
    """float32 averages of this rank's parameters, in host memory (pinned for a GPU).

    `update` is called after each optimizer step and acts every `interval` steps. What it averages are
    the weights as the model computes with them; in BF16 training the average itself stays float32.
    `earlier_updates` are those of the runs that this one took the average over from.
    """

    def __init__(self, step: TrainingStep, decay: float, interval: int) -> None:
        self._step, self._decay, self._interval = step, decay, interval
        self.earlier_updates = 0
        cuda = step.resolved.device == "cuda"
        self._averages: list[dict[str, Tensor]] = []
        for chunk in step.chunks:
            self._averages.append({})
            for name, weight in local_weights(chunk, unwrap(chunk)).items():
                self._averages[-1][name] = torch.empty(
                    weight.shape, dtype=torch.float32, device="cpu", pin_memory=cuda
                )
        self.start_from_weights()

    @torch.no_grad()
    def start_from_weights(self) -> None:
        """Forget the past: the average is the weights."""
        for parameter, average in self._pairs():
            average.copy_(parameter)

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        for chunk, averages in zip(self._step.chunks, self._averages, strict=True):
            for name, weight in local_weights(chunk, unwrap(chunk)).items():
                yield weight, averages[name]

    @torch.no_grad()
    def update(self, step_number: int) -> None:
        """Take in the weights after step `step_number` (from 1), if that one is due."""
        if step_number % self._interval:
            return
        self._step.gather_parameters()
        updates = self.earlier_updates + step_number // self._interval - 1
        weight = 1 - effective_decay(self._decay, updates)
        pairs = list(self._pairs())
        averages = [average for _, average in pairs]
        weights = [parameter.detach().to("cpu", torch.float32) for parameter, _ in pairs]
        torch._foreach_lerp_(averages, weights, weight)

    @contextmanager
    def in_place_of_weights(self) -> Iterator[None]:
        """The model computes with the average inside; its own weights come back bit by bit."""
        self._step.gather_parameters()
        pairs = list(self._pairs())
        with torch.no_grad():
            own = [parameter.detach().to("cpu", copy=True) for parameter, _ in pairs]
            for parameter, average in pairs:
                parameter.copy_(average)
        self._step.forget_gathered()
        try:
            yield
        finally:
            self._step.forget_gathered()
            with torch.no_grad():
                for (parameter, _), weights in zip(pairs, own, strict=True):
                    parameter.copy_(weights)
            self._step.forget_gathered()

    def sharded_state(self, metadata: dict[str, Any]) -> dict[str, Any]:
        """The averages under the names and places of the weights they belong to, `average.` before them.

        `metadata` is what the model's own sharded state is made with.
        """
        state: dict[str, Any] = {EARLIER_UPDATES: self.earlier_updates}
        for index, (chunk, averages) in enumerate(zip(self._step.chunks, self._averages, strict=True)):
            model = unwrap(chunk)
            with whole_parameters(chunk):
                sharded = model.sharded_state_dict(metadata=metadata)
            if isinstance(chunk, FullyShardedChunk):
                state[f"average{index}"] = sharded_companions(chunk, sharded, averages, PREFIX)
            else:
                average_of = {p.data_ptr(): averages[name] for name, p in model.named_parameters()}
                state[f"average{index}"] = companions(sharded, average_of, PREFIX)
        return state

    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `sharded_state` gave the places for."""
        self.earlier_updates = state.get(EARLIER_UPDATES, 0)
        for index, (chunk, averages) in enumerate(zip(self._step.chunks, self._averages, strict=True)):
            if isinstance(chunk, FullyShardedChunk):
                continue  # parts of parameters were loaded in place
            loaded = state[f"average{index}"]
            assert loaded.keys() == averages.keys(), loaded.keys() ^ averages.keys()
            for name, average in averages.items():
                average.copy_(loaded[name])
