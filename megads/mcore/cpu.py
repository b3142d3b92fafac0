"""Run Megatron-Core on a machine without CUDA: the substitutions, in one place.

Megatron-Core calls `torch.cuda` directly and writes `device="cuda"` in about fifty places of the
training path. On a CPU run `install_cpu_substitutions()` maps those calls to their CPU meaning:
device arguments become "cpu", streams and events become no-ops (a CPU runs in program order
anyway), the CUDA generator is the CPU generator. It is called once, explicitly, before the process
groups are made; importing this module changes nothing, and with CUDA it refuses to run.

Factories are wrapped one by one instead of through a `TorchFunctionMode`, which maps devices too
but adds Python work to every tensor operation of the run.
"""

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.optim import SGD, Adam, Optimizer

from megads.errors import EnvironmentSetupError
from megads.mcore.compat import check_megatron_version
from megads.mcore.imports import import_megatron

_CPU = torch.device("cpu")
_FACTORIES = (
    "arange", "as_tensor", "empty", "empty_like", "eye", "full", "full_like", "linspace", "ones",
    "ones_like", "rand", "randint", "randn", "randperm", "tensor", "zeros", "zeros_like",
)  # fmt: skip
_METHOD_FACTORIES = ("new_empty", "new_full", "new_tensor", "new_zeros")
_installed = False


class _Event:
    """A CUDA event on a device that runs in program order: always already complete."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record(self, *args: Any) -> None:
        pass

    def wait(self, *args: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


class _Stream:
    """The only stream of a CPU: every stream compares equal to it."""

    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream)

    def __hash__(self) -> int:
        return 0

    def record_event(self, event: Any = None) -> _Event:
        return event or _Event()

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass


@contextlib.contextmanager
def _stream_context(stream: Any) -> Iterator[None]:
    yield


def _cpu_device(device: Any) -> Any:
    """The CPU for anything that names a CUDA device, else the argument itself."""
    if isinstance(device, str) and device.startswith("cuda"):
        return _CPU
    if isinstance(device, torch.device) and device.type == "cuda":
        return _CPU
    # An index names a CUDA device, and `.to` may be given a data type in its place.
    return _CPU if isinstance(device, int) else device


def _map_device_keyword(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            kwargs["device"] = _cpu_device(kwargs["device"])
        return function(*args, **kwargs)

    return wrapper


def _map_device_argument(to: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(to)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        if args:
            args = (_cpu_device(args[0]), *args[1:])
        if "device" in kwargs:
            kwargs["device"] = _cpu_device(kwargs["device"])
        return to(self, *args, **kwargs)

    return wrapper


def _cuda_type_name(type_: Callable[..., Any]) -> Callable[..., Any]:
    """Megatron-Core's optimizers sort parameters by `type() == 'torch.cuda.FloatTensor'`."""

    @functools.wraps(type_)
    def wrapper(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = type_(self, *args, **kwargs)
        return result.replace("torch.", "torch.cuda.", 1) if isinstance(result, str) else result

    return wrapper


def _integer_splits(all_to_all_single: Callable[..., Any]) -> Callable[..., Any]:
    """gloo wants Python integers; the dispatcher leaves its split sizes in a tensor on the CPU."""

    def integers(splits: Any) -> list[int] | None:
        if splits is None:
            return None
        return splits.tolist() if isinstance(splits, torch.Tensor) else [int(n) for n in splits]

    @functools.wraps(all_to_all_single)
    def wrapper(
        output: torch.Tensor,
        input: torch.Tensor,
        output_split_sizes: Any = None,
        input_split_sizes: Any = None,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        return all_to_all_single(
            output, input, integers(output_split_sizes), integers(input_split_sizes), group, async_op
        )

    return wrapper


class _Done:
    """The handle of a collective that had nothing to do."""

    def wait(self, *args: Any) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


def _skip_alone(collective: Callable[..., Any]) -> Callable[..., Any]:
    """A collective of one process that would copy a tensor onto itself: gloo would copy it twice.

    Megatron-Core's data-parallel buffers reduce and gather in place also where there is one replica.
    """

    names = tuple(inspect.signature(collective).parameters)[:2]

    @functools.wraps(collective)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        output, input = (*args, *(kwargs[name] for name in names if name in kwargs))[:2]
        in_place = output.data_ptr() == input.data_ptr() and output.shape == input.shape
        if in_place and dist.get_world_size(kwargs.get("group")) == 1:
            return _Done() if kwargs.get("async_op") else None
        return collective(*args, **kwargs)

    return wrapper


def _substitute_torch() -> None:
    for owner, factories in ((torch, _FACTORIES), (torch.Tensor, _METHOD_FACTORIES)):
        for name in factories:
            setattr(owner, name, _map_device_keyword(getattr(owner, name)))
    torch.Tensor.to = _map_device_argument(torch.Tensor.to)  # type: ignore[method-assign]
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign,assignment]
    torch.Tensor.record_stream = lambda self, stream: None  # type: ignore[method-assign,assignment]
    torch.Tensor.type = _cuda_type_name(torch.Tensor.type)  # type: ignore[method-assign]
    dist.all_to_all_single = _integer_splits(dist.all_to_all_single)
    dist.reduce_scatter_tensor = _skip_alone(dist.reduce_scatter_tensor)
    dist.all_gather_into_tensor = _skip_alone(dist.all_gather_into_tensor)


def _substitute_torch_optimizers() -> None:
    """Optimizers without what their decorators tell the compiler, for which they import all of it (0.5 s)."""
    for name in ("add_param_group", "state_dict", "load_state_dict"):
        setattr(Optimizer, name, getattr(Optimizer, name).__wrapped__)
    for class_ in (Adam, SGD):
        class_.step = torch.no_grad()(class_.step.__wrapped__)  # type: ignore[union-attr,method-assign]


def _substitute_torch_cuda() -> None:
    table: dict[str, Any] = {
        # An index, as of a CUDA device: Megatron-FSDP writes f"cuda:{current_device()}".
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
        "Stream": _Stream,
        "Event": _Event,
        "current_stream": lambda device=None: _Stream(),
        "default_stream": lambda device=None: _Stream(),
        "stream": _stream_context,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "manual_seed": torch.manual_seed,
    }
    for name, replacement in table.items():
        setattr(torch.cuda, name, replacement)


def _hide_cuda_libraries() -> None:
    """Megatron-Core takes the kernels of these wherever they can be imported, on a CPU run too."""
    for name in ("transformer_engine", "apex"):
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]  # to import None is an ImportError


