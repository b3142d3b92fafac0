"""DeepEP's dispatcher trains as the all-to-all one does, over a stand-in for its buffer on gloo."""

from typing import Any

import pytest
import torch

from tests.dist import tiny
from tests.dist.harness import run_distributed

STEPS = 3
EP, ETP = "distributed.expert_parallel_size", "distributed.expert_tensor_parallel_size"
MOE = "model.moe."


def train(settings: dict[str, Any]) -> dict[str, Any]:
    from megads.config import validate_kernels
    from tests.dist import fake_deep_ep

    fake_deep_ep.install()
    # The checks refuse a CPU run and a machine without DeepEP; both are what this test is for.
    validate_kernels._deep_ep = lambda config, cuda: iter(())
    records = tiny.train(tiny.start(settings), 0, STEPS)
    return {"records": records, "calls": dict(fake_deep_ep.calls)}


def run(processes: int, **settings: Any) -> dict[str, Any]:
    ranks = run_distributed(processes, train, settings=settings)
    return {"records": list(tiny.merge([rank["records"] for rank in ranks])), "calls": ranks[0]["calls"]}


@pytest.mark.parametrize(
    ("processes", "settings"),
    [
        (2, {EP: 2}),
        (2, {ETP: 2, MOE + "deep_ep_async": True}),
        (4, {EP: 2, "distributed.tensor_parallel_size": 2, MOE + "capacity_factor": 0.8}),
    ],
    ids=["ep2", "etp2-async", "tp2-ep2-capacity"],
)
def test_training_equals_the_all_to_all_dispatcher(processes: int, settings: dict[str, Any]) -> None:
    found = run(processes, **settings, **{MOE + "use_deep_ep": True})
    plain = {name: value for name, value in settings.items() if name != MOE + "deep_ep_async"}
    expected = run(processes, **plain)
    assert not expected["calls"]
    asynchronous = settings.get(MOE + "deep_ep_async", False)
    assert {(was_async, fp8) for _, was_async, fp8 in found["calls"]} == {(asynchronous, False)}
    for mine, other in zip(found["records"], expected["records"], strict=True):
        assert mine["losses"] == pytest.approx(other["losses"], rel=1e-5)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
        assert mine["loads"] == other["loads"]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_fp8_dispatch_rounds_tokens_and_gradients_only(asynchronous: bool) -> None:
    wide = {EP: 2, "model.mla.d_model": 128, MOE + "use_deep_ep": True, MOE + "deep_ep_async": asynchronous}
    found = run(2, **wide, **{MOE + "deep_ep_fp8": True})
    expected = run(2, **wide)
    assert {call for call in found["calls"] if call[0] == "dispatch"} == {("dispatch", asynchronous, True)}
    assert {call for call in found["calls"] if call[0] == "combine"} == {("combine", asynchronous, False)}
    first, other = found["records"][0], expected["records"][0]
    assert first["losses"] == pytest.approx(other["losses"], rel=0.01)
    assert first["losses"] != other["losses"]
    assert first["grad_norm"] == pytest.approx(other["grad_norm"], rel=0.05)


def test_fp8_numbers_are_within_half_a_step_and_exact_the_second_time() -> None:
    from megads.model.deep_ep import from_fp8, to_fp8

    x = torch.randn(5, 384) * torch.logspace(-30, 30, 5)[:, None]
    x[0, :128] = 0.0
    x[1, 0] = 1e-44
    numbers, factors = to_fp8(x)
    assert (numbers.dtype, factors.shape) == (torch.float8_e4m3fn, (5, 3))
    assert torch.frexp(factors).mantissa.eq(0.5).all(), "powers of two"
    back = from_fp8(numbers, factors, torch.float32)
    assert back[0, :128].eq(0).all()
    # Four significant bits, or the smallest step of the block: 2^-9 of its factor.
    step = torch.maximum(x.abs() * 2**-4, factors.repeat_interleave(128, dim=1) * 2**-10)
    assert ((back - x).abs() <= step).all()
    assert back.eq(back.bfloat16()).all(), "BF16 holds them"
    again = from_fp8(*to_fp8(back), torch.float32)
    assert again.equal(back)
