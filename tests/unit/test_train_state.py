"""The training state survives JSON bit for bit, and refuses anything else."""

import json
import random
from dataclasses import fields

import orjson
import pytest

from megads.errors import CheckpointError
from megads.train.state import TrainState


def some_state(seed: int) -> TrainState:
    draw = random.Random(seed)
    return TrainState(
        step=draw.randrange(10**7),
        tokens=draw.randrange(10**14),
        samples=draw.randrange(10**10),
        skipped_steps=draw.randrange(100),
        best_validation_loss=draw.choice([None, draw.uniform(0, 12), 5e-324, 0.1 + 0.2]),
        best_validation_step=draw.choice([None, 12]),
        wall_seconds=draw.uniform(0, 1e7),
        flops=draw.uniform(0, 1e25),
    )


@pytest.mark.parametrize("codec", [(json.dumps, json.loads), (orjson.dumps, orjson.loads)])
def test_json_round_trip_is_exact(codec):
    write, read = codec
    for seed in range(200):
        state = some_state(seed)
        back = TrainState.from_dict(read(write(state.to_dict())))
        assert back == state
        assert back.flops.hex() == state.flops.hex()
        assert back.wall_seconds.hex() == state.wall_seconds.hex()


def test_every_field_is_saved():
    assert list(TrainState().to_dict()) == [field.name for field in fields(TrainState)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": None}, "tokens must be a whole number"),
        ({"tokens": -1}, "tokens must be a whole number"),
        ({"tokens": 1.5}, "tokens must be a whole number"),
        ({"step": True}, "step must be a whole number"),
        ({"flops": "1e3"}, "flops must be a finite number"),
        ({"flops": float("nan")}, "flops must be a finite number"),
        ({"wall_seconds": None}, "wall_seconds must be a finite number"),
        ({"learning_rate": 0.1}, "learning_rate is unknown"),
    ],
)
def test_bad_field_is_refused(change: dict[str, object], message: str):
    with pytest.raises(CheckpointError, match=message):
        TrainState.from_dict({**TrainState().to_dict(), **change})


def test_all_problems_are_named_at_once():
    values = TrainState().to_dict()
    del values["samples"]
    with pytest.raises(CheckpointError) as caught:
        TrainState.from_dict({**values, "speed": 1, "step": -3})
    assert all(name in str(caught.value) for name in ("samples is missing", "speed is unknown", "step must"))


def test_not_an_object():
    with pytest.raises(CheckpointError, match="object"):
        TrainState.from_dict([1, 2])  # type: ignore[arg-type]


def test_whole_float_written_as_integer():
    assert TrainState.from_dict({**TrainState().to_dict(), "flops": 3}).flops == 3.0


def test_advance():
    state = TrainState()
    state.advance(samples=8, tokens=8 * 256, flops=1e9, seconds=0.5)
    state.advance(samples=16, tokens=16 * 256, flops=2e9, seconds=1.0, skipped=True)
    assert state == TrainState(
        step=2, tokens=24 * 256, samples=24, skipped_steps=1, wall_seconds=1.5, flops=3e9
    )


def test_best_validation_loss():
    state = TrainState(step=10)
    assert not state.record_validation(float("nan"))
    assert not state.record_validation(float("inf"))
    assert state.best_validation_loss is None
    assert state.record_validation(5.0)
    state.step = 20
    assert not state.record_validation(5.0)
    assert not state.record_validation(float("nan"))
    assert (state.best_validation_loss, state.best_validation_step) == (5.0, 10)
    state.step = 30
    assert state.record_validation(4.5)
    assert (state.best_validation_loss, state.best_validation_step) == (4.5, 30)
