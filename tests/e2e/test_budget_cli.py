"""A run at its limit saves, alerts, and ends with its own exit code; a restart needs a higher limit."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from megads.errors import BudgetReached
from megads.train.budget import FILE_NAME
from tests.e2e.commands import pretrain, pretrain_well, records, steps

PER_HOUR = 3600.0  # a device costs 1 a second
COUNT = "import os, sys; print(os.environ['MEGADS_ALERT_TEXT'], file=open(sys.argv[1], 'a'))"


def test_limit_refusal_and_raise(config: Path, tmp_path: Path) -> None:
    output, alerts = tmp_path / "run", tmp_path / "alerts"
    prices: tuple[Any, ...] = (
        "--config", config, "--train-iters", 100_000, "--budget.device_hour_cost", PER_HOUR,
        "--budget.alert_command", json.dumps([sys.executable, "-c", COUNT, str(alerts)]),
    )  # fmt: skip
    stopped = pretrain(*prices, "--budget.max_cost", 4, processes=1)
    assert stopped.returncode == BudgetReached.exit_code, stopped.stdout + stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert "BudgetReached: " in stopped.stderr
    last = steps(output)[-1]
    assert f"saved after step {last}" in stopped.stderr
    assert (output / "checkpoints" / f"step_{last:08d}" / "COMMIT.json").is_file()
    costs = [record["cost"] for record in records(output, "train")]
    assert costs == sorted(costs)
    assert costs[-1] >= 4 > max(costs[:-1], default=0)
    marks = [event["share"] for event in records(output, "event") if event["event"] == "budget"]
    assert marks[-1] >= 1
    assert len(alerts.read_text().splitlines()) == len(marks)
    account = json.loads((output / FILE_NAME).read_text())
    assert account["cost"] >= costs[-1]

    refused = pretrain(*prices, "--budget.max_cost", 4)
    assert refused.returncode == BudgetReached.exit_code
    assert "budget.max_cost = 4 already: raise it" in refused.stderr
    assert steps(output)[-1] == last

    end = ("--training.exit_step", last + 2)
    pretrain_well(*prices, "--budget.max_cost", 400, *end)
    assert steps(output)[-2:] == [last + 1, last + 2]
    assert records(output, "train")[-1]["cost"] >= account["cost"]


def test_all_ranks_stop_at_a_limit_of_time(config: Path, tmp_path: Path) -> None:
    done = pretrain("--config", config, "--train-iters", 100_000, "--budget.max_hours", 3 / 3600, processes=2)
    assert done.returncode != 0
    assert done.stderr.count("BudgetReached: ") == 1, done.stderr
    [checkpoint] = (tmp_path / "run" / "checkpoints").glob("step_*")
    assert (checkpoint / "COMMIT.json").is_file()
    assert int(checkpoint.name.removeprefix("step_")) == steps(tmp_path / "run")[-1]


@pytest.mark.parametrize("flag", [("--budget.max_cost", 5), ("--budget.alert_webhook", "nowhere")])
def test_a_budget_that_cannot_be(config: Path, flag: tuple[str, object]) -> None:
    done = pretrain("--config", config, *flag)
    assert done.returncode == 2
    assert str(flag[0]).removeprefix("--") in done.stderr
