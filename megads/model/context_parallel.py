"""Context parallelism: how a sequence is split over ranks, and the exchange of MLA's latent.

A sequence is cut into 2C chunks; rank c holds chunks c and 2C-1-c, so that all ranks do the same
causal work (the split of Megatron-Core). Keys and values are never exchanged: the ranks gather the
latent and the rotary key, kv_lora_rank + qk_rope_head_dim numbers per token, and project it up
themselves.
"""

import functools
import math

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor


def local_chunks(context_parallel_size: int, rank: int) -> tuple[int, ...]:
    """The chunks of the sequence that a rank holds, in order."""
    if context_parallel_size == 1:
        return (0,)
    return rank, 2 * context_parallel_size - 1 - rank


def local_positions(seq_length: int, group: dist.ProcessGroup, device: torch.device) -> Tensor:
    """Positions of this rank's tokens within the whole sequence [S / C]."""
    chunks = local_chunks(group.size(), group.rank())
    length = seq_length // (group.size() * len(chunks))
    return torch.cat([torch.arange(c * length, (c + 1) * length, device=device) for c in chunks])


def local_part(batch_BS: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's columns of a batch-first tensor [B, S] -> [B, S / C]."""
    if group.size() == 1:
        return batch_BS
    return batch_BS[:, local_positions(batch_BS.shape[1], group, batch_BS.device)]


def gather_sequence(x_SB: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All ranks' parts, rank after rank, along the first dimension; gradients are summed back."""
    if group.size() == 1:
        return x_SB
    return gather_from_sequence_parallel_region(x_SB, tensor_parallel_output_grad=True, group=group)


def in_sequence_order(x_SB: Tensor, tp: int, cp: int) -> Tensor:
    """The tokens of the whole sequence, gathered over CP and then over TP, in its order [S, B, *].

    Sequence parallelism cuts a CP rank's tokens into `tp` pieces, so that the gathered order is
    (TP piece, CP rank, token). Blocks are moved, not tokens: backward then moves them back, where an index
    would have it add up token by token.
    """
    length = x_SB.shape[0]
    block = math.gcd(length // (2 * cp), length // (cp * tp))
    blocks = x_SB.split(block)
    return torch.cat([blocks[i] for i in _order_after_gather(length // block, tp, cp)])


@functools.lru_cache(maxsize=16)
def _order_after_gather(blocks: int, tp: int, cp: int) -> list[int]:
    """Where each block of a sequence lies after it has been gathered over CP, then over TP."""
    chunk = blocks // (2 * cp)
    held = [[c * chunk + i for c in local_chunks(cp, rank) for i in range(chunk)] for rank in range(cp)]
    piece = blocks // (cp * tp)
    gathered = [
        position
        for tp_rank in range(tp)
        for positions in held
        for position in positions[tp_rank * piece : (tp_rank + 1) * piece]
    ]
    order = [0] * blocks
    for index, position in enumerate(gathered):
        order[position] = index
    return order
