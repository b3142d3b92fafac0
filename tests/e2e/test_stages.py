"""Stages follow one another on the weights of the one before; stopped and restarted, nothing changes."""

from pathlib import Path
from typing import Any

import pytest

from megads.config.stages import load_stages
from megads.train.stages import _where_to_start
from tests.dist.harness import run_distributed
from tests.e2e.commands import pretrain, records, steps, write_json
from tests.e2e.test_resume_cli import measured

PRETRAIN_STEPS, EXTEND_STEPS = 4, 6
YARN = {"max_context_length": 32, "rope_scaling": {"factor": 2, "original_max_position_embeddings": 16}}
STAGES = [
    {
        "name": "pretrain",
        "training": {"seq_length": 16, "train_steps": PRETRAIN_STEPS},
        "distributed": {"expert_parallel_size": 2},
    },
    {
        "name": "extend",
        "model": {"mla": YARN},
        "training": {"train_steps": EXTEND_STEPS},
        "distributed": {"tensor_parallel_size": 2},
        "checkpointing": {"init_optimizer": "keep"},
    },
    # One step that changes nothing: what it evaluates is what it started from.
    {
        "name": "probe",
        "model": {"mla": YARN, "moe": {"bias_update_rate": 0}},
        "training": {
            "train_steps": 1,
            "lr_warmup_steps": 0,
            "learning_rate": 1e-30,
            "min_learning_rate": 0,
        },
        "distributed": {"tensor_parallel_size": 2},
    },
]


def run_command(
    path: Path, settings: dict[str, Any], sigterm_at_call: int = 0, only: str = ""
) -> dict[str, Any]:
    """What `pretrain_megads.py` does, in this process of a job; in one of its training steps SIGTERM comes.

    Returns the error if there was one, how many optimizers, gradient buffers and weights of earlier stages
    were in memory when a model was built, how many at the end, and how many
    updates of earlier stages each average of the weights has in it.
    """
    import os
    import signal
    import weakref

    from megads.config.stages import check_stages, load_stages
    from megads.errors import MegadsError
    from megads.mcore.groups import initialize_device, world_size_from_environment

    stages = load_stages(path, settings)
    check_stages(stages, world_size_from_environment(), cuda=False)
    initialize_device("cpu")
    from megads.train import loop
    from megads.train.stages import run_stages

    models: list[weakref.ref[Any]] = []
    alive_before: list[int] = []
    averages: list[int] = []

    def alive() -> int:
        found = [reference() for reference in models]
        return sum(one is not None and getattr(one, "numel", lambda: 1)() > 0 for one in found)

    class Recorded(loop.TrainingStep):
        calls = 0

        def __init__(self, *args: Any) -> None:
            alive_before.append(alive())
            super().__init__(*args)
            gradients = [buffer.grad_data for chunk in self.chunks for buffer in chunk.buffers]
            parameters = [parameter for chunk in self.chunks for parameter in chunk.parameters()]
            models.extend(weakref.ref(one) for one in (self.optimizer, *gradients, *parameters))

        def train(self, *args: Any) -> Any:
            self.calls += 1
            if self.calls == sigterm_at_call:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().train(*args)

    def initialize(*args: Any) -> Any:
        state = original(*args)
        averages.append(args[-1].earlier_updates)
        return state

    original = loop.initialize
    loop.TrainingStep, loop.initialize = Recorded, initialize  # type: ignore[misc]
    error = ""
    try:
        run_stages(stages, world_size_from_environment(), False, only or None)
    except MegadsError as raised:
        error = f"{type(raised).__name__}: {raised}"
    return {"error": error, "alive_before": alive_before, "alive": alive(), "averages": averages}


@pytest.fixture
def staged(config: Path, tmp_path: Path) -> Path:
    return write_json(
        tmp_path / "stages.json",
        {
            "extends": str(config),
            "training": {"average_decay": 0.9, "save_interval": 2, "eval_interval": 100},
            "validation": {"eval_steps": 1, "per_source": False},
            "stages": STAGES,
        },
    )


def run(path: Path, output: Path, processes: int = 2, **kwargs: Any) -> list[dict[str, Any]]:
    settings = {"output_dir": str(output)} | kwargs.pop("settings", {})
    return run_distributed(processes, run_command, path=path, settings=settings, **kwargs)


