"""What a run does when its gradients or its loss go wrong, with the faults injected into real runs."""

import random
import statistics
from pathlib import Path
from typing import Any

import pytest

from tests.dist.harness import run_distributed
from tests.e2e.commands import pretrain_well, records

SPIKES = {
    "training.stability.spike_window": 16,
    "training.stability.spike_least_increase": 0.3,
    "training.stability.spike_threshold": 5.0,
    "training.eval_interval": 0,
    "training.save_interval": 10,
    "distributed.zero_stage": 1,
}


def faulty_run(
    config_path: Path, settings: dict[str, Any], faults: dict[int, tuple[str, int]], once: bool = True
) -> dict[str, Any]:
    """A whole run in which `faults` (step: kind, rank) happen; `once`: not again after a rollback.

    Kinds: "nan" puts NaN into a gradient of that rank, "batch" replaces the labels of all by noise,
    "weights" damages the weights of all before the step.
    """
    import torch
    import torch.distributed as dist

    from megads.checkpoint.store import CheckpointStore
    from megads.config.loader import load_config
    from megads.config.resolve import resolve
    from megads.config.validate import check
    from megads.errors import MegadsError
    from megads.mcore.groups import (
        initialize_device,
        initialize_process_groups,
        world_size_from_environment,
    )

    config = load_config(str(config_path), settings)
    world_size = world_size_from_environment()
    check(config, world_size, False)
    resolved = resolve(config, world_size, False)
    initialize_device(resolved.device)
    initialize_process_groups(resolved, 2, config.seed)
    from megads.train.loop import Run

    left = dict(faults)

    def noisy(batches: Any) -> Any:
        for batch in batches:
            yield batch | {"labels": torch.randint_like(batch["labels"], config.model.vocab_size)}

    def train(batches: Any, *rest: Any) -> Any:
        step = run.state.step + 1
        kind, rank = left.pop(step, ("", 0)) if once else left.get(step, ("", 0))
        hooks = []
        if kind == "weights":
            with torch.no_grad():
                for parameter in run.step.chunks[0].parameters():
                    parameter.mul_(3.0)
            run.step.optimizer.reload_model_params()
        elif kind == "nan" and dist.get_rank() == rank:
            norm = next(p for n, p in run.step.chunks[0].named_parameters() if n.endswith("norm.weight"))
            hooks.append(norm.register_hook(lambda gradient: gradient * torch.nan))
        elif kind == "batch":
            batches = noisy(batches)
        try:
            return original(batches, *rest)
        finally:
            for hook in hooks:
                hook.remove()

    error = ""
    with CheckpointStore(resolved.checkpoint_dir, keep_last_n=0) as store:
        run = Run(config, resolved, store)
        original, run.step.train = run.step.train, train  # type: ignore[method-assign]
        try:
            run.to_the_end()
        except MegadsError as raised:
            error = str(raised)
        finite = all(bool(torch.isfinite(p).all()) for c in run.step.chunks for p in c.parameters())
    return {"state": run.state.to_dict(), "finite": finite, "error": error}


def run_faulty(
    config: Path, faults: dict[int, tuple[str, int]], settings: dict[str, Any], *, processes: int = 1,
    once: bool = True,
) -> list[dict[str, Any]]:  # fmt: skip
    """What `faulty_run` gives, by rank."""
    return run_distributed(
        processes, faulty_run, timeout_seconds=180, config_path=config, settings=settings, faults=faults,
        once=once,
    )  # fmt: skip


def events(output: Path, name: str) -> list[dict[str, Any]]:
    return [record for record in records(output, "event") if record["event"] == name]


def test_nothing_is_saved_while_updates_are_left_out(config: Path) -> None:
    settings = {"training.train_steps": 12, "training.save_interval": 5}
    run_faulty(config, dict.fromkeys((4, 5, 6), ("nan", 0)), settings)
    saved = (config.parent / "run" / "checkpoints").glob("step_*")
    assert sorted(int(path.name[-2:]) for path in saved) == [7, 10, 12]


def test_a_curve_that_cannot_be_drawn_costs_no_run(config: Path) -> None:
    done = pretrain_well("--config", config, "--lr", 1e10, "--train-iters", 4, "--log-interval", 4)
    assert "the loss is nan" in done.stdout
    assert "no loss curve: " in done.stdout


