"""The split of a sequence over ranks, and its way back to one."""

import pytest
import torch
from torch import Tensor

from megads.model.context_parallel import in_sequence_order, local_chunks


def gathered(length: int, tp: int, cp: int) -> Tensor:
    """Positions as ranks hold them, gathered over CP within each TP piece, then over TP [S, 1]."""
    chunks = torch.arange(length).chunk(2 * cp)
    held = [torch.cat([chunks[c] for c in local_chunks(cp, rank)]) for rank in range(cp)]
    pieces = [positions.chunk(tp) for positions in held]
    return torch.cat([pieces[rank][piece] for piece in range(tp) for rank in range(cp)])[:, None]


# The last two: pieces that are no multiple of a chunk, nor the other way round.
@pytest.mark.parametrize(("length", "tp", "cp"), [(16, 1, 2), (16, 2, 2), (32, 4, 4), (24, 3, 2), (60, 5, 3)])
def test_gathered_tokens_return_to_their_order(length: int, tp: int, cp: int) -> None:
    x = gathered(length, tp, cp).double().requires_grad_()
    ordered = in_sequence_order(x, tp, cp)
    assert ordered.flatten().tolist() == list(range(length))
    ordered.backward(ordered.detach() * 10)
    assert x.grad is not None
    assert x.grad.equal(x.detach() * 10)


def test_all_ranks_have_the_same_causal_work() -> None:
    work = {sum(local_chunks(4, rank)) for rank in range(4)}
    assert len(work) == 1
    assert sorted(chunk for rank in range(4) for chunk in local_chunks(4, rank)) == list(range(8))
    assert local_chunks(1, 0) == (0,)
