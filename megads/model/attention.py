"""Core attention: softmax(q k^T) v, by torch's scaled_dot_product_attention.

Queries may be a part of the sequence (context parallelism): each contiguous run of queries sees the
keys up to its own last position. `flash_attention.py` holds the kernels for CUDA behind the same interface.

Shapes: B batch, N heads, Q queries, K keys, D query/key width, V value width.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from megads.model.functional import causal_attention


class CoreAttention(Protocol):
    """Causal attention of a contiguous run of queries, the first at position `first_query`: [B, N, Q, V].

    `window` and `documents_BK` (of the whole sequence) are those of `allowed`, `dropout` is on
    probabilities.
    """

    def __call__(
        self,
        q_BNQD: Tensor,
        k_BNKD: Tensor,
        v_BNKV: Tensor,
        *,
        scale: float,
        first_query: int = 0,
        window: int | None = None,
        documents_BK: Tensor | None = None,
        dropout: float = 0.0,
    ) -> Tensor: ...


def allowed(
    query_positions_Q: Tensor,
    key_positions_K: Tensor,
    window: int | None,
    query_documents_BQ: Tensor | None = None,
    key_documents_BK: Tensor | None = None,
) -> Tensor:
    """Which keys each query may see, as a boolean mask [Q, K], or [B, 1, Q, K] with documents.

    A token sees itself and what lies before it, at most `window` tokens in all, and only tokens of
    its own document where documents are given.
    """
    distance = query_positions_Q[:, None] - key_positions_K[None, :]
    mask = distance >= 0
    if window is not None:
        mask &= distance < window
    if query_documents_BQ is None or key_documents_BK is None:
        return mask
    same_document = query_documents_BQ[:, None, :, None] == key_documents_BK[:, None, None, :]
    return mask & same_document


def dense_attention(
    q_BNQD: Tensor,
    k_BNKD: Tensor,
    v_BNKV: Tensor,
    *,
    scale: float,
    first_query: int = 0,
    window: int | None = None,
    documents_BK: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """A `CoreAttention` for every device, type, mask and width, by the kernel that torch picks."""
    last = first_query + q_BNQD.shape[2]
    k_BNKD, v_BNKV = k_BNKD[:, :, :last], v_BNKV[:, :, :last]
    window = None if window is not None and window >= last else window
    if first_query == 0 and window is None and documents_BK is None:
        if q_BNQD.device.type == "cpu" and dropout == 0.0:
            q, k, v = (x.flatten(0, 1) for x in (q_BNQD, k_BNKD, v_BNKV))
            return causal_attention(q, k, v, scale).unflatten(0, q_BNQD.shape[:2])
        return F.scaled_dot_product_attention(
            q_BNQD, k_BNKD, v_BNKV, is_causal=True, scale=scale, dropout_p=dropout
        )
    positions = torch.arange(last, device=q_BNQD.device)
    documents = documents_BK[:, :last] if documents_BK is not None else None
    mask = allowed(
        positions[first_query:],
        positions,
        window,
        documents[:, first_query:] if documents is not None else None,
        documents,
    )
    return F.scaled_dot_product_attention(
        q_BNQD, k_BNKD, v_BNKV, attn_mask=mask, scale=scale, dropout_p=dropout
    )
