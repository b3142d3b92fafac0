"""Hashes on the disk, divided by their leading bits: what must be compared lies together.

Each shard leaves one file of entries per kind, ordered by partition, and where each partition starts.
A partition of all shards, concatenated in the order of the shards, holds every entry that can equal
another one of it; it is small enough for memory if there are enough partitions, whatever the corpus.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

DOCUMENT = np.dtype([("high", "<u8"), ("low", "<u8"), ("row", "<u4")])
"""A key and the document it is of, as its number among the shard's documents (from 0)."""
PARAGRAPH = np.dtype([*DOCUMENT.descr, ("start", "<u4"), ("end", "<u4")])
"""The same of some characters of the document."""

KEYS_PER_PARTITION = 8_000_000
TEXT_PER_INPUT_BYTE = 4  # gzip's usual ratio on text
TEXT_BYTES_PER_KEY = 150


def partition_count(input_bytes: int) -> int:
    """A power of two that gives about KEYS_PER_PARTITION keys, 0.5 GB of work, for inputs of this size."""
    keys = input_bytes * TEXT_PER_INPUT_BYTE // TEXT_BYTES_PER_KEY
    return max(16, 1 << (keys // KEYS_PER_PARTITION).bit_length())


def entries(
    dtype: np.dtype[Any], keys: bytes | NDArray[np.uint64], rows: Sequence[int] | NDArray[Any]
) -> NDArray[Any]:
    """An array [n] of entries from 16 bytes of key each (or uint64 [n, 2]) and their rows."""
    pairs = np.frombuffer(keys, ">u8").reshape(-1, 2) if isinstance(keys, bytes) else keys
    result = np.zeros(len(rows), dtype)
    result["high"], result["low"], result["row"] = pairs[:, 0], pairs[:, 1], rows
    return result


def write_keys(path: Path, parts: Iterable[NDArray[Any]], dtype: np.dtype[Any], partitions: int) -> None:
    """Write entries, in the order of the shard within each partition, as PATH.keys and PATH.starts."""
    every = np.concatenate([np.empty(0, dtype), *parts])
    number = _partition_of(every["high"], partitions)
    every[np.argsort(number, kind="stable")].tofile(path.with_suffix(".keys"))
    starts = np.zeros(partitions + 1, np.int64)
    np.cumsum(np.bincount(number, minlength=partitions), out=starts[1:])
    starts.tofile(path.with_suffix(".starts"))


def read_partition(
    paths: Sequence[Path], dtype: np.dtype[Any], partition: int
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """The entries of one partition over all shards, in order [n], and the number of each one's shard [n]."""
    parts, counts = [np.empty(0, dtype)], []
    for path in paths:
        first, last = np.fromfile(path.with_suffix(".starts"), np.int64, count=2, offset=8 * partition)
        parts.append(
            np.fromfile(
                path.with_suffix(".keys"), dtype, count=int(last - first), offset=int(first) * dtype.itemsize
            )
        )
        counts.append(int(last - first))
    return np.concatenate(parts), np.repeat(np.arange(len(paths)), counts)


def _partition_of(high: NDArray[np.uint64], partitions: int) -> NDArray[np.int64]:
    assert partitions & (partitions - 1) == 0, "not a power of two"
    bits = partitions.bit_length() - 1
    return (high >> np.uint64(64 - bits)).astype(np.int64) if bits else np.zeros(high.size, np.int64)
