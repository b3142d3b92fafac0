"""Hostile input, strict and tolerant; and every defect that other tools are known for, shown absent.

Strict: the run stops with file and line and publishes nothing of the shard. Tolerant: what holds no
document is put aside and counted. Either way the run ends, in bounded memory.
"""

import gzip
import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import zstandard
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megads.data.encoding import Encoder
from megads.data.indexed import data_files
from megads.data.inputs import InputShard, find_shards
from megads.data.manifest import read_record
from megads.data.preprocess import preprocess
from megads.data.recipe import Recipe
from megads.data.shards import Shard, convert_shard
from megads.errors import DataError

DEEPSEEK = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜fim▁hole｜>")
GOOD = [f"A document, number {i}.\n\nWith line breaks; and marks!" for i in range(60)]
MAX_LINE_BYTES = 4096


def line_of(text: str, **fields: object) -> bytes:
    return json.dumps({"text": text, **fields}).encode() + b"\n"


GOOD_LINES = b"".join(map(line_of, GOOD))
BAD_LINES = {
    "no_text": b'{"id": "1"}',
    "null_text": b'{"text": null}',
    "text_not_a_string": b'{"text": 12.5}',
    "not_an_object": b'["text"]',
    "bad_json": b'{"text": "cut',
    "bad_utf8": b'{"text": "\xff\xfe"}',
    "lone_surrogate": b'{"text": "\\udc80"}',
    "line_too_long": b'{"text": "' + b"x" * MAX_LINE_BYTES + b'"}',
}
PACK: dict[str, Callable[[bytes], bytes]] = {
    ".jsonl": bytes,
    ".jsonl.gz": gzip.compress,
    ".jsonl.zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE with DeepSeek's control tokens, of which one is not even marked as such."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, show_progress=False, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()
    )
    model.train_from_iterator(GOOD, trainer)
    model.add_special_tokens([token for token in DEEPSEEK if token != "<｜User｜>"])
    model.add_tokens(["<｜User｜>"])
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    model.save(str(path))
    return path


@pytest.fixture(scope="module")
def strict(tokenizer_path: Path) -> Encoder:
    return Encoder(Recipe(str(tokenizer_path), max_line_bytes=MAX_LINE_BYTES))


@pytest.fixture(scope="module")
def tolerant(tokenizer_path: Path) -> Encoder:
    return Encoder(Recipe(str(tokenizer_path), max_line_bytes=MAX_LINE_BYTES, quarantine_quota=0.2))


def shard_of(path: Path) -> Shard:
    return Shard(find_shards([str(path)])[0], path.parent / "out" / "d")


def texts_of(shard: Shard, encoder: Encoder) -> list[str]:
    dataset = IndexedDataset(str(shard.prefix))
    ids = [dataset[i].tolist() for i in range(len(dataset))]
    assert all(document[-1] == encoder.tokenizer.eod_id for document in ids)
    return [encoder.tokenizer.decode(document[:-1]) for document in ids]


def published(shard: Shard) -> set[str]:
    directory = shard.prefix.parent
    return {path.name for path in directory.iterdir()} if directory.exists() else set()


def check_conservation(record: dict[str, Any]) -> None:
    lost = sum(record["quarantined"].values()) + sum(record["dropped"].values())
    assert record["documents_in"] == record["documents"] + lost


@pytest.mark.parametrize("reason", BAD_LINES)
@pytest.mark.parametrize("ending", PACK)
def test_a_bad_line(tmp_path: Path, strict: Encoder, tolerant: Encoder, reason: str, ending: str) -> None:
    lines = GOOD_LINES.splitlines(keepends=True)
    path = tmp_path / f"a{ending}"
    path.write_bytes(PACK[ending](b"".join([*lines[:40], BAD_LINES[reason] + b"\n", *lines[40:]])))
    shard = shard_of(path)
    with pytest.raises(DataError, match=rf"a{ending}, line 41: "):
        convert_shard(shard, strict)
    assert published(shard) == set()
    record = convert_shard(shard, tolerant)
    assert record["quarantined"] == {reason: 1}
    assert (record["documents_in"], record["documents"]) == (61, 60)
    check_conservation(record)
    assert texts_of(shard, tolerant) == GOOD
    listed = json.loads((shard.prefix.parent / "d.quarantine.jsonl").read_text())
    assert (listed["line"], listed["reason"]) == (41, reason)


