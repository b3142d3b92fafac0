"""Expert parallelism by DeepEP: how Megatron-Core's flex dispatcher sends tokens.

DeepEP (github.com/deepseek-ai/DeepEP) sends a token once to each rank, however many of its experts are there,
and across nodes once to each node. Megatron-Core's flex dispatcher calls it, always in BF16 and by default on
a stream of its own; here is what it leaves open (`model.moe.deep_ep_async`, `deep_ep_fp8`).

Shapes: T tokens, H hidden.
"""

from functools import partial
from typing import Any

import torch
from megatron.core.transformer.moe import fused_a2a
from megatron.core.transformer.moe.token_dispatcher import MoEFlexTokenDispatcher
from torch import Tensor

from megads.config.schema import MoE
from megads.errors import EnvironmentSetupError

# Channels that share a scale (DeepSeek-V3, section 3.3.2); what DeepEP takes.
BLOCK = 128

_get_buffer = fused_a2a.get_buffer


def configure_deep_ep(dispatcher: MoEFlexTokenDispatcher, moe: MoE) -> None:
    """Makes a layer's dispatcher send as `moe` says.

    Asynchronously: what is received is allocated on DeepEP's stream, and the compute stream waits for an
    event in place of the stream. Megatron-Core waits right after the exchange, so this alone hides nothing.

    Raises:
        EnvironmentSetupError: the GPU is older than Hopper.
    """
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0):
        raise EnvironmentSetupError(
            f"model.moe.use_deep_ep needs Hopper or a later GPU, and this is {torch.cuda.get_device_name()}: "
            "set it to false for the all-to-all dispatcher"
        )
    stream = {"async_finish": moe.deep_ep_async, "allocate_on_comm_stream": moe.deep_ep_async}
    dispatcher.token_dispatch = partial(dispatcher.token_dispatch, **stream)
    dispatcher.token_combine = partial(dispatcher.token_combine, **stream)
    fused_a2a.get_buffer = _get_fp8_buffer if moe.deep_ep_fp8 else _get_buffer


def _get_fp8_buffer(group: Any, hidden_bytes: int) -> "FP8Buffer":
    return FP8Buffer(_get_buffer(group, hidden_bytes))


class FP8Buffer:
    """A `deep_ep.Buffer` that dispatches in FP8 what it is given in BF16: tokens, and in backward gradients.

    Sums of several ranks, `combine`, stay in BF16, as in DeepSeek-V3 (arXiv:2412.19437, section 3.3.2).
    """

    def __init__(self, buffer: Any) -> None:
        self.buffer = buffer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.buffer, name)

    def dispatch(self, x_TH: Tensor, *, async_finish: bool = False, **options: Any) -> Any:
        quantized = to_fp8(x_TH)
        if async_finish:
            # The event given was recorded before the tokens were rounded: DeepEP has to wait for a later one.
            options["previous_event"] = fused_a2a.EventOverlap(fused_a2a.EventHandle())
        received, *rest, event = self.buffer.dispatch(quantized, async_finish=async_finish, **options)
        if async_finish:
            event.current_stream_wait()
        numbers, factors = received
        return from_fp8(numbers, factors, x_TH.dtype), *rest, event


def to_fp8(x_TH: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 numbers [T, H] and what they are to be multiplied with, per block of channels [T, H / 128].

    Factors are powers of two, as the paper has them for what goes into the experts: nothing is lost when the
    numbers are widened to BF16 and rounded again by an FP8 matrix product.
    """
    blocks = x_TH.float().unflatten(-1, (-1, BLOCK))
    largest = torch.finfo(torch.float8_e4m3fn).max
    # frexp's mantissa is in [0.5, 1): two to its exponent is above amax / largest. Not below normal numbers.
    exponents = torch.frexp(blocks.abs().amax(dim=-1) / largest).exponent.clamp(min=-126)
    factors = torch.ldexp(torch.ones((), device=x_TH.device), exponents)
    return (blocks / factors.unsqueeze(-1)).to(torch.float8_e4m3fn).flatten(-2), factors


def from_fp8(x_TH: Tensor, factors: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers of `to_fp8` in `dtype` [T, H]."""
    return (x_TH.float().unflatten(-1, (-1, BLOCK)) * factors.unsqueeze(-1)).flatten(-2).to(dtype)
