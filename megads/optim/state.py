"""Weights and optimizer as parts of a checkpoint, and back, whatever `zero_stage` divides.

A checkpoint is the same for stages 1 to 3: that of Megatron-Core's `DistributedOptimizer` with
`fully_reshardable`, which has one dictionary for the experts' parameter groups, one for the others, and
tensors `optimizer.state.{param, exp_avg, exp_avg_sq}.<weight>`.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.utils import to_local_if_dtensor
from torch import Tensor

from megads.optim import build
from megads.optim.build import DataParallelChunk, allocate_optimizer_state
from megads.optim.fully_sharded import FullyShardedChunk, sharded_parts
from megads.optim.master_weights import reload_weights, renew_weights

Entries = dict[str, Any]  # a model's sharded state, by its own names


def whole_parameters(chunk: DataParallelChunk) -> AbstractContextManager[None]:
    """Inside, the chunk's model can be asked for its sharded state."""
    return chunk.whole_parameters() if isinstance(chunk, FullyShardedChunk) else nullcontext()


def sharded_weights(chunk: DataParallelChunk, entries: Entries) -> Entries:
    """What this rank saves or loads of `entries`, the sharded state of the chunk's model."""
    if not isinstance(chunk, FullyShardedChunk):
        return entries
    shard_of = {id(shard.parameter): shard for shard in chunk.shards()}
    local: Entries = {}
    for name, entry in entries.items():
        shard = shard_of.get(id(getattr(entry, "data", None)))
        if shard is None:
            local[name] = entry
        elif parts := sharded_parts(entry, shard, shard.weight):
            local[name] = parts
    return local


def local_weights(chunk: DataParallelChunk, model: torch.nn.Module) -> dict[str, Tensor]:
    """What this rank keeps of the chunk's weights, the whole or a shard, by their names in `model`."""
    with whole_parameters(chunk):
        named = dict(model.named_parameters())
    if not isinstance(chunk, FullyShardedChunk):
        return dict(named)
    shard_of = {id(shard.parameter): shard for shard in chunk.shards()}
    return {name: shard_of[id(parameter)].weight for name, parameter in named.items()}


def sharded_companions(
    chunk: FullyShardedChunk, entries: Entries, tensors: dict[str, Tensor], prefix: str
) -> Entries:
    """`tensors`, like `local_weights`, as parts of tensors that are saved beside the weights."""
    shard_of = {id(shard.parameter): shard for shard in chunk.shards()}
    found = (
        (name, sharded_parts(entries[name], shard_of[id(entries[name].data)], tensor, prefix))
        for name, tensor in tensors.items()
    )
    return {name: parts for name, parts in found if parts}


def load_weights(chunk: DataParallelChunk, model: torch.nn.Module, loaded: Entries) -> None:
    """Put what was loaded into the places of `sharded_weights` into the chunk and its `model`."""
    if not isinstance(chunk, FullyShardedChunk):
        model.load_state_dict(loaded)
        return
    # Parts of parameters were loaded in place.
    others = {name: value for name, value in loaded.items() if not isinstance(value, dict)}
    model.load_state_dict(others, strict=False)
    chunk.forget_gathered()


def sharded_optimizer_state(
    optimizer: MegatronOptimizer,
    chunks: list[DataParallelChunk],
    entries: list[Entries],
    metadata: dict[str, Any],
    *,
    loading: bool,
) -> dict[Any, Any]:
    """What this rank saves or loads of the optimizer.

    `entries` are the sharded states of the chunks' models, `metadata` what they were made with.
    """
    allocate_optimizer_state(optimizer)
    sharded = [chunk for chunk in chunks if isinstance(chunk, FullyShardedChunk)]
    if not sharded:
        models = {f"model{index}": each for index, each in enumerate(entries)}
        return optimizer.sharded_state_dict(models, is_loading=loading, metadata=metadata)
    entry_of = {id(e.data): e for each in entries for e in each.values() if hasattr(e, "data")}
    tensors: dict[bool, dict[int, Any]] = {False: {}, True: {}}
    for index, shard in enumerate(shard for chunk in sharded for shard in chunk.shards()):
        if shard.weight.numel() == 0:
            optimizer.optimizer.state.pop(shard.optimized, None)  # it will never step
            continue
        entry, values_of = entry_of[id(shard.parameter)], _moments(optimizer, shard.optimized)
        values_of["param"] = shard.main_weight
        tensors[shard.expert][index] = {
            name: sharded_parts(entry, shard, values.view(-1), f"optimizer.state.{name}.")
            for name, values in values_of.items()
        }
    steps = _steps_taken(optimizer)
    parts = [
        {
            "optimizer": {"param_groups": groups},
            "param_state": tensors[expert],
            "param_state_sharding_type": metadata["distrib_optim_sharding_type"],
        }
        for expert in (False, True)
        if (groups := _groups(optimizer, expert, steps))
    ]
    return dict(enumerate(parts)) if len(parts) > 1 else parts[0]


@torch.no_grad()
def load_optimizer_state(
    optimizer: MegatronOptimizer, chunks: list[DataParallelChunk], loaded: dict[Any, Any]
) -> None:
    """Put what was loaded into the places of `sharded_optimizer_state` into the optimizer.

    The model's weights follow the optimizer's, more exact ones if the checkpoint is of another precision.
    """
    if not isinstance(chunks[0], FullyShardedChunk):
        build.load_optimizer_state(optimizer, loaded)
        renew_weights(optimizer, chunks)
        return
    # Tensors were loaded in place, and hyperparameters stay the configuration's.
    groups = loaded.get(0, loaded)["optimizer"]["param_groups"]
    steps = int(groups[0].get("step") or 0)
    inner = optimizer.optimizer
    for group in inner.param_groups:
        if not isinstance(inner, torch.optim.Adam):
            group["step"] = steps
    for moments in inner.state.values():
        if "step" in moments:
            moments["step"].fill_(steps)
    for chunk in chunks:
        for shard in chunk.shards():
            shard.weight.copy_(shard.main_weight)
        chunk.forget_gathered()


def start_from_weights(
    optimizer: MegatronOptimizer, chunks: list[DataParallelChunk], loaded: list[Entries]
) -> None:
    """Have the optimizer's copy of the weights follow the models', `loaded` without it."""
    if not isinstance(chunks[0], FullyShardedChunk):
        reload_weights(optimizer, chunks, {f"model{index}": model for index, model in enumerate(loaded)})
        return
    for chunk in chunks:
        for shard in chunk.shards():
            shard.main_weight.copy_(shard.weight)


def _moments(optimizer: MegatronOptimizer, parameter: torch.nn.Parameter) -> dict[str, Tensor]:
    state = optimizer.optimizer.state[parameter]
    return {name: to_local_if_dtensor(tensor) for name, tensor in state.items() if name != "step"}


def _groups(optimizer: MegatronOptimizer, expert: bool, steps: int) -> list[dict[str, Any]]:
    groups = [group for group in optimizer.optimizer.param_groups if group["is_expert_parallel"] == expert]
    return [{k: v for k, v in group.items() if k != "params"} | {"step": steps} for group in groups]


def _steps_taken(optimizer: MegatronOptimizer) -> int:
    """Updates made so far: counted by parameter in torch's Adam, by group in Transformer Engine's."""
    inner = optimizer.optimizer
    counted = [int(moments["step"]) for moments in inner.state.values() if "step" in moments]
    return max(counted + [int(group.get("step") or 0) for group in inner.param_groups])
