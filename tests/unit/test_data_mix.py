"""The mix: exact shares at every length, phases, caps, and what does not depend on the length of a run."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megads.config.resolve import resolve
from megads.config.schema import Config
from megads.config.validate import find_problems
from megads.data.blend import Datasets, build_datasets
from megads.data.mix import BLOCK_SAMPLES, Mix, MixPhase, phases_within_caps
from megads.data.mix_table import mix_rows, mix_table, repetition_warnings
from megads.data.sources import SampleCounts
from megads.errors import ConfigError

from data_files import numbered_documents, write_dataset  # isort: skip

# Dolma's sources as in configs/dolma.json.
DOLMA = (0.35, 0.15, 0.08, 0.1, 0.05, 0.1, 0.05, 0.03, 0.05, 0.02, 0.01, 0.005, 0.005)
ANNEALING = (0.1, 0.1, 0.2, 0.0, 0.0, 0.2, 0.0, 0.1, 0.2, 0.1, 0.0, 0.0, 0.0)
SEQ = 16


def sequence(mix: Mix, samples: int) -> tuple[np.ndarray, np.ndarray]:
    located = [mix.locate(sample) for sample in range(samples)]
    return np.array([s for s, _ in located]), np.array([n for _, n in located])


def by_hand(weights: tuple[float, ...], samples: int) -> list[int]:
    """The definition: samples in the order in which they are due, one at a time."""
    taken = [0] * len(weights)
    order = []
    for _ in range(samples):
        due = [(n + 0.5) / w if w else math.inf for n, w in zip(taken, weights, strict=True)]
        source = due.index(min(due))
        taken[source] += 1
        order.append(source)
    return order


@pytest.mark.parametrize("weights", [(1.0,), (0.5, 0.5), (0.7, 0.0, 0.3), DOLMA, (1 / 3, 1 / 3, 1 / 3)])
def test_the_order_is_that_of_the_definition(weights: tuple[float, ...]) -> None:
    sources, numbers = sequence(Mix([MixPhase(0, weights)]), 5000)
    assert sources.tolist() == by_hand(weights, 5000)
    for source in range(len(weights)):
        mine = numbers[sources == source]
        assert mine.tolist() == list(range(mine.size))


def test_shares_hold_after_every_sample_and_over_a_million_of_each_phase() -> None:
    """Within 0.1% of each asked weight per phase, and never more than (1 + K w) / 2 samples off."""
    million = 1_000_000
    mix = Mix([MixPhase(0, DOLMA), MixPhase(million, ANNEALING)])
    for start, weights in ((0, DOLMA), (million, ANNEALING)):
        counts = mix.counts(start + million) - mix.counts(start)
        assert counts.sum() == million
        for count, weight in zip(counts.tolist(), weights, strict=True):
            assert abs(count - weight * million) <= 0.001 * weight * million
        for samples in [*range(1, 300), *range(1000, million, 77_777)]:
            off = np.abs(mix.counts(start + samples) - mix.counts(start) - samples * np.array(weights))
            active = sum(weight > 0 for weight in weights)
            assert np.all(off <= 0.5 + active * np.array(weights) / 2 + 1e-6)


def test_every_sample_is_given_once_across_blocks_and_phases() -> None:
    """What `locate` gives one by one is what `counts` says, wherever the blocks of its cache end."""
    edges = [0, BLOCK_SAMPLES + 7, BLOCK_SAMPLES + 8, 3 * BLOCK_SAMPLES - 1]
    weights = [DOLMA, ANNEALING, tuple(reversed(DOLMA)), DOLMA]
    mix = Mix([MixPhase(start, weight) for start, weight in zip(edges, weights, strict=True)])
    total = 4 * BLOCK_SAMPLES
    sources, numbers = sequence(mix, total)
    for source in range(len(DOLMA)):
        mine = numbers[sources == source]
        assert np.array_equal(mine, np.arange(mine.size)), "none missing, none repeated, in order"
    for samples in (1, 100, *edges[1:], total - 1, total):
        assert np.array_equal(mix.counts(samples), np.bincount(sources[:samples], minlength=len(DOLMA)))
    again = Mix(mix.phases)
    for sample in (total - 1, 0, edges[2], edges[1] - 1, 12_345):  # in any order
        assert again.locate(sample) == (sources[sample], numbers[sample])


def test_far_into_a_run() -> None:
    mix, start = Mix([MixPhase(0, DOLMA)]), 10**11
    sources = [mix.locate(start + i)[0] for i in range(1000)]
    assert np.array_equal(
        mix.counts(start + 1000) - mix.counts(start), np.bincount(sources, minlength=len(DOLMA))
    )
    assert abs(mix.counts(start)[0] - 0.35 * start) < 10


def test_a_later_phase_changes_nothing_before_it() -> None:
    short = sequence(Mix([MixPhase(0, DOLMA)]), 5000)
    phased = sequence(Mix([MixPhase(0, DOLMA), MixPhase(4000, ANNEALING)]), 5000)
    for one, other in zip(short, phased, strict=True):
        assert np.array_equal(one[:4000], other[:4000])
    assert not np.array_equal(short[0], phased[0])


def test_caps_hold_exactly_and_the_others_take_over_in_proportion() -> None:
    names, shares = ("a", "b", "c"), {"a": 0.5, "b": 0.3, "c": 0.2}
    phases = phases_within_caps(names, [0], [shares], 10_000, {"a": 1000, "b": 50_000})
    assert phases[0].weights == pytest.approx((0.1, 0.54, 0.36))
    assert Mix(phases).counts(10_000).tolist() == [1000, 5400, 3600]
    # What b takes over brings it to its own cap.
    phases = phases_within_caps(names, [0], [shares], 10_000, {"a": 1000, "b": 5000})
    assert Mix(phases).counts(10_000).tolist() == [1000, 5000, 4000]
    for odd in range(1, 60, 7):
        given = Mix(phases_within_caps(names, [0], [shares], 9973, {"a": odd, "c": 3 * odd})).counts(9973)
        assert given[0] <= odd
        assert given[2] <= 3 * odd
        assert given[0] >= odd - 2, "a cap is used up"


def test_caps_over_phases() -> None:
    names = ("a", "b")
    shares = [{"a": 0.5, "b": 0.5}, {"a": 0.8, "b": 0.2}]
    phases = phases_within_caps(names, [0, 1000], shares, 2000, {"a": 650})
    assert [phase.weights for phase in phases] == [pytest.approx((0.25, 0.75)), pytest.approx((0.4, 0.6))]
    assert Mix(phases).counts(2000).tolist() == [650, 1350]
    unreached = phases_within_caps(names, [0, 1000], shares, 900, {})
    assert unreached == (MixPhase(0, (0.5, 0.5)),)


def test_caps_below_the_budget_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"phase 1 needs 1,000 sequences.*\(a, b\) leaves 999"):
        phases_within_caps(("a", "b"), [0], [{"a": 0.5, "b": 0.5}], 1000, {"a": 100, "b": 899})
    assert Mix(
        phases_within_caps(("a", "b"), [0], [{"a": 0.5, "b": 0.5}], 1000, {"a": 100, "b": 900})
    ).counts(1000).tolist() == [100, 900]


# ------------------------------------------------------------------ through the configuration


def config_of(tmp_path: Path, **data: Any) -> Config:
    for number, name in enumerate(("a", "b", "c")):
        if not (tmp_path / f"{name}.idx").exists():
            write_dataset(tmp_path / name, numbered_documents(100, 3, 400, seed=number))
    sources = [{"name": name, "subset": name, **data.pop(name, {})} for name in ("a", "b", "c")]
    return Config.model_validate(
        {
            "model": {"vocab_size": 500},
            "training": {"seq_length": SEQ, "total_training_tokens": 10_000},
            "data": {"cache_dir": str(tmp_path), "split": "90,10,0", "sources": sources, **data},
        }
    )


def build(config: Config, train: int) -> Datasets:
    return build_datasets(config, resolve(config, 1, False), SampleCounts(train))


def rows_of(datasets: Datasets, samples: int) -> list[list[int]]:
    return [datasets.train[i]["tokens"].tolist() for i in range(samples)]


PHASES = [
    {"from_tokens": 0, "weights": {"a": 3, "b": 1}},
    {"from_tokens": 100 * SEQ - 3, "weights": {"b": 1, "c": 1}},
]


def test_a_longer_run_begins_with_the_same_samples(tmp_path: Path) -> None:
    """Also beyond an epoch, and with phases that the shorter one does not reach."""
    for data in ({}, {"phases": PHASES}, {"mixing_temperature": 0.3}):
        short, long = (build(config_of(tmp_path, **data), samples) for samples in (90, 2000))
        assert rows_of(long, 90) == rows_of(short, 90)
        assert short.fingerprint(90) == long.fingerprint(90)
    first = build(config_of(tmp_path, phases=PHASES[:1]), 300)
    both = build(config_of(tmp_path, phases=PHASES), 300)
    assert rows_of(first, 100) == rows_of(both, 100)
    assert rows_of(first, 101) != rows_of(both, 101)
    assert first.fingerprint(100) == both.fingerprint(100)
    assert first.fingerprint(101) != both.fingerprint(101)


def test_phases_begin_with_the_first_sample_from_their_token_on(tmp_path: Path) -> None:
    built = build(config_of(tmp_path, phases=PHASES), 300)
    assert built.sampled(0) == {"a": 0, "b": 0, "c": 0}
    assert built.sampled(100) == {"a": 75, "b": 25, "c": 0}
    assert built.sampled(300) == {"a": 75, "b": 125, "c": 100}
    stream, number = built.train.stream.locate(100)
    assert (stream.part.name, number) == ("b", 25), "a source goes on where it was"


def test_the_fingerprint_tells_what_changes_the_order(tmp_path: Path) -> None:
    first = build(config_of(tmp_path), 100).fingerprint(50)
    changes: list[dict[str, Any]] = [
        {"a": {"weight": 2.0}},
        {"preprocessing": {"shuffle_seed": 1}},
        {"split": "80,20,0"},
        {"c": {"weight": 0}},
    ]
    for change in changes:
        assert build(config_of(tmp_path, **change), 100).fingerprint(50) != first
    assert build(config_of(tmp_path, num_workers=7), 200).fingerprint(50) == first
    write_dataset(tmp_path / "a", numbered_documents(100, 3, 400, seed=9))
    assert build(config_of(tmp_path), 100).fingerprint(50) != first


def test_the_table(tmp_path: Path) -> None:
    config = config_of(tmp_path, phases=PHASES, a={"max_epochs": 0.3})
    built = build(config, 300)
    rows = mix_rows(config, built.corpus)
    assert [(row.phase, row.source) for row in rows] == [(p, s) for p in (1, 2, 0) for s in "abc"]
    whole = {row.source: row for row in rows if row.phase == 0}
    assert sum(row.read_tokens for row in whole.values()) == 300 * SEQ
    assert {name: row.read_tokens // SEQ for name, row in whole.items()} == built.sampled(300)
    assert 0.28 < whole["a"].epochs <= 0.3
    assert [row.weight for row in rows[:3]] == [3, 1, 0]
    text = mix_table(config, built.corpus)
    assert text == built.table
    assert f"training data: {300 * SEQ:,} tokens" in text
    assert "phase 2, from token 1,600 on:" in text
    assert text.count("tokens read") == 3
    assert "not read" not in text
    text = build(config_of(tmp_path, c={"weight": 0}), 300).table
    assert text.endswith("\nnot read, without a weight above 0: c")


def test_repetition_is_warned_of(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    few, many = build(config, 600).corpus, build(config, 3 * 5 * 200).corpus
    assert list(repetition_warnings(config, few)) == []
    warned = list(repetition_warnings(config, many))
    assert [text.split()[1] for text in warned] == ["a", "b", "c"]
    assert "beyond about 4 epochs" in warned[0]


def test_caps_that_leave_too_little_stop_the_run(tmp_path: Path) -> None:
    once = {"max_epochs": 1.0}
    with pytest.raises(ConfigError, match="raise max_epochs, add data, or shorten the run"):
        build(config_of(tmp_path, a=once, b=once, c=once), 10_000)


@pytest.mark.parametrize(
    ("phases", "said"),
    [
        ([{"from_tokens": 5, "weights": {"a": 1}}], "must begin at 0"),
        ([PHASES[0], PHASES[0]], "increasing numbers of tokens"),
        ([{"from_tokens": 0, "weights": {"aa": 1, "b": 1}}], "no source is named 'aa'; did you mean 'a'"),
        ([{"from_tokens": 0, "weights": {"a": -1, "b": 2}}], "cannot be negative"),
        ([{"from_tokens": 0, "weights": {"a": 0}}], "weights are all 0"),
    ],
)
def test_phases_that_cannot_be(tmp_path: Path, phases: list[dict[str, Any]], said: str) -> None:
    problems = [p for p in find_problems(config_of(tmp_path, phases=phases), 1, False) if "data.phases" in p]
    assert len(problems) == 1
    assert said in problems[0]


def test_one_phase_is_the_same_as_weights(tmp_path: Path) -> None:
    weights = {"a": 1.0, "b": 2.0, "c": 1.0}
    plain = build(config_of(tmp_path, b={"weight": 2.0}), 200)
    phased = build(config_of(tmp_path, phases=[{"from_tokens": 0, "weights": weights}]), 200)
    assert rows_of(plain, 200) == rows_of(phased, 200)
    assert all(one <= other for one, other in pairwise(plain.sampled(n)["b"] for n in range(200)))
