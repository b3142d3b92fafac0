"""Indexed files: Megatron-Core's bytes, all or nothing on the disk, and no damaged pair gets through."""

import contextlib
import json
import os
import random
import resource
import shutil
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megads.data import indexed
from megads.data.indexed import HEADER, IndexedWriter, data_files, token_type
from megads.data.manifest import check_dataset, sequence_lengths
from megads.errors import DataError
from megads.publish import publish_file

from data_files import SHA256, VOCAB_SIZE, numbered_documents, write_dataset  # isort: skip


@pytest.mark.parametrize("vocab_size", [500, 65_499, 65_500, 129_280])
@pytest.mark.parametrize("copy_items", [7, 1 << 20])
def test_files_are_those_of_megatron_core(
    tmp_path: Path, vocab_size: int, copy_items: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexed, "COPY_ITEMS", copy_items)
    documents = [*numbered_documents(100, 3, vocab_size), [vocab_size - 1]]
    write_dataset(tmp_path / "ours", documents, vocab_size=vocab_size)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=token_type(vocab_size).type)
    for ids in documents:
        builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for ending in ("bin", "idx"):
        assert (tmp_path / f"ours.{ending}").read_bytes() == (tmp_path / f"theirs.{ending}").read_bytes()
    read = IndexedDataset(str(tmp_path / "ours"))
    assert [read[i].tolist() for i in range(len(read))] == documents
    info = check_dataset(tmp_path / "ours", vocab_size, SHA256, full=True)
    assert (info.documents, info.tokens) == (len(documents), sum(map(len, documents)))
    assert sequence_lengths(tmp_path / "ours").tolist() == [len(ids) for ids in documents]


def test_memory_does_not_grow_with_the_dataset(tmp_path: Path) -> None:
    tokens = np.ones(100_000, dtype=np.uint16)
    lengths = np.ones(100_000, dtype=np.int32)
    tracemalloc.start()
    with IndexedWriter(tmp_path / "d", VOCAB_SIZE) as writer:
        for _ in range(50):
            writer.add(tokens, lengths)
        writer.finish({})
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert writer.documents == 5_000_000
    assert peak_bytes < 60 << 20, "Megatron-Core's builder takes 136 bytes per document, here 680 MB"


