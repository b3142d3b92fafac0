"""Emulated FP8 products: all three of a layer against products of rounded operands, written out."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megads.config.schema import FP8
from megads.model.fp8_emulation import Rounding, emulated_linear, emulated_product
from megads.model.fp8_history import FORMATS, AmaxHistory, restore_histories, sharded_histories
from megads.model.fp8_rounding import (
    Rows,
    exact_scale,
    power_of_two_scale,
    round_along_columns,
    round_along_rows,
    round_matrices,
    round_tiles,
)

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
ENDS = torch.tensor([40, 40, 172], dtype=torch.int32)  # the second expert has no token


def operands(seed: int = 0, experts: int = 1, rows: int = 172) -> tuple[torch.Tensor, ...]:
    """x [R, I], w [E, O, I] and the output's gradient [R, O]."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * torch.logspace(-2, 2, shape[-1])

    return draw(rows, 144), draw(experts, 160, 144), draw(rows, 160)


def rounding(recipe: Any, form: str = "e4m3") -> Rounding:
    return Rounding(recipe, FORMATS[form])


def products(x: torch.Tensor, w: torch.Tensor, grad: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, ...]:
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    y = emulated_product(x, w, **kwargs)
    return y.detach(), *torch.autograd.grad(y, (x, w), grad)


def test_a_blockwise_linear_is_what_the_paper_says() -> None:
    """DeepSeek-V3, figure 6 and section 3.3.2: 1x128 tiles along the sum, 128x128 blocks of weights."""
    x, w, grad = operands()
    y, grad_x, grad_w = products(x, w, grad, ends_E=None, rounding=rounding("blockwise"))
    rows, block = Rows(172), (128, power_of_two_scale, E4M3)
    weight = round_tiles(w[0], *block)
    assert torch.equal(y, round_along_columns(x, *block) @ weight.t())
    assert torch.equal(grad_x, round_along_columns(grad, *block) @ weight)
    assert torch.equal(
        grad_w[0], round_along_rows(grad, *block, rows).t() @ round_along_rows(x, *block, rows)
    )


def test_gradients_in_hybrid_are_e5m2() -> None:
    x, w, grad = operands()
    _, grad_x, _ = products(x, w, grad, ends_E=None, rounding=rounding("tensorwise", "hybrid"))
    rows = Rows(172)
    weight = round_matrices(w[0], exact_scale, E4M3, Rows(160))
    assert torch.equal(grad_x, round_matrices(grad, exact_scale, E5M2, rows) @ weight)


@pytest.mark.parametrize("recipe", ["blockwise", "tensorwise", "mxfp8"])
@pytest.mark.parametrize("form", ["e4m3", "hybrid"])
def test_a_grouped_product_is_one_linear_per_expert(recipe: str, form: str) -> None:
    x, w, grad = operands(experts=3)
    y, grad_x, grad_w = products(x, w, grad, ends_E=ENDS, rounding=rounding(recipe, form))
    start = 0
    for expert, end in enumerate(ENDS.tolist()):
        if start == end:
            assert not grad_w[expert].any()
            continue
        own = (x[start:end], w[expert : expert + 1], grad[start:end])
        alone = products(*own, ends_E=None, rounding=rounding(recipe, form))
        for together, single in zip((y[start:end], grad_x[start:end], grad_w[expert]), alone, strict=True):
            torch.testing.assert_close(together, single.view_as(together), rtol=1e-5, atol=1e-5)
        start = end


@pytest.mark.parametrize(
    ("recipe", "form", "error"),
    [
        ("blockwise", "e4m3", 0.06),
        ("mxfp8", "e4m3", 0.06),
        ("tensorwise", "e4m3", 0.08),
        ("tensorwise", "hybrid", 0.1),
    ],
)
def test_products_stay_near_those_of_fp32(recipe: str, form: str, error: float) -> None:
    x, w, grad = (torch.randn(shape) for shape in ((172, 144), (1, 160, 144), (172, 160)))
    exact = (x @ w[0].t(), grad @ w[0], (grad.t() @ x).unsqueeze(0))
    emulated = products(x, w, grad, ends_E=None, rounding=rounding(recipe, form))
    for a, b in zip(emulated, exact, strict=True):
        assert 0 < (a - b).norm() < error * b.norm()


def test_operands_that_fp8_holds_give_exact_products() -> None:
    x, w, grad = (torch.randint(-8, 9, shape).float() for shape in ((172, 144), (1, 160, 144), (172, 160)))
    for recipe in ("blockwise", "mxfp8"):
        y, grad_x, grad_w = products(x, w, grad, ends_E=None, rounding=rounding(recipe))
        assert torch.equal(y, x @ w[0].t())
        assert torch.equal(grad_x, grad @ w[0])
        assert torch.equal(grad_w[0], grad.t() @ x)


