"""Spikes are found, and clean noise is not taken for one."""

import math
import random

import pytest

from megads.config.schema import Stability
from megads.train.stability import RecentLosses, SpikeWatch, is_spike

CURVES, STEPS = 10_000, 200


def clean_curve(random_: random.Random, steps: int = STEPS) -> list[float]:
    """A loss that falls as a power law with normal noise, some of it strong; now and then a plateau."""
    start, floor = random_.uniform(7, 12), random_.uniform(1.5, 3.5)
    power, noise = random_.uniform(0.1, 0.8), random_.choice([0.005, 0.02, 0.1, 0.3])
    plateau = random_.randrange(steps) if random_.random() < 0.3 else steps
    return [
        floor + (start - floor) * (1 + min(step, plateau)) ** -power + random_.gauss(0, noise)
        for step in range(steps)
    ]


def test_no_false_rollback_on_ten_thousand_clean_noisy_curves() -> None:
    settings = Stability(spike_policy="rollback")
    random_ = random.Random(0)
    for _ in range(CURVES):
        watch = SpikeWatch(settings)
        for step, loss in enumerate(clean_curve(random_), 1):
            assert watch.judge(step, loss).action != "rollback"


@pytest.mark.parametrize("height", [1.0, 3.0, math.inf, math.nan])
def test_a_lasting_spike_is_rolled_back(height: float) -> None:
    settings = Stability(spike_policy="rollback", spike_patience=3)
    random_ = random.Random(1)
    for _ in range(200):
        watch = SpikeWatch(settings)
        losses = [3 + random_.gauss(0, 0.02) for _ in range(100)]
        at = random_.randrange(20, 90)
        for step in range(at, 100):
            losses[step] += height
        actions = [watch.judge(step, loss) for step, loss in enumerate(losses, 1)]
        first = next(verdict for verdict in actions if verdict.action == "rollback")
        assert first.first_bad_step == at + 1
        assert actions.index(first) == at + 2  # the third in a row


def test_one_bad_batch_is_no_reason_to_go_back() -> None:
    watch = SpikeWatch(Stability(spike_policy="rollback", spike_patience=3))
    losses = [3.0 + 0.01 * (step % 3) for step in range(60)]
    losses[30] = losses[31] = losses[40] = 9.0
    actions = [watch.judge(step, loss).action for step, loss in enumerate(losses, 1)]
    assert [step for step, action in enumerate(actions) if action == "warn"] == [30, 31, 40]
    assert "rollback" not in actions
    assert max(watch.recent.as_tuple()) < 4, "spikes are no measure for later losses"


def test_skip_and_warn() -> None:
    losses = [3.0 + 0.01 * (step % 3) for step in range(40)] + [8.0] * 40
    skipping, warning = (SpikeWatch(Stability(spike_policy=policy)) for policy in ("skip", "warn"))
    skipped = [skipping.judge(step, loss).action for step, loss in enumerate(losses, 1)]
    warned = [warning.judge(step, loss).action for step, loss in enumerate(losses, 1)]
    assert skipped[40:] == ["skip"] * 40
    assert warned[40] == "warn"
    assert warned[-1] == "accept", "after a window of them, the higher loss is what is normal"


def test_a_loss_that_is_no_number_is_not_said_to_be_high() -> None:
    """Nor that its update is made, where its gradients will tell."""
    verdict = SpikeWatch(Stability(spike_policy="warn")).judge(1, math.nan)
    assert verdict.text() == "the loss is nan: the update is made if its gradients are finite"
    verdict = SpikeWatch(Stability(spike_policy="skip")).judge(1, math.inf)
    assert verdict.text() == "the loss is inf: the update is left out"


def test_nothing_is_judged_before_there_is_a_past() -> None:
    settings = Stability()
    recent = RecentLosses(settings.spike_window, [3.0] * 15)
    assert not is_spike(50.0, recent, settings)
    assert is_spike(math.nan, recent, settings)
    recent.append(3.0)
    assert is_spike(50.0, recent, settings)
    assert not is_spike(3.1, recent, settings), "a deviation of 0 does not make everything a spike"


def test_the_window_forgets_and_survives() -> None:
    recent = RecentLosses(16, [float(n) for n in range(40)])
    assert recent.as_tuple() == tuple(float(n) for n in range(24, 40))
    assert recent.median() == 31.5
    assert recent.deviation() == pytest.approx(1.4826 * 4)
    assert RecentLosses(16, recent.as_tuple()).as_tuple() == recent.as_tuple()
