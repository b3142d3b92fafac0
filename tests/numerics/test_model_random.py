"""Dropout, router noise and recomputation: what they may change and what they may not.

Every run is two optimizer steps of the tiny model on one process from the same weights and seed, so
runs that must agree agree bitwise.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.dist import tiny
from tests.dist.harness import run_distributed

DROPOUTS = {
    "hidden": {"model.hidden_dropout": 0.2},
    "attention": {"model.mla.attn_dropout": 0.2},
    "moe": {"model.moe.dropout": 0.2},
}
NOISE = {"model.moe.router_noise_std": 1.0}
RANDOM = NOISE | {name: value for setting in DROPOUTS.values() for name, value in setting.items()}
FULL = {"training.gradient_checkpointing": "full"}
SELECTIVE = {"training.gradient_checkpointing": "selective"}

RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "full": FULL,
    "selective": SELECTIVE,
    **DROPOUTS,
    "noise": NOISE,
    "random": RANDOM,
    "random-again": RANDOM,
    "random-full": RANDOM | FULL,
    "random-selective": RANDOM | SELECTIVE,
}


# --- in a worker ------------------------------------------------------------------------------


def run_all() -> dict[str, Any]:
    found = {name: run(settings) for name, settings in RUNS.items()}
    found["noise-annealed"] = run(NOISE, router_noise_std=0.0)
    return found


def run(settings: dict[str, Any], **schedule: float) -> dict[str, Any]:
    step = tiny.start(settings)
    records, gradients = [], []
    held_out = tiny.micro_batches(step, tiny.global_batch(9))
    evaluated, _ = step.evaluate(iter(held_out), len(held_out))
    for index in range(2):
        parts = tiny.micro_batches(step, tiny.global_batch(index))
        result = step.train(iter(parts), len(parts), tiny.scalars(step, **schedule))
        records.append((result.loss_sums.tolist(), result.grad_norm, result.loads.tolist()))
        gradients.append({name: p.main_grad.clone() for name, p in step.chunks[0].module.named_parameters()})
    return {"evaluated": evaluated.tolist(), "records": records, "gradients": gradients}


def route_with_noise() -> dict[str, Tensor]:
    """A router's gates with noise, without it, and the scores without noise [T, E]."""
    from megads.model.router import scores_of

    router = tiny.start(NOISE | {"model.moe.balance_loss_type": "none"}).routers[0]
    router.train()
    hidden = torch.randn(tiny.SEQ_LENGTH, 4, 32, generator=torch.Generator().manual_seed(5))
    noisy, routed = router(hidden)
    router.noise_std = 0.0
    clean, _ = router(hidden)
    scores = scores_of(torch.nn.functional.linear(hidden.flatten(0, 1), router.weight), "sigmoid")
    found = {"noisy": noisy, "routed": routed, "clean": clean, "scores": scores}
    return {name: tensor.detach() for name, tensor in found.items()}


# --- with the worker's results ----------------------------------------------------------------


@pytest.fixture(scope="module")
def runs() -> dict[str, Any]:
    return run_distributed(1, run_all)[0]


def assert_bitwise(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["records"] == expected["records"]
    for mine, other in zip(found["gradients"], expected["gradients"], strict=True):
        differ = [name for name, gradient in other.items() if not torch.equal(mine[name], gradient)]
        assert not differ


@pytest.mark.parametrize("how", ["full", "selective"])
def test_recomputation_changes_nothing(runs: dict[str, Any], how: str) -> None:
    assert_bitwise(runs[how], runs["plain"])


@pytest.mark.parametrize("how", ["full", "selective"])
def test_recomputation_draws_the_same_dropout_and_noise(runs: dict[str, Any], how: str) -> None:
    assert_bitwise(runs[f"random-{how}"], runs["random"])


def test_a_seed_gives_the_same_run(runs: dict[str, Any]) -> None:
    assert_bitwise(runs["random-again"], runs["random"])


@pytest.mark.parametrize("kind", DROPOUTS)
def test_each_dropout_acts_in_training_only(runs: dict[str, Any], kind: str) -> None:
    assert runs[kind]["evaluated"] == runs["plain"]["evaluated"]
    for found, plain in zip(runs[kind]["records"], runs["plain"]["records"], strict=True):
        assert found[0] != plain[0]
        # Dropped values are made up for: the loss stays near, the sum over 128 tokens moves by far less.
        assert found[0] == pytest.approx(plain[0], rel=0.1)


def test_noise_changes_loads_in_training_only(runs: dict[str, Any]) -> None:
    assert runs["noise"]["evaluated"] == runs["plain"]["evaluated"]
    assert runs["noise"]["records"][0][2] != runs["plain"]["records"][0][2]


def test_noise_that_has_fallen_to_zero_is_none(runs: dict[str, Any]) -> None:
    """The schedule's value acts, not the configuration's."""
    assert_bitwise(runs["noise-annealed"], runs["plain"])


def test_noise_changes_the_choice_but_no_gate() -> None:
    """Gates are the normalized clean scores of whatever experts the noise has led to."""
    (found,) = run_distributed(1, route_with_noise)
    assert not torch.equal(found["noisy"] > 0, found["clean"] > 0)
    chosen = found["scores"] * found["routed"]
    expected = 2.5 * chosen / chosen.sum(dim=-1, keepdim=True)
    torch.testing.assert_close(found["noisy"], expected)
    assert (found["routed"].sum(dim=-1) == 2).all()