def test_nothing_is_left_when_writing_fails(tmp_path: Path) -> None:
    writer = IndexedWriter(tmp_path / "d", VOCAB_SIZE)
    with contextlib.suppress(KeyError), writer:
        writer.add(np.array([1, 2], dtype=np.uint16), np.array([2], dtype=np.int32))
        assert list(tmp_path.iterdir())
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_a_data_error_and_the_old_dataset_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = write_dataset(tmp_path / "d", [[5, 6, 2]])

    def no_space(file: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(indexed, "_to_disk", no_space)
    with pytest.raises(DataError, match="No space left"):
        write_dataset(prefix, [[7, 2]])
    monkeypatch.undo()
    assert check_dataset(prefix, VOCAB_SIZE, SHA256, full=True).tokens == 3
    assert {p.name for p in tmp_path.iterdir()} == {"d.bin", "d.idx", "d.json"}


def test_a_disk_that_fills_up_on_the_way_is_a_data_error_too(tmp_path: Path) -> None:
    """What is still in buffers then fails once more when the files are closed."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(DataError, match=r"d: cannot be written: .*File too large"):
            write_dataset(tmp_path / "d", [[7, 2]] * 750)
        with pytest.raises(DataError, match=r"file: cannot be written: .*File too large"):
            publish_file(tmp_path / "file", b"x" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("killed_before", range(6))
def test_a_kill_at_any_moment_leaves_no_mixed_pair(tmp_path: Path, killed_before: int) -> None:
    """The n-th rename or removal never happens: what is there is the old, the new, or refused."""
    old, new = [[5, 6, 2]], [[7, 8, 2]]  # of one size, so that sizes alone cannot tell
    prefix = write_dataset(tmp_path / "d", old)
    script = f"""
import os, sys
sys.path[:0] = {[str(Path(__file__).parent), *sys.path]!r}
from pathlib import Path
from data_files import write_dataset
calls = 0
def counted(function):
    def call(*args, **kwargs):
        global calls
        if calls == {killed_before}:
            os._exit(9)
        calls += 1
        return function(*args, **kwargs)
    return call
os.replace, Path.unlink = counted(os.replace), counted(Path.unlink)
write_dataset(Path({str(prefix)!r}), {new!r})
"""
    code = subprocess.run([sys.executable, "-c", script], check=False).returncode
    assert code == (9 if killed_before < 5 else 0)
    try:
        check_dataset(prefix, VOCAB_SIZE, SHA256, full=True)
    except DataError:
        assert 0 < killed_before < 4
    else:
        read = IndexedDataset(str(prefix))  # keep it: its arrays are views of a map that dies with it
        content = read[0].tolist()
        assert content == (old if killed_before == 0 else new)[0]
        assert data_files(prefix)[2].exists() == (killed_before in (0, 5))
    write_dataset(prefix, new)  # and the remains are no obstacle
    assert check_dataset(prefix, VOCAB_SIZE, SHA256, full=True).tokens == 3


def test_one_writer_at_a_time_and_no_silent_overwrite(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "d", VOCAB_SIZE) as writer:
        with pytest.raises(DataError, match="another process"):
            IndexedWriter(tmp_path / "d", VOCAB_SIZE)
        writer.finish({})
    with pytest.raises(DataError, match="exist already"):
        IndexedWriter(tmp_path / "d", VOCAB_SIZE)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "d", numbered_documents(20, 3, VOCAB_SIZE))


def rewrite(path: Path, offset: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


def shorten(path: Path, by_bytes: int) -> None:
    os.truncate(path, path.stat().st_size - by_bytes)


N = 20  # documents
BAD = {
    "no .bin": (lambda b, i, j: b.unlink(), r"d\.bin: no such file"),
    "no .idx": (lambda b, i, j: i.unlink(), r"d\.idx: no such file"),
    "truncated .bin": (lambda b, i, j: shorten(b, 2), r"d\.bin: .* truncated"),
    "empty .bin": (lambda b, i, j: b.write_bytes(b""), r"d\.bin: .* truncated"),
    "longer .bin": (lambda b, i, j: b.write_bytes(b.read_bytes() + b"\0\0"), r"d\.bin"),
    "truncated .idx": (lambda b, i, j: shorten(i, 8), r"d\.idx: .* truncated"),
    "headless .idx": (lambda b, i, j: os.truncate(i, 20), "bad magic"),
    "empty .idx": (lambda b, i, j: i.write_bytes(b""), "bad magic"),
    "magic": (lambda b, i, j: rewrite(i, 0, b"X"), "bad magic"),
    "version": (lambda b, i, j: rewrite(i, 9, b"\2"), "version 2"),
    "type code": (lambda b, i, j: rewrite(i, 17, b"\7"), "type code 7"),
    "count": (lambda b, i, j: rewrite(i, 18, struct.pack("<Q", 2**62)), "truncated or damaged"),
    "negative length": (lambda b, i, j: rewrite(i, HEADER.size, struct.pack("<i", -5)), "negative length"),
    "other length": (lambda b, i, j: rewrite(i, HEADER.size, struct.pack("<i", 1)), "offsets"),
    "offset": (lambda b, i, j: rewrite(i, HEADER.size + 4 * N + 8, struct.pack("<q", 0)), "offsets"),
    "boundary": (lambda b, i, j: rewrite(i, HEADER.size + 12 * N + 8, struct.pack("<q", 19)), "not ascend"),
    "last boundary": (lambda b, i, j: rewrite(i, HEADER.size + 20 * N, struct.pack("<q", 99)), "sequence 99"),
    "record": (lambda b, i, j: j.write_text("{"), r"d\.json: not a record"),
    "record without hash": (lambda b, i, j: j.write_text('{"format": "megads-indexed-1"}'), "not a record"),
}  # fmt: skip


@pytest.mark.parametrize("damage", BAD)
def test_bad_pairs_are_refused(dataset: Path, damage: str) -> None:
    act, said = BAD[damage]
    act(*data_files(dataset))
    with pytest.raises(DataError, match=said):
        check_dataset(dataset, VOCAB_SIZE, SHA256)


def test_other_tokenizer_larger_vocabulary_and_emptiness_are_refused(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="another tokenizer"):
        check_dataset(dataset, VOCAB_SIZE, "b" * 64)
    with pytest.raises(DataError, match=r"500 ids, the model's vocabulary only 499.*at least 500"):
        check_dataset(dataset, VOCAB_SIZE - 1, SHA256)
    assert check_dataset(dataset, VOCAB_SIZE + 1, None).vocab_size == VOCAB_SIZE
    for name, documents in (("none", []), ("hollow", [[], []])):
        with pytest.raises(DataError, match="empty"):
            check_dataset(write_dataset(tmp_path / name, documents), VOCAB_SIZE, SHA256)


def test_a_dataset_without_record_passes_on_its_structure(dataset: Path) -> None:
    data_files(dataset)[2].unlink()
    info = check_dataset(dataset, VOCAB_SIZE, "b" * 64)
    assert (info.documents, info.vocab_size, info.eod_id, info.tokenizer_sha256) == (20, None, None, None)


def test_every_mutation_is_found(dataset: Path, tmp_path: Path) -> None:
    """Single-byte changes and truncations anywhere in the three files: found, or without effect."""
    rng = random.Random(0)
    good = check_dataset(dataset, VOCAB_SIZE, SHA256, full=True)
    copies = data_files(tmp_path / "copy")
    silent = []
    for number in range(600):
        for file, copy in zip(data_files(dataset), copies, strict=True):
            shutil.copyfile(file, copy)
        target = copies[number % 3]
        content = bytearray(target.read_bytes())
        position = rng.randrange(len(content))
        if rng.random() < 0.8:
            content[position] ^= rng.randrange(1, 256)
            target.write_bytes(content)
        else:
            target.write_bytes(content[:position])
        try:
            found = check_dataset(tmp_path / "copy", VOCAB_SIZE, SHA256, full=True)
        except DataError:
            continue
        if number % 3 < 2 or (found.documents, found.tokens, found.eod_id) != (
            good.documents,
            good.tokens,
            good.eod_id,
        ):
            silent.append((number, position))
    assert not silent


def test_the_record_says_what_it_is_of(dataset: Path) -> None:
    record = json.loads(data_files(dataset)[2].read_text())
    for part, path in zip(("bin", "idx"), data_files(dataset), strict=False):
        assert record[part]["bytes"] == path.stat().st_size
