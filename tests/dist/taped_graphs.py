"""CUDA graphs on a CPU: a capture writes down every operation, a replay does them again on the same tensors.

As with real graphs no Python runs in a replay: inputs, outputs and everything else are at the addresses of
the capture, and numbers that Python knew are those of then. What would wait for the device is refused. Not
imitated are streams, and memory that graphs share.
"""

import contextlib
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.distributed import Work
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

_WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")


def _aliases(tree: Any) -> Any:
    """The same memory by tensors of their own: an operation may change a tensor's shape in place."""
    return tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, tree)


def _finish(outputs: Any) -> None:
    """Wait for a collective, which on a GPU would be the stream's business."""
    for leaf in tree_leaves(outputs):
        if isinstance(leaf, torch.ScriptObject):
            Work.unbox(leaf).wait()


_wait = Work.wait


def _wait_quietly(work: Work, *args: Any) -> Any:
    """Some of gloo's collectives end with operations of torch's, which a replay has in the collective."""
    with _disable_current_modes():
        return _wait(work, *args)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class TapedGraph:
    """`torch.cuda.CUDAGraph`."""

    replays = 0
    """Of all graphs."""

    def __init__(self) -> None:
        self._operations: list[tuple[Any, Any, Any, list[Tensor | None]]] | None = []

    def write_down(self, operation: Any, args: Any, kwargs: Any, outputs: Any) -> None:
        assert self._operations is not None
        given = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        # Views, and what was changed in place, are up to date when their memory is.
        new = [
            out if out.untyped_storage()._cdata not in given else None for out in _tensors(_aliases(outputs))
        ]
        self._operations.append((operation, args, kwargs, new))

    def replay(self) -> None:
        assert self._operations is not None, "it was reset"
        TapedGraph.replays += 1
        with torch.no_grad():
            for operation, args, kwargs, outputs in self._operations:
                again = operation(*_aliases(args), **_aliases(kwargs))
                _finish(again)
                for old, new in zip(outputs, _tensors(again), strict=True):
                    if old is not None:
                        old.copy_(new)

    def reset(self) -> None:
        self._operations = None


class taped(TorchDispatchMode):
    """`torch.cuda.graph`."""

    def __init__(self, graph: TapedGraph, **options: Any) -> None:
        super().__init__()
        self._graph = graph

    def __enter__(self) -> Any:
        self._changes = contextlib.ExitStack()
        self._changes.enter_context(mock.patch.object(Work, "wait", _wait_quietly))
        # Memory that is given back while capturing is there again in replays.
        self._changes.enter_context(mock.patch.object(torch.UntypedStorage, "resize_"))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._changes.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not any(wait in func.name() for wait in _WAITS), f"{func} waits for the device"
        kwargs = kwargs or {}
        given = _aliases(args), _aliases(kwargs)
        outputs = func(*args, **kwargs)
        self._graph.write_down(func, *given, outputs)
        return outputs


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, callable_: "TapedCallable", *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.callable = callable_
        for static, given in zip(callable_.inputs, inputs, strict=False):  # then come weights
            assert static.shape == given.shape
            assert static.dtype == given.dtype
            static.copy_(given)
        callable_.forward.replay()
        return tuple(output.detach() for output in callable_.outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        callable_: TapedCallable = ctx.callable
        for static, given in zip(callable_.output_grads, grads, strict=True):
            if static is not None:
                static.copy_(given)
        callable_.backward.replay()
        return None, *(None if grad is None else grad.clone() for grad in callable_.grads)


class TapedCallable:
    """A module as two graphs, forward and backward, as Transformer Engine makes them of it."""

    def __init__(self, module: torch.nn.Module, hidden: Tensor, named: dict[str, Tensor]) -> None:
        self.forward, self.backward = TapedGraph(), TapedGraph()
        self.names, self.inputs = list(named), [hidden, *named.values()]
        with taped(self.forward):
            self.outputs = module(hidden, **named)
        self.output_grads = [torch.zeros_like(out) if out.requires_grad else None for out in self.outputs]
        with taped(self.backward):
            torch.autograd.backward(
                [out for out in self.outputs if out.requires_grad],
                [grad for grad in self.output_grads if grad is not None],
            )
        self.weights = [weight for weight in module.parameters() if weight.grad is not None]
        self.grads = [tensor.grad for tensor in (*self.inputs, *self.weights)]
        for tensor in (*self.inputs, *self.weights):
            tensor.grad = None

    def __call__(self, hidden: Tensor, **named: Any) -> tuple[Tensor, ...]:
        given = (hidden, *(named[name] for name in self.names))
        outputs: tuple[Tensor, ...] = _Replay.apply(self, *given, *self.weights)
        return outputs

    def reset(self) -> None:
        self.forward.reset()
        self.backward.reset()
