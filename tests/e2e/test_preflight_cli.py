"""Preflight in a run as a user starts it: ranks are compared, a disk that is too small ends it at once."""

from pathlib import Path

from megads.errors import EnvironmentSetupError
from tests.e2e.commands import pretrain, pretrain_well


def test_ranks_are_compared_before_the_first_step(config: Path, tmp_path: Path) -> None:
    done = pretrain_well("--config", config, "--training.exit_step", 1, processes=2)
    before, found, after = done.stdout.partition("preflight: 2 ranks on 1 hosts compared in ")
    assert found
    assert "| loss" not in before
    assert "| loss" in after
    assert not list(tmp_path.rglob(".preflight-*"))


def test_a_disk_without_room_for_a_checkpoint_ends_the_job(config: Path, tmp_path: Path) -> None:
    huge = ("--model.moe.num_experts", 2**20, "--model.moe.expert_intermediate_size", 2**14)
    done = pretrain("--config", config, *huge)
    assert done.returncode == EnvironmentSetupError.exit_code, done.stdout + done.stderr
    assert "one checkpoint takes about" in done.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
