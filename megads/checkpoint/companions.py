"""Tensors that are saved beside the weights, with their names and places: an average of them, say."""

from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from torch import Tensor


def companions(sharded: dict[str, Any], tensor_of: dict[int, Tensor], prefix: str) -> dict[str, Any]:
    """The part of a model's sharded state whose tensors have a companion, with that in their place.

    `tensor_of`: address (`data_ptr`) of a weight to its companion, of the same shape. `prefix` is put
    before the names in the checkpoint; the keys of the dictionary stay.
    """
    kept = {name: shard for name, shard in sharded.items() if _replace(shard, tensor_of)}
    add_prefix_for_sharding(kept, prefix)
    return kept


def _replace(shard: Any, tensor_of: dict[int, Tensor]) -> bool:
    """Put the companion into a shard; False for what has none (buffers, extra states)."""
    if not isinstance(shard, ShardedTensor | ShardedTensorFactory) or shard.data is None:
        return False
    companion = tensor_of.get(shard.data.data_ptr())
    if companion is None:
        return False
    shard.data = companion.view(shard.data.shape)
    if isinstance(shard, ShardedTensor):
        shard.dtype = companion.dtype
    return True
