"""Blends through Megatron-Core: every token once an epoch, right shares, and errors before step 1."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids

from megads.config.resolve import resolve
from megads.config.schema import Config
from megads.data.blend import Datasets, SampleCounts, build_datasets
from megads.data.indexed import IndexedWriter, data_files
from megads.data.mix import normalized
from megads.data.sources import build_index, plan_corpus
from megads.errors import ConfigError, DataError

from data_files import EOD_ID, numbered_documents, write_dataset  # isort: skip

SEQ = 16
VOCAB = 60_000


def config_of(tmp_path: Path, sources: list[dict[str, Any]], **data: Any) -> Config:
    return Config.model_validate(
        {
            "model": {"vocab_size": VOCAB},
            "training": {"seq_length": SEQ, "total_training_tokens": 10_000},
            "data": {"cache_dir": str(tmp_path), "sources": sources, "split": "90,10,0", **data},
        }
    )


def build(config: Config, **samples: int) -> Datasets:
    return build_datasets(config, resolve(config, 1, False), SampleCounts(**samples))


def unique_documents(count: int, start: int = 3) -> list[list[int]]:
    """Documents of which no id but the end of document occurs twice."""
    rng = np.random.default_rng(count)
    ids = iter(range(start, VOCAB))
    return [[*(next(ids) for _ in range(rng.integers(3, 40))), EOD_ID] for _ in range(count)]


def ids_of(dataset: Any) -> np.ndarray:
    return np.concatenate([dataset[i]["tokens"].numpy() for i in range(len(dataset))])


def test_an_epoch_holds_every_token_once_and_splits_share_none(tmp_path: Path) -> None:
    documents = unique_documents(300)
    write_dataset(tmp_path / "a", documents, vocab_size=VOCAB)
    config = config_of(tmp_path, [{"name": "a", "subset": "a"}])
    train_tokens = sum(map(len, documents[:270]))
    valid_tokens = sum(map(len, documents[270:]))
    built = build(config, train=(train_tokens - 1) // SEQ, valid=(valid_tokens - 1) // SEQ)
    assert built.valid is not None
    train, valid = ids_of(built.train), ids_of(built.valid)
    for ids, part in ((train, documents[:270]), (valid, documents[270:])):
        assert ids.size >= sum(map(len, part)) - SEQ
        words = ids[ids != EOD_ID]
        assert len(set(words.tolist())) == words.size, "an id occurs twice within an epoch"
        assert set(words.tolist()) <= {i for document in part for i in document}
    assert train[:200].tolist() != sorted(train[:200].tolist()), "the order is shuffled"


def test_samples_are_shaped_and_shifted(tmp_path: Path) -> None:
    write_dataset(tmp_path / "a", unique_documents(50), vocab_size=VOCAB)
    sample = build(config_of(tmp_path, [{"name": "a", "subset": "a"}]), train=5).train[3]
    assert set(sample) == {"tokens", "labels", "loss_mask", "position_ids", "source"}
    assert int(sample.pop("source")) == 0
    assert all(value.shape == (SEQ,) for value in sample.values())
    assert [sample[k].dtype for k in ("tokens", "labels", "loss_mask", "position_ids")] == [
        torch.int64, torch.int64, torch.float32, torch.int64,
    ]  # fmt: skip
    assert torch.equal(sample["tokens"][1:], sample["labels"][:-1])
    assert sample["position_ids"].tolist() == list(range(SEQ))
    assert sample["loss_mask"].tolist() == [1.0] * SEQ


def test_masks_are_those_of_megatron_core(tmp_path: Path) -> None:
    write_dataset(tmp_path / "a", numbered_documents(200, 3, 500), vocab_size=VOCAB)
    flags = {"reset_position_ids": True, "eod_mask_loss": True, "document_mask": True}
    train = build(config_of(tmp_path, [{"name": "a", "subset": "a"}], **flags), train=200).train
    boundaries = 0
    for i in range(len(train)):
        sample = train[i]
        attention, loss_mask, positions = _get_ltor_masks_and_position_ids(
            sample["tokens"], EOD_ID, True, True, True, True
        )
        assert torch.equal(sample["loss_mask"], loss_mask)
        assert torch.equal(sample["position_ids"], positions)
        ids = sample["document_ids"]
        assert ids.dtype == torch.int32
        visible = (ids[:, None] == ids[None, :]) & torch.ones(SEQ, SEQ, dtype=torch.bool).tril()
        assert torch.equal(visible, ~attention[0])
        boundaries += int(ids[-1])
    assert boundaries > 50


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
def test_shares_of_the_blend(tmp_path: Path, temperature: float) -> None:
    """Sources of disjoint ids; one of weight 0, one of two files with 3:1 tokens."""
    write_dataset(tmp_path / "a", numbered_documents(100, 100, 200), vocab_size=VOCAB)
    write_dataset(tmp_path / "b1", numbered_documents(300, 200, 300), vocab_size=VOCAB)
    write_dataset(tmp_path / "b2", numbered_documents(100, 300, 400), vocab_size=VOCAB)
    write_dataset(tmp_path / "never", numbered_documents(100, 400, 500), vocab_size=VOCAB)
    sources = [
        {"name": "a", "subset": "a", "weight": 0.8},
        {"name": "b", "path": [str(tmp_path / "b1"), str(tmp_path / "b2")], "weight": 3.2},
        {"name": "never", "subset": "never", "weight": 0},
    ]
    config = config_of(tmp_path, sources, mixing_temperature=temperature)
    built = build(config, train=2000, valid=100, valid_per_source=20)
    first = np.array([built.train[i]["tokens"].max() for i in range(2000)]) // 100
    of_source = [int(built.train[i]["source"]) for i in range(2000)]
    assert of_source == [int(number > 1) for number in first], "every sample says which source it is from"
    share_a = 0.2**temperature / (0.2**temperature + 0.8**temperature)
    assert built.corpus.blends["train"].phases[0].weights == pytest.approx((share_a, 1 - share_a))
    counts = {i: float(np.mean(first == i)) for i in (1, 2, 3, 4)}
    assert counts[1] == pytest.approx(share_a, abs=2e-3)
    assert counts[2] / (counts[2] + counts[3]) == pytest.approx(0.75, abs=0.05)
    assert counts[4] == 0
    # Every prefix of the run has its share already, not only the whole of it.
    assert float(np.mean(first[:200] == 1)) == pytest.approx(share_a, abs=2e-2)
    assert built.sampled(2000) == {"a": round(2000 * share_a), "b": round(2000 * (1 - share_a))}
    assert set(built.valid_by_source) == {"a", "b"}
    for name, low, high in (("a", 100, 200), ("b", 200, 400)):
        ids = ids_of(built.valid_by_source[name])
        assert len(built.valid_by_source[name]) == 20
        assert np.all((ids == EOD_ID) | ((ids >= low) & (ids < high)))


def test_more_samples_than_an_epoch(tmp_path: Path) -> None:
    documents = unique_documents(40)
    write_dataset(tmp_path / "a", documents, vocab_size=VOCAB)
    config = config_of(tmp_path, [{"name": "a", "subset": "a"}], split="100,0,0")
    epoch_tokens = sum(map(len, documents))
    train = build(config, train=10 * epoch_tokens // SEQ).train
    ids, counts = np.unique(ids_of(train), return_counts=True)
    seen = counts[ids != EOD_ID]
    assert len(seen) == sum(len(document) - 1 for document in documents)
    assert seen.min() >= 8
    assert seen.max() <= 11


def test_the_order_depends_on_the_seed_alone(tmp_path: Path) -> None:
    write_dataset(tmp_path / "a", unique_documents(100), vocab_size=VOCAB)
    write_dataset(tmp_path / "b", unique_documents(50, start=30_000), vocab_size=VOCAB)
    sources = [{"name": "a", "subset": "a"}, {"name": "b", "subset": "b"}]

    def order(cache: str, seed: int | None = None) -> list[int]:
        config = config_of(
            tmp_path, [{"name": s["name"], "path": str(tmp_path / s["name"])} for s in sources],
            cache_dir=str(tmp_path / cache), preprocessing={"shuffle_seed": seed},
        )  # fmt: skip
        return ids_of(build(config, train=200).train).tolist()

    built, cached, afresh = order("one"), order("one"), order("two")
    assert built == cached == afresh
    assert order("one", seed=42) == built, "null means the run's seed, which is 42"
    assert order("one", seed=43) != built


def test_a_dataset_made_again_under_its_name_is_not_read_by_the_old_index(tmp_path: Path) -> None:
    """Megatron-Core's own cache is keyed by path: it would serve old offsets into new documents."""
    config = config_of(tmp_path, [{"name": "a", "subset": "a"}], split="100,0,0")
    for count in (80, 120):
        documents = unique_documents(count)
        write_dataset(tmp_path / "a", documents, vocab_size=VOCAB)
        samples = sum(map(len, unique_documents(80))) // SEQ - 1
        words = ids_of(build(config, train=samples).train)
        streams = "".join(f" {i} " for document in documents for i in document)
        words = words[words != EOD_ID]
        assert len(set(words.tolist())) == words.size
        assert all(f" {i} " in streams for i in words[:50])


