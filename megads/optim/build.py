"""Data parallelism and the optimizer around the model chunks.

The optimizer is Megatron-Core's: sharded over data parallelism with `zero_stage` 1, with FP32 master
weights for 16-bit models. It takes Transformer Engine's fused Adam where that is installed, then
NVIDIA's apex, then torch's; with BF16 moments ours (`adam.py`) in place of torch's, with moments in host
memory in place of any.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer, get_megatron_optimizer
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.utils import get_model_config

from megads.config.memory import offloaded_fraction
from megads.config.resolve import Resolved
from megads.config.schema import Config
from megads.mcore.translate import DTYPES, ddp_config, optimizer_config
from megads.optim.adam import use_moments_of
from megads.optim.fully_sharded import FullyShardedChunk
from megads.optim.loss_scale import share_loss_scale

type DataParallelChunk = DistributedDataParallel | FullyShardedChunk
_TORCH_ADAM = (torch.optim.Adam, torch.optim.AdamW)


def wrap_data_parallel(
    config: Config, resolved: Resolved, chunks: list[torch.nn.Module]
) -> list[DataParallelChunk]:
    """The chunks with gradient buffers and their reduction over data parallelism."""
    ddp = ddp_config(config, resolved)
    transformer = get_model_config(chunks[0])
    transformer.finalize_model_grads_func = finalize_model_grads
    if ddp.use_megatron_fsdp:
        return [FullyShardedChunk(transformer, ddp, chunk) for chunk in chunks]
    with _side_stream() if config.training.cuda_graphs else contextlib.nullcontext():
        wrapped = [
            # Later virtual stages need no buckets: their reductions are not on the critical path.
            DistributedDataParallel(transformer, ddp, chunk, disable_bucketing=index > 0)
            for index, chunk in enumerate(chunks)
        ]
    if resolved.device == "cpu":
        for chunk in chunks:
            _accumulate_in_buffers(chunk)
    if ddp.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in wrapped]
        transformer.no_sync_func = no_sync if len(wrapped) > 1 else no_sync[0]
    return wrapped


@contextlib.contextmanager
def _side_stream() -> Iterator[None]:
    """What is done inside is not on the default stream, and done before what follows.

    Data parallelism keeps the autograd nodes that gradients end in, and these stay on the stream that they
    were made on: of a graph that is captured the default stream cannot be part.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)
    # Torch would warn of it in every step without a graph.
    torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)


def _accumulate_in_buffers(chunk: torch.nn.Module) -> None:
    """Let linears add weight gradients straight to the data-parallel buffers (see `mcore.cpu`).

    Only after wrapping: the buffers must exist.
    """
    for module in chunk.modules():
        if isinstance(module, ColumnParallelLinear | RowParallelLinear):
            module.gradient_accumulation_fusion = True


def release_data_parallel(chunks: list[DataParallelChunk]) -> None:
    """Free weights, gradients and what holds the optimizer; the chunks cannot be used any more.

    Their hooks on autograd's accumulation nodes refer to them, and they to the nodes: a circle through C++
    that Python's collector does not see. So the modules may stay, and must not hold tensors.
    """
    for chunk in chunks:
        transformer = get_model_config(chunk.module)
        transformer.finalize_model_grads_func = transformer.no_sync_func = transformer.grad_scale_func = None
        if isinstance(chunk, FullyShardedChunk):
            chunk.release()
            continue
        for held in (
            chunk.grad_accs, chunk.buffers, chunk.expert_parallel_buffers, chunk.bucket_groups,
            chunk.expert_parallel_bucket_groups, chunk.param_to_bucket_group,
        ):  # fmt: skip
            held.clear()
        for parameter in chunk.parameters():
            parameter.data, parameter.grad, parameter.main_grad = parameter.data.new_empty(0), None, None


