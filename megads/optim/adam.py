"""Adam whose moments may be BF16 (DeepSeek-V3, arXiv:2412.19437, section 3.3.3), or in host memory.

Weights and gradients are FP32: Megatron-Core's master weights. A step computes in FP32 on their device and
rounds what it stores. With FP32 moments it is torch's AdamW bit by bit, so a run may change over and back.
Moments in host memory (ZeRO-Offload, arXiv:2101.06840, which also updates there) are fetched a batch at a
time: the numbers are those of a run without, and what crosses the bus is 8 bytes per parameter each way.
"""

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.utils import to_local_if_dtensor
from torch import Tensor

from megads.errors import EnvironmentSetupError

# Elements that are updated together: their FP32 copies are the only memory a step takes. A CPU keeps this
# many in its cache; a GPU wants large kernels.
_BATCH_ELEMENTS = {"cpu": 1 << 17, "cuda": 1 << 25}


class Adam(torch.optim.Adam):
    """Adam (arXiv:1412.6980), with `decoupled_weight_decay` AdamW (arXiv:1711.05101).

    State per parameter: `step`, and `exp_avg`, `exp_avg_sq` in the types given, the shape and device those of
    what this rank has of the parameter. Moments of up to `host_fraction` of all elements lie in host memory.
    """

    def __init__(
        self,
        param_groups: Any,
        *,
        exp_avg_dtype: torch.dtype,
        exp_avg_sq_dtype: torch.dtype,
        host_fraction: float = 0.0,
        **kwargs: Any,
    ) -> None:
        self.dtypes = {"exp_avg": exp_avg_dtype, "exp_avg_sq": exp_avg_sq_dtype}
        self.host_fraction = host_fraction
        self._elements = self._elements_on_host = 0
        super().__init__(param_groups, **kwargs)

    def initialize_state(self, parameter: Tensor) -> None:
        """Zero moments."""
        local = to_local_if_dtensor(parameter)
        place: dict[str, Any] = {"device": local.device}
        if self._next_is_on_host(local.numel()):
            place = {"device": "cpu", "pin_memory": local.is_cuda}
        self.state[parameter] = {"step": torch.zeros((), dtype=torch.float32)} | {
            name: torch.zeros(local.shape, dtype=dtype, **place) for name, dtype in self.dtypes.items()
        }

    def _next_is_on_host(self, elements: int) -> bool:
        self._elements += elements
        if self._elements_on_host + elements > self.host_fraction * self._elements:
            return False
        self._elements_on_host += elements
        return True

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Into the tensors that are there: torch's gives moments the type and device of their parameter."""
        for saved, group in zip(state_dict["param_groups"], self.param_groups, strict=True):
            for index, parameter in zip(saved["params"], group["params"], strict=True):
                if not self.state[parameter]:
                    self.initialize_state(parameter)
                for name, value in state_dict["state"].get(index, {}).items():
                    self.state[parameter][name].copy_(value)
                if "step" in saved:
                    self.state[parameter]["step"].fill_(saved["step"])
            group.update({name: value for name, value in saved.items() if name != "params"})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        assert closure is None, "Megatron-Core passes none"
        for group in self.param_groups:
            for parameters, steps in self._batches(group["params"]):
                self._update(group, parameters, steps)
                # Where Transformer Engine is installed, Megatron-Core looks for the number of steps here.
                group["step"] = int(steps)
        if self._elements_on_host and torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()  # a checkpoint reads host memory without waiting

    def _batches(self, parameters: list[Tensor]) -> Iterator[tuple[list[tuple[Tensor, ...]], float]]:
        """Pieces of (weight, gradient, moments) of the same step, about _BATCH_ELEMENTS at a time."""
        batch: list[tuple[Tensor, ...]] = []
        elements, batch_step = 0, 0.0
        for parameter in parameters:
            if parameter.grad is None:
                continue
            if not self.state[parameter]:
                self.initialize_state(parameter)
            state = self.state[parameter]
            state["step"] += 1
            step, limit = state["step"].item(), _BATCH_ELEMENTS[parameter.device.type]
            tensors = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
            local = [to_local_if_dtensor(tensor).view(-1) for tensor in tensors]  # DTensors: Megatron-FSDP's
            for pieces in zip(*(tensor.split(limit) for tensor in local), strict=True):
                if batch and (elements + len(pieces[0]) > limit or step != batch_step):
                    yield batch, batch_step
                    batch, elements = [], 0
                batch.append(pieces)
                elements, batch_step = elements + len(pieces[0]), step
        if batch:
            yield batch, batch_step

    def _update(self, group: dict[str, Any], pieces: list[tuple[Tensor, ...]], step: float) -> None:
        """The operations of torch's own, in its order, on FP32 copies of what is not FP32."""
        beta1, beta2 = group["betas"]
        weights, gradients, stored_avg, stored_sq = (list(tensors) for tensors in zip(*pieces, strict=True))
        exp_avg, exp_avg_sq = (_as_float32(stored, weights[0].device) for stored in (stored_avg, stored_sq))
        if group["weight_decay"]:
            if group["decoupled_weight_decay"]:
                torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            else:
                gradients = list(torch._foreach_add(gradients, weights, alpha=group["weight_decay"]))
        torch._foreach_lerp_(exp_avg, gradients, 1 - beta1)
        torch._foreach_mul_(exp_avg_sq, beta2)
        torch._foreach_addcmul_(exp_avg_sq, gradients, gradients, 1 - beta2)
        denominator = torch._foreach_sqrt(exp_avg_sq)
        torch._foreach_div_(denominator, (1 - beta2**step) ** 0.5)
        torch._foreach_add_(denominator, group["eps"])
        torch._foreach_addcdiv_(weights, exp_avg, denominator, -group["lr"] / (1 - beta1**step))
        for stored, new in ((stored_avg, exp_avg), (stored_sq, exp_avg_sq)):
            changed = [index for index, old in enumerate(stored) if old is not new[index]]
            if changed:
                targets, sources = [stored[index] for index in changed], [new[index] for index in changed]
                torch._foreach_copy_(targets, sources, non_blocking=True)


