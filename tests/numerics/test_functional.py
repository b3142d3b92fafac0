"""The hand-written gradients of model/functional.py: against torch's own formulas and finite differences."""

import pytest
import torch
import torch.nn.functional as F

from megads.model import functional


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("scaled", [False, True])
def test_swiglu(scaled: bool) -> None:
    gate_up, scale = random(6, 5, 16), random(6, 5) if scaled else None
    gate, up = gate_up.chunk(2, dim=-1)
    expected = F.silu(gate) * up * (1.0 if scale is None else scale.unsqueeze(-1))
    torch.testing.assert_close(functional.swiglu(gate_up, scale), expected)
    inputs = (gate_up,) if scale is None else (gate_up, scale)
    assert torch.autograd.gradcheck(functional.swiglu, inputs)


@pytest.mark.parametrize("shape", [(7, 16), (3, 4, 16)])
def test_rms_norm(shape: tuple[int, ...]) -> None:
    x, weight = random(*shape), random(16)
    apply = functional._RMSNorm.apply  # rms_norm takes it for float32 on the CPU only
    torch.testing.assert_close(apply(x, weight, 1e-6), F.rms_norm(x, (16,), weight, 1e-6))
    assert torch.autograd.gradcheck(lambda a, b: apply(a, b, 1e-3), (x, weight))


def test_rms_norm_is_used_in_float32_and_agrees_with_torch() -> None:
    x, weight = (random(64, 96).float().detach().requires_grad_() for _ in range(2))
    weight = weight[0].detach().requires_grad_()
    ours = functional.rms_norm(x, weight, 1e-6)
    assert ours.grad_fn is not None
    assert "RMSNorm" in type(ours.grad_fn).__name__
    grad = torch.randn_like(ours)
    expected = torch.autograd.grad(F.rms_norm(x, (96,), weight, 1e-6), (x, weight), grad)
    torch.testing.assert_close(torch.autograd.grad(ours, (x, weight), grad), expected, rtol=1e-5, atol=1e-5)


def test_cross_entropy() -> None:
    logits, labels, grad = random(6, 5, 16), torch.randint(16, (6, 5)), torch.randn(6, 5, dtype=torch.float64)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(6, 5)
    ours = functional.cross_entropy(logits.clone(), labels)  # it overwrites its input
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(
        torch.autograd.grad(ours, logits, grad), torch.autograd.grad(expected, logits, grad)
    )


def test_cross_entropy_of_huge_logits_is_finite() -> None:
    logits = torch.tensor([[1e4, 0.0], [-1e4, 1e4]], requires_grad=True)
    loss = functional.cross_entropy(logits.clone(), torch.tensor([0, 0]))
    torch.testing.assert_close(loss, torch.tensor([0.0, 2e4]))
    loss.sum().backward()
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("length", [1, 4, 10])
def test_causal_attention(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional._CausalAttention, "BLOCK", 4)  # whole, partial and single blocks
    q, k, v = random(3, length, 6), random(3, length, 6), random(3, length, 5)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)
    torch.testing.assert_close(functional.causal_attention(q, k, v, 0.3), expected)
    assert torch.autograd.gradcheck(lambda *qkv: functional.causal_attention(*qkv, 0.3), (q, k, v))
