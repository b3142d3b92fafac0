"""Peak memory of output head and loss, forward and backward: whole logits against chunks of tokens.

    python benchmarks/loss_memory.py [--tokens 1024] [--vocabulary 16384] [--hidden 64] [--chunks 64 256]

Counted on the CPU, not sampled: a dispatch mode sees every tensor that is made and when it is freed. Nothing
is timed, and the result depends on sizes only. Hidden states and weight are not counted, their gradients are.
"""

import argparse
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megads.model.functional import cross_entropy
from megads.model.linear_cross_entropy import linear_cross_entropy

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


class Peak(TorchDispatchMode):
    """`most_bytes`: the most that tensors made inside it have taken at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.most_bytes = self._bytes = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return out

    def ignore(self, *tensors: Tensor) -> None:
        """What is there already, and may be seen again."""
        self._known.update(tensor.untyped_storage()._cdata for tensor in tensors)

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._known:
            return
        self._known.add(storage._cdata)
        self._bytes += storage.nbytes()
        self.most_bytes = max(self.most_bytes, self._bytes)
        weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._bytes -= size


def peak_bytes(
    loss: Loss, tokens: int, vocabulary: int, hidden: int, dtype: torch.dtype = torch.float32
) -> int:
    """The most that `loss(hidden states, weight, labels)` and its backward pass take besides their inputs."""
    states = torch.randn(tokens, hidden, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, hidden, dtype=dtype, requires_grad=True)
    labels = torch.randint(vocabulary, (tokens,))
    with Peak() as peak:
        peak.ignore(states, weight, labels)
        loss(states, weight, labels).sum().backward()
    return peak.most_bytes


def whole_logits(states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """As the model without `training.loss_chunk_tokens` does it."""
    return cross_entropy((states @ weight.t()).float(), labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of a micro-batch")
    parser.add_argument("--vocabulary", type=int, default=16384)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--chunks", type=int, nargs="+", default=[64, 256], help="loss_chunk_tokens")
    args = parser.parse_args()
    losses: dict[str, Loss] = {"whole logits": whole_logits}
    for chunk in args.chunks:
        losses[f"chunks of {chunk} tokens"] = partial(linear_cross_entropy, chunk_tokens=chunk)
    table = Table(title=f"{args.tokens} tokens, vocabulary {args.vocabulary}, hidden {args.hidden}")
    for heading in ("loss by", "precision", "MiB", "bytes per logit"):
        table.add_column(heading)
    for dtype, precision in ((torch.float32, "FP32"), (torch.bfloat16, "BF16")):
        for name, loss in losses.items():
            size = peak_bytes(loss, args.tokens, args.vocabulary, args.hidden, dtype)
            per_logit = size / args.tokens / args.vocabulary
            table.add_row(name, precision, f"{size / 2**20:.1f}", f"{per_logit:.2f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