def _as_float32(tensors: list[Tensor], device: torch.device) -> list[Tensor]:
    return [tensor.to(device, torch.float32, non_blocking=True) for tensor in tensors]


def use_moments_of(
    optimizer: MegatronOptimizer,
    exp_avg: torch.dtype,
    exp_avg_sq: torch.dtype,
    host_fraction: float = 0.0,
) -> None:
    """Let one of Megatron-Core's optimizers, before its first step, keep Adam's moments in these types.

    Where it runs Transformer Engine's fused Adam, that keeps them, but in host memory; else `Adam` does.
    Megatron-Core's own options are not taken: `use_precision_aware_optimizer` moves the master weights into
    Transformer Engine's optimizer, there is none of it without the sharded optimizer, and none on a CPU;
    `optimizer_cpu_offload` builds on it, and updates on the host by an optimizer for each parameter.
    """
    if optimizer.optimizer is None:  # no parameters on this rank
        return
    old = optimizer.optimizer
    assert not old.state, "moments must not exist yet"
    dtypes = {"exp_avg_dtype": exp_avg, "exp_avg_sq_dtype": exp_avg_sq}
    placeholder = [torch.empty(0)]  # Megatron-Core's FP32 shards are views, which torch's constructor refuses
    if isinstance(old, torch.optim.Adam) or host_fraction:
        torchs = isinstance(old, torch.optim.Adam)
        decoupled = old.defaults["decoupled_weight_decay"] if torchs else bool(old.adam_w_mode)
        optimizer.optimizer = Adam(placeholder, host_fraction=host_fraction, **dtypes)
        optimizer.init_state_fn = _initialize
        for group in old.param_groups:
            group["decoupled_weight_decay"] = decoupled
    elif not hasattr(old, "exp_avg_dtype"):
        raise EnvironmentSetupError(
            "BF16 moments (training.adam_exp_avg_dtype, adam_exp_avg_sq_dtype) do not work with apex's Adam, "
            "which Megatron-Core takes here: install Transformer Engine, remove apex, or set them to fp32"
        )
    else:
        optimizer.optimizer = type(old)(placeholder, adam_w_mode=bool(old.adam_w_mode), **dtypes)
        optimizer.init_state_fn = _initialize_fused
    optimizer.optimizer.param_groups = old.param_groups


def _initialize(adam: Adam, config: Any = None) -> None:
    for group in adam.param_groups:
        for parameter in group["params"]:
            if not adam.state[parameter]:
                adam.initialize_state(parameter)


def _initialize_fused(adam: Any, config: Any = None) -> None:
    for group in adam.param_groups:
        for parameter in group["params"]:
            if not adam.state[parameter]:
                adam.initialize_state(parameter, store_param_remainders=False)