def test_more_than_the_quota_publishes_nothing(tmp_path: Path, tolerant: Encoder) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD_LINES + b"\n".join(list(BAD_LINES.values()) * 2) + b"\n")
    shard = shard_of(path)
    with pytest.raises(DataError, match=r"a\.jsonl: 16 of 76 lines .*quota of 0\.2\. The first is line 61"):
        convert_shard(shard, tolerant)
    assert published(shard) == set()


@pytest.mark.parametrize("ending", [".jsonl.gz", ".jsonl.zst"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "other", "unreadable"])
def test_damaged_files(
    tmp_path: Path,
    strict: Encoder,
    tolerant: Encoder,
    ending: str,
    damage: str,
) -> None:
    packed = PACK[ending](GOOD_LINES)
    flipped = bytearray(packed)
    flipped[len(packed) // 2] ^= 0x40
    path = tmp_path / f"a{ending}"
    content = {"truncated": packed[:-20], "flipped": bytes(flipped), "empty": b"", "other": GOOD_LINES}
    path.write_bytes(content.get(damage, packed))
    shard = shard_of(path)
    if damage == "unreadable":
        path.unlink()  # permissions do not stop root; a file that goes away does
    with pytest.raises(DataError, match=rf"a{ending}, line \d+: the file cannot be read any further"):
        convert_shard(shard, strict)
    assert published(shard) == set(), "a part of a damaged file was published"
    record = convert_shard(shard, tolerant)
    assert f"a{ending}, line" in record["damaged"]
    assert (record["documents"], record["tokens"]) == (0, 0)
    assert published(shard) == {"d.json", "d.quarantine.jsonl"}
    check_conservation(record)
    # The next run leaves it at that, unless the file is mended, or was only out of reach.
    again = preprocess([shard], Recipe(str(strict.tokenizer.path), max_line_bytes=MAX_LINE_BYTES,
                                       quarantine_quota=1.0))  # fmt: skip
    assert next(iter(again.values())).done_before == (damage != "unreadable")
    path.write_bytes(packed)
    summary = preprocess([shard_of(path)], strict.recipe)
    assert sum(s.documents for s in summary.values()) == len(GOOD)


def test_damaged_files_have_a_quota_of_bytes(tmp_path: Path, tokenizer_path: Path) -> None:
    for i in range(4):
        (tmp_path / f"{i}.jsonl.gz").write_bytes(gzip.compress(GOOD_LINES))
    (tmp_path / "4.jsonl.gz").write_bytes(gzip.compress(GOOD_LINES)[:-30])
    shards = [Shard(s, tmp_path / "out" / s.stem) for s in find_shards([str(tmp_path)])]
    with pytest.raises(DataError, match=r"more than the quota of 0\.15.*4\.jsonl\.gz"):
        preprocess(shards, Recipe(str(tokenizer_path), quarantine_quota=0.15))
    summary = preprocess(shards, Recipe(str(tokenizer_path), quarantine_quota=0.25))
    assert next(iter(summary.values())).damaged == 1


@pytest.mark.parametrize("ending", [".jsonl.gz", ".jsonl.zst"])
def test_a_bomb_costs_no_memory(tmp_path: Path, strict: Encoder, tolerant: Encoder, ending: str) -> None:
    path = tmp_path / f"bomb{ending}"
    path.write_bytes(PACK[ending](GOOD_LINES + b'{"text": "' + bytes(96 << 20) + b'"}\n' + GOOD_LINES))
    assert path.stat().st_size < 200_000
    shard = shard_of(path)
    with pytest.raises(DataError, match=r"line 61: the line is longer than 4,096 bytes"):
        convert_shard(shard, strict)
    tracemalloc.start()
    record = convert_shard(shard, tolerant)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (record["documents"], record["quarantined"]) == (120, {"line_too_long": 1})
    assert peak_bytes < 48 << 20


def test_empty_files(tmp_path: Path, strict: Encoder) -> None:
    for name, content in (
        ("plain.jsonl", b""),
        ("packed.jsonl.gz", gzip.compress(b"")),
        ("framed.jsonl.zst", zstandard.ZstdCompressor().compress(b"")),
        ("blank.jsonl", b"\n \n\r\n"),
    ):
        (tmp_path / name).write_bytes(content)
        shard = shard_of(tmp_path / name)
        record = convert_shard(shard, strict)
        assert (record["documents_in"], record["documents"], record["damaged"]) == (0, 0, None)
        assert published(shard) == {"d.json"}


def test_duplicate_ids_lose_no_document(tmp_path: Path, strict: Encoder) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(line_of(text, id="same") for text in GOOD))
    assert convert_shard(shard_of(path), strict)["documents"] == len(GOOD)
    assert texts_of(shard_of(path), strict) == GOOD


