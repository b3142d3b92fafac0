"""Adam with FP32 or BF16 moments: torch's own bit by bit, or close to it."""

import copy
from typing import Any

import pytest
import torch

from megads.optim import adam
from megads.optim.adam import Adam

SHAPES = [(300,), (1000,), (7,), (64,)]
HYPERPARAMETERS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8}


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def groups(of: list[torch.nn.Parameter]) -> list[dict[str, Any]]:
    """Some weights decay, some do not, as Megatron-Core divides them."""
    return [
        {"params": of[:2], "weight_decay": 0.1, **HYPERPARAMETERS},
        {"params": of[2:], "weight_decay": 0.0, **HYPERPARAMETERS},
    ]


def step(optimizer: torch.optim.Optimizer, of: list[torch.nn.Parameter], number: int) -> None:
    generator = torch.Generator().manual_seed(100 + number)
    for parameter in of:
        parameter.grad = torch.randn(parameter.shape, generator=generator) * 10.0 ** -(number % 3)
    optimizer.step()


def low_precision(of: list[torch.nn.Parameter], dtype: torch.dtype, decoupled: bool = True) -> Adam:
    return Adam(groups(of), exp_avg_dtype=dtype, exp_avg_sq_dtype=dtype, decoupled_weight_decay=decoupled)


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("batch_elements", [1 << 17, 128])
def test_with_fp32_moments_it_is_torchs(
    decoupled: bool, batch_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(adam._BATCH_ELEMENTS, "cpu", batch_elements)
    ours, theirs = parameters(), parameters()
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    own, reference = low_precision(ours, torch.float32, decoupled), kind(groups(theirs), foreach=False)
    for number in range(5):
        step(own, ours, number)
        step(reference, theirs, number)
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b)


def test_bf16_moments_are_stored_in_bf16_and_stay_close() -> None:
    ours, theirs = parameters(), parameters()
    own, reference = low_precision(ours, torch.bfloat16), torch.optim.AdamW(groups(theirs), foreach=False)
    for number in range(50):
        step(own, ours, number)
        step(reference, theirs, number)
    for parameter in ours:
        assert {own.state[parameter][name].dtype for name in ("exp_avg", "exp_avg_sq")} == {torch.bfloat16}
    moved = torch.cat([(a - b).detach().flatten() for a, b in zip(theirs, parameters(), strict=True)])
    apart = torch.cat([(a - b).detach().flatten() for a, b in zip(ours, theirs, strict=True)])
    assert 0 < apart.norm() < 0.01 * moved.norm()


def test_each_moment_has_its_own_type() -> None:
    (own,) = [torch.nn.Parameter(torch.ones(4))]
    optimizer = Adam([own], exp_avg_dtype=torch.bfloat16, exp_avg_sq_dtype=torch.float32)
    own.grad = torch.ones(4)
    optimizer.step()
    assert optimizer.state[own]["exp_avg"].dtype == torch.bfloat16
    assert optimizer.state[own]["exp_avg_sq"].dtype == torch.float32


def test_a_loaded_state_goes_on_exactly_and_keeps_its_types() -> None:
    ours = parameters()
    optimizer = low_precision(ours, torch.bfloat16)
    for number in range(3):
        step(optimizer, ours, number)
    resumed_parameters = copy.deepcopy(ours)
    resumed = low_precision(resumed_parameters, torch.bfloat16)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for number in range(3, 6):
        step(optimizer, ours, number)
        step(resumed, resumed_parameters, number)
    for a, b in zip(ours, resumed_parameters, strict=True):
        assert torch.equal(a, b)
        assert resumed.state[b]["exp_avg"].dtype == torch.bfloat16


def test_parameters_without_a_gradient_are_left_alone() -> None:
    ours = parameters()
    before = ours[1].detach().clone()
    optimizer = low_precision(ours, torch.bfloat16)
    ours[0].grad = torch.ones_like(ours[0])
    optimizer.step()
    assert torch.equal(ours[1], before)
    assert list(optimizer.state) == [ours[0]]


@pytest.mark.parametrize(("fraction", "on_host"), [(0.0, []), (0.5, [2, 3]), (1.0, [0, 1, 2, 3])])
def test_a_share_of_the_moments_is_in_host_memory(
    fraction: float, on_host: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never more elements than asked for, in the order of the parameters."""
    made: list[tuple[int, bool]] = []
    place = Adam._next_is_on_host
    monkeypatch.setattr(
        Adam, "_next_is_on_host", lambda self, size: made.append((size, place(self, size))) or made[-1][1]
    )
    ours = parameters()
    step(
        Adam(
            groups(ours), exp_avg_dtype=torch.float32, exp_avg_sq_dtype=torch.float32, host_fraction=fraction
        ),
        ours,
        0,
    )
    assert [size for size, _ in made] == [300, 1000, 7, 64]
    chosen = [index for index, (_, host) in enumerate(made) if host]
    assert sum(made[index][0] for index in chosen) <= fraction * 1371
    assert chosen == on_host


def test_loading_keeps_the_tensors_and_takes_the_count_of_groups() -> None:
    """Where Transformer Engine is installed Megatron-Core gives the number of steps by group only."""
    ours = parameters()
    optimizer = low_precision(ours, torch.float32)
    step(optimizer, ours, 0)
    before = optimizer.state[ours[0]]["exp_avg"]
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        group["step"] = 7
    for state in saved["state"].values():
        del state["step"]
        state["exp_avg"] += 1
    optimizer.load_state_dict(saved)
    assert optimizer.state[ours[0]]["exp_avg"] is before
    assert torch.equal(before, saved["state"][0]["exp_avg"])
    assert {float(state["step"]) for state in optimizer.state.values()} == {7.0}
