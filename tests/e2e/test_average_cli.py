"""A run that keeps an average of its weights evaluates it, saves it, and goes on with it."""

from pathlib import Path
from typing import Any

from tests.e2e.commands import pretrain_well, records

FLAGS = ("--training.average_decay", 0.9, "--training.eval_interval", 4, "--eval-iters", 1)


def validations(output: Path) -> dict[int, dict[str, Any]]:
    return {record["step"]: record for record in records(output, "validation")}


def test_the_average_is_evaluated_and_survives_a_resume(config: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    pretrain_well("--config", config, "--output_dir", whole, *FLAGS)
    for stop in ((), ("--training.exit_step", 4))[::-1]:
        pretrain_well("--config", config, "--output_dir", parts, *FLAGS, *stop)
    expected, found = validations(whole), validations(parts)
    assert set(expected) == set(found) == {4, 8}
    for step in expected:
        assert expected[step]["average_loss"] != expected[step]["loss"]
        assert found[step]["average_loss"] == expected[step]["average_loss"]
        assert found[step]["loss"] == expected[step]["loss"]


def test_an_average_may_begin_in_the_middle_of_a_run(config: Path) -> None:
    pretrain_well("--config", config, "--training.exit_step", 4)
    done = pretrain_well("--config", config, *FLAGS)
    assert "holds no average of the weights" in done.stdout + done.stderr
    assert "average_loss" in validations(config.parent / "run")[8]
    without = pretrain_well("--config", config, "--train-iters", 9)
    assert "holds an average of the weights, and this run keeps none" in without.stdout
