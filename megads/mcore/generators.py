"""The random-number generators of a process: their states as one object of a sharded checkpoint."""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedObject
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker


def sharded_generators() -> ShardedObject:
    """The states of this rank's generators: torch's on CPU and GPU, Megatron-Core's tracker."""
    states: dict[str, Any] = {"cpu": torch.get_rng_state(), "tracker": get_cuda_rng_tracker().get_states()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return ShardedObject("generators", states, (dist.get_world_size(),), (dist.get_rank(),), replica_id=0)


def restore_generators(states: dict[str, Any]) -> None:
    """Put loaded states back."""
    torch.set_rng_state(states["cpu"])
    get_cuda_rng_tracker().set_states(states["tracker"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
