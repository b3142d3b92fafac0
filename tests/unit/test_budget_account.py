"""What a run has cost: over restarts, crashes and limits, with a clock of the test's own."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megads.config.loader import load_config
from megads.config.schema import Budget
from megads.config.validate import find_problems, notes
from megads.errors import BudgetReached, RunStopped
from megads.train.budget import FILE_NAME, SECONDS_BETWEEN_WRITES, BudgetWatch
from megads.train.signals import StopRequest
from megads.train.state import TrainState

HOUR = 3600.0


@pytest.fixture(autouse=True, scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("store") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Clock:
    seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


class Job:
    """One start of a run of 8 devices in `directory`."""

    def __init__(self, directory: Path, saved: TrainState | None = None, **settings: Any) -> None:
        overrides = {f"budget.{name}": value for name, value in settings.items()}
        config = load_config(None, {"output_dir": str(directory), **overrides})
        self.clock = Clock()
        account = saved.to_dict() if saved else None
        self.watch = BudgetWatch(config, 8, self.clock(), account, self.clock)
        self.state = TrainState()
        self.told: list[tuple[float, str]] = []

    def work(self, hours: float) -> str | None:
        self.clock.seconds += hours * HOUR
        self.watch.charge(self.state)
        return self.watch.check(
            self.state,
            self.watch.share(self.state),
            lambda facts, text: self.told.append((facts["share"], text)),
        )


def test_devices_and_job_are_paid_by_the_hour(tmp_path: Path) -> None:
    job = Job(tmp_path, device_hour_cost=2.5, job_hour_cost=4)
    assert job.work(1.5) is None
    assert job.state.cost == pytest.approx(1.5 * (8 * 2.5 + 4))
    assert job.state.job_seconds == pytest.approx(1.5 * HOUR)
    assert job.told == []


def test_warnings_come_once_each_and_the_limit_is_reached(tmp_path: Path) -> None:
    job = Job(tmp_path, device_hour_cost=1, max_cost=80)
    assert job.work(7.9) is None
    assert job.told == []
    assert job.work(0.2) is None
    assert job.work(0.2) is None
    assert [round(share, 4) for share, _ in job.told] == [0.81]
    assert "64.80 of budget.max_cost = 80" in job.told[0][1]
    assert job.work(0.8) is None
    assert len(job.told) == 2
    reached = job.work(1.0)
    assert reached is not None
    assert "80.80 of budget.max_cost = 80" in reached
    assert "the run stops here" in job.told[2][1]


def test_a_jump_over_all_marks_is_told_once(tmp_path: Path) -> None:
    job = Job(tmp_path, max_hours=1)
    assert job.work(3) is not None
    assert len(job.told) == 1


def test_the_nearest_of_two_limits_counts(tmp_path: Path) -> None:
    job = Job(tmp_path, device_hour_cost=1, max_cost=800, max_hours=2)
    assert "max_hours" in str(job.work(2.5))


def test_ranks_stop_together_by_the_largest_share(tmp_path: Path) -> None:
    job = Job(tmp_path, max_hours=10)
    assert job.watch.check(job.state, 1.0, lambda facts, text: None) is not None


def test_signals_and_budget_are_agreed_on_in_one_reduction(monkeypatch: pytest.MonkeyPatch) -> None:
    reductions: list[int] = []
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, **how: reductions.append(tensor.numel()))
    stop = StopRequest()
    try:
        assert stop.agreed(0.25) == (None, 0.25)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.agreed(0.5) == ("SIGUSR1", 0.5)
    finally:
        stop.close()
    assert reductions == [2, 2]


def test_a_restart_goes_on_with_the_checkpoints_account(tmp_path: Path) -> None:
    first = Job(tmp_path, device_hour_cost=1, max_cost=80)
    first.work(8.5)
    second = Job(tmp_path / "fresh machine", first.state, device_hour_cost=2, max_cost=80)
    second.watch.refuse_if_spent()
    assert second.work(0.5) is None
    assert second.state.cost == pytest.approx(68 + 8)
    assert [round(share, 2) for share, _ in second.told] == [0.95], "80% was told before"


def test_what_a_crash_lost_was_paid_for(tmp_path: Path) -> None:
    first = Job(tmp_path, device_hour_cost=1)
    first.work(1)
    saved = TrainState.from_dict(first.state.to_dict())
    first.work(2)
    first.work(SECONDS_BETWEEN_WRITES / HOUR / 2)  # after the last time that it was written
    second = Job(tmp_path, saved, device_hour_cost=1)
    second.work(1)
    assert second.state.cost == pytest.approx(8 * 4)


def test_a_clean_end_writes_all(tmp_path: Path) -> None:
    job = Job(tmp_path, device_hour_cost=1)
    job.clock.seconds += 5
    job.watch.close()
    account = json.loads((tmp_path / FILE_NAME).read_text())
    assert account == {"job_seconds": 5.0, "cost": pytest.approx(5 * 8 / HOUR)}


def test_without_prices_and_limits_there_is_no_file(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.work(1)
    job.watch.close()
    assert list(tmp_path.iterdir()) == []
    assert job.state.job_seconds == HOUR


def test_a_start_beyond_the_limit_is_refused(tmp_path: Path) -> None:
    Job(tmp_path, max_hours=1).work(1.25)
    again = Job(tmp_path, max_hours=1)
    with pytest.raises(BudgetReached, match=r"1\.25 h of budget.max_hours = 1 already: raise it"):
        again.watch.refuse_if_spent()
    Job(tmp_path, max_hours=2).watch.refuse_if_spent()


def test_a_damaged_file_is_told_and_the_checkpoint_holds(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / FILE_NAME).write_text('{"job_seconds": ')
    job = Job(tmp_path, TrainState(job_seconds=60.0, cost=1.0), device_hour_cost=1)
    assert job.watch.spent.cost == 1.0
    assert "cannot be read" in caplog.text


def test_the_exit_code_is_its_own() -> None:
    assert issubclass(BudgetReached, RunStopped)
    assert BudgetReached.exit_code not in (0, 1, 2, 3, 4, 5, 6, RunStopped.exit_code)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"max_cost": 10}, "nothing has a price"),
        ({"warn_at": [0.8, 1.0]}, "budget.warn_at"),
        ({"alert_webhook": "ftp://host"}, "budget.alert_webhook"),
        ({"alert_webhook": "hooks.example.org/x"}, "budget.alert_webhook"),
    ],
)
def test_mistakes(settings: dict[str, Any], said: str) -> None:
    config = load_config(None, {f"budget.{name}": value for name, value in settings.items()})
    assert any(said in problem for problem in find_problems(config, 1, cuda=False))


@pytest.mark.parametrize(
    "webhook", ["https://hooks.example.org/a/b?c=d", "http://localhost:80", "$MY_HOOK", None]
)
def test_webhooks_that_can_be(webhook: str | None) -> None:
    config = load_config(None, {"budget.alert_webhook": webhook})
    assert not [problem for problem in find_problems(config, 1, cuda=False) if "webhook" in problem]


def test_alerts_without_a_limit_are_noted() -> None:
    config = load_config(None, {"budget.alert_command": ["mail"]})
    assert any("budget.alert_command has no effect" in note for note in notes(config))
    assert Budget().max_cost is None
