"""Retrieval measured: how often a model of a checkpoint finds a fact in a haystack, by length and depth.

A prompt counts as answered when every token of the answer is the likeliest one, all before it given. That is
what greedy decoding writes: where one token is wrong, both miss the answer; where none is, both have it.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from megads.checkpoint import commit
from megads.checkpoint.compare import check_compatible
from megads.checkpoint.manifest import MANIFEST_NAME
from megads.checkpoint.store import CheckpointStore
from megads.config.loader import load_config
from megads.config.resolve import resolve
from megads.config.schema import Config
from megads.config.validate import check
from megads.data.needles import Haystack, Prompt
from megads.errors import CheckpointError
from megads.mcore.groups import initialize_device, initialize_process_groups
from megads.model.build import unwrap
from megads.train.resume import initialize
from megads.train.step import TrainingStep

Predict = Callable[[Tensor, int], Tensor]
"""(token ids [B, S], n) to the likeliest token after each of the last n positions [B, n]."""

# A checkpoint of any layout is evaluated in one process.
_ONE_PROCESS: dict[str, Any] = {
    "distributed.launcher": "torchrun",
    "distributed.tensor_parallel_size": 1,
    "distributed.sequence_parallel": None,
    "distributed.pipeline_parallel_size": 1,
    "distributed.virtual_pipeline_parallel_size": None,
    "distributed.pipeline_layout": None,
    "distributed.expert_parallel_size": 1,
    "distributed.expert_tensor_parallel_size": 1,
    "distributed.context_parallel_size": 1,
    "distributed.data_parallel_size": -1,
    "distributed.tp_comm_overlap": False,
    "distributed.overlap_expert_parallel": False,
    "distributed.overlap_shared_experts": False,
    "distributed.delay_wgrad_compute": False,
    "distributed.slurm.enabled": False,
    "distributed.deepspeed.enabled": False,
    "training.average_decay": None,
}


@dataclass(frozen=True)
class Grid:
    """What is measured: prompts of these lengths, with the fact at `depths` places from start to end."""

    lengths: tuple[int, ...]
    depths: int
    samples: int
    seed: int = 0

    @property
    def depth_shares(self) -> tuple[float, ...]:
        """0 is the start of the haystack, 1 its end."""
        return tuple(i / (self.depths - 1) for i in range(self.depths)) if self.depths > 1 else (0.5,)


def accuracy_by_length_and_depth(
    predict: Predict, haystack: Haystack, grid: Grid, batch_tokens: int = 16384
) -> list[list[float]]:
    """Share of prompts that are answered [lengths, depths]; the prompts depend on grid and haystack alone."""
    return [
        [
            _accuracy(predict, prompts_of(haystack, grid, length, depth), batch_tokens)
            for depth in grid.depth_shares
        ]
        for length in grid.lengths
    ]


def prompts_of(haystack: Haystack, grid: Grid, length: int, depth: float) -> list[Prompt]:
    """The prompts of one cell of the grid."""
    random = Random(f"{grid.seed} {length} {depth}")
    return [haystack.prompt(length, depth, random) for _ in range(grid.samples)]


def _accuracy(predict: Predict, prompts: Sequence[Prompt], batch_tokens: int) -> float:
    size = max(1, batch_tokens // len(prompts[0].ids))
    found = 0
    for first in range(0, len(prompts), size):
        batch = prompts[first : first + size]
        answer_tokens = max(prompt.answer_tokens for prompt in batch)
        ids_BS = torch.tensor([prompt.ids for prompt in batch])
        predicted = predict(ids_BS[:, :-1], answer_tokens)
        right = predicted == ids_BS[:, -answer_tokens:]
        found += sum(
            bool(row[-prompt.answer_tokens :].all()) for row, prompt in zip(right, batch, strict=True)
        )
    return found / len(prompts)


@dataclass(frozen=True)
class Evaluated:
    """The model of a checkpoint, in this process."""

    info: commit.CheckpointInfo
    record: dict[str, Any]
    config: Config
    step: TrainingStep

    @torch.no_grad()
    def predict(self, ids_BS: Tensor, last: int) -> Tensor:
        """The likeliest token after each of the last `last` positions [B, last]."""
        model = unwrap(self.step.chunks[0])
        model.eval()
        # The head of a large vocabulary would take most of the memory, for positions that nobody asks about.
        hook = model.output_layer.register_forward_pre_hook(
            lambda _, inputs: (inputs[0][-last:], *inputs[1:])
        )
        device = torch.cuda.current_device()
        try:
            positions = torch.arange(ids_BS.shape[1], device=device).unsqueeze(0)
            logits_KBSV = self.step.chunks[0](ids_BS.to(device), None, positions)
        finally:
            hook.remove()
        return logits_KBSV[0].argmax(dim=-1).cpu()


def load_evaluated(
    path: str, overrides: Mapping[str, Any] = {}, origins: Mapping[str, str] = {}, *, cuda: bool = False
) -> Evaluated:
    """Load the weights of a checkpoint, or of the newest of a directory; joins a job of one process.

    `overrides` are settings by dotted name on top of the checkpoint's own: YaRN on weights trained without
    it, say; `origins` as for `load_config`. Raises ConfigError for settings that do not fit, CheckpointError
    for a checkpoint that cannot be read or is of another model.
    """
    config = _config_of(path, overrides, origins)
    check(config, 1, cuda)
    resolved = resolve(config, 1, cuda)
    initialize_device(resolved.device)
    initialize_process_groups(resolved, config.distributed.timeout_minutes, config.seed)
    # A store leases its directory, and the checkpoint's may be in use by a run: this one has its own.
    with tempfile.TemporaryDirectory() as directory, CheckpointStore(directory) as store:
        info = store.find(path)
        assert info is not None, "only a store's own directory may be empty"
        record = commit.read_record(info.path)
        check_compatible(record, config, None, config.checkpointing.allow_changed, new_run=True)
        step = TrainingStep(config, resolved)
        initialize(config, store, info, step, None)
    return Evaluated(info, record, config, step)


def _config_of(path: str, overrides: Mapping[str, Any], origins: Mapping[str, str]) -> Config:
    """The configuration in a checkpoint's record, for one process, with `overrides` on top."""
    newest = commit.latest(path)
    directory = Path(path) if newest is None else newest.path
    if not (directory / MANIFEST_NAME).is_file():
        raise CheckpointError(
            f"{path}: neither a checkpoint nor a directory of them; a run writes them below its output_dir, "
            "as checkpoints/step_NUMBER"
        )
    saved = commit.read_record(directory)["config"]
    places = dict.fromkeys(saved, f"the record of {directory}") | dict(origins)
    return load_config(None, {**saved, **_ONE_PROCESS, **overrides}, places)
