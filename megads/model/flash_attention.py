"""Flash attention for training on CUDA: the kernels, what each of them can do, and which one a run takes.

Scores are never in memory whole (FlashAttention, arXiv:2205.14135). MLA's queries and keys are wider than its
values (192 and 128 in DeepSeek-V3), which some kernels take and others want padded. Packed documents are
sequences of different lengths side by side (`packed_sequences.py`), so they cost no more than they compute.

Shapes: see `attention.py`; T tokens of all sequences, one after the other.
"""

import functools
import logging
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

from megads.config.resolve import Resolved
from megads.config.schema import Config
from megads.config.validate_kernels import flash_attention_problem
from megads.errors import EnvironmentSetupError
from megads.mcore.translate import DTYPES
from megads.model.attention import CoreAttention, dense_attention
from megads.model.packed_sequences import in_rows, pack, side_by_side

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Case:
    """All that the limits of kernels depend on, for one call in a process. `queries` end with the `keys`.

    `transformer_engine`: the layers are Transformer Engine's.
    """

    transformer_engine: bool
    dtype: torch.dtype
    heads: int
    qk_width: int
    v_width: int
    queries: int
    keys: int
    documents: bool
    window: int | None

    @property
    def window_size(self) -> tuple[int, int]:
        return _window_size(self.window, self.keys)


@dataclass(frozen=True)
class Kernel:
    """`problem` says why a case is impossible, or None."""

    name: str
    problem: Callable[[Case], str | None]
    attend: CoreAttention


def _window_size(window: int | None, keys: int) -> tuple[int, int]:
    """(tokens before, tokens after) that a token sees beside itself, -1 for all."""
    return (-1 if window is None or window >= keys else window - 1), 0


# --- the kernels ------------------------------------------------------------------------------


@functools.cache
def _te_attention(heads: int, qk_width: int, v_width: int, scale: float) -> Callable[..., Tensor]:
    """Transformer Engine's module, which holds no weights: one for all layers, and part of none."""
    from transformer_engine.pytorch import DotProductAttention, autocast

    module = DotProductAttention(heads, (qk_width, v_width), softmax_scale=scale)

    def attend(*args: Any, **options: Any) -> Tensor:
        # Never in FP8, as in the paper; inside its context a module may also be called once only.
        with autocast(enabled=False):
            return module(*args, **options)  # type: ignore[no-any-return]

    return attend


