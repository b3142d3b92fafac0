"""Elementwise parts of the model with hand-written gradients: fewer passes over memory than autograd's.

Every function has the plain formula in its docstring and is tested against it. On CUDA, where torch
fuses RMSNorm itself, that one is torch's.
"""

from typing import Any

import torch
import torch.nn.functional as F
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


def swiglu(gate_up: Tensor, scale: Tensor | None = None) -> Tensor:
    """silu(gate) * up * scale for [gate | up] [..., 2 I] and `scale` [...] (None: 1): [..., I]."""
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

    The probabilities are computed again in backward from the saved normalizers (FlashAttention,
    arXiv:2205.14135); per block these are few, large matrix products.
    """

    BLOCK = 128

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        length, block = q.shape[1], _CausalAttention.BLOCK
        out = q.new_empty(*q.shape[:2], v.shape[-1])
        normalizers = q.new_empty(q.shape[:2])
        for start in range(0, length, block):
            end = min(start + block, length)
            scores = _masked_scores(q, k, start, end, scale)
            largest = scores.amax(dim=-1, keepdim=True)
            exponentials = scores.sub_(largest).exp_()
            total = exponentials.sum(dim=-1, keepdim=True)
            normalizers[:, start:end] = (total.log() + largest).squeeze(-1)
            # Not out=, nor baddbmm_ below: on a slice they fall back to a product per head.
            out[:, start:end] = torch.bmm(exponentials, v[:, :end]).div_(total)
        ctx.save_for_backward(q, k, v, out, normalizers)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, normalizers = ctx.saved_tensors
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        along = torch.linalg.vecdot(grad, out).unsqueeze(-1)
        for start in range(0, q.shape[1], _CausalAttention.BLOCK):
            end = min(start + _CausalAttention.BLOCK, q.shape[1])
            rows = slice(start, end)
            scores = _masked_scores(q, k, start, end, ctx.scale)
            probabilities = scores.sub_(normalizers[:, rows, None]).exp_()
            grad_v[:, :end] += torch.bmm(probabilities.transpose(1, 2), grad[:, rows])
            grad_scores = torch.bmm(grad[:, rows], v[:, :end].transpose(1, 2))
            grad_scores = grad_scores.sub_(along[:, rows]).mul_(probabilities).mul_(ctx.scale)
            grad_q[:, rows] = torch.bmm(grad_scores, k[:, :end])
            grad_k[:, :end] += torch.bmm(grad_scores.transpose(1, 2), q[:, rows])
        return grad_q, grad_k, grad_v, None


def _masked_scores(q: Tensor, k: Tensor, start: int, end: int, scale: float) -> Tensor:
    """Scaled logits of the queries from `start` to `end` and the keys before `end`, later keys at -inf."""
    scores = torch.bmm(q[:, start:end], k[:, :end].transpose(1, 2)).mul_(scale)
    later = torch.ones(end - start, end - start, dtype=torch.bool, device=q.device).triu_(1)
    scores[:, :, start:end].masked_fill_(later, -torch.inf)
    return scores


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T, causal) v for contiguous [heads, S, D] and [heads, S, V]: [heads, S, V].

    For the CPU, whose fused kernel wants equal widths and does not reach the speed of matrix products.
    """
    return _CausalAttention.apply(q.contiguous(), k.contiguous(), v.contiguous(), scale)
