"""Output head and cross-entropy in one, for a few tokens at a time: the logits of all never exist together.

Forward keeps two numbers per token and backward computes the logits of each chunk again, a third more work in
the head, as in Cut Cross-Entropy (arXiv:2411.09009). Chunks of plain matrix products instead of a kernel are
Liger Kernel's (arXiv:2410.10989), which saves that work by making gradients in forward, where each token's
weight in the objective is not known yet.

Softmax and sums are in FP32 (FP64 stays), the products in the run's precision, as with whole logits.

Shapes: T tokens, C of a chunk, H hidden, V this rank's part of the vocabulary.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def _chunks(tokens: int, chunk_tokens: int) -> Iterator[slice]:
    for start in range(0, tokens, chunk_tokens):
        yield slice(start, start + chunk_tokens)


def _logits(hidden_CH: Tensor, weight_VH: Tensor) -> Tensor:
    """[C, V], rounded to the run's precision, in at least FP32."""
    logits_CV = hidden_CH @ weight_VH.t()
    return logits_CV if logits_CV.dtype == torch.float64 else logits_CV.float()


def _statistics(logits_CV: Tensor, labels_C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[C] each: the largest logit, the sum of exponentials below it, the label's logit. Overwrites logits."""
    largest_C1 = logits_CV.amax(dim=-1, keepdim=True)
    chosen_C = logits_CV.gather(-1, labels_C.unsqueeze(-1)).squeeze(-1)
    return largest_C1.squeeze(-1), logits_CV.sub_(largest_C1).exp_().sum(dim=-1), chosen_C


def _gradient_sum(weight: Any) -> tuple[Tensor, bool]:
    """Where to sum the weight's gradient over chunks in FP32, and whether that is its final place.

    Final is the buffer of Megatron-Core's data parallelism, by the contract of its fused linears: who adds to
    `main_grad` says so in `grad_added_to_main_grad`.
    """
    buffer = getattr(weight, "main_grad", None)
    if buffer is not None and buffer.dtype == torch.float32 and hasattr(weight, "grad_added_to_main_grad"):
        return buffer, True
    exact = weight.dtype if weight.dtype == torch.float64 else torch.float32
    return torch.zeros_like(weight, dtype=exact), False


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        weight_VH: Tensor,
        labels_T: Tensor,
        chunk_tokens: int,
        tp_group: dist.ProcessGroup | None,
    ) -> Tensor:
        tokens, vocabulary = hidden_TH.shape[0], weight_VH.shape[0]
        # Labels of other ranks' parts of the vocabulary point to the first entry, and count nothing.
        local_T = labels_T if tp_group is None else labels_T - tp_group.rank() * vocabulary
        here_T = (local_T >= 0) & (local_T < vocabulary)
        local_T = torch.where(here_T, local_T, 0)
        exact = torch.float64 if hidden_TH.dtype == torch.float64 else torch.float32
        largest_T, total_T, chosen_T = hidden_TH.new_empty(3, tokens, dtype=exact).unbind()
        for rows in _chunks(tokens, chunk_tokens):
            largest_T[rows], total_T[rows], chosen_T[rows] = _statistics(
                _logits(hidden_TH[rows], weight_VH), local_T[rows]
            )
        if tp_group is not None:
            largest_of_all_T = largest_T.clone()
            dist.all_reduce(largest_of_all_T, op=dist.ReduceOp.MAX, group=tp_group)
            sums = torch.stack((total_T * (largest_T - largest_of_all_T).exp(), chosen_T * here_T))
            dist.all_reduce(sums, group=tp_group)
            largest_T, (total_T, chosen_T) = largest_of_all_T, sums.unbind()
        ctx.save_for_backward(hidden_TH, local_T, here_T, largest_T, total_T)
        ctx.weight = weight_VH  # the parameter itself: its gradient buffer hangs on it
        ctx.chunk_tokens = chunk_tokens
        return total_T.log() - (chosen_T - largest_T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        hidden_TH, local_T, here_T, largest_T, total_T = ctx.saved_tensors
        weight = ctx.weight
        weight_VH = weight.detach()
        grad_hidden_TH = torch.empty_like(hidden_TH)
        grad_weight_VH, final = _gradient_sum(weight)
        softmax_factor_T, label_grad_T = grad_T / total_T, -grad_T * here_T
        for rows in _chunks(hidden_TH.shape[0], ctx.chunk_tokens):
            grad_CV = _logits(hidden_TH[rows], weight_VH).sub_(largest_T[rows].unsqueeze(-1)).exp_()
            grad_CV.mul_(softmax_factor_T[rows].unsqueeze(-1))  # softmax(logits) * grad
            grad_CV.scatter_add_(-1, local_T[rows].unsqueeze(-1), label_grad_T[rows].unsqueeze(-1))
            grad_CV = grad_CV.to(weight.dtype)
            torch.mm(grad_CV, weight_VH, out=grad_hidden_TH[rows])
            if grad_CV.dtype == grad_weight_VH.dtype:
                grad_weight_VH.addmm_(grad_CV.t(), hidden_TH[rows])
            else:
                grad_weight_VH.add_(grad_CV.t() @ hidden_TH[rows])
            del grad_CV  # before the next chunk's logits
        if not final:
            return grad_hidden_TH, grad_weight_VH.to(weight.dtype), None, None, None
        weight.grad_added_to_main_grad = True
        # Hooks wait for a gradient. It is added only to one that another use of the weight gives.
        shared = getattr(weight, "zero_out_wgrad", False)
        unused = torch.zeros_like(weight_VH) if shared else torch.empty_like(weight_VH)
        return grad_hidden_TH, unused, None, None, None


def linear_cross_entropy(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    labels_T: Tensor,
    chunk_tokens: int,
    tp_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """-log softmax(hidden weight^T)[label] of each token [T], in float32.

    Args:
        hidden_TH: whole on every rank of `tp_group`; its gradient is of this rank's part of the vocabulary
            only, to be summed by the caller.
        weight_VH: this rank's rows of the head. Where Megatron-Core's data parallelism has given it a
            gradient buffer, its gradient is added there.
        labels_T: ids in the whole vocabulary.
        chunk_tokens: tokens whose logits exist at a time.
        tp_group: the ranks that hold the vocabulary's parts, in order; None: one.
    """
    return _LinearCrossEntropy.apply(hidden_TH, weight_VH, labels_T, chunk_tokens, tp_group)