def _te_problem(case: Case) -> str | None:
    """Asks Transformer Engine what it would take, and keeps it from taking its unfused attention later."""
    if not case.transformer_engine:
        return "the layers are native (model.backend)"
    from transformer_engine.pytorch.attention.dot_product_attention.utils import (
        AttentionParams,
        get_attention_backend,
    )

    whole, packed = case.queries == case.keys, case.documents
    parameters = AttentionParams(
        qkv_dtype=case.dtype,
        qkv_layout="thd_thd_thd" if packed else "sbhd_sbhd_sbhd",
        num_heads=case.heads,
        num_gqa_groups=case.heads,
        max_seqlen_q=case.queries,
        max_seqlen_kv=case.keys,
        num_tokens_q=case.queries if packed else 0,
        num_tokens_kv=case.keys if packed else 0,
        head_dim_qk=case.qk_width,
        head_dim_v=case.v_width,
        attn_mask_type=_te_mask(packed, whole),
        window_size=case.window_size,
        bottom_right_diagonal=not whole,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    flash, _, fused, *_ = get_attention_backend(parameters)
    if not flash and not fused:
        return "Transformer Engine has only its unfused attention for this (NVTE_DEBUG=1 tells why)"
    # Its selection by call has no other switch. Where neither works any more it raises.
    os.environ.setdefault("NVTE_UNFUSED_ATTN", "0")
    return None


def _te_mask(packed: bool, whole: bool) -> str:
    return ("padding_" if packed else "") + ("causal" if whole else "causal_bottom_right")


def _te_attend(
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
    assert dropout == 0.0
    batch, heads, queries, width = q_BNQD.shape
    last = first_query + queries
    attention = _te_attention(heads, width, v_BNKV.shape[-1], scale)
    options: dict[str, Any] = {
        "window_size": _window_size(window, last),
        "attn_mask_type": _te_mask(documents_BK is not None, first_query == 0),
    }
    if documents_BK is None:
        q, k, v = (x[:, :, :last].permute(2, 0, 1, 3) for x in (q_BNQD, k_BNKD, v_BNKV))
        out_QBX = attention(q, k, v, qkv_format="sbhd", **options)
        return out_QBX.unflatten(-1, (heads, -1)).permute(1, 2, 0, 3)
    packing = pack(documents_BK, batch, first_query, last, q_BNQD.device)
    out_TX = attention(
        side_by_side(q_BNQD, (0,) * batch, queries),
        side_by_side(k_BNKD, packing.first_keys, last),
        side_by_side(v_BNKV, packing.first_keys, last),
        qkv_format="thd",
        cu_seqlens_q=packing.query_ends,
        cu_seqlens_kv=packing.key_ends,
        max_seqlen_q=packing.longest_query,
        max_seqlen_kv=packing.longest_key,
        pad_between_seqs=False,
        **options,
    )
    return in_rows(out_TX.unflatten(-1, (heads, -1)), batch)


def _cudnn_problem(case: Case) -> str | None:
    if case.documents or case.window_size != (-1, 0) or case.queries != case.keys:
        return "torch's cuDNN attention has no documents, no window and no parts of a sequence"
    length = min(case.keys, 1024)  # its limits do not depend on it
    q = torch.empty(1, case.heads, length, case.qk_width, dtype=case.dtype, device="cuda")
    v = torch.empty(1, case.heads, length, case.v_width, dtype=case.dtype, device="cuda")
    q.requires_grad_()
    parameters = torch.backends.cuda.SDPAParams(q, q, v, None, 0.0, True, False)
    with warnings.catch_warnings(record=True) as reasons:
        warnings.simplefilter("always")
        if torch.backends.cuda.can_use_cudnn_attention(parameters, debug=True):
            return None
    return "; ".join(str(reason.message) for reason in reasons) or "torch's cuDNN attention is not available"


def _cudnn_attend(
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
    keys = k_BNKD.shape[2]
    assert q_BNQD.shape[2] == keys
    assert _window_size(window, keys) == (-1, 0)
    assert documents_BK is None
    assert first_query == 0
    assert dropout == 0.0
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(q_BNQD, k_BNKD, v_BNKV, is_causal=True, scale=scale)


def _flash_problem(case: Case) -> str | None:
    if not torch.backends.cuda.is_flash_attention_available():
        return "this torch was built without FlashAttention"
    if torch.cuda.get_device_capability() < (8, 0):
        return "torch's FlashAttention needs an Ampere GPU or a later one"
    return None


def _flash_attend(
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
    assert dropout == 0.0
    batch, _, queries, width = q_BNQD.shape
    last, v_width = first_query + queries, v_BNKV.shape[-1]
    common = -(-max(width, v_width) // 8) * 8  # it wants one width, a multiple of 8; zeros change nothing
    q, k, v = (_widened(x, common) for x in (q_BNQD, k_BNKD, v_BNKV))
    packing = pack(documents_BK, batch, first_query, last, q.device)
    out_TNX: Tensor = varlen_attn(  # type: ignore[assignment]
        side_by_side(q, (0,) * batch, queries),
        side_by_side(k, packing.first_keys, last),
        side_by_side(v, packing.first_keys, last),
        packing.query_ends,
        packing.key_ends,
        packing.longest_query,
        packing.longest_key,
        scale=scale,
        window_size=_window_size(window, last),
    )
    return in_rows(out_TNX[..., :v_width], batch)


def _widened(x: Tensor, width: int) -> Tensor:
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


# Best first.
KERNELS = (
    Kernel("Transformer Engine's attention (FlashAttention or cuDNN)", _te_problem, _te_attend),
    Kernel("torch's cuDNN attention", _cudnn_problem, _cudnn_attend),
    Kernel("torch's FlashAttention", _flash_problem, _flash_attend),
)


# --- the choice -------------------------------------------------------------------------------


def find_kernel(cases: list[Case]) -> tuple[Kernel | None, list[str]]:
    """The best kernel that can do all cases on this GPU, and why those before it (or all) cannot."""
    reasons: list[str] = []
    for kernel in KERNELS:
        problems = [problem for case in cases if (problem := kernel.problem(case))]
        if not problems:
            return kernel, reasons
        reasons.append(f"not {kernel.name}: {problems[0]}")
    return None, reasons


def choose_core_attention(config: Config, resolved: Resolved, transformer_engine: bool) -> CoreAttention:
    """The core attention of a run, shown on the log: one choice for all its layers.

    `transformer_engine` says whether these are Transformer Engine's.

    Raises:
        EnvironmentSetupError: flash attention is asked for without `fallback_to_dense`, and no kernel works.
    """
    mla = config.model.mla
    if not mla.use_flash_mla:
        return dense_attention
    if problem := flash_attention_problem(config, resolved.device):
        kernel, reasons = None, [problem]
    else:
        kernel, reasons = find_kernel(_cases(config, resolved, transformer_engine))
    why = "; ".join(reasons)
    if kernel is not None:
        logger.info("attention: %s%s", kernel.name, f" ({why})" if why else "")
        return kernel.attend
    if not mla.fallback_to_dense:
        raise EnvironmentSetupError(
            f"model.mla.use_flash_mla: no flash kernel works here: {why}; set model.mla.fallback_to_dense to "
            "true for the dense kernel"
        )
    if dist.get_rank() == 0:
        logger.warning("attention: torch's dense kernel in place of a flash one (use_flash_mla): %s", why)
    return dense_attention


def _cases(config: Config, resolved: Resolved, transformer_engine: bool) -> list[Case]:
    """A whole sequence, or a rank's first and second part of it under context parallelism."""
    mla, shape, keys = config.model.mla, resolved.shape, config.training.seq_length
    case = Case(
        transformer_engine=transformer_engine,
        dtype=DTYPES[resolved.precision],
        heads=mla.num_heads // resolved.tp,
        qk_width=shape.qk_nope_head_dim + shape.qk_rope_head_dim,
        v_width=shape.v_head_dim,
        queries=keys,
        keys=keys,
        documents=config.data.document_mask,
        window=mla.sliding_window,
    )
    if resolved.cp == 1:
        return [case]
    chunk = keys // (2 * resolved.cp)
    return [replace(case, queries=chunk), replace(case, queries=chunk, keys=chunk)]
