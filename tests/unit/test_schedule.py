"""Schedules against published numbers, and against step-by-step counting where a closed form is used."""

import math
from itertools import pairwise

import pytest

from megads.config.schedule import (
    BatchSchedule,
    Phase,
    PiecewiseSchedule,
    learning_rate_schedule,
    router_noise_schedule,
)
from megads.config.schema import Training
from megads.errors import ConfigError

BILLION, TRILLION = 10**9, 10**12
V3_BATCH = BatchSchedule(final=15360, start=3072, ramp_tokens=469 * BILLION, seq_length=4096)
V3_WARMUP_TOKENS = 2000 * 3072 * 4096


def training(**values: object) -> Training:
    return Training.model_validate({"global_batch_size": 8, "seq_length": 16, **values})


def counted(batch: BatchSchedule, steps: int) -> list[int]:
    """Tokens after 0, 1, ... steps, by taking the steps one at a time."""
    tokens = [0]
    for _ in range(steps):
        tokens.append(tokens[-1] + batch.batch_size(tokens[-1]) * batch.seq_length)
    return tokens


# Batch size


def test_constant_batch():
    batch = BatchSchedule(final=64, start=None, ramp_tokens=0, seq_length=2048)
    assert batch.batch_size(0) == batch.batch_size(10**15) == 64
    assert batch.tokens_after(1000) == 1000 * 64 * 2048
    assert batch.steps_for(1000 * 64 * 2048) == 1000
    assert batch.steps_for(1000 * 64 * 2048 + 1) == 1001
    assert batch.steps_for(0) == 0


