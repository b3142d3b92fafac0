"""Packed documents as attention kernels for sequences of different lengths want them: side by side.

Shapes: B batch, N heads, Q queries, K keys, T tokens of all sequences, one after the other.
"""

import functools
import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Sequences side by side: cumulative lengths [sequences + 1] int32, the longest of them as integers.

    Row b of a batch gives its keys from `first_keys[b]` on: those before belong to documents that end before
    the first query.
    """

    first_keys: tuple[int, ...]
    query_ends: Tensor
    key_ends: Tensor
    longest_query: int
    longest_key: int


def _packing(rows: list[list[int]], first_query: int, last: int, device: torch.device) -> Packing:
    """`rows` holds the first tokens of each row's documents, 0 first."""
    first_keys, query_lengths, key_lengths = [], [0], [0]
    for starts in rows:
        spans = [(a, b) for a, b in itertools.pairwise([*starts, last]) if b > first_query]
        first_keys.append(spans[0][0])
        query_lengths += [end - max(start, first_query) for start, end in spans]
        key_lengths += [end - start for start, end in spans]

    def ends(lengths: list[int]) -> Tensor:
        return torch.tensor(list(itertools.accumulate(lengths)), dtype=torch.int32, device=device)

    def longest(lengths: list[int]) -> int:
        # A power of two: kernels that are built for a length are built a few times only.
        return min(last, 1 << (max(lengths) - 1).bit_length())

    return Packing(
        tuple(first_keys),
        ends(query_lengths),
        ends(key_lengths),
        longest(query_lengths),
        longest(key_lengths),
    )


@functools.lru_cache(maxsize=16)
def _packing_of_rows(batch: int, first_query: int, last: int, device: torch.device) -> Packing:
    """Each row is one document."""
    return _packing([[0]] * batch, first_query, last, device)


# All layers of a micro-batch ask for the same documents, also when they recompute: they are read on the host
# once. The tensor is kept beside what was read from it, so that no other one gets its address.
_packings: dict[tuple[Any, ...], tuple[Tensor, Packing]] = {}
_MOST_PACKINGS = 64  # two parts of the micro-batches that a pipeline has in flight


def pack(
    documents_BK: Tensor | None, batch: int, first_query: int, last: int, device: torch.device
) -> Packing:
    """How queries `first_query` to `last - 1` and their keys lie side by side, by documents.

    The tokens of a document must be contiguous.
    """
    if documents_BK is None:
        return _packing_of_rows(batch, first_query, last, device)
    key = (documents_BK.data_ptr(), documents_BK._version, *documents_BK.shape, first_query, last)
    if key not in _packings:
        documents = documents_BK[:, :last].cpu()
        changes = documents[:, 1:] != documents[:, :-1]
        rows = [[0, *(row.nonzero().flatten() + 1).tolist()] for row in changes]
        _packings[key] = documents_BK, _packing(rows, first_query, last, device)
        if len(_packings) > _MOST_PACKINGS:
            del _packings[next(iter(_packings))]
    return _packings[key][1]


def side_by_side(x_BNSX: Tensor, firsts: tuple[int, ...], last: int) -> Tensor:
    """Rows from their first token on: [T, N, *], of one row without a copy."""
    rows = [x_NSX[:, first:last].transpose(0, 1) for x_NSX, first in zip(x_BNSX, firsts, strict=True)]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def in_rows(x_TNV: Tensor, batch: int) -> Tensor:
    """Outputs of queries side by side, as many in each row: [B, N, Q, V]."""
    return x_TNV.unflatten(0, (batch, -1)).transpose(1, 2)