def test_an_interrupted_or_damaged_index_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_dataset(tmp_path / "a", unique_documents(100), vocab_size=VOCAB)
    config = config_of(tmp_path, [{"name": "a", "subset": "a"}])
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            build(config, train=100)
    assert list((tmp_path / "index").iterdir()) == []
    expected = ids_of(build(config, train=100).train).tolist()
    files = sorted((tmp_path / "index").iterdir(), key=lambda file: file.suffix)
    assert [file.suffix for file in files] == [".epochs", ".shards"]
    content = {file: file.read_bytes() for file in files}
    for file in files:
        for damage in (content[file][: len(content[file]) // 2], _flipped(content[file]), b""):
            file.write_bytes(damage)
            caplog.clear()
            assert ids_of(build(config, train=100).train).tolist() == expected
            assert f"{file} is damaged: it is made again" in caplog.text
            assert file.read_bytes() == content[file]
    caplog.clear()
    assert ids_of(build(config, train=100).train).tolist() == expected
    assert "damaged" not in caplog.text


def _flipped(content: bytes) -> bytes:
    """One bit of an array differs."""
    changed = bytearray(content)
    changed[-20] ^= 4
    return bytes(changed)


def test_processes_that_share_the_work_build_the_same_index(tmp_path: Path) -> None:
    sources = []
    for number, name in enumerate(("a", "b", "c")):
        write_dataset(tmp_path / name, numbered_documents(300, 3, 500, seed=number), vocab_size=VOCAB)
        sources.append({"name": name, "path": str(tmp_path / name)})
    written = []
    for workers in (1, 3):
        config = config_of(tmp_path, sources, cache_dir=str(tmp_path / f"cache{workers}"))
        corpus = plan_corpus(config, SampleCounts(60_000, 10))
        made = build_index(corpus, workers)
        files = sorted((tmp_path / f"cache{workers}" / "index").glob("*.epochs"))
        assert made == len(files) > 6
        assert build_index(corpus, workers) == 0
        written.append({file.name: file.read_bytes() for file in files})
    assert written[0] == written[1]


def test_validation_does_without_a_source_that_is_too_small_for_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_dataset(tmp_path / "large", [[*range(3, 12), EOD_ID]] * 200, vocab_size=VOCAB)
    write_dataset(tmp_path / "small", [[*range(3, 12), EOD_ID]] * 20, vocab_size=VOCAB)
    sources = [{"name": name, "subset": name, "weight": 0.5} for name in ("large", "small")]
    datasets = build(config_of(tmp_path, sources, split="95,5,0"), train=8, valid=3, valid_per_source=2)
    assert datasets.valid is not None
    assert len(datasets.valid) == 3
    assert list(datasets.valid_by_source) == ["large"]
    assert "Left out of validation: Source 'small'" in caplog.text


def test_a_split_too_small_for_a_sequence_says_so(tmp_path: Path) -> None:
    write_dataset(tmp_path / "a", [[*range(3, 12), EOD_ID]] * 20, vocab_size=VOCAB)
    config = config_of(tmp_path, [{"name": "web", "subset": "a"}], split="95,5,0")
    with pytest.raises(
        DataError,
        match=r"'web': its validation split .* has 10 tokens in 1 documents, and one sequence takes 17",
    ):
        build(config, train=5, valid=1)
    assert build(config, train=5, valid_per_source=1).valid_by_source == {}
    empty = config_of(tmp_path, [{"name": "web", "subset": "a"}], split="99,1,0")
    with pytest.raises(DataError, match="0 tokens in 0 documents"):
        build(empty, train=5, valid=1)
    assert build(empty, train=5).valid is None
    none = config_of(tmp_path, [{"name": "web", "subset": "a"}], split="100,0,0")
    with pytest.raises(ConfigError, match="leaves nothing for test"):
        build(none, train=5, test=1)


def test_wrong_sources(tmp_path: Path) -> None:
    write_dataset(tmp_path / "a", unique_documents(30), vocab_size=VOCAB)
    write_dataset(tmp_path / "b", unique_documents(30), vocab_size=VOCAB, sha256="b" * 64)
    (tmp_path / "hollow").mkdir()
    write_dataset(tmp_path / "above" / "web" / "a", unique_documents(30), vocab_size=VOCAB)
    cases: list[tuple[list[dict[str, Any]], type[Exception], str]] = [
        ([{"name": "a", "subset": "missing"}], DataError, r"missing\.bin: no such file.* 'a' names\. Make"),
        ([{"name": "a", "subset": "hollo"}], DataError, r"hollo\.bin: .*did you mean hollow\?"),
        ([{"name": "a", "path": [f"{tmp_path}/a", f"{tmp_path}/./a"]}], DataError, "listed twice"),
        ([{"name": "a", "subset": "hollow"}], DataError, r"no dataset .* in this directory\."),
        ([{"name": "a", "subset": "above"}], DataError, "there are in those below it: web"),
        ([{"name": "a"}], ConfigError, "path or a subset"),
        ([{"name": "a", "subset": "a", "weight": 0}], ConfigError, "weight above 0"),
        ([], ConfigError, "weight above 0"),
        ([{"name": "a", "subset": "a"}, {"name": "a", "subset": "b"}], ConfigError, "same name"),
        ([{"name": "a", "subset": "a"}, {"name": "b", "subset": "b"}], DataError, "another tokenizer"),
    ]
    for sources, error, said in cases:
        with pytest.raises(error, match=said):
            build(config_of(tmp_path, sources), train=5)
    write_dataset(tmp_path / "web" / "1", unique_documents(30), vocab_size=VOCAB)
    data_files(write_dataset(tmp_path / "web" / "2", unique_documents(30), vocab_size=VOCAB))[1].unlink()
    with pytest.raises(DataError, match=r"web/2\.idx: no such file"):
        build(config_of(tmp_path, [{"name": "a", "subset": "web"}]), train=5)
    config = config_of(tmp_path, [{"name": "a", "subset": "a"}])
    small = config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": 100})})
    with pytest.raises(DataError, match="model's vocabulary only 100"):
        build(small, train=5)
    with pytest.raises(ConfigError, match=r"data\.split"):
        build(config_of(tmp_path, [{"name": "a", "subset": "a"}], split="all"), train=5)


def test_a_source_that_is_still_being_made_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_dataset(tmp_path / "web" / "a", unique_documents(60), vocab_size=VOCAB)
    config = config_of(tmp_path, [{"name": "web", "subset": "web"}])
    with IndexedWriter(tmp_path / "web" / "b.2", VOCAB):
        build(config, train=5)
    assert "1 datasets of source web are being made" in caplog.text
    assert "not read: b.2. Preprocess" in caplog.text
    caplog.clear()
    build(config, train=5)
    assert "being made" not in caplog.text


def test_two_sources_of_the_same_data_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_dataset(tmp_path / "a", unique_documents(60), vocab_size=VOCAB)
    (tmp_path / "b.idx").symlink_to("a.idx")
    (tmp_path / "b.bin").symlink_to("a.bin")
    build(config_of(tmp_path, [{"name": name, "subset": name} for name in "ab"]), train=5)
    assert f"Sources a and b both read {tmp_path}/b" in caplog.text


def test_a_dataset_without_record(tmp_path: Path) -> None:
    write_dataset(tmp_path / "a", unique_documents(60), vocab_size=VOCAB)
    data_files(tmp_path / "a")[2].unlink()
    assert len(build(config_of(tmp_path, [{"name": "a", "subset": "a"}]), train=5).train) == 5
    with pytest.raises(DataError, match="document_mask needs"):
        build(config_of(tmp_path, [{"name": "a", "subset": "a"}], document_mask=True), train=5)


def test_an_id_beyond_the_vocabulary_is_caught_when_read(tmp_path: Path) -> None:
    write_dataset(tmp_path / "a", unique_documents(60), vocab_size=VOCAB)
    bin_path = data_files(tmp_path / "a")[0]
    bin_path.write_bytes(b"\xff" * bin_path.stat().st_size)
    train = build(config_of(tmp_path, [{"name": "a", "subset": "a"}]), train=5).train
    with pytest.raises(DataError, match="token id 65535, the vocabulary has 60,000"):
        train[0]


def test_shares_are_normalized() -> None:
    assert normalized({"x": 4, "y": 1, "z": 0}, 1.0) == {"x": 0.8, "y": 0.2}
    assert normalized({"x": 4, "y": 1}, 0.5) == {"x": pytest.approx(2 / 3), "y": pytest.approx(1 / 3)}
