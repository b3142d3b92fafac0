"""ZeRO-2 and ZeRO-3 by Megatron-FSDP: gradients, and weights too, spread over data parallelism.

ZeRO: arXiv:1910.02054, section 5. With stage 2 each rank reduces and keeps the gradients of its part of the
weights only; with stage 3 it also keeps no more than that part of the weights, and a layer's weights are
gathered when it computes, forward and backward. A rank's part of a parameter is a range of whole rows
(entries of its first dimension, so an expert, where experts are stacked), perhaps none.

Megatron-Core saves such models in a format of its own (`fsdp_dtensor`). Here their parts are described as
what they are, parts of the tensors that every other stage saves (`sharded_parts`), so that a run may go on
with another `zero_stage`.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.distributed.fsdp.mcore_fsdp_adapter import FullyShardedDataParallel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


@dataclass(frozen=True)
class WeightShard:
    """This rank's part of one parameter: the elements from `start` on of the flattened parameter.

    `parameter` is the whole one, whose storage is empty while it is not gathered; `optimized` is what the
    optimizer holds; `expert` says that it is spread as experts are. `weight` and `main_weight` are flat views
    of the model's and the optimizer's copy, one and the same where the model is FP32.
    """

    parameter: torch.nn.Parameter
    optimized: torch.nn.Parameter
    expert: bool
    start: int
    weight: Tensor
    main_weight: Tensor


class FullyShardedChunk(FullyShardedDataParallel):  # type: ignore[misc]
    """A model chunk whose gradients (and weights) are sharded; each transformer layer is gathered as one."""

    def __init__(
        self, transformer: TransformerConfig, ddp: DistributedDataParallelConfig, chunk: torch.nn.Module
    ) -> None:
        for parameter in chunk.parameters():
            if getattr(parameter, "tensor_model_parallel", False) and not hasattr(parameter, "partition_dim"):
                # Stacked experts, split along their width; without a dimension Megatron-FSDP takes them for
                # replicas and broadcasts one rank's part to all.
                parameter.partition_dim = 2  # type: ignore[attr-defined]
        super().__init__(transformer, ddp, chunk)
        # It copies the optimizer's weights over the model's, which is wrong where only these were loaded.
        self.module._load_state_dict_post_hook.remove()
        if not torch.cuda.is_available():
            # gloo gathers in threads of its own, into memory that Megatron-FSDP, which counts on the order of
            # CUDA's streams, frees and takes again: with recomputation one run in twenty crashed.
            pipeline = self.module.all_gather_pipeline
            pipeline.all_gather_params = partial(pipeline.all_gather_params, async_param_gather=False)
        for _, optimized in self.param_and_grad_buffer.optimizer_named_parameters:
            # Not among the attributes that Megatron-FSDP hands on; without it the gradient norm misses the
            # experts of all tensor-parallel ranks but the first.
            optimized.allreduce = getattr(optimized.orig_param, "allreduce", True)

    def sync_rng_states_across_tp_group(self) -> None:
        """Leaves the generators alone: tensor-parallel ranks must draw different dropout masks."""

    def shards(self) -> Iterator[WeightShard]:
        """This rank's part of every parameter."""
        buffer = self.param_and_grad_buffer
        for _, optimized in buffer.optimizer_named_parameters:
            parameter = optimized.orig_param
            group = buffer.parameter_groups[buffer.param_to_param_group[parameter]]
            weights, main_weights = group.model_weight_buffer, group.main_weight_buffer
            item = weights.param_idx[parameter]
            weight = weights.get_item(item, only_shard=True)
            main = weight if main_weights is None else main_weights.get_item(item, only_shard=True)
            start, _ = weights._get_item_slice_in_shard(item)
            expert = not getattr(parameter, "allreduce", True)
            yield WeightShard(parameter, optimized, expert, start, weight, main)

    @contextmanager
    def whole_parameters(self) -> Iterator[None]:
        """Inside, the modules hold the whole parameters, of which shape and type may be read.

        Otherwise, and whenever a state dictionary is asked for, they hold the optimizer's.
        """
        fsdp = self.module
        sharded = fsdp.is_param_fsdp_distributed
        fsdp._replace_param_with_raw_if_needed()
        fsdp.is_param_fsdp_distributed = True  # so that a state dictionary does not put the others back
        try:
            yield
        finally:
            fsdp.is_param_fsdp_distributed = False
            if sharded:
                fsdp._replace_param_with_distributed_if_needed()

    def forget_gathered(self) -> None:
        """Have the weights gathered anew before they are used: the shards have changed, or will."""
        self.module.synchronize_param_gather()

    def release(self) -> None:
        """Free weights and gradients; the chunk cannot be used any more."""
        self.stop_communication()
        buffer = self.param_and_grad_buffer
        for group in buffer.parameter_groups:
            for kept in (group.model_weight_buffer, group.main_weight_buffer, group.main_grad_buffer):
                if kept is not None:
                    kept.free_bucket_storage()
                    kept.data = kept.data.new_empty(0)
        for _, optimized in buffer.optimizer_named_parameters:
            optimized.grad, optimized._local_tensor = None, optimized._local_tensor.new_empty(0)
            optimized.orig_param.data = optimized.orig_param.data.new_empty(0)
        buffer.buffer.clear()
        buffer.dist_main_weight.clear()
        buffer.dist_main_grad.clear()


def sharded_parts(
    entry: ShardedTensor | ShardedTensorFactory, shard: WeightShard, values: Tensor, prefix: str = ""
) -> dict[int, ShardedTensor]:
    """`values` as parts of the tensors of a checkpoint that `entry` makes of the whole parameter.

    Args:
        entry: the parameter's in the model's sharded state.
        shard: where `values` belong in the parameter.
        values: a flat tensor of the shard's size: its weights, or state of the optimizer.
        prefix: put before the names in the checkpoint.
    """
    # A tensor without memory tells which part of the parameter each tensor of the checkpoint is made of.
    whole = torch.empty(shard.parameter.shape, dtype=values.dtype, device="meta")
    key = prefix + entry.key
    if isinstance(entry, ShardedTensorFactory):
        wholes = entry.build_fn(key, whole, entry.replica_id, entry.flattened_range)
    else:
        wholes = [replace(entry, key=key, data=whole, dtype=values.dtype)]
    parts = (_part(tensor, shard.start, values) for tensor in wholes)
    return {index: part for index, part in enumerate(parts) if part is not None}


def _part(whole: ShardedTensor, start: int, values: Tensor) -> ShardedTensor | None:
    """The rows of `whole` that are among `values`, which begin at element `start` of the parameter."""
    tensor, axis = whole.data, whole.prepend_axis_num
    assert tensor.is_contiguous(), f"{whole.key} is not a range of its parameter"
    first, row = tensor.storage_offset(), math.prod(tensor.shape[1:])
    begin, end = max(first, start), min(first + tensor.numel(), start + values.numel())
    if begin >= end:
        return None
    assert (begin - first) % row == (end - first) % row == 0, f"{whole.key} is cut inside a row"
    data = values[begin - start : end - start].view(-1, *tensor.shape[1:])
    offset = list(whole.global_offset)
    offset[axis] += (begin - first) // row
    return replace(
        whole,
        data=data,
        local_shape=tuple(data.shape),
        global_offset=tuple(offset),
        axis_fragmentations=None,  # rows are not spread evenly
        replica_id=(*whole.replica_id[:-1], 0),  # no other data-parallel rank has them
    )
