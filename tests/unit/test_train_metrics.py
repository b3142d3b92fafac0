"""Means over an interval, expert balance, speed and utilization."""

import itertools
import math
import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from megads.config.scalars import Scalars
from megads.train.matmul_rate import measure_matmul_rate, peak_rate, published_peak
from megads.train.meters import (
    Averages,
    ExpertBalance,
    Memory,
    Speed,
    SpeedMeter,
    StepMeter,
    max_violation,
    peak_memory_bytes,
    relative_entropy,
    used_memory,
)
from megads.train.metrics import (
    experts_record,
    perplexity,
    run_record,
    train_record,
    validation_record,
)
from megads.train.state import TrainState

# Means


def test_weighted_mean_over_the_interval():
    meter = StepMeter(["lm_loss", "mtp_loss", "grad_norm"])
    meter.add("lm_loss", torch.tensor(4.0, requires_grad=True), weight=torch.tensor(100))
    meter.add("lm_loss", torch.tensor(1.0), weight=300)
    meter.add("grad_norm", 2.0)
    meter.add("grad_norm", 3.0)
    meter.step_done()
    meter.step_done()
    averages = meter.drain()
    assert averages.steps == 2
    assert averages.means == {"lm_loss": 1.75, "mtp_loss": None, "grad_norm": 2.5}


def test_drain_starts_anew():
    meter = StepMeter(["lm_loss"], moe_layers=1, num_experts=2)
    meter.add("lm_loss", 4.0)
    meter.add_experts(torch.tensor([[3, 1]]), torch.tensor([[4.0, 0.0]]))
    meter.add_bias_ranges(torch.tensor([0.5]))
    meter.step_done()
    meter.drain()
    meter.add_sum("lm_loss", 6.0, 3)
    meter.add_experts(torch.tensor([[2, 2]]), torch.tensor([[2.0, 2.0]]))
    meter.add_bias_ranges(torch.tensor([0.25]))
    meter.step_done()
    experts = ExpertBalance([0.0], [0], [1.0], [0.25], load=[[0.5, 0.5]])
    assert meter.drain() == Averages(steps=1, means={"lm_loss": 2.0}, experts=experts)


def test_sum_and_weight():
    meter = StepMeter(["lm_loss"])
    meter.add_sum("lm_loss", torch.tensor(30.0), torch.tensor(10))
    meter.add_sum("lm_loss", torch.tensor(10.0), torch.tensor(10))
    assert meter.drain().means["lm_loss"] == 2.0


def test_sums_of_several_names():
    meter = StepMeter(["grad_norm", "lm_loss", "mtp_loss_1"])
    for _ in range(2):
        meter.add_sums(("lm_loss", "mtp_loss_1"), torch.tensor([30.0, 8.0]), torch.tensor([10, 4]))
    meter.add_sums((), torch.zeros(0), torch.zeros(0))
    assert meter.drain().means == {"grad_norm": None, "lm_loss": 3.0, "mtp_loss_1": 2.0}
    with pytest.raises(AssertionError):
        meter.add_sums(("grad_norm", "mtp_loss_1"), torch.zeros(2), torch.zeros(2))


def test_long_interval_keeps_small_differences():
    """Sums are float64: a hundred thousand float32 terms lose nothing that a log line shows."""
    meter = StepMeter(["lm_loss"])
    for _ in range(1000):
        meter.add("lm_loss", torch.tensor(1.2345678), weight=4_000_000)
    assert meter.drain().means["lm_loss"] == pytest.approx(float(torch.tensor(1.2345678)), rel=1e-7)


def test_nan_shows():
    meter = StepMeter(["lm_loss"])
    meter.add("lm_loss", torch.tensor(float("nan")))
    meter.add("lm_loss", 1.0)
    assert math.isnan(meter.drain().means["lm_loss"])


def test_unknown_name_is_a_bug():
    with pytest.raises(KeyError):
        StepMeter(["lm_loss"]).add("lm_los", 1.0)


class Ranks:
    """Meters of several ranks in one process; `drain` sums over them as an all-reduce does."""

    def __init__(self, meters: list[StepMeter]) -> None:
        self.meters = meters

    def drain(self) -> list[Averages]:
        shares: list[torch.Tensor] = []
        for meter in self.meters[:-1]:
            meter.drain(lambda flat: shares.append(flat.clone()))
        return [self.meters[-1].drain(lambda flat: flat.add_(sum(shares)))]


