"""Linears and experts that put their weight gradients off, as Transformer Engine's do, in plain torch.

To a model they are what Transformer Engine's modules with `delay_wgrad_compute` are: backward gives the
gradient of the input, `backward_dw` that of the weights, and data parallelism hears of it by a hook.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from megads.mcore.backend import Name
from megads.model.backends import Backend, backend_modules
from megads.model.experts import GroupedExperts
from megads.model.linear import ReplicatedLinear


class Delaying(torch.nn.Module):
    """Mixed into a module whose first output is all that depends on its weights."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.put_off: deque[tuple[tuple[Any, ...], Tensor]] = deque()
        self.reduce: list[Callable[[], None]] = []
        for weight in self.parameters():
            weight.skip_backward_post_hook = True  # type: ignore[attr-defined]

    def register_wgrad_accumulation_and_reduce_hooks(self, hook: Callable[[], None]) -> None:
        self.reduce.append(hook)

    def forward(self, *args: Any) -> tuple[Tensor, Any]:
        frozen = {name: weight.detach() for name, weight in self.named_parameters()}
        # Megatron-Core's linears have a way of their own for frozen weights, which is what these are here.
        output, rest = _call(self, super().forward, frozen, args)
        if output.requires_grad:
            kept = tuple(arg.detach() if isinstance(arg, Tensor) else arg for arg in args)
            output.register_hook(lambda gradient: self.put_off.append((kept, gradient)))
        return output, rest

    def backward_dw(self) -> None:
        args, gradient = self.put_off.popleft()
        with torch.enable_grad():
            output, _ = super().forward(*args)
        torch.autograd.backward(output, gradient)
        for reduce in self.reduce:
            reduce()


def _call(
    module: torch.nn.Module, function: Callable[..., Any], weights: dict[str, Tensor], args: tuple[Any, ...]
) -> Any:
    """`function`, a method of `module`, with other weights in its place."""
    own = dict(module._parameters)
    module._parameters.update(weights)  # type: ignore[arg-type]
    try:
        return function(*args)
    finally:
        module._parameters.update(own)


class DelayingColumnLinear(Delaying, ColumnParallelLinear):  # type: ignore[misc]
    pass


class DelayingRowLinear(Delaying, RowParallelLinear):  # type: ignore[misc]
    pass


class DelayingReplicatedLinear(Delaying, ReplicatedLinear):
    pass


class DelayingExperts(Delaying, GroupedExperts):
    pass


def delaying(name: Name) -> Backend:
    """The modules of a backend, with these in place of what Transformer Engine would delay."""
    return replace(
        backend_modules(name),
        column_linear=DelayingColumnLinear,
        row_linear=DelayingRowLinear,
        replicated_linear=DelayingReplicatedLinear,
        experts=DelayingExperts,
    )
