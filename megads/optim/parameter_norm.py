"""The norm of all parameters of a model that is spread over ranks, each parameter counted once."""

from collections.abc import Iterator

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor

from megads.optim.fully_sharded import FullyShardedChunk


@torch.no_grad()
def squared_norm_share(chunks: list[torch.nn.Module], groups: ProcessGroupCollection) -> Tensor:
    """This rank's share of the squared L2 norm, float64: the sum over all ranks is that of the whole model.

    Norms of single parameters are taken in FP32, whatever their type. A parameter that several ranks hold
    counts on each of them in part (data parallelism) or on one of them (the others).
    """
    total = torch.zeros((), dtype=torch.float64, device=torch.cuda.current_device())
    for parameter, weight, replicas in (part for chunk in chunks for part in _parts(chunk, groups)):
        counts_here = param_is_not_shared(parameter) and param_is_not_tensor_parallel_duplicate(
            parameter, groups.tp, groups.expt_tp
        )
        if counts_here:
            norm = torch.linalg.vector_norm(weight, dtype=torch.float32)
            total += norm.double().square() / replicas
    return total


def _parts(
    chunk: torch.nn.Module, groups: ProcessGroupCollection
) -> Iterator[tuple[torch.nn.Parameter, Tensor, int]]:
    """(parameter, what this rank holds of it, data-parallel ranks that hold the same)."""
    if isinstance(chunk, FullyShardedChunk):
        yield from ((shard.optimized, shard.weight, 1) for shard in chunk.shards())
        return
    for parameter in chunk.parameters():
        replicas = groups.dp_cp if getattr(parameter, "allreduce", True) else groups.expt_dp
        yield parameter, parameter, replicas.size()
