"""Elementwise parts of the model with hand-written gradients: fewer passes over memory than autograd's.

Every function has the plain formula in its docstring and is tested against it. On CUDA, where torch
fuses RMSNorm itself, that one is torch's, and SwiGLU is Megatron-Core's where `mcore.fusions` says so.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl, weighted_bias_swiglu_impl
from torch import Tensor
from torch.autograd.function import once_differentiable


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, scale: Tensor | None) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        ctx.save_for_backward(gate_up, scale)
        hidden = F.silu(gate).mul_(up)
        return hidden if scale is None else hidden.mul_(scale.unsqueeze(-1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        gate_up, scale = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        activated = F.silu(gate)
        grad_scale = None
        if scale is not None:
            grad_scale = torch.linalg.vecdot(grad, activated * up).to(scale.dtype)
            grad = grad * scale.unsqueeze(-1)
        grad_gate_up = torch.empty_like(gate_up)
        grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
        torch.mul(grad, activated, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return grad_gate_up, grad_scale


def swiglu(gate_up: Tensor, scale: Tensor | None = None, *, fused: bool = False) -> Tensor:
    """silu(gate) * up * scale for [gate | up] [..., 2 I] and `scale` [...] (None: 1): [..., I].

    `fused`: by Megatron-Core's compiled functions, with the scale in its own precision; 2 or 3 dimensions.
    """
    if fused:
        if scale is None:
            return bias_swiglu_impl(gate_up, None)
        return weighted_bias_swiglu_impl(gate_up, None, scale.unsqueeze(-1))
    return _SwiGLU.apply(gate_up, None if scale is None else scale.to(gate_up.dtype))


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        width = x.shape[-1]
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(width)
        inverse = mean_square.add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        product = grad * x
        grad_weight = inverse.flatten() @ product.flatten(0, -2)
        # d/dx of x / rms(x): the part along x is taken out.
        along = (product @ weight).unsqueeze(-1).mul_(inverse.pow(3)).div_(x.shape[-1])
        return (grad * weight).mul_(inverse).addcmul_(x, along, value=-1), grad_weight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv:1910.07467)."""
    if x.device.type == "cpu" and x.dtype == torch.float32:
        return _RMSNorm.apply(x, weight, eps)
    return F.rms_norm(x, weight.shape, weight, eps)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        labels = labels.unsqueeze(-1)
        largest = logits.amax(dim=-1, keepdim=True)
        chosen = logits.gather(-1, labels) - largest
        exponentials = logits.sub_(largest).exp_()
        total = exponentials.sum(dim=-1, keepdim=True)
        ctx.save_for_backward(exponentials, labels, total)
        return (total.log() - chosen).squeeze(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        exponentials, labels, total = ctx.saved_tensors
        grad = grad.unsqueeze(-1)
        grad_logits = exponentials.mul_(grad / total)  # softmax(logits) * grad
        return grad_logits.scatter_add_(-1, labels, -grad), None


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-log softmax(logits)[label] for each row: [..., V], [...] -> [...].

    Overwrites `logits`, the largest tensor of a step: nothing else may need them, and backward runs once.
    """
    return _CrossEntropy.apply(logits, labels)


class _CausalAttention(torch.autograd.Function):
    """Causal attention in blocks of queries, each with the keys up to its end.

    Backward computes the probabilities again (FlashAttention, arXiv:2205.14135). Per block these are few,
    large matrix products, with torch's fused softmax in place between them.
    """

    BLOCK = 128

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        out = q.new_empty(*q.shape[:2], v.shape[-1])
        mask = _later_keys(q)
        for rows, end in _query_blocks(q):
            # Not out=, nor baddbmm_ below: on a slice they fall back to a product per head.
            out[:, rows] = torch.bmm(_probabilities(q[:, rows], k[:, :end], scale, mask), v[:, :end])
        ctx.save_for_backward(q, k, v)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v = ctx.saved_tensors
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        mask = _later_keys(q)
        for rows, end in _query_blocks(q):
            probabilities = _probabilities(q[:, rows], k[:, :end], ctx.scale, mask)
            grad_v[:, :end] += torch.bmm(probabilities.transpose(1, 2), grad[:, rows])
            grad_scores = torch.bmm(grad[:, rows], v[:, :end].transpose(1, 2))
            torch.ops.aten._softmax_backward_data.out(
                grad_scores, probabilities, -1, grad_scores.dtype, grad_input=grad_scores
            )
            grad_q[:, rows] = _scaled_bmm(grad_scores, k[:, :end], ctx.scale)
            grad_k[:, :end] += _scaled_bmm(grad_scores.transpose(1, 2), q[:, rows], ctx.scale)
        return grad_q, grad_k, grad_v, None


def _query_blocks(q: Tensor) -> Iterator[tuple[slice, int]]:
    """The rows of each block of queries, and the end of the keys it sees."""
    for start in range(0, q.shape[1], _CausalAttention.BLOCK):
        end = min(start + _CausalAttention.BLOCK, q.shape[1])
        yield slice(start, end), end


def _later_keys(q: Tensor) -> Tensor:
    """-inf where a key comes after its query, else 0, for the square on the diagonal of a block."""
    block = _CausalAttention.BLOCK
    return q.new_full((block, block), -torch.inf).triu_(1)


def _scaled_bmm(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale * a @ b, the factor for free inside the product."""
    return torch.baddbmm(a.new_empty(()), a, b, beta=0, alpha=scale)


def _probabilities(q: Tensor, k: Tensor, scale: float, mask: Tensor) -> Tensor:
    """softmax(scale q k^T) [heads, rows, keys] of a block of queries whose last keys are at its own rows."""
    rows = q.shape[1]
    scores = _scaled_bmm(q, k.transpose(1, 2), scale)
    scores[:, :, -rows:].add_(mask[:rows, :rows])
    return torch.softmax(scores, dim=-1, out=scores)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T, causal) v for contiguous [heads, S, D] and [heads, S, V]: [heads, S, V].

    For the CPU, whose fused kernel wants equal widths and does not reach the speed of matrix products.
    """
    return _CausalAttention.apply(q.contiguous(), k.contiguous(), v.contiguous(), scale)