def test_duplicate_keys_in_a_record_are_read_as_json_libraries_do(tmp_path: Path, strict: Encoder) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "first", "text": "last"}\n')
    convert_shard(shard_of(path), strict)
    assert texts_of(shard_of(path), strict) == ["last"]


def test_text_that_looks_like_control_tokens_stays_text(tmp_path: Path, strict: Encoder) -> None:
    """Defect 4 of others: documents that end where a web page quotes an end-of-document token."""
    texts = [f"a{token}b {token}{token}" for token in DEEPSEEK] + list(DEEPSEEK)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(map(line_of, texts)))
    shard = shard_of(path)
    convert_shard(shard, strict)
    assert texts_of(shard, strict) == texts
    control = {strict.tokenizer.control_id(token) for token in DEEPSEEK}
    assert None not in control
    dataset = IndexedDataset(str(shard.prefix))
    for i in range(len(dataset)):
        assert control.isdisjoint(dataset[i].tolist()[:-1])


def test_records_without_text_do_not_take_others_along(tmp_path: Path, tolerant: Encoder) -> None:
    """Defect 1 of others: of 3,619 records with one bad one, 3,378 documents came out, with exit 0."""
    lines = [line_of(f"document {i}") for i in range(3618)]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join([*lines[:1200], b'{"id": "no text"}\n', *lines[1200:]]))
    record = convert_shard(shard_of(path), tolerant)
    assert (record["documents_in"], record["documents"], record["quarantined"]) == (
        3619,
        3618,
        {"no_text": 1},
    )
    assert texts_of(shard_of(path), tolerant) == [f"document {i}" for i in range(3618)]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_record_neither_hangs_nor_leaves_an_orphan(
    tmp_path: Path, strict: Encoder, workers: int
) -> None:
    """Defect 2 of others: the pool hangs, and a `.bin` without index stays."""
    for i in range(4):
        (tmp_path / f"{i}.jsonl.gz").write_bytes(gzip.compress(GOOD_LINES + b"{\n"))
    shards = [Shard(s, tmp_path / "out" / s.stem) for s in find_shards([str(tmp_path)])]
    with pytest.raises(DataError, match=r"\.jsonl\.gz, line 61: not a JSON object"):
        preprocess(shards, strict.recipe, workers=workers)
    assert not list((tmp_path / "out").iterdir())


def test_a_truncated_file_is_never_a_success(tmp_path: Path, strict: Encoder) -> None:
    """Defect 3 of others: exit 0 with partial output. Wherever the file is cut."""
    packed = gzip.compress(GOOD_LINES)
    path = tmp_path / "a.jsonl.gz"
    for length in range(0, len(packed), 7):
        path.write_bytes(packed[:length])
        with pytest.raises(DataError):
            convert_shard(shard_of(path), strict)
        assert published(shard_of(path)) == set()


def test_a_file_that_changes_while_it_is_read_is_made_again(tmp_path: Path, strict: Encoder) -> None:
    """The record has the hash of what was read, not of what lies there later."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD_LINES)
    shard = shard_of(path)
    path.write_bytes(GOOD_LINES + line_of("more"))  # between listing and reading
    assert preprocess([shard], strict.recipe)[shard.input.source].documents == 61
    assert preprocess([shard_of(path)], strict.recipe)[shard.input.source].documents == 61


def test_a_full_disk_is_told_and_leaves_nothing(
    tmp_path: Path, strict: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD_LINES)

    def no_space(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(DataError, match=r"cannot be written: .*No space left"):
        convert_shard(shard_of(path), strict)
    assert published(shard_of(path)) == set()


def test_a_missing_directory_entry_is_an_error_of_listing(tmp_path: Path, strict: Encoder) -> None:
    """A file that is gone when its turn comes stops a strict run; it is not passed over."""
    gone = InputShard(str(tmp_path / "gone.jsonl"), "x", "x", "gone.jsonl", 5, "mtime 1")
    with pytest.raises(DataError, match=r"gone\.jsonl, line 1: .*No such file"):
        preprocess([Shard(gone, tmp_path / "out" / "gone")], strict.recipe)
    assert read_record(tmp_path / "out" / "gone") is None
    assert not data_files(tmp_path / "out" / "gone")[0].exists()