def test_stages_are_one_run_however_often_it_is_stopped(staged: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for rank in run(staged, whole):
        assert rank == {
            "error": "",
            "alive_before": [0, 0, 0],
            "alive": 0,
            "averages": [PRETRAIN_STEPS, PRETRAIN_STEPS + EXTEND_STEPS],
        }
    layouts = [records(whole / stage["name"], "run")[0]["layout"] for stage in STAGES]
    assert layouts == ["EP2 DP2", "TP2", "TP2"]
    first = measured(whole / "extend", "train")[0]
    assert (first["step"], first["tokens"], first["samples"]) == (1, 4 * 32, 4), "counters start at 0"
    # Evaluated on the same samples, with the weights and the average that the stage before ended with.
    losses = [measured(whole / name, "validation")[-1]["loss"] for name in ("extend", "probe")]
    assert losses[0] == losses[1]

    run(staged, cut, settings={"training.exit_step": 2})
    assert steps(cut / "pretrain") == [1, 2]
    run(staged, cut, sigterm_at_call=PRETRAIN_STEPS - 2)  # in its last step
    assert steps(cut / "pretrain") == list(range(1, PRETRAIN_STEPS + 1))
    assert not (cut / "extend").exists(), "a stop request ends all stages"
    run(staged, cut, settings={"training.exit_step": EXTEND_STEPS - 1})
    assert steps(cut / "extend") == list(range(1, EXTEND_STEPS))
    run(staged, cut)
    for stage in STAGES:
        for kind in ("train", "validation"):
            name = stage["name"]
            assert measured(cut / name, kind) == measured(whole / name, kind), (name, kind)

    again = pretrain("--config", staged, "--output_dir", cut, processes=2)
    assert again.returncode == 0, again.stderr
    assert "stage extend: skipped, finished at step 6" in again.stdout
    assert "nothing is left to do" in again.stdout
    assert [len(records(cut / stage["name"], "run")) for stage in STAGES] == [2, 2, 1]


def test_a_stage_by_itself_and_stages_that_do_not_follow(
    staged: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one, output = (
        {"distributed.expert_parallel_size": 1, "distributed.tensor_parallel_size": 1},
        tmp_path / "run",
    )

    def error(**kwargs: Any) -> str:
        return str(run(staged, output, processes=1, **{"settings": one} | kwargs)[0]["error"])

    early = error(only="extend")
    assert early.startswith("CheckpointError: stage extend starts from step 4 of stage pretrain")
    assert "there is no checkpoint" in early
    assert error(only="pretrain") == ""
    assert not (output / "extend" / "checkpoints").exists()
    assert error(only="extend") == ""
    longer = error(settings=one | {"training.train_steps": 8})
    assert "stage pretrain is at step 4 of 8, but stage extend after it has checkpoints" in longer
    stages = load_stages(staged, one | {"output_dir": str(output), "checkpointing.load": None})
    assert _where_to_start(stages, 0) == ("", None)
    assert "stage pretrain starts afresh, and stage extend after it has checkpoints" in caplog.text


def test_data_of_a_later_stage_are_missed_before_the_first_starts(config: Path, tmp_path: Path) -> None:
    later = {"name": "answers", "data": {"sources": [{"name": "gone", "path": str(tmp_path / "gone")}]}}
    path = write_json(
        tmp_path / "stages.json", {"extends": str(config), "stages": [{"name": "first"}, later]}
    )
    error = run(path, tmp_path / "run", processes=1)[0]["error"]
    assert error.startswith("DataError: stage answers: ")
    assert str(tmp_path / "gone") in error
    assert not (tmp_path / "run" / "first" / "checkpoints").exists()


def test_a_run_from_the_weights_of_another(config: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    average = {"training.average_decay": 0.9, "training.train_steps": 2}
    run(config, first, processes=1, settings=average | {"checkpointing.save_optimizer": False})
    start = average | {"checkpointing.init_from": str(first / "checkpoints")}

    def begin(**settings: Any) -> dict[str, Any]:
        return run(config, second, processes=1, settings=start | settings)[0]

    assert "saved without its optimizer" in begin(**{"checkpointing.init_optimizer": "keep"})["error"]
    assert "model.moe.num_experts: checkpoint 4, now 8" in begin(**{"model.moe.num_experts": 8})["error"]
    assert "gone" in begin(**{"checkpointing.init_from": str(tmp_path / "gone")})["error"]
    assert begin()["averages"] == [2]
    assert begin(**{"training.train_steps": 3})["averages"] == [], "goes on from its own checkpoint"
    assert [record["step"] for record in records(second, "run")] == [0, 2]
    assert steps(second) == [1, 2, 3]