def test_a_hundred_poisoned_gradients_poison_nothing(config: Path) -> None:
    random_ = random.Random(0)
    steps = random_.sample(range(1, 220), 100)
    faults = {step: ("nan", random_.randrange(2)) for step in steps}
    settings = {
        "training.train_steps": 220, "training.stability.max_skipped_steps": 50,
        "training.save_interval": 100, "training.log_interval": 10,
    }  # fmt: skip
    ranks = run_faulty(config, faults, settings, processes=2)
    for rank in ranks:
        assert rank["finite"]
        assert not rank["error"]
        assert rank["state"]["skipped_steps"] == 100
    train = records(config.parent / "run", "train")
    assert train[-1]["lm_loss"] < train[0]["lm_loss"]


def test_poisoned_gradients_in_a_row_end_the_run(config: Path) -> None:
    faults = dict.fromkeys(range(3, 9), ("nan", 0))
    settings = {"training.stability.max_skipped_steps": 4}
    [found] = run_faulty(config, faults, settings)
    assert "4 steps in a row, up to step 6, had gradients that are not finite" in found["error"]
    assert found["finite"]


def test_bad_batches_are_left_out(config: Path) -> None:
    faults = {50: ("batch", 0), 51: ("batch", 0), 56: ("batch", 0)}
    settings = SPIKES | {
        "training.train_steps": 60, "training.stability.spike_policy": "skip",
        "training.learning_rate": 1e-2,
        # Batches of 128 tokens: a sound one may be 0.8 above the median by itself, noise is 2.2 above.
        "training.stability.spike_least_increase": 1.5,
    }  # fmt: skip
    ranks = run_faulty(config, faults, settings, processes=2)
    output = config.parent / "run"
    left_out = {event["step"] for event in events(output, "spike")}
    assert left_out == faults.keys()
    for rank in ranks:
        assert rank["state"]["skipped_steps"] == rank["state"]["spikes"] == len(left_out)
        assert rank["state"]["step"] == 60


@pytest.mark.parametrize("processes", [1, 2])
def test_a_lasting_spike_goes_back_and_past_its_data(config: Path, processes: int) -> None:
    settings = SPIKES | {
        "training.train_steps": 60, "training.stability.spike_policy": "rollback",
        "training.learning_rate": 1e-2,
    }  # fmt: skip
    ranks = run_faulty(config, {34: ("weights", 0)}, settings, processes=processes)
    output = config.parent / "run"
    [rollback] = events(output, "rollback")
    assert (rollback["step"], rollback["from_step"], rollback["first_bad_step"]) == (30, 36, 34)
    for rank in ranks:
        state = rank["state"]
        assert (state["step"], state["rollbacks"], state["lr_factor"]) == (60, 1, 0.5)
        assert state["skipped_samples"] == 6 * 4
        assert state["samples"] - state["skipped_samples"] == 60 * 4
    train = records(output, "train")
    assert [record["step"] for record in train] == list(range(1, 61))
    # As good as before the spike, which was four times as high; a step of 128 tokens may be off by a tenth.
    assert statistics.median(record["lm_loss"] for record in train[-10:]) < rollback["median_loss"] + 0.1
    full, halved = (next(r for r in train if r["step"] == step)["learning_rate"] for step in (30, 31))
    assert halved == pytest.approx(full / 2, rel=0.1)
    assert (output / "metrics.superseded.jsonl").exists()


def test_it_does_not_go_back_for_ever(config: Path) -> None:
    settings = SPIKES | {
        "training.train_steps": 60, "training.stability.spike_policy": "rollback",
        "training.stability.max_rollbacks": 2, "training.learning_rate": 1e-2,
    }  # fmt: skip
    [found] = run_faulty(config, {34: ("weights", 0)}, settings, once=False)
    assert "has gone back 2 times already" in found["error"]
    # Restarted, it still knows.
    [again] = run_faulty(config, {34: ("weights", 0)}, settings, once=False)
    assert "has gone back 2 times already" in again["error"]
    assert again["state"]["lr_factor"] == 0.25


def test_a_spike_before_the_first_checkpoint_is_an_error(config: Path) -> None:
    settings = SPIKES | {
        "training.train_steps": 60, "training.stability.spike_policy": "rollback",
        "training.save_interval": 0, "training.learning_rate": 1e-2,
    }  # fmt: skip
    [found] = run_faulty(config, {34: ("weights", 0)}, settings)
    assert "no checkpoint is older than that" in found["error"]