def test_v3_ramp():
    assert V3_BATCH.batch_size(0) == 3072
    assert V3_BATCH.batch_size(469 * BILLION) == 15360
    assert V3_BATCH.batch_size(469 * BILLION - 1) == 12288
    # Four increments, evenly spaced over the ramp.
    assert [V3_BATCH.batch_size(i * 469 * BILLION // 4) for i in range(5)] == [3072, 6144, 9216, 12288, 15360]
    assert len(V3_BATCH.stages) == 5
    steps = V3_BATCH.steps_for(14_800 * BILLION)
    assert V3_BATCH.tokens_after(steps) >= 14_800 * BILLION > V3_BATCH.tokens_after(steps - 1)


@pytest.mark.parametrize(
    ("final", "start", "ramp_tokens"),
    [(8, 2, 1000), (8, 2, 1001), (8, 1, 37), (8, 8, 500), (12, 3, 5), (64, 1, 30000), (6, 2, 1), (4, 2, 128)],
)
def test_closed_form_is_counting(final: int, start: int, ramp_tokens: int):
    batch = BatchSchedule(final, start, ramp_tokens, seq_length=16)
    tokens = counted(batch, 300)
    assert [batch.tokens_after(step) for step in range(301)] == tokens
    for total in [*range(1, 200), *tokens[1:], *(t + 1 for t in tokens[:-1]), *(t - 1 for t in tokens[1:])]:
        assert batch.steps_for(total) == next(step for step in range(301) if tokens[step] >= total)
    sizes = [batch.batch_size(t) for t in range(ramp_tokens + 50)]
    assert sizes[0] == start
    assert sizes[-1] == final
    assert all(later >= earlier and later % start == 0 for earlier, later in pairwise(sizes))


@pytest.mark.parametrize(("final", "start", "ramp_tokens"), [(8, 2, 1000), (8, 1, 37), (4, None, 0)])
def test_from_anywhere_is_counting(final: int, start: int | None, ramp_tokens: int):
    """A run that goes on with other batch sizes begins at tokens that its own steps would never reach."""
    batch = BatchSchedule(final, start, ramp_tokens, seq_length=16)
    for consumed in range(0, 1500, 7):
        steps, tokens = 0, consumed
        while tokens < 1200:
            tokens += batch.tokens_per_step(tokens)
            steps += 1
        assert batch.steps_for(1200, consumed) == steps
        assert batch.tokens_at_end(1200, consumed) == tokens


def test_long_run_is_not_counted_step_by_step():
    batch = BatchSchedule(final=4096, start=1, ramp_tokens=10**12, seq_length=4096)
    steps = batch.steps_for(10**18)
    assert steps > 10**10
    assert batch.tokens_after(steps) >= 10**18 > batch.tokens_after(steps - 1)


@pytest.mark.parametrize(
    "sizes", [(10, 4, 100, 16), (4, 8, 100, 16), (0, None, 0, 16), (8, None, 100, 16), (8, 4, 0, 16)]
)
def test_impossible_ramp(sizes: tuple[int, int | None, int, int]):
    with pytest.raises(ValueError, match="batch"):
        BatchSchedule(*sizes)


# Learning rate


def test_v3_five_phases():
    """DeepSeek-V3, section 4.2: 2K steps of warm-up, 2.2e-4 to 10T, cosine over 4.3T, 333B, 167B."""
    schedule = learning_rate_schedule(
        training(
            lr_decay_style="phases",
            lr_phases=[
                {"until_tokens": V3_WARMUP_TOKENS, "to": 2.2e-4, "shape": "linear"},
                {"until_tokens": 10 * TRILLION, "to": 2.2e-4},
                {"until_tokens": 14_300 * BILLION, "to": 2.2e-5, "shape": "cosine"},
                {"until_tokens": 14_633 * BILLION, "to": 2.2e-5},
                {"until_tokens": 14_800 * BILLION, "to": 7.3e-6},
            ],
        ),
        14_800 * BILLION,
        V3_BATCH,
    )
    assert schedule.value(V3_BATCH.tokens_after(1)) == pytest.approx(2.2e-4 / 2000)
    assert schedule.value(V3_BATCH.tokens_after(1000)) == pytest.approx(1.1e-4)
    assert schedule.value(V3_BATCH.tokens_after(2000)) == 2.2e-4
    assert schedule.value(5 * TRILLION) == schedule.value(10 * TRILLION) == 2.2e-4
    assert schedule.value(12_150 * BILLION) == pytest.approx((2.2e-4 + 2.2e-5) / 2)
    quarter = 2.2e-5 + (2.2e-4 - 2.2e-5) * 0.5 * (1 + math.cos(math.pi / 4))
    assert schedule.value(11_075 * BILLION) == pytest.approx(quarter)
    assert schedule.value(14_300 * BILLION) == schedule.value(14_500 * BILLION) == 2.2e-5
    assert schedule.value(14_633 * BILLION) == 2.2e-5
    assert schedule.value(14_633 * BILLION + 1) == schedule.value(14_800 * BILLION) == 7.3e-6
    assert schedule.value(20 * TRILLION) == 7.3e-6


def test_deepseek_llm_multistep():
    """DeepSeek LLM, section 2.3: 2000 steps of warm-up, 31.6% after 80% of the tokens, 10% after 90%."""
    batch = BatchSchedule(final=4608, start=None, ramp_tokens=0, seq_length=4096)
    total = 2 * TRILLION
    schedule = learning_rate_schedule(
        training(lr_decay_style="multistep", learning_rate=3.2e-4, lr_warmup_steps=2000), total, batch
    )
    assert schedule.value(batch.tokens_after(2000)) == schedule.value(total * 8 // 10) == 3.2e-4
    assert schedule.value(total * 8 // 10 + 1) == schedule.value(total * 9 // 10) == 3.2e-4 * 0.316
    assert schedule.value(total * 9 // 10 + 1) == schedule.value(total) == pytest.approx(3.2e-5)


def test_moonlight():
    """Moonlight, arXiv:2502.16982: batch 2048, doubled at 200B; cosine to 5.2T; 100 steps up, linear to 0."""
    batch = BatchSchedule(final=4096, start=2048, ramp_tokens=200 * BILLION, seq_length=8192)
    assert [batch.batch_size(t) for t in (0, 200 * BILLION - 1, 200 * BILLION)] == [2048, 2048, 4096]
    warmup = batch.tokens_after(2000)
    assert round(warmup / BILLION, 1) == 33.6
    second_peak = 5_200 * BILLION + 100 * 4096 * 8192
    schedule = learning_rate_schedule(
        training(
            lr_decay_style="phases",
            lr_phases=[
                {"until_tokens": warmup, "to": 4.2e-4, "shape": "linear"},
                {"until_tokens": 5_200 * BILLION, "to": 4.2e-5, "shape": "cosine"},
                {"until_tokens": second_peak, "to": 1e-4, "shape": "linear"},
                {"until_tokens": 5_700 * BILLION, "to": 0.0, "shape": "linear"},
            ],
        ),
        5_700 * BILLION,
        batch,
    )
    assert schedule.value(warmup) == 4.2e-4
    assert schedule.value((warmup + 5_200 * BILLION) // 2) == pytest.approx((4.2e-4 + 4.2e-5) / 2)
    assert schedule.value(5_200 * BILLION) == 4.2e-5
    assert schedule.value(second_peak) == 1e-4
    assert schedule.value((second_peak + 5_700 * BILLION) // 2) == pytest.approx(5e-5)
    assert schedule.value(5_700 * BILLION) == 0.0


@pytest.mark.parametrize("style", ["cosine", "linear", "constant", "wsd", "multistep"])
def test_warm_up_reaches_the_peak_and_first_step_moves(style: str):
    batch = BatchSchedule(8, None, 0, 16)
    schedule = learning_rate_schedule(
        training(lr_decay_style=style, learning_rate=1e-3, lr_warmup_steps=10), batch.tokens_after(100), batch
    )
    rates = [schedule.value(batch.tokens_after(step)) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([1e-4 * step for step in range(1, 11)])
    assert rates[9] == 1e-3 == max(rates)
    assert all(later <= earlier for earlier, later in pairwise(rates[9:]))
    final = {"constant": 1e-3, "multistep": 1e-4}.get(style, 3e-5)
    assert rates[-1] == pytest.approx(final)
    assert schedule.value(batch.tokens_after(1000)) == pytest.approx(final)


def test_cosine_and_linear_midpoints():
    batch = BatchSchedule(8, None, 0, 16)
    for style, quarter in [("linear", 0.75), ("cosine", 0.5 * (1 + math.cos(math.pi / 4)))]:
        schedule = learning_rate_schedule(
            training(lr_decay_style=style, learning_rate=1.0, min_learning_rate=0.0, lr_warmup_steps=20),
            batch.tokens_after(100),
            batch,
        )
        assert schedule.value(batch.tokens_after(40)) == pytest.approx(quarter)
        assert schedule.value(batch.tokens_after(60)) == pytest.approx(0.5)


@pytest.mark.parametrize(("style", "middle"), [("linear", 0.55), ("cosine", 0.55)])
def test_wsd_decays_in_its_last_share(style: str, middle: float):
    schedule = learning_rate_schedule(
        training(
            lr_decay_style="wsd",
            learning_rate=1.0,
            min_learning_rate=0.1,
            lr_warmup_steps=0,
            lr_wsd_decay_fraction=0.2,
            lr_wsd_decay_style=style,
        ),
        10_000,
        BatchSchedule(8, None, 0, 16),
    )
    assert schedule.value(1) == schedule.value(8000) == 1.0
    assert schedule.value(8001) < 1.0
    assert schedule.value(9000) == pytest.approx(middle)
    assert schedule.value(10_000) == 0.1


def test_warm_up_follows_the_batch_ramp():
    """Steps of the ramp hold different numbers of tokens; warm-up ends with the step it was given as."""
    batch = BatchSchedule(final=8, start=2, ramp_tokens=1000, seq_length=16)
    schedule = learning_rate_schedule(
        training(learning_rate=1e-3, lr_warmup_steps=25), batch.tokens_after(200), batch
    )
    assert schedule.value(batch.tokens_after(25)) == 1e-3
    assert schedule.value(batch.tokens_after(24)) < 1e-3
    assert schedule.value(batch.tokens_after(26)) < 1e-3


def test_no_warm_up():
    batch = BatchSchedule(8, None, 0, 16)
    schedule = learning_rate_schedule(
        training(learning_rate=1e-3, lr_warmup_steps=0, lr_decay_style="constant"), 10_000, batch
    )
    assert schedule.value(batch.tokens_after(1)) == 1e-3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr_warmup_steps": 101}, "lr_warmup_steps"),
        ({"lr_warmup_steps": 91, "lr_decay_style": "wsd"}, "lr_warmup_steps"),
        ({"lr_warmup_steps": 81, "lr_decay_style": "multistep"}, "lr_warmup_steps"),
        (
            {"lr_warmup_steps": 0, "lr_decay_style": "multistep", "lr_multistep": [[0.9, 0.3], [0.8, 0.1]]},
            "multistep",
        ),
        ({"lr_decay_style": "phases"}, "lr_phases is empty"),
        ({"lr_phases": [{"until_tokens": 10, "to": 1e-3}]}, "lr_decay_style"),
        (
            {
                "lr_decay_style": "phases",
                "lr_phases": [{"until_tokens": 10, "to": 1e-3}, {"until_tokens": 10, "to": 1e-4}],
            },
            "increasing",
        ),
    ],
)
def test_schedules_that_do_not_fit_are_refused(values: dict[str, object], message: str):
    batch = BatchSchedule(8, None, 0, 16)
    with pytest.raises(ConfigError, match=message):
        learning_rate_schedule(training(**values), batch.tokens_after(100), batch)


@pytest.mark.parametrize(("style", "steps"), [("cosine", 100), ("wsd", 90), ("multistep", 80)])
def test_longest_warm_up_that_fits(style: str, steps: int):
    batch = BatchSchedule(8, None, 0, 16)
    schedule = learning_rate_schedule(
        training(lr_warmup_steps=steps, lr_decay_style=style, learning_rate=1e-3),
        batch.tokens_after(100),
        batch,
    )
    assert schedule.value(batch.tokens_after(steps)) == 1e-3


def test_phase_owns_its_end():
    schedule = PiecewiseSchedule((Phase(10, 1.0, 1.0, "constant"), Phase(20, 5.0, 6.0, "linear")))
    assert schedule.value(10) == 1.0
    assert schedule.value(11) == pytest.approx(5.1)
    assert schedule.value(0) == 1.0


def test_router_noise_anneals_to_zero():
    schedule = router_noise_schedule(0.8, 1000)
    assert schedule.value(0) == 0.8
    assert schedule.value(500) == pytest.approx(0.4)
    assert schedule.value(1000) == schedule.value(2000) == 0.0
