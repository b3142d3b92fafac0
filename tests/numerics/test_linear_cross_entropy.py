"""Losses by chunks of tokens against whole logits: values, gradients, buffers, memory; on two ranks."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from benchmarks.loss_memory import peak_bytes, whole_logits
from megads.model.linear_cross_entropy import linear_cross_entropy
from tests.dist.harness import run_distributed

TOKENS, HIDDEN, VOCABULARY = 13, 24, 50


def problem(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(hidden, head, labels, gradients of the losses), with logits that are neither flat nor one-hot."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    gradients = torch.rand(TOKENS, generator=generator)  # each token has a weight of its own
    gradients[3] = 0.0
    return hidden, weight, labels, gradients.to(torch.promote_types(dtype, torch.float32))


def by_whole_logits(
    hidden: Tensor, weight: Tensor, labels: Tensor, gradients: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    losses = F.cross_entropy((hidden @ weight.t()).to(gradients.dtype), labels, reduction="none")
    return losses, *torch.autograd.grad(losses, (hidden, weight), gradients)


@pytest.mark.parametrize("chunk", [1, 5, 13, 100])
def test_like_whole_logits(chunk: int) -> None:
    hidden, weight, labels, gradients = problem()
    losses = linear_cross_entropy(hidden, weight, labels, chunk)
    found = (losses, *torch.autograd.grad(losses, (hidden, weight), gradients))
    expected = by_whole_logits(hidden, weight, labels, gradients)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_gradients_by_finite_differences() -> None:
    hidden, weight, labels, _ = problem(torch.float64)
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, labels, 4), (hidden, weight))


def test_huge_logits_are_finite() -> None:
    hidden = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    losses = linear_cross_entropy(
        hidden, torch.tensor([[1.0], [0.0]], requires_grad=True), torch.zeros(2).long(), 1
    )
    torch.testing.assert_close(losses, torch.tensor([0.0, 1e4]))
    losses.sum().backward()
    assert hidden.grad is not None
    assert torch.isfinite(hidden.grad).all()


def test_in_bf16_losses_are_fp32_and_the_gradient_is_summed_in_fp32() -> None:
    """As good as whole logits in BF16, both measured by FP32."""
    hidden, weight, labels, gradients = problem(torch.bfloat16)
    exact = by_whole_logits(hidden.float(), weight.float(), labels, gradients)
    whole = by_whole_logits(hidden, weight, labels, gradients)
    losses = linear_cross_entropy(hidden, weight, labels, 2)
    found = (losses, *torch.autograd.grad(losses, (hidden, weight), gradients))
    assert [tensor.dtype for tensor in found] == [torch.float32, torch.bfloat16, torch.bfloat16]
    for mine, other, truth in zip(found, whole, exact, strict=True):
        assert (mine - truth).norm() <= 1.2 * (other - truth).norm()


@pytest.mark.parametrize("shared", [False, True])
def test_the_gradient_goes_to_the_buffer_of_data_parallelism(shared: bool) -> None:
    """It is added to what is there, and what autograd gets is nothing where the weight has another use."""
    hidden, weight, labels, gradients = problem()
    _, _, expected = by_whole_logits(hidden, weight, labels, gradients)
    weight.main_grad = torch.ones_like(weight)  # type: ignore[attr-defined]
    weight.grad_added_to_main_grad, weight.zero_out_wgrad = False, shared  # type: ignore[attr-defined]
    linear_cross_entropy(hidden, weight, labels, 5).backward(gradients)
    assert weight.grad_added_to_main_grad  # type: ignore[attr-defined]
    torch.testing.assert_close(weight.main_grad - 1, expected, rtol=1e-5, atol=1e-6)  # type: ignore[attr-defined]
    assert weight.grad is not None
    assert not shared or weight.grad.count_nonzero() == 0


def test_only_the_logits_of_a_chunk_exist() -> None:
    tokens, chunk, vocabulary, width = 256, 16, 512, 8
    most = peak_bytes(lambda *inputs: linear_cross_entropy(*inputs, chunk), tokens, vocabulary, width)
    logits, whole = 4 * chunk * vocabulary, 4 * tokens * vocabulary
    gradients = 4 * (vocabulary + tokens) * width
    assert logits + gradients < most < logits + gradients + 4 * 20 * tokens
    assert whole < peak_bytes(whole_logits, tokens, vocabulary, width)
    assert most < whole / 4


def on_a_rank(chunk: int) -> tuple[Tensor, Tensor, Tensor]:
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    hidden, weight, labels, gradients = problem()
    part = weight.detach().chunk(size)[rank].requires_grad_()
    losses = linear_cross_entropy(hidden, part, labels, chunk, dist.group.WORLD)
    grad_hidden, grad_part = torch.autograd.grad(losses, (hidden, part), gradients)
    dist.all_reduce(grad_hidden)
    return losses.detach(), grad_hidden, grad_part


def test_a_vocabulary_on_two_ranks() -> None:
    expected = by_whole_logits(*problem())
    ranks = run_distributed(2, on_a_rank, chunk=5)
    for losses, grad_hidden, _ in ranks:
        torch.testing.assert_close((losses, grad_hidden), expected[:2], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.cat([part for _, _, part in ranks]), expected[2], rtol=1e-6, atol=1e-6)