def test_ranks_are_joined():
    """Two stages with two tensor-parallel copies each: losses on the last stage, one MoE layer per stage."""
    meters = [StepMeter(["lm_loss", "grad_norm"], moe_layers=2, num_experts=4) for _ in range(4)]
    loads = [torch.tensor([[4, 0, 0, 0]]), torch.tensor([[1, 1, 2, 0]])]
    for rank, meter in enumerate(meters):
        stage = rank // 2
        meter.add("grad_norm", 7.0)
        meter.add_experts(loads[stage], loads[stage].float(), layers=[stage])
        meter.add_bias_ranges(torch.tensor([0.5 + stage]), layers=[stage])
        if stage == 1:
            meter.add("lm_loss", 5.0, weight=64)
        meter.step_done()
    [averages] = Ranks(meters).drain()
    assert averages.means == {"lm_loss": 5.0, "grad_norm": 7.0}
    experts = averages.experts
    assert experts is not None
    assert (experts.max_vio, experts.dead_experts) == ([3.0, 1.0], [3, 1])
    assert experts.load == [[1, 0, 0, 0], [0.25, 0.25, 0.5, 0]]
    assert experts.router_entropy == pytest.approx([0.0, 0.75])
    assert experts.bias_range == [0.5, 1.5]


# Expert balance


def test_max_violation():
    load = torch.tensor([[5.0, 5, 5, 5], [20, 0, 0, 0], [8, 4, 4, 0], [0, 0, 0, 0]])
    assert max_violation(load).tolist() == [0.0, 3.0, 1.0, 0.0]


def test_max_violation_of_random_loads_is_the_definition():
    load = torch.randint(0, 50, (6, 16), generator=torch.Generator().manual_seed(0)).double()
    for row, value in zip(load.tolist(), max_violation(load).tolist(), strict=True):
        assert value == pytest.approx(max(row) / (sum(row) / len(row)) - 1)


def balance(meter: StepMeter) -> ExpertBalance:
    experts = meter.drain().experts
    assert experts is not None
    return experts


def test_max_vio_is_per_step_and_death_is_per_interval():
    """Two lopsided steps that even out: bad balance in each, but no expert starved."""
    meter = StepMeter([], moe_layers=1, num_experts=2)
    for load in ([[10, 0]], [[0, 10]]):
        meter.add_experts(torch.tensor(load), torch.tensor(load))
    experts = balance(meter)
    assert experts.max_vio == [1.0]
    assert experts.dead_experts == [0]


def test_layer_that_nobody_reported():
    meter = StepMeter([], moe_layers=2, num_experts=2)
    meter.add_experts(torch.tensor([[3, 1]]), torch.tensor([[1.0, 0.0]]), layers=[1])
    experts = balance(meter)
    assert experts.max_vio == [None, 0.5]
    assert experts.router_entropy == [None, 0.0]
    assert experts.bias_range == [None, None]
    assert experts.load == [[0, 0], [0.75, 0.25]]


def test_relative_entropy_is_the_definition():
    weights = torch.tensor([[1.0, 1, 1, 1], [0, 7, 0, 0], [1, 2, 3, 4], [0, 0, 0, 0]])
    even, one, some, nothing = relative_entropy(weights).tolist()
    assert (even, one, nothing) == (pytest.approx(1), 0, 0)
    assert some == pytest.approx(-sum(n / 10 * math.log(n / 10) for n in (1, 2, 3, 4)) / math.log(4))


# Speed


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_speed():
    clock = Clock()
    meter = SpeedMeter(peak_flops_per_second=100e12, processes=2, clock=clock)
    for _ in range(4):
        clock.now += 0.5
        assert meter.step_done(10_000, 6e13) == 0.5
    speed = meter.interval(tokens_left=100_000)
    assert speed == Speed(
        step_seconds=0.5,
        tokens_per_second=20_000,
        tokens_per_second_per_device=10_000,
        tflops_per_device=60,
        mfu=0.6,
        seconds_left=5.0,
    )


def test_excluded_time_does_not_count():
    clock = Clock()
    meter = SpeedMeter(peak_flops_per_second=1, processes=1, clock=clock)
    clock.now += 1
    meter.step_done(100, 100)
    with meter.excluded():
        clock.now += 1000
    clock.now += 1
    assert meter.step_done(100, 100) == 1
    assert meter.interval(0).tokens_per_second == 100


def test_excluded_time_does_not_count_when_it_fails():
    clock = Clock()
    meter = SpeedMeter(peak_flops_per_second=1, processes=1, clock=clock)

    def failing_evaluation() -> None:
        with meter.excluded():
            clock.now += 1000
            raise RuntimeError

    with pytest.raises(RuntimeError):
        failing_evaluation()
    clock.now += 2
    assert meter.step_done(100, 100) == 2


def test_time_left_follows_recent_intervals():
    clock = Clock()
    meter = SpeedMeter(peak_flops_per_second=1, processes=1, clock=clock)
    left = []
    for seconds in [1.0] * 5 + [2.0] * 10:
        clock.now += seconds
        meter.step_done(100, 100)
        left.append(meter.interval(tokens_left=1000).seconds_left)
    assert left[4] == pytest.approx(10)
    assert left[4] < left[9] < left[14]
    assert left[14] == pytest.approx(20)
    clock.now += 1
    meter.step_done(100, 100)
    assert meter.interval(tokens_left=-5).seconds_left == 0


# The yardstick


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100-PCIE-40GB", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("Tesla T4", None),
    ],
)
def test_published_peaks(name: str, peak: float | None):
    assert published_peak(name) == peak


