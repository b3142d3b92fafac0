"""The moving average of the weights: the textbook's numbers, in every layout, through checkpoints."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.dist import tiny
from tests.dist.harness import run_distributed
from tests.dist.tiny import LAYOUTS

DECAY, STEPS = 0.3, 4
# A gradient that is nothing but rounding would move its weight as far as any other by Adam's usual epsilon.
CALM = {"training.adam_eps": 1e-3}


def averages_of(step: Any, average: Any) -> list[tuple[str, tuple[int, ...], tuple[int, ...], Tensor]]:
    """This rank's parts of the average, under the names of the weights."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories, is_main_replica

    from megads.train.snapshot import metadata_of

    state = average.sharded_state(metadata_of(step))
    apply_factories(state)
    return [
        (
            shard.key.removeprefix("average."),
            tuple(shard.global_shape),
            tuple(shard.global_offset),
            shard.data.detach().clone()[(None,) * shard.prepend_axis_num],
        )
        for shard in nested_values(state)
        if isinstance(shard, ShardedTensor) and is_main_replica(shard.replica_id)
    ]


def run(settings: dict[str, Any], directory: Path | None = None) -> dict[str, Any]:
    """Weights after each step, the average at the end, and after a save into `directory` and a load."""
    from megads.checkpoint.store import CheckpointStore
    from megads.train.average import ParameterAverage
    from megads.train.snapshot import restore_state, sharded_state

    step = tiny.start(settings)
    average = ParameterAverage(step, DECAY, interval=1)
    weights = [tiny.shards(step, optimizer=False)]
    for index in range(STEPS):
        tiny.train(step, index, 1)
        average.update(index + 1)
        weights.append(tiny.shards(step, optimizer=False))
    found = {"weights": weights, "average": averages_of(step, average)}
    if directory is not None:
        with CheckpointStore(directory, async_save=False) as store:
            store.save(STEPS, sharded_state(step, optimizer=True, generators=False, average=average), {})
        fresh = ParameterAverage(step, DECAY, interval=1)
        with CheckpointStore(directory) as store:
            places = sharded_state(step, optimizer=True, generators=False, average=fresh, loading=True)
            loaded = store.load("latest", places)
            assert loaded is not None
            restore_state(step, loaded[0], optimizer=True, generators=False, average=fresh)
        found["loaded"] = averages_of(step, fresh)
    return found


def whole(ranks: list[dict[str, Any]], name: str) -> dict[str, Tensor]:
    return tiny.assemble([rank[name] for rank in ranks])


def textbook() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(expected, found) of one process, the expected one computed here from the weights of each step."""
    ranks = run_distributed(1, run, settings={})
    weights = [tiny.assemble([rank["weights"][i] for rank in ranks]) for i in range(STEPS + 1)]
    found = whole(ranks, "average")
    expected = {name: weights[0][name].double() for name in found}
    for n, now in enumerate(weights[1:]):
        decay = min(DECAY, (1 + n) / (10 + n))
        expected = {name: decay * e + (1 - decay) * now[name].double() for name, e in expected.items()}
    return expected, found


def test_the_average_is_the_textbooks() -> None:
    expected, found = textbook()
    assert len(found) > 50
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name].double(), tensor, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("layout", ["tp2", "pp2", "ep2", "dp2", "dp2-zero2", "tp2-ep2-zero3"])
def test_every_layout_saves_and_loads_the_same_average(layout: str, tmp_path: Path) -> None:
    single = whole(run_distributed(1, run, settings=CALM), "average")
    processes, settings = LAYOUTS[layout]
    ranks = run_distributed(processes, run, settings=settings | CALM, directory=tmp_path)
    found, loaded = whole(ranks, "average"), whole(ranks, "loaded")
    assert found.keys() == loaded.keys() == single.keys()
    for name, tensor in single.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)
        assert torch.equal(loaded[name], found[name]), name


def evaluate(settings: dict[str, Any]) -> dict[str, Any]:
    from megads.train.average import ParameterAverage

    step = tiny.start(settings)
    average = ParameterAverage(step, 0.999, interval=2)
    parts = tiny.micro_batches(step, tiny.global_batch(99))
    untrained = step.evaluate(iter(parts), len(parts))[0].tolist()
    for index in range(3):
        tiny.train(step, index, 1)
        if index == 0:
            average.update(1)  # not due: it still is the untrained model
    before = tiny.shards(step, optimizer=False)
    own = step.evaluate(iter(parts), len(parts))[0].tolist()
    with average.in_place_of_weights():
        averaged = step.evaluate(iter(parts), len(parts))[0].tolist()
    same = [torch.equal(a[3], b[3]) for a, b in zip(before, tiny.shards(step, optimizer=False), strict=True)]
    return {"untrained": untrained, "own": own, "averaged": averaged, "same": all(same)}


@pytest.mark.parametrize("layout", ["single", "dp2-zero2", "dp2-zero3"])
def test_evaluating_the_average_leaves_the_weights_alone(layout: str) -> None:
    processes, settings = LAYOUTS[layout]
    for found in run_distributed(processes, evaluate, settings=settings):
        assert found["same"]
        assert found["averaged"] == pytest.approx(found["untrained"], rel=1e-2)
        assert found["averaged"] != found["own"]