def test_a_linear_keeps_the_shape_and_type_of_its_input() -> None:
    x = torch.randn(4, 3, 144, dtype=torch.bfloat16, requires_grad=True)
    w = torch.randn(160, 144, dtype=torch.bfloat16, requires_grad=True)
    y = emulated_linear(x, w, rounding("blockwise"))
    assert (y.shape, y.dtype) == ((4, 3, 160), torch.bfloat16)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    torch.testing.assert_close(y, F.linear(x, w), rtol=0.1, atol=3.0)


def delayed(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> tuple[AmaxHistory, Rounding]:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    history = AmaxHistory(FP8(recipe="delayed", **settings), matrices=1)
    return history, Rounding("delayed", FORMATS["e4m3"], history)


def test_delayed_scales_are_of_the_largest_values_of_earlier_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    history, own = delayed(monkeypatch, amax_history_len=2)
    x, w, grad = operands()
    scales = []
    for factor in (4.0, 1.0, 0.5, 0.25):
        products(x * factor, w, grad, ends_E=None, rounding=own)
        products(x * factor / 2, w, grad, ends_E=None, rounding=own)  # another micro-batch
        scales.append(history.scale[:, 0].clone())
        history.advance()
    largest = torch.stack([x.abs().max(), w.abs().max(), grad.abs().max()])
    assert torch.equal(scales[0], torch.ones(3))  # nothing is known yet
    for step, seen in ((1, 4.0), (2, 4.0), (3, 1.0)):  # of the last two steps
        expected = 448.0 / (largest * torch.tensor([seen, 1.0, 1.0]))
        torch.testing.assert_close(scales[step], expected)


def test_the_most_recent_value_can_make_the_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    history, own = delayed(monkeypatch, amax_history_len=8, amax_compute_algo="most_recent")
    x, w, grad = operands()
    for factor in (4.0, 1.0):
        products(x * factor, w, grad, ends_E=None, rounding=own)
        history.advance()
    torch.testing.assert_close(history.scale[0, 0], 448.0 / x.abs().max())


def test_delayed_scaling_clips_what_is_larger_than_before(monkeypatch: pytest.MonkeyPatch) -> None:
    history, own = delayed(monkeypatch)
    x, w, grad = operands()
    products(x, w, grad, ends_E=None, rounding=own)
    history.advance()
    rounded = own.activation(x * 8, Rows(len(x)), sum_over_rows=False)
    assert rounded.abs().max() <= x.abs().max() * (1 + 1e-6)


def test_evaluation_and_infinities_leave_the_scales_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    history, own = delayed(monkeypatch)
    x, w, grad = operands()
    with torch.no_grad():
        emulated_product(x, w, None, own)
    assert not history.amax_history.any()
    products(torch.full_like(x, torch.inf), w, grad, ends_E=None, rounding=own)
    history.advance()
    assert history.scale[0].tolist() == [1.0]


def chunk_of(history: AmaxHistory) -> list[torch.nn.Module]:
    chunk = torch.nn.Module()
    chunk.linear = torch.nn.Module()
    chunk.linear.amax_histories = {"weight": history}  # type: ignore[assignment]
    return [chunk]


@pytest.mark.parametrize("length", [2, 4, 9])
def test_saved_scales_go_on_exactly_also_into_a_history_of_another_length(
    length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    x, w, grad = operands()

    def step(history: AmaxHistory, own: Rounding, factor: float) -> tuple[torch.Tensor, ...]:
        found = products(x * factor, w, grad, ends_E=None, rounding=own)
        history.advance()
        return found

    history, own = delayed(monkeypatch, amax_history_len=4)
    for factor in (1.0, 4.0, 2.0):
        step(history, own, factor)
    saved = sharded_histories(chunk_of(history)).data
    loaded, its_own = delayed(monkeypatch, amax_history_len=length)
    assert restore_histories(chunk_of(loaded), saved)
    for ours, theirs in zip(step(history, own, 3.0), step(loaded, its_own, 3.0), strict=True):
        assert torch.equal(ours, theirs)
    largest = (4.0 if length > 2 else 3.0) * x.abs().max()
    torch.testing.assert_close(loaded.scale[0, 0], 448.0 / largest)


def test_scales_of_other_products_are_not_taken_for_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    history, _ = delayed(monkeypatch)
    saved = {"amax": torch.ones(1024, 3, 1), "scale": torch.full((3, 1), 5.0)}
    assert not restore_histories(chunk_of(history), {})
    assert not restore_histories(chunk_of(history), {"0.other.weight": {"all": saved}})
    assert history.scale.flatten().tolist() == [1.0, 1.0, 1.0]
    ours = {"0.linear.weight": {"all": saved}}
    assert not restore_histories(chunk_of(history), ours | {"0.other.weight": {"all": saved}})
    assert restore_histories(chunk_of(history), ours)
    assert history.scale.flatten().tolist() == [5.0, 5.0, 5.0]
