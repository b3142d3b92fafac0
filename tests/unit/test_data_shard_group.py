"""Many files as one dataset: the tokens of Megatron-Core's reader, checked once, few files open."""

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets import helpers
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megads.data import shard_group as module
from megads.data.bin_files import BinFiles
from megads.data.epochs import EpochIndex, SourcePart
from megads.data.indexed import data_files
from megads.data.shard_group import ShardGroup
from megads.data.sources import split_bounds
from megads.errors import ConfigError, DataError

from data_files import numbered_documents, write_dataset  # isort: skip


@pytest.fixture
def prefixes(tmp_path: Path) -> list[str]:
    return [
        str(write_dataset(tmp_path / f"shard{i}", numbered_documents(20 + i, 3, 500, seed=i)))
        for i in range(5)
    ]


def test_a_group_reads_what_megatron_core_reads(tmp_path: Path, prefixes: list[str]) -> None:
    group = ShardGroup.open(prefixes, tmp_path)
    parts = [IndexedDataset(prefix) for prefix in prefixes]
    lengths = np.concatenate([part.sequence_lengths for part in parts])
    assert len(group) == len(lengths) == 110
    assert np.array_equal(group.sequence_lengths, lengths)
    assert group.sequence_lengths.dtype == np.int32
    assert group.tokens() == lengths.sum()
    assert group.tokens(7, 50) == lengths[7:50].sum()
    assert group.document_indices.tolist() == list(range(111))
    assert np.array_equal(group.lengths_of(np.array([3, 109, 20])), lengths[[3, 109, 20]])
    document = 0
    for number, part in enumerate(parts):
        for row in range(len(part)):
            assert np.array_equal(group[document], part[row])
            assert np.array_equal(group.get(document, 2, 3), part.get(row, 2, 3))
            assert np.array_equal(group.get(np.int32(document), 4), part.get(row, 4))
            shard, row_there = group.shard_of(document)
            assert (shard.prefix, row_there) == (prefixes[number], row)
            document += 1
    for wrong in ((110, 0, None), (-1, 0, None), (0, 0, 10_000), (0, 10_000, None)):
        with pytest.raises(IndexError):
            group.get(*wrong)


