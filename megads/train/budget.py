"""What a run has cost so far, what it may cost, and who is told (section `budget`; docs/budget.md).

A job costs its time on the machines, from where it begins with its data to its end: evaluation, checkpoints
and work that a crash lost are paid for too. The account is in every checkpoint, and in `budget.json` beside
them, which also knows what was spent after the newest one.
"""

import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megads.config.schema import Budget, Config
from megads.errors import BudgetReached
from megads.train.alerts import Alerts, webhook_url
from megads.train.state import TrainState

logger = logging.getLogger(__name__)

FILE_NAME = "budget.json"
SECONDS_BETWEEN_WRITES = 30.0


@dataclass(frozen=True)
class Spent:
    """Of a run by now: the time its jobs took, and money."""

    job_seconds: float = 0.0
    cost: float = 0.0

    def limits(self, budget: Budget) -> Iterator[tuple[float, str]]:
        """(share used, in words) of each limit there is."""
        if budget.max_cost is not None:
            yield self.cost / budget.max_cost, f"{self.cost:,.2f} of budget.max_cost = {budget.max_cost:,g}"
        if budget.max_hours is not None:
            hours = self.job_seconds / 3600
            yield hours / budget.max_hours, f"{hours:,.2f} h of budget.max_hours = {budget.max_hours:,g}"

    def nearest_limit(self, budget: Budget) -> tuple[float, str]:
        """The limit of which most is used; (0, "") without any."""
        return max(self.limits(budget), default=(0.0, ""))


class BudgetWatch:
    """The account of a run. Each rank has one, with its own clock; rank 0 writes and sends.

    `saved` is the training state of the checkpoint that the run goes on from, `began` when it began to cost,
    by `clock`. Making one is collective.
    """

    def __init__(
        self,
        config: Config,
        devices: int,
        began: float,
        saved: Mapping[str, Any] | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config, self._budget, self._clock = config, config.budget, clock
        self._cost_per_second = (devices * self._budget.device_hour_cost + self._budget.job_hour_cost) / 3600
        self._leads = dist.get_rank() == 0
        self._file = Path(config.output_dir) / FILE_NAME
        self._began = self._written = began
        self._before = self._earlier(saved or {})
        share, _ = self._before.nearest_limit(self._budget)
        self._told = [warning for warning in self._budget.warn_at if warning <= share]
        self._alerts = Alerts(self._budget)
        if self._leads and self._budget.alert_webhook is not None and not webhook_url(self._budget):
            name = self._budget.alert_webhook
            logger.warning(
                "budget.alert_webhook: %s is not set in the environment; no alert will go there", name
            )

    def refuse_if_spent(self) -> None:
        """Raises BudgetReached where nothing is left for a start."""
        share, text = self._before.nearest_limit(self._budget)
        if share >= 1:
            raise BudgetReached(
                f"the run has used {text} already: raise it to go on (the account is in the checkpoints and "
                f"in {self._file}; a run in another output_dir has its own)"
            )

    @property
    def spent(self) -> Spent:
        """By now, on this process's clock."""
        seconds = self._clock() - self._began
        return Spent(self._before.job_seconds + seconds, self._before.cost + seconds * self._cost_per_second)

    def charge(self, state: TrainState) -> None:
        """Put what is spent by now into the training state, and from time to time into the file."""
        spent = self.spent
        state.job_seconds, state.cost = spent.job_seconds, spent.cost
        if self._clock() - self._written >= SECONDS_BETWEEN_WRITES:
            self._write(spent)

    def share(self, state: TrainState) -> float:
        """What is used of the nearest limit by this process's account; 0 without a limit."""
        return Spent(state.job_seconds, state.cost).nearest_limit(self._budget)[0]

    def check(
        self, state: TrainState, share: float, tell: Callable[[dict[str, Any], str], None]
    ) -> str | None:
        """The limit that is reached, in words, if one is.

        `share` is the largest one of any rank. `tell` gets facts and a sentence once at each share of
        `budget.warn_at`, and at the limit; alerts go out then.
        """
        _, text = Spent(state.job_seconds, state.cost).nearest_limit(self._budget)
        if not text:
            return None
        reached = [mark for mark in (*self._budget.warn_at, 1.0) if mark <= share and mark not in self._told]
        if reached:
            self._told += reached
            what = "the run stops here" if share >= 1 else "at the limit the run saves and stops"
            facts = {"share": share, "job_seconds": state.job_seconds, "cost": state.cost}
            sentence = f"{share:.0%} of the budget is used, {text}: {what}"
            tell(facts, sentence)
            self._send(facts, sentence, state.step)
        return text if share >= 1 else None

    def close(self) -> None:
        """Write the account, and wait for alerts that are under way."""
        self._write(self.spent)
        self._alerts.close()

    def _send(self, facts: Mapping[str, Any], sentence: str, step: int) -> None:
        if not self._leads:
            return
        name, directory = self._config.experiment_name, str(Path(self._config.output_dir).resolve())
        self._alerts.send(
            {
                "text": f"{name}, step {step}: {sentence}",
                "experiment_name": name,
                "output_dir": directory,
                "step": step,
                **facts,
                "max_cost": self._budget.max_cost,
                "max_hours": self._budget.max_hours,
            }
        )

    def _earlier(self, saved: Mapping[str, Any]) -> Spent:
        """What was spent before: the checkpoint's account, or that of the file, which only rank 0 reads."""
        accounts = [saved, self._read() if self._leads else {}]
        found = [Spent(*(max(a.get(name, 0.0) for a in accounts) for name in ("job_seconds", "cost")))]
        dist.broadcast_object_list(found, src=0)
        return found[0]

    def _read(self) -> dict[str, float]:
        try:
            content = json.loads(self._file.read_text(encoding="utf-8"))
            return {name: float(content[name]) for name in ("job_seconds", "cost")}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, KeyError) as error:
            logger.warning("%s cannot be read (%s): the checkpoint's account holds", self._file, error)
            return {}

    def _write(self, spent: Spent) -> None:
        self._written = self._clock()
        if not self._leads or not (self._cost_per_second or self._budget.max_hours):
            return
        temporary = self._file.with_name(f".{FILE_NAME}.tmp-{os.getpid()}")
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(asdict(spent)) + "\n", encoding="utf-8")
            temporary.replace(self._file)
        except OSError as error:
            logger.warning(
                "%s cannot be written (%s): a crash would forget what was spent", self._file, error
            )
