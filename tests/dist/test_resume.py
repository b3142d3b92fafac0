"""Stop and resume: bitwise the same run in one layout, the same tensors in any other.

Through the checkpoint store, at the level of tensors; what the command line does on top is tested in
`tests/e2e`.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.dist import tiny
from tests.dist.harness import run_distributed
from tests.dist.tiny import LAYOUTS

BEFORE, AFTER = 3, 2
LOSS_TOLERANCE = 1e-6

RANDOM = {
    "model.hidden_dropout": 0.1,
    "model.mla.attn_dropout": 0.1,
    "model.moe.dropout": 0.1,
    "model.moe.router_noise_std": 0.3,
}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "adam": {"training.optimizer": "adam"},
    # Megatron-Core's distributed optimizer knows only Adam.
    "sgd": {"training.optimizer": "sgd", "distributed.zero_stage": 0},
    "sgd-no-momentum": {
        "training.optimizer": "sgd", "training.sgd_momentum": 0.0, "distributed.zero_stage": 0,
    },
}  # fmt: skip
MOMENTS = {
    "adamw": ("exp_avg", "exp_avg_sq"),
    "adam": ("exp_avg", "exp_avg_sq"),
    "sgd": ("momentum_buffer",),
    "sgd-no-momentum": (),
}


# --- in a worker ------------------------------------------------------------------------------


def save(step: Any, directory: Path, at: int) -> None:
    from megads.checkpoint.store import CheckpointStore
    from megads.train.snapshot import sharded_state

    step.gather_parameters()
    with CheckpointStore(directory, async_save=False) as store:
        state = sharded_state(step, optimizer=True, generators=True, fp8_histories=step.delayed_scaling)
        store.save(at, state, {})
        assert store.last_saved is not None


def load(step: Any, directory: Path, generators: bool) -> None:
    from megads.checkpoint.store import CheckpointStore
    from megads.train.snapshot import restore_state, sharded_state

    parts = {"optimizer": True, "generators": generators, "fp8_histories": step.delayed_scaling}
    with CheckpointStore(directory) as store:
        loaded = store.load("latest", sharded_state(step, **parts, loading=True))
        assert loaded is not None
        restore_state(step, loaded[0], **parts)


def state_of(step: Any) -> dict[str, Any]:
    return {"shards": tiny.shards(step), "optimizer_steps": tiny.optimizer_steps(step)}


def train_and_save(settings: dict[str, Any], directory: Path) -> dict[str, Any]:
    """A run that saves after BEFORE steps and goes on."""
    step = tiny.start(settings)
    tiny.train(step, 0, BEFORE)
    save(step, directory, BEFORE)
    saved = state_of(step)
    records = tiny.train(step, BEFORE, AFTER)
    return {"saved": saved, "records": records, "end": state_of(step)}


def load_and_train(settings: dict[str, Any], directory: Path, generators: bool) -> dict[str, Any]:
    """A run that starts from the newest checkpoint and saves at its end; its own weights were others."""
    step = tiny.start(settings | {"seed": 7})
    fresh = tiny.shards(step, optimizer=False)
    load(step, directory, generators)
    loaded = state_of(step)
    records = tiny.train(step, BEFORE, AFTER)
    save(step, directory, BEFORE + AFTER)
    return {"fresh": fresh, "loaded": loaded, "records": records, "end": state_of(step)}


def load_and_list(settings: dict[str, Any], directory: Path) -> list[tuple[Any, ...]]:
    """Hyperparameters of every parameter group in the step after a resume."""
    step = tiny.start(settings)
    load(step, directory, generators=True)
    tiny.train(step, BEFORE, 1)
    return [(group["lr"], group["betas"], group["eps"]) for group in step.optimizer.param_groups]


# --- with the workers' results ----------------------------------------------------------------


def job(layout: str, function: Any, settings: dict[str, Any], **kwargs: Any) -> list[dict[str, Any]]:
    processes, of_layout = LAYOUTS[layout]
    return run_distributed(processes, function, settings=of_layout | settings, **kwargs)


def whole(ranks: list[dict[str, Any]], when: str) -> dict[str, Tensor]:
    return tiny.assemble([rank[when]["shards"] for rank in ranks])


def assert_equal_tensors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    differ = [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]
    assert not differ


def assert_has_state(tensors: dict[str, Tensor], moments: tuple[str, ...]) -> None:
    """Every weight has its moments, and none is still zero: what is compared below is not empty."""
    weights = {
        name for name in tensors if not name.startswith("optimizer.") and not name.endswith("expert_bias")
    }
    for moment in moments:
        assert {f"optimizer.state.{moment}.{name}" for name in weights} <= tensors.keys()
        assert all(tensors[f"optimizer.state.{moment}.{name}"].any() for name in weights)


def hexadecimal(ranks: list[dict[str, Any]]) -> list[list[str]]:
    numbers = [
        [*record["losses"], record["grad_norm"]] for record in tiny.merge([r["records"] for r in ranks])
    ]
    return [[float(number).hex() for number in of_step] for of_step in numbers]


@pytest.mark.parametrize(
    ("layout", "optimizer"),
    [
        ("single", "adamw"),
        ("single", "adam"),
        ("single", "sgd"),
        ("single", "sgd-no-momentum"),
        ("dp2", "adamw"),
        ("dp2-zero0", "adamw"),
        ("tp2", "adamw"),
        ("pp2-vpp2", "adamw"),
        ("ep2", "adamw"),
        ("dp2-zero2", "adamw"),
        ("dp2-zero3", "adam"),
        ("tp2-ep2-zero3", "adamw"),
    ],
)
def test_resume_is_bitwise_the_same_run(layout: str, optimizer: str, tmp_path: Path) -> None:
    """With dropout and router noise: generators of every rank go on where they were."""
    settings = RANDOM | OPTIMIZERS[optimizer]
    run = job(layout, train_and_save, settings, directory=tmp_path)
    resumed = job(layout, load_and_train, settings, directory=tmp_path, generators=True)
    assert hexadecimal(resumed) == hexadecimal(run)
    assert_has_state(whole(run, "saved"), MOMENTS[optimizer])
    assert_equal_tensors(whole(resumed, "loaded"), whole(run, "saved"))
    assert_equal_tensors(whole(resumed, "end"), whole(run, "end"))
    for when, expected in (("loaded", BEFORE), ("end", BEFORE + AFTER)):
        for rank in resumed:
            assert rank[when]["optimizer_steps"] == ({expected} if "adam" in optimizer else set())


def test_a_resumed_run_is_resumed_again(tmp_path: Path) -> None:
    """The optimizer's step counters, which Megatron-Core moves about when it loads, count on."""
    layout = "dp2"
    job(layout, train_and_save, {}, directory=tmp_path)
    first = job(layout, load_and_train, {}, directory=tmp_path, generators=True)
    second = job(layout, load_and_train, {}, directory=tmp_path, generators=True)
    assert_equal_tensors(whole(second, "loaded"), whole(first, "end"))
    assert all(rank["loaded"]["optimizer_steps"] == {BEFORE + AFTER} for rank in second)


