"""The loss scale of FP16 training: one for all parameters.

Megatron-Core gives every optimizer of a model (dense weights, experts) a scaler of its own, and scales the
loss by the first one's. After an overflow that only one of them has seen they differ, and from then on the
others' gradients would be divided by the wrong scale.
"""

from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.grad_scaler import DynamicGradScaler, MegatronGradScaler
from torch import Tensor


class _Shared(MegatronGradScaler):  # type: ignore[misc]
    """A scaler for several optimizers: it collects what each has found, and is updated once."""

    def __init__(self, scaler: MegatronGradScaler) -> None:
        self.scaler, self.found_inf = scaler, False

    @property
    def scale(self) -> Tensor:
        return self.scaler.scale

    @property
    def inv_scale(self) -> Tensor:
        return self.scaler.inv_scale

    def update(self, found_inf: bool) -> None:
        self.found_inf |= found_inf

    def state_dict(self) -> dict[str, Any]:
        return self.scaler.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.scaler.load_state_dict(state_dict)


def share_loss_scale(optimizer: MegatronOptimizer) -> None:
    """Let all parts of `optimizer` use the first one's scaler, which follows what any of them finds."""
    parts = optimizer.chained_optimizers
    if getattr(parts[0], "grad_scaler", None) is None:
        return
    shared = _Shared(parts[0].grad_scaler)
    for part in parts:
        part.grad_scaler = shared
    prepare_grads = optimizer.prepare_grads

    def prepare_and_update() -> bool:
        shared.found_inf = False
        found_inf = prepare_grads()
        shared.scaler.update(found_inf)
        return bool(found_inf)

    optimizer.prepare_grads = prepare_and_update


def loss_scale(optimizer: MegatronOptimizer) -> float | None:
    """The factor on the loss of the next step; None without loss scaling."""
    parts = optimizer.chained_optimizers
    if getattr(parts[0], "grad_scaler", None) is None:
        return None
    return float(optimizer.get_loss_scale().item())


def loss_scale_can_fall(optimizer: MegatronOptimizer) -> bool:
    """Whether a further overflow would lower the loss scale: it is dynamic, and above its least value."""
    parts = optimizer.chained_optimizers
    shared = getattr(parts[0], "grad_scaler", None)
    scaler = shared.scaler if isinstance(shared, _Shared) else None
    return isinstance(scaler, DynamicGradScaler) and bool(torch.any(scaler.scale > scaler.min_scale))
