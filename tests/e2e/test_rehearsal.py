"""DeepSeek-V3's whole recipe, shrunk: the run goes through all its phases, and resumes between any two."""

from pathlib import Path
from typing import Any

import pytest

from megads.config.loader import load_config
from megads.config.resolve import resolve
from megads.config.scalars import Schedules, scheduled_settings
from megads.config.schema import Config
from tests.dist.harness import run_distributed
from tests.e2e.commands import ROOT, Finished, records, tool
from tests.e2e.test_resume_cli import measured

V3 = ROOT / "configs" / "deepseek_v3_671b.json"
TOKENS, BATCH_SIZE = 21_000, 5


def rehearse(like: Path, tokens: int, batch_size: int, output: Path) -> Finished:
    sizes = ("--tokens", tokens, "--batch-size", batch_size)
    return tool("rehearse.py", V3, "--like", like, *sizes, "--output", output)


@pytest.fixture
def rehearsal(config: Path, tmp_path: Path) -> Path:
    """V3's recipe on the smallest model, in about 140 steps."""
    path = tmp_path / "rehearsal.json"
    made = rehearse(config, TOKENS, BATCH_SIZE, path)
    assert made.returncode == 0, made.stderr
    assert "14,800,000,000,000 tokens of deepseek_v3_671b in 21,000" in made.stdout
    return path


def train_in_parts(path: Path, output_dir: Path, exit_steps: list[int | None]) -> None:
    """In a worker: the run, stopped after each of `exit_steps` and started again."""
    from megads.config.validate import check
    from megads.mcore.groups import initialize_device, initialize_process_groups
    from megads.train.loop import train

    for index, exit_step in enumerate(exit_steps):
        settings = {"output_dir": str(output_dir), "training.exit_step": exit_step}
        config = load_config(str(path), settings)
        check(config, 1, cuda=False)
        resolved = resolve(config, 1, cuda=False)
        if index == 0:
            initialize_device(resolved.device)
            initialize_process_groups(resolved, 2, config.seed)
        train(config, resolved)


def boundaries(config: Config) -> list[int]:
    """The last step before each change of phase or batch size."""
    resolved = resolve(config, 1, cuda=False)
    phases = [*config.training.lr_phases, *(p for s in scheduled_settings(config) for p in s.phases)]
    untils = {phase.until_tokens for phase in phases} - {resolved.total_tokens}
    ends = {resolved.batch.steps_for(until_tokens + 1) - 1 for until_tokens in untils}
    return sorted(ends | {stage.first_step for stage in resolved.batch.stages[1:]})


def test_all_phases_of_v3_run_and_resume_bitwise(rehearsal: Path, tmp_path: Path) -> None:
    config = load_config(str(rehearsal))
    stops: list[Any] = boundaries(config)
    assert len(stops) == 8, "warm-up; four increments of the batch; 10T, 14.3T and 14.633T tokens"
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run_distributed(1, train_in_parts, path=rehearsal, output_dir=whole, exit_steps=[None])
    run_distributed(1, train_in_parts, path=rehearsal, output_dir=cut, exit_steps=[*stops, None])
    assert [record["step"] for record in records(cut, "run")] == [0, *stops]
    assert measured(cut, "train") == measured(whole, "train")

    seen = records(whole, "train")
    schedules = Schedules(config, resolve(config, 1, cuda=False))
    for before, record in zip([0, *(r["tokens"] for r in seen)], seen, strict=False):
        batch_size, scalars = schedules.at(before)
        assert (record["batch_size"], record["learning_rate"]) == (batch_size, scalars.learning_rate)
    assert sorted({r["batch_size"] for r in seen}) == [1, 2, 3, 4, 5]
    assert sorted({r["mtp_loss_weight"] for r in seen}) == [0.1, 0.3]
    assert sorted({r["bias_update_rate"] for r in seen}) == [0.0, 0.001]
    assert (max(r["learning_rate"] for r in seen), seen[-1]["learning_rate"]) == (2.2e-4, 7.3e-6)
    assert seen[-1]["lm_loss"] < seen[0]["lm_loss"]


@pytest.mark.parametrize(
    ("tokens", "batch_size", "problem"),
    [
        (15_000, 5, "are too few for this recipe: the phase of training.lr_phases until"),
        (60_000, 6, "training.batch_size_rampup_start would be 1.2"),
    ],
)
def test_too_small_a_rehearsal_is_refused(
    config: Path, tmp_path: Path, tokens: int, batch_size: int, problem: str
) -> None:
    path = tmp_path / "small.json"
    made = rehearse(config, tokens, batch_size, path)
    assert made.returncode == 2
    assert problem in made.stderr
    assert not path.exists()
