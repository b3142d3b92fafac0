"""The difficulty curriculum: level by level, each document and sequence once, and nothing else changes."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from data_files import EOD_ID, VOCAB_SIZE, write_dataset

from megads.config.resolve import resolve
from megads.config.schema import Config
from megads.data.blend import Datasets, SampleCounts, build_datasets
from megads.data.epochs import EpochIndex, SourcePart
from megads.data.indexed import SCORES, sidecar_file
from megads.data.shard_group import ShardGroup
from megads.errors import DataError

SEQ, DOCUMENTS, LEVELS = 16, 400, 5


def scored_dataset(prefix: Path, seed: int, scores: np.ndarray | None = None) -> np.ndarray:
    """A dataset whose documents consist of their own number; returns their scores, many of them equal."""
    rng = np.random.default_rng(seed)
    write_dataset(
        prefix,
        [[3 + n] * int(rng.integers(2, 40)) + [EOD_ID] for n in range(DOCUMENTS)],
        vocab_size=VOCAB_SIZE,
    )
    scores = rng.integers(0, 50, DOCUMENTS).astype(np.float32) if scores is None else scores
    np.save(sidecar_file(prefix, SCORES), scores)
    return scores


def config_of(tmp_path: Path, **data: Any) -> Config:
    return Config.model_validate(
        {
            "model": {"vocab_size": VOCAB_SIZE},
            "training": {"seq_length": SEQ, "total_training_tokens": 10_000},
            "data": {
                "cache_dir": str(tmp_path), "split": "100,0,0", "sources": [{"name": "a", "subset": "a"}],
                **data,
            },
        }
    )  # fmt: skip


def build(config: Config, train: int) -> Datasets:
    return build_datasets(config, resolve(config, 1, False), SampleCounts(train))


def per_epoch(config: Config) -> int:
    return build(config, 1).corpus.blends["train"].parts[0].samples_per_epoch


def documents_in_order(built: Datasets, first: int, count: int) -> list[int]:
    """The document that each sample begins in."""
    return [built.train.stream.locate(i)[0].documents(i)[0][1] for i in range(first, first + count)]


def levels_of(scores: np.ndarray, ascending: bool) -> np.ndarray:
    """By the definition: sorted by score, then by number, and cut into equal parts."""
    by_score = sorted(range(scores.size), key=lambda n: (scores[n] if ascending else -scores[n], n))
    level = np.empty(scores.size, np.int64)
    for rank, number in enumerate(by_score):
        level[number] = rank * LEVELS // scores.size
    return level


@pytest.mark.parametrize("order", ["ascending", "descending"])
def test_documents_come_level_by_level(tmp_path: Path, order: str) -> None:
    scores = scored_dataset(tmp_path / "a", 1)
    config = config_of(tmp_path, curriculum={"order": order, "levels": LEVELS, "epochs": 2})
    count = per_epoch(config)
    built = build(config, 3 * count)
    level = levels_of(scores, order == "ascending")
    assert f"a: epochs up to 2 in {LEVELS} levels of {order} scores" in built.table
    epochs = []
    for number in range(3):
        first = documents_in_order(built, number * count, count)
        epochs.append(first)
        seen = level[first]
        assert np.all(np.diff(seen) >= 0) == (number < 2), "ordered epochs, then one that is not"
        within = np.array(first)[seen == 2]
        assert within.tolist() != sorted(within.tolist()), "within a level the order is random"
        samples = range(number * count, (number + 1) * count)
        ids = np.concatenate([built.train[i]["tokens"].numpy() for i in samples])
        stored = ShardGroup.load(built.corpus.blends["train"].parts[0].group_file)
        counted = np.bincount(ids[ids != EOD_ID] - 3, minlength=DOCUMENTS)
        left_out = stored.lengths(0, DOCUMENTS) - 1 - counted
        assert left_out.min() >= 0, "no token twice"
        assert left_out.sum() <= SEQ, "every token but a rest of the epoch"
    assert epochs[0] != epochs[1] != epochs[2]


def old_keys(part: SourcePart) -> str:
    """The name of an index as it was before there were curricula and conversations."""
    key = [
        1, part.name, part.split, part.content_sha256, part.first_document, part.documents, part.tokens,
        part.sequence_tokens, part.seed,
    ]  # fmt: skip
    return hashlib.sha256(repr(key).encode()).hexdigest()[:16]


def test_without_the_setting_nothing_changes(tmp_path: Path) -> None:
    """Index, order and fingerprint are the same with scores and without, and keep their old names."""
    scored_dataset(tmp_path / "a", 1)
    config = config_of(tmp_path)
    with_scores = build(config, 300)
    ids = [with_scores.train[i]["tokens"].tolist() for i in range(300)]
    part = with_scores.corpus.blends["train"].parts[0]
    (made,) = (tmp_path / "index").glob("*.epochs")
    assert made.name == f"a-train-{old_keys(part)}-000000.epochs"
    order, _, shuffle = EpochIndex(part, tmp_path / "index").epoch(0)
    text = repr([1, part.seed, "a", "train", 0])
    words = np.frombuffer(hashlib.sha256(text.encode()).digest(), dtype=np.uint32)
    draw = np.random.RandomState(words)
    for found, size in ((order, DOCUMENTS), (shuffle, part.samples_per_epoch)):
        expected = np.arange(size, dtype=np.int32)
        draw.shuffle(expected)
        assert np.array_equal(found, expected)
    sidecar_file(tmp_path / "a", SCORES).unlink()
    without = build(config, 300)
    assert [without.train[i]["tokens"].tolist() for i in range(300)] == ids
    assert without.fingerprint(300) == with_scores.fingerprint(300)


def test_every_setting_and_score_has_an_order_of_its_own(tmp_path: Path) -> None:
    scores = scored_dataset(tmp_path / "a", 1)
    fingerprints = {build(config_of(tmp_path), 50).fingerprint(50)}
    settings = {"order": "ascending", "levels": LEVELS, "epochs": 1}
    for change in ({}, {"order": "descending"}, {"levels": 4}, {"epochs": 2}):
        fingerprints.add(build(config_of(tmp_path, curriculum=settings | change), 50).fingerprint(50))
    before = build(config_of(tmp_path, curriculum=settings), 50)
    fingerprints.add(before.fingerprint(50))
    np.save(sidecar_file(tmp_path / "a", SCORES), scores[::-1].copy())
    after = build(config_of(tmp_path, curriculum=settings), 50)
    fingerprints.add(after.fingerprint(50))
    assert len(fingerprints) == 6
    assert documents_in_order(before, 0, 50) != documents_in_order(after, 0, 50)


def test_a_longer_run_begins_with_the_same_samples(tmp_path: Path) -> None:
    """So a resume, which needs no more than the number of samples, goes on where it was."""
    scored_dataset(tmp_path / "a", 1)
    config = config_of(tmp_path, curriculum={"levels": LEVELS})
    count = per_epoch(config)
    short, long = build(config, count), build(config, 4 * count)
    for i in range(0, count, 7):
        assert short.train[i]["tokens"].tolist() == long.train[i]["tokens"].tolist()


def test_sources_without_scores(tmp_path: Path) -> None:
    scored_dataset(tmp_path / "a", 1)
    scored_dataset(tmp_path / "b", 2)
    sidecar_file(tmp_path / "b", SCORES).unlink()
    sources = [{"name": name, "subset": name} for name in "ab"]
    with pytest.raises(DataError, match=r"b\.scores\.npy: no such file, .* of 'b' by it"):
        build(config_of(tmp_path, sources=sources, curriculum={}), 50)
    tolerant = config_of(tmp_path, sources=sources, curriculum={"without_scores": "shuffle"})
    parts = build(tolerant, 50).corpus.blends["train"].parts
    assert [part.score_order is not None for part in parts] == [True, False]


@pytest.mark.parametrize(
    ("scores", "says"),
    [
        (
            np.array([1.0, np.nan] * (DOCUMENTS // 2), np.float32),
            r"200 scores are not numbers .* document 1\.",
        ),
        (np.ones(DOCUMENTS - 1, np.float32), "not a score for each of 400 documents"),
        (np.ones(DOCUMENTS, np.int32), "not a score for each of 400 documents"),
    ],
)
def test_scores_that_are_no_scores(tmp_path: Path, scores: np.ndarray, says: str) -> None:
    scored_dataset(tmp_path / "a", 1, scores)
    with pytest.raises(DataError, match=r"a\.scores\.npy: .*" + says):
        build(config_of(tmp_path, curriculum={}), 50)


def test_scores_of_another_dataset(tmp_path: Path) -> None:
    scored_dataset(tmp_path / "a", 1)
    record_file = tmp_path / "a.json"
    record = orjson.loads(record_file.read_bytes())
    record["scores"] = {"bytes": 7, "sha256": "0" * 64}
    record_file.write_bytes(orjson.dumps(record))
    with pytest.raises(DataError, match=r"a\.scores\.npy: .* its dataset was made with 7"):
        build(config_of(tmp_path, curriculum={}), 50)


@pytest.mark.parametrize("levels", [1, 400, 1000])
def test_any_number_of_levels(tmp_path: Path, levels: int) -> None:
    scores = scored_dataset(tmp_path / "a", 1)
    config = config_of(tmp_path, curriculum={"levels": levels})
    count = per_epoch(config)
    built = build(config, count)
    first = documents_in_order(built, 0, count)
    if levels > 1:
        assert np.all(np.diff(scores[first]) >= 0)
    positions = {int(built.train.stream.locate(i)[0]._index.epoch(0)[2][i]) for i in range(count)}
    assert positions == set(range(count)), "every sequence once"