def build_optimizer(config: Config, resolved: Resolved, chunks: list[DataParallelChunk]) -> MegatronOptimizer:
    """The optimizer of the wrapped chunks."""
    optimizer = get_megatron_optimizer(optimizer_config(config, resolved), chunks)
    if not isinstance(optimizer, ChainedOptimizer):  # Megatron-FSDP's, which clips without `get_grad_norm`
        optimizer = ChainedOptimizer([optimizer])
    get_model_config(chunks[0]).grad_scale_func = optimizer.scale_loss
    share_loss_scale(optimizer)
    _refuse_nonfinite_gradients(optimizer)
    exp_avg, exp_avg_sq = config.training.adam_exp_avg_dtype, config.training.adam_exp_avg_sq_dtype
    host_fraction = offloaded_fraction(config, resolved)
    as_torchs = exp_avg == exp_avg_sq == "fp32" and not host_fraction
    for inner in optimizer.chained_optimizers:
        if config.training.optimizer != "sgd" and not as_torchs:
            use_moments_of(inner, DTYPES[exp_avg], DTYPES[exp_avg_sq], host_fraction)
        elif isinstance(inner.optimizer, _TORCH_ADAM):
            # One pass over the weights instead of about ten; Megatron-Core does not ask for it.
            inner.optimizer.defaults["fused"] = True
            for group in inner.optimizer.param_groups:
                group["fused"] = True
        if isinstance(inner.optimizer, _TORCH_ADAM) and hasattr(
            inner, "_set_main_param_and_optimizer_states"
        ):
            _expect_no_step_tensor(inner)
        if inner.optimizer is not None and inner.init_state_fn is None:
            # Megatron-Core has none for SGD, and calls it when loading.
            inner.init_state_fn = _allocate_momentum
    return optimizer


class NonFiniteGradientsError(ArithmeticError):
    """Raised by `optimizer.step()` before anything is changed; the same on every rank."""


def _refuse_nonfinite_gradients(optimizer: MegatronOptimizer) -> None:
    """End a step whose gradient norm is not finite, before clipping spreads it to every weight.

    Megatron-Core checks only scaled FP16 gradients. The norm is that of all ranks' gradients, so that
    they agree.
    """
    get_grad_norm = optimizer.get_grad_norm

    def checked_grad_norm() -> float:
        norm = get_grad_norm()
        if norm is not None and not math.isfinite(norm):
            raise NonFiniteGradientsError(norm)
        return norm

    optimizer.get_grad_norm = checked_grad_norm


def _expect_no_step_tensor(inner: MegatronOptimizer) -> None:
    """Let torch's Adam load a reshardable checkpoint.

    Megatron-Core 0.19.2 leaves its step counter out of the tensors that it loads, and then asks for it
    (the counter itself travels with the parameter groups).
    """
    set_states = inner._set_main_param_and_optimizer_states

    def set_states_without_step(parameter: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        set_states(parameter, {"step": None, **tensors})

    inner._set_main_param_and_optimizer_states = set_states_without_step


def _allocate_momentum(optimizer: torch.optim.Optimizer, config: Any = None) -> None:
    """Zero momentum for SGD: its first step comes out as from none."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if group["momentum"]:
                optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))


def set_learning_rate(optimizer: MegatronOptimizer, learning_rate: float, weight_decay: float) -> None:
    """Learning rate and weight decay of the next step, in every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_mult", 1.0)
        group["weight_decay"] = weight_decay * group.get("wd_mult", 1.0)


def allocate_optimizer_state(optimizer: MegatronOptimizer) -> None:
    """Give an optimizer that has not stepped yet its (zero) moments, so that a checkpoint has a place.

    Megatron-Core describes the state of torch's optimizers only once it exists.
    """
    for inner in optimizer.chained_optimizers:
        if inner.optimizer is None or inner.optimizer.state:
            continue
        inner.init_state_fn(inner.optimizer, inner.config)
        if isinstance(inner.optimizer, _TORCH_ADAM):
            for state in inner.optimizer.state.values():
                state["step"] = torch.zeros((), dtype=torch.float32)


def load_optimizer_state(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    """Put loaded moments and step counters in place; the hyperparameters stay the configuration's.

    Megatron-Core takes those of the checkpoint (betas, epsilon, momentum), so that changing one and resuming
    would change nothing. It also gives all parameters of torch's Adam one step counter, which each of them
    would increment.
    """
    names = ("lr", "weight_decay", "betas", "eps", "momentum", "fused")
    configured = [{n: group[n] for n in names if n in group} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, settings in zip(optimizer.param_groups, configured, strict=True):
        group.update(settings)
    for inner in optimizer.chained_optimizers:
        for parameter in inner.optimizer.state.values():
            if isinstance(parameter.get("step"), torch.Tensor):
                parameter["step"] = parameter["step"].clone()