def test_what_was_checked_is_not_read_again(
    tmp_path: Path, prefixes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[str] = []
    real = module.check_dataset

    def counting(prefix: str, *args: Any, **kwargs: Any) -> Any:
        checked.append(prefix)
        return real(prefix, *args, **kwargs)

    monkeypatch.setattr(module, "check_dataset", counting)
    first = ShardGroup.open(prefixes, tmp_path)
    assert sorted(checked) == sorted(prefixes)
    again = ShardGroup.open(prefixes, tmp_path)
    assert len(checked) == 5
    assert again.shards == first.shards
    assert again.sha256 == first.sha256
    touched = data_files(prefixes[2])[0]
    os.utime(touched, ns=(0, touched.stat().st_mtime_ns + 1))
    ShardGroup.open(prefixes, tmp_path)
    assert len(checked) == 10, "another time of change: all are checked again"
    other = ShardGroup.open(prefixes[:4], tmp_path)
    assert other.sha256 != first.sha256
    copy = shutil.copytree(tmp_path, tmp_path.with_name("copy_of_" + tmp_path.name))
    copied = ShardGroup.open([str(copy / Path(prefix).name) for prefix in prefixes], tmp_path)
    assert copied.sha256 == first.sha256, "the content has the same name wherever it lies"


@pytest.mark.parametrize("part", [0, 1, 2])
def test_damage_after_the_first_check_is_noticed(tmp_path: Path, prefixes: list[str], part: int) -> None:
    ShardGroup.open(prefixes, tmp_path)
    path = data_files(prefixes[3])[part]
    os.truncate(path, path.stat().st_size - 2)
    with pytest.raises(DataError, match="shard3"):
        ShardGroup.open(prefixes, tmp_path)


def test_a_file_that_shrinks_during_the_run_is_an_error_with_its_name(
    tmp_path: Path, prefixes: list[str]
) -> None:
    """A mapping would end the process with SIGBUS."""
    group = ShardGroup.open(prefixes, tmp_path)
    os.truncate(prefixes[0] + ".bin", 10)
    with pytest.raises(DataError, match=r"shard0\.bin: ends before byte .* resume"):
        group[19]
    os.unlink(prefixes[4] + ".bin")
    with pytest.raises(DataError, match=r"shard4\.bin: cannot be read"):
        group[109]


def test_few_files_are_open_at_once(tmp_path: Path) -> None:
    paths = []
    for i in range(40):
        path = tmp_path / f"{i}.bin"
        path.write_bytes(bytes([i]) * 10)
        paths.append(str(path))

    def open_files() -> int:
        return sum(name.startswith(str(tmp_path)) for name in _names_of_open_files())

    files = BinFiles(paths, most_open=7)
    for i in [*range(40), *range(39, -1, -1)]:
        assert files.read(i, 3, 4) == bytes([i]) * 4
        assert open_files() <= 7
    files.close()
    assert open_files() == 0
    assert files.read(5, 0, 1) == b"\x05"


def _names_of_open_files() -> list[str]:
    names = []
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile: of the listing, or of another thread
            names.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    return names


def test_datasets_without_tokens_are_left_out(
    tmp_path: Path, prefixes: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    empty = str(write_dataset(tmp_path / "empty", []))
    group = ShardGroup.open([*prefixes, empty], tmp_path)
    assert len(group) == 110
    assert "empty holds no tokens" in caplog.text
    with pytest.raises(DataError, match="no tokens in any of the 1 datasets"):
        ShardGroup.open([empty], tmp_path)
    data_files(prefixes[0])[0].write_bytes(b"")
    with pytest.raises(DataError, match=r"\.bin: 0 bytes, but its index lists"):
        ShardGroup.open(prefixes, tmp_path)


@pytest.mark.parametrize("split", ["98,1,1", "100,0,0", "1", "90,10", "969.5,30.3,0.2", "0,50,50", "1,1,1"])
def test_splits_are_megatron_cores(split: str) -> None:
    theirs = convert_split_vector_to_split_matrix(parse_and_normalize_split(split))
    ours = split_bounds(split)
    for documents in (1, 3, 100, 12_345, 4_600_000_001):
        for mine, other in zip(ours.values(), theirs, strict=True):
            assert (mine is None) == (other is None)
            if mine is not None and other is not None:
                assert [round(b * documents) for b in mine] == [round(b * float(documents)) for b in other]
    with pytest.raises(ConfigError):
        split_bounds("all")


@pytest.mark.parametrize("sequence_tokens", [2, 16, 100])
def test_an_epoch_is_cut_as_megatron_core_cuts_it(
    tmp_path: Path, prefixes: list[str], sequence_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one piece and in many; with documents of no tokens in between."""
    write_dataset(tmp_path / "gaps", [[5, 2], [], [], [7, 8, 9, 2], []] * 10)
    group = ShardGroup.open([*prefixes, str(tmp_path / "gaps")], tmp_path)
    part = SourcePart(
        "s/1", "train", group.path, group.sha256, 10, 140, group.tokens(10, 150), sequence_tokens, seed=1
    )
    for piece in (1 << 24, 1, 7):
        monkeypatch.setattr("megads.data.epochs.PIECE_DOCUMENTS", piece)
        index = EpochIndex(part, tmp_path / f"index{piece}")
        build(index, 3)
        for epoch in range(3):
            documents, boundaries, shuffle = index.epoch(epoch)
            assert sorted(documents.tolist()) == list(range(10, 150))
            assert sorted(shuffle.tolist()) == list(range(part.samples_per_epoch))
            theirs = helpers.build_sample_idx(
                group.sequence_lengths, documents.copy(), sequence_tokens, 1, part.tokens, True, True
            )
            starts = [place_of(group, documents, *pair) for pair in theirs.tolist()]
            assert [place_of(group, documents, *pair) for pair in boundaries.tolist()] == starts
    assert [file.name[:10] for file in (tmp_path / "index1").iterdir()] == ["s_1-train-"]


def build(index: EpochIndex, epochs: int) -> list[int]:
    missing = index.missing(epochs)
    for block in missing:
        index.build_block(block)
    return missing


def place_of(group: ShardGroup, documents: np.ndarray, place: int, offset: int) -> int:
    """The token of the packed epoch; a boundary at the end of a document is the start of the next."""
    return int(group.lengths_of(documents[:place]).sum()) + offset


def test_epochs_differ_and_do_not_depend_on_how_many_are_built(tmp_path: Path, prefixes: list[str]) -> None:
    group = ShardGroup.open(prefixes, tmp_path)
    part = SourcePart("s", "train", group.path, group.sha256, 0, 110, group.tokens(), 16, seed=1)
    few, many = EpochIndex(part, tmp_path / "few"), EpochIndex(part, tmp_path / "many")
    assert build(few, 1) == [0]
    assert build(many, 2 * many.block_epochs + 1) == [0, 1, 2]
    assert build(many, 2 * many.block_epochs + 1) == []
    for one, other in zip(few.epoch(0), many.epoch(0), strict=True):
        assert np.array_equal(one, other)
    orders = {many.epoch(e)[0].tobytes() for e in (0, 1, few.block_epochs, 2 * few.block_epochs)}
    assert len(orders) == 4
    again = EpochIndex(SourcePart(**{**vars(part), "seed": 2}), tmp_path / "few")
    build(again, 1)
    assert not np.array_equal(again.epoch(0)[0], few.epoch(0)[0])