def test_measured_rate_is_what_a_product_takes(monkeypatch: pytest.MonkeyPatch):
    """By a clock that only products move: slowly the first time, and when another process is in the way."""
    takes, now, sizes = itertools.chain([9.0, 0.5, 0.25], itertools.repeat(0.25)), [0.0], set()

    def matmul(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        now[0] += next(takes)
        sizes.update((left.shape, right.shape, out.shape))
        return real(left, right, out=out)

    real = torch.matmul
    monkeypatch.setattr(torch, "matmul", matmul)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    assert measure_matmul_rate(size=64, seconds=2.0) == 2 * 64**3 / 0.25
    assert now[0] == 9.0 + 2.0
    assert sizes == {(64, 64)}


def test_cpu_peak_is_measured_and_leaves_the_generator_alone():
    before = torch.get_rng_state()
    peak = peak_rate("cpu")
    assert torch.equal(before, torch.get_rng_state())
    assert peak.flops_per_second > 1e8
    assert "measured FP32" in peak.source


# Records


def a_record(averages: Averages, **state: Any) -> dict[str, Any]:
    speed = Speed(0.5, 20_000.0, 10_000.0, 60.0, 0.6, 5.0)
    return train_record(
        TrainState(**state), averages, speed, scalars=SCALARS, batch_size=8, memory=Memory(1024, 0.25)
    )


SCALARS = Scalars(3e-4, 0.1, 0.3, 0.001, 1e-4, 1.0, 0.0, 64)
EXPERTS = ExpertBalance(
    max_vio=[0.5, None, 1.5],
    dead_experts=[0, 2, 1],
    router_entropy=[0.5, None, 1.0],
    bias_range=[0.25, 0.5, None],
    load=[[2 / 3, 1 / 3], [0, 0], [0.5, 0.5]],
)


def test_train_record():
    averages = Averages(steps=10, means={"lm_loss": 4.5, "grad_norm": None}, experts=EXPERTS)
    record = a_record(averages, step=20, tokens=4000, samples=40, skipped_steps=1)
    assert record["kind"] == "train"
    assert (record["step"], record["tokens"], record["interval_steps"]) == (20, 4000, 10)
    assert (record["lm_loss"], record["grad_norm"], record["learning_rate"]) == (4.5, None, 3e-4)
    assert (record["max_vio"], record["dead_experts"], record["router_entropy"]) == (1.0, 3, 0.75)
    assert record["bias_range"] == 0.5
    assert record["max_vio_by_layer"] == [0.5, None, 1.5]
    assert (record["mfu"], record["tflops_per_device"]) == (0.6, 60)
    assert (record["peak_memory_bytes"], record["memory_share"]) == (1024, 0.25)


def test_dense_model_has_no_balance():
    record = a_record(Averages(steps=1, means={}), step=1)
    assert not {"max_vio", "dead_experts", "router_entropy", "bias_range"} & record.keys()


def test_model_without_biases_has_no_range_of_them():
    experts = replace(EXPERTS, bias_range=[None, None, None])
    record = a_record(Averages(steps=1, means={}, experts=experts), step=1)
    assert not {"bias_range", "bias_range_by_layer"} & record.keys()


def test_experts_record():
    record = experts_record(TrainState(step=20, tokens=4000), EXPERTS)
    assert record == {
        "kind": "experts", "step": 20, "tokens": 4000,
        "load_by_layer": [[0.6667, 0.3333], [0, 0], [0.5, 0.5]],
    }  # fmt: skip


def test_validation_record():
    state = TrainState(step=5, tokens=9)
    record = validation_record(state, math.log(50), loss_by_source={"code": 2.0}, is_best=True)
    assert record["perplexity"] == pytest.approx(50)
    assert record["loss/code"] == 2.0
    assert (record["step"], record["tokens"], record["is_best"]) == (5, 9, True)


def test_run_record():
    state = TrainState(step=5, tokens=9)
    record = run_record(state, total_tokens=100, train_steps=50, vocab_size=4096, layout="TP2", world_size=2)
    assert record["kind"] == "run"
    assert (record["step"], record["vocab_size"], record["layout"]) == (5, 4096, "TP2")
    assert record["world_size"] == 2


def test_perplexity_does_not_overflow():
    assert perplexity(1e6) == math.inf
    assert perplexity(0.0) == 1.0
    assert math.isnan(perplexity(math.nan))


def test_memory_is_that_of_the_fullest_rank():
    def with_a_fuller_rank(both: torch.Tensor) -> None:
        both.copy_(torch.maximum(both, torch.tensor([2.0**50, 0.875])))

    mine = used_memory("cpu")
    assert mine.peak_bytes == pytest.approx(peak_memory_bytes("cpu"), rel=0.02)
    assert 0 < mine.share < 1
    assert used_memory("cpu", with_a_fuller_rank) == Memory(2**50, max(mine.share, 0.875))
