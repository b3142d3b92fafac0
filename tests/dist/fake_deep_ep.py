"""The interface of DeepEP's `Buffer` as its documentation describes it, by all-to-alls on gloo.

What real kernels demand is asserted, but for BF16: a CPU run is in FP32.
"""

import importlib
import sys
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Calls by name and by whether they were asynchronous, and whether in FP8.
calls: Counter[tuple[str, bool, bool]] = Counter()


def install() -> None:
    """Megatron-Core finds this module as `deep_ep`, for the rest of the process."""
    from megatron.core.transformer.moe import fused_a2a, token_dispatcher

    sys.modules["deep_ep"] = sys.modules["deep_ep.utils"] = sys.modules[__name__]
    importlib.reload(fused_a2a)
    for name in ("fused_dispatch", "fused_combine", "set_deepep_num_sms"):
        setattr(token_dispatcher, name, getattr(fused_a2a, name))


class EventHandle:
    pass


class EventOverlap:
    def __init__(self, event: EventHandle | None = None) -> None:
        self.event = event

    def current_stream_wait(self) -> None:
        assert self.event is not None, "only asynchronous calls give events to wait for"


class Config:
    def get_nvl_buffer_size_hint(self, hidden_bytes: int, ranks: int) -> int:
        return hidden_bytes * ranks

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, ranks: int) -> int:
        return 0


def _exchange(rows: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
    """Rows sorted by the rank they go to, for those sorted by the rank they come from."""
    raw = rows.contiguous().view(torch.uint8)
    output = raw.new_empty(sum(received), *raw.shape[1:])
    dist.all_to_all_single(output, raw, received, sent, group=group)
    return output.view(rows.dtype)


class Buffer:
    def __init__(self, group: Any, num_nvl_bytes: int, num_rdma_bytes: int) -> None:
        self.group, self.num_nvl_bytes, self.num_rdma_bytes = group, num_nvl_bytes, num_rdma_bytes

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        assert new_num_sms % 2 == 0

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        return Config()

    get_combine_config = get_dispatch_config

    def _event(self, call: str, previous: EventOverlap | None, asynchronous: bool, on_comm_stream: bool,
               fp8: bool = False) -> EventOverlap:  # fmt: skip
        if asynchronous:
            assert previous is not None
            assert previous.event is not None, "the compute stream's work is to be waited for"
        else:
            assert not on_comm_stream
        calls[call, asynchronous, fp8] += 1
        return EventOverlap(EventHandle() if asynchronous else None)

    def get_dispatch_layout(
        self,
        topk_idx: Tensor,
        num_experts: int,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> Any:
        assert topk_idx.dtype == torch.int64
        ranks = self.group.size()
        chosen = topk_idx[topk_idx >= 0]
        per_expert = torch.bincount(chosen, minlength=num_experts)
        padded = torch.where(topk_idx >= 0, topk_idx // (num_experts // ranks), ranks)
        in_rank = torch.zeros(len(topk_idx), ranks + 1, dtype=torch.bool).scatter_(1, padded, True)[:, :ranks]
        event = self._event("layout", previous_event, async_finish, allocate_on_comm_stream)
        return in_rank.sum(0).int(), None, per_expert.int(), in_rank, event

    def dispatch(
        self,
        x: Tensor | tuple[Tensor, Tensor],
        handle: Any = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> Any:
        event = self._event(
            "dispatch", previous_event, async_finish, allocate_on_comm_stream, isinstance(x, tuple)
        )
        parts = x if isinstance(x, tuple) else (x,)
        if isinstance(x, tuple):
            assert (x[0].dtype, x[1].dtype) == (torch.float8_e4m3fn, torch.float32)
            assert x[1].shape == (x[0].shape[0], x[0].shape[1] // 128)
        if handle is not None:
            assert topk_idx is None
            assert topk_weights is None
            sources, sent, received, _ = handle
            out = tuple(_exchange(part[sources], sent, received, self.group) for part in parts)
            return out if isinstance(x, tuple) else out[0], None, None, None, None, event
        assert is_token_in_rank is not None
        assert num_tokens_per_expert is not None
        assert topk_idx is not None
        assert topk_weights is not None
        assert topk_weights.dtype == torch.float32
        sources = torch.cat([column.nonzero().flatten() for column in is_token_in_rank.T])
        sent = is_token_in_rank.sum(0).tolist()
        one_each = [1] * len(sent)
        received = _exchange(torch.tensor(sent)[:, None], one_each, one_each, self.group).flatten().tolist()
        out = tuple(_exchange(part[sources], sent, received, self.group) for part in parts)
        experts = _exchange(topk_idx[sources], sent, received, self.group)
        weights = _exchange(topk_weights[sources], sent, received, self.group)
        held = len(num_tokens_per_expert) // self.group.size()
        experts = experts - self.group.rank() * held
        mine = (experts >= 0) & (experts < held)
        counts = torch.bincount(experts[mine], minlength=held).tolist()
        new_handle = (sources, sent, received, len(topk_idx))
        return (
            out if isinstance(x, tuple) else out[0],
            experts.masked_fill(~mine, -1),
            weights.masked_fill(~mine, 0.0),
            counts,
            new_handle,
            event,
        )

    def combine(
        self,
        x: Tensor,
        handle: Any,
        topk_weights: Tensor | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> Any:
        event = self._event("combine", previous_event, async_finish, allocate_on_comm_stream)
        sources, sent, received, tokens = handle

        def summed(rows: Tensor) -> Tensor:
            back = _exchange(rows, received, sent, self.group)
            return rows.new_zeros(tokens, rows.shape[1]).index_add_(0, sources, back)

        return summed(x), None if topk_weights is None else summed(topk_weights), event