@pytest.mark.parametrize("layout", ["dp2", "dp2-zero0", "dp2-zero3"])
def test_a_run_resumes_with_the_hyperparameters_that_it_is_given(layout: str, tmp_path: Path) -> None:
    """Megatron-Core finds parameter groups by their learning rates, and takes betas from the checkpoint."""
    job(layout, train_and_save, {}, directory=tmp_path)
    changed = {
        "training.learning_rate": 5e-4, "training.min_learning_rate": 1e-5, "training.adam_beta1": 0.8,
        "training.adam_beta2": 0.9, "training.adam_eps": 1e-6,
    }  # fmt: skip
    for groups in job(layout, load_and_list, changed, directory=tmp_path):
        assert set(groups) == {(5e-4, (0.8, 0.9), 1e-6)}


def test_generators_are_what_makes_it_the_same_run(tmp_path: Path) -> None:
    """Without them the tensors are the same and the run is another: the test above can fail."""
    run = job("single", train_and_save, RANDOM, directory=tmp_path)
    resumed = job("single", load_and_train, RANDOM, directory=tmp_path, generators=False)
    assert_equal_tensors(whole(resumed, "loaded"), whole(run, "saved"))
    assert hexadecimal(resumed) != hexadecimal(run)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("single", "tp2"),
        ("tp2", "pp2"),
        ("pp2", "ep2"),
        ("ep2", "single"),
        ("dp2", "cp2"),
        ("pp2-vpp2", "tp2-ep2"),
        ("tp2-etp2", "single"),
        ("pp2-uneven", "dp2"),
        ("tp2-pp2", "pp2-ep2"),
        ("dp2", "dp2-zero3"),
        ("dp2-zero3", "dp2"),
        ("etp2-zero2", "tp2-ep2-zero3"),
        ("cp2-zero3", "pp2-uneven"),
    ],
)
def test_another_layout_goes_on_from_the_same_tensors(source: str, target: str, tmp_path: Path) -> None:
    reshard(source, target, {}, tmp_path, MOMENTS["adamw"])


def test_sgd_in_another_layout(tmp_path: Path) -> None:
    reshard("dp2", "tp2", OPTIMIZERS["sgd"], tmp_path, MOMENTS["sgd"])


def test_tied_embeddings_in_another_layout(tmp_path: Path) -> None:
    """A pipeline holds the table twice, a checkpoint once; which rank holds what changes here."""
    reshard("pp2", "pp2-vpp2", {"model.tie_word_embeddings": True}, tmp_path, MOMENTS["adamw"])


def reshard(
    source: str, target: str, settings: dict[str, Any], directory: Path, moments: tuple[str, ...]
) -> None:
    run = job(source, train_and_save, settings, directory=directory)
    resumed = job(target, load_and_train, settings, directory=directory, generators=False)
    saved = whole(run, "saved")
    assert_has_state(saved, moments)
    fresh = tiny.assemble([rank["fresh"] for rank in resumed])
    assert not any(torch.equal(fresh[name], saved[name]) for name in fresh)
    assert_equal_tensors(whole(resumed, "loaded"), saved)
    records = zip(*(tiny.merge([rank["records"] for rank in ranks]) for ranks in (resumed, run)), strict=True)
    for index, (mine, other) in enumerate(records):
        # The second of these losses is of weights that the loaded moments have moved.
        assert mine["losses"] == pytest.approx(other["losses"], rel=LOSS_TOLERANCE), f"step {BEFORE + index}"
        assert mine["loads"] == other["loads"]