def _import_megatron_uncompiled() -> None:
    """Import Megatron-Core with `torch.compile` as the identity.

    Its `jit_fuser` is `torch.compile`, bound to functions when they are imported. With MoE's
    changing shapes that recompiles for most of a short run (single steps of 5 to 16 s instead of
    0.7 s were measured), and importing the compiler alone takes seconds.
    """
    compile_, torch.compile = torch.compile, lambda function=None, **kwargs: function  # type: ignore[assignment]
    try:
        import_megatron()
    finally:
        torch.compile = compile_
    import megatron.core.jit

    megatron.core.jit.disable_jit_fuser()


class _WeightGradients:
    """NVIDIA apex's kernels that add a weight gradient to a buffer, as one matrix product."""

    @staticmethod
    def wgrad_gemm_accum_fp32(
        input: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor
    ) -> None:
        main_grad.addmm_(grad_output.t(), input)


def _scale_in_place(
    chunk_size: int, overflow: Any, tensor_lists: list[list[torch.Tensor]], scale: float
) -> None:
    """Megatron-Core's fallback copies each gradient; it is only ever called to scale them in place."""
    source, target = tensor_lists
    assert all(a is b for a, b in zip(source, target, strict=True))
    torch._foreach_mul_(target, scale)


def _substitute_megatron() -> None:
    _hide_cuda_libraries()
    _import_megatron_uncompiled()
    from megatron.core.optimizer import clip_grads
    from megatron.core.tensor_parallel import layers, random

    clip_grads.multi_tensor_scale_impl = _scale_in_place
    layers.fused_weight_gradient_mlp_cuda = _WeightGradients

    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)


def install_cpu_substitutions() -> None:
    """Make Megatron-Core run on the CPU with gloo, for the rest of this process; idempotent.

    Raises:
        EnvironmentSetupError: CUDA is available (use it, or hide it with CUDA_VISIBLE_DEVICES=""),
            or Megatron-Core is of another version than the one these substitutions were made for.
    """
    global _installed
    if _installed:
        return
    if torch.cuda.is_available():
        raise EnvironmentSetupError(
            "distributed.device is cpu but this machine has CUDA: run with distributed.device=cuda, "
            'or hide the GPUs with CUDA_VISIBLE_DEVICES=""'
        )
    check_megatron_version()
    _substitute_torch()
    _substitute_torch_optimizers()
    _substitute_torch_cuda()
    _substitute_megatron()
    _installed = True
