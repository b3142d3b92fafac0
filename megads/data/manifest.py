"""What an indexed dataset must be, and the check, before the first step, that it is.

`check_dataset` reads the index whole (20 bytes per document) and compares sizes; with `full=True` it
also hashes the `.bin`. A dataset of Megatron-LM's own tools, which leave no `.json`, passes on its
structure alone.
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from megads.data.indexed import (
    COPY_ITEMS,
    HEADER,
    LOSS_MASK,
    MAGIC,
    TOKEN_TYPES,
    VERSION,
    data_files,
    sidecar_file,
)
from megads.errors import DataError

RECORD_FORMAT = "megads-indexed-1"


@dataclass(frozen=True)
class DatasetInfo:
    """A dataset that passed `check_dataset`; what only the record knows is None without one."""

    prefix: str
    documents: int
    tokens: int
    idx_sha256: str
    vocab_size: int | None
    eod_id: int | None
    tokenizer_sha256: str | None
    loss_mask_sha256: str | None = None
    """Of the `.loss_mask`; None: every token counts."""


def check_dataset(
    prefix: str | os.PathLike[str], vocab_size: int, tokenizer_sha256: str | None, *, full: bool = False
) -> DatasetInfo:
    """Refuse a dataset that is not whole or does not fit the model, with a DataError.

    `vocab_size` is the model's. `tokenizer_sha256` None: any tokenizer. Checked: both files are there;
    header, counts, lengths, offsets and file sizes agree; it is not empty; where there is a record:
    hash of the `.idx` (of the `.bin` too if `full`), tokenizer, vocabulary within the model's; and the
    size (if `full` the hash) of the `.loss_mask` that it names.
    """
    bin_path, idx_path, record_path = data_files(prefix)
    record = read_record(prefix)
    if record is not None and is_empty(record):
        raise DataError(f"{prefix}: its input holds no document ({record_path.name}); leave it out.")
    for path in (bin_path, idx_path):
        if not path.is_file():
            raise DataError(f"{path}: no such file. Make the dataset with tools/preprocess_dolma.py.")
    documents, tokens = check_index(bin_path, idx_path)
    if tokens == 0:
        raise DataError(f"{prefix}: the dataset is empty ({documents:,} documents, no tokens).")
    idx_sha256 = _sha256(idx_path)
    if record is None:
        return DatasetInfo(os.fspath(prefix), documents, tokens, idx_sha256, None, None, None)
    recorded = {idx_path: (record["idx"]["sha256"], idx_sha256)}
    if full:
        recorded[bin_path] = (record["bin"]["sha256"], _sha256(bin_path))
    loss_mask = record.get("loss_mask")
    if loss_mask is not None:
        mask_path = sidecar_file(prefix, LOSS_MASK)
        found_bytes = mask_path.stat().st_size if mask_path.is_file() else 0
        if found_bytes != tokens:
            raise DataError(
                f"{mask_path}: {found_bytes:,} bytes, but it must have one for each of {tokens:,} tokens. "
                f"{MAKE_AGAIN}"
            )
        if full:
            recorded[mask_path] = (loss_mask["sha256"], _sha256(mask_path))
    for path, (expected, found) in recorded.items():
        if expected != found:
            raise DataError(f"{path}: the content is not what {record_path.name} records. {MAKE_AGAIN}")
    info = DatasetInfo(
        os.fspath(prefix),
        documents,
        tokens,
        idx_sha256,
        record["vocab_size"],
        record["eod_id"],
        record["tokenizer"]["sha256"],
        None if loss_mask is None else loss_mask["sha256"],
    )
    _check_fit(info, vocab_size, tokenizer_sha256)
    return info


MAKE_AGAIN = "Copy it again, or make it again with tools/preprocess_dolma.py."


def _check_fit(info: DatasetInfo, vocab_size: int, tokenizer_sha256: str | None) -> None:
    assert info.vocab_size is not None
    assert info.tokenizer_sha256 is not None
    if tokenizer_sha256 is not None and info.tokenizer_sha256 != tokenizer_sha256:
        raise DataError(
            f"{info.prefix}: made with another tokenizer (sha256 {info.tokenizer_sha256[:12]}…) than the "
            f"run's ({tokenizer_sha256[:12]}…). Set data.tokenizer_path to the one it was made with, or "
            "preprocess again."
        )
    if info.vocab_size > vocab_size:
        raise DataError(
            f"{info.prefix}: its tokenizer has {info.vocab_size:,} ids, the model's vocabulary only "
            f"{vocab_size:,}. Set model.vocab_size to at least {info.vocab_size:,}."
        )


def sequence_lengths(prefix: str | os.PathLike[str]) -> NDArray[np.int32]:
    """Length in tokens of each sequence [n], mapped from the `.idx` of a checked dataset."""
    idx_path = data_files(prefix)[1]
    with open(idx_path, "rb") as file:
        sequences = HEADER.unpack(file.read(HEADER.size))[3]
    return np.memmap(idx_path, dtype=np.int32, mode="r", offset=HEADER.size, shape=(sequences,))


def check_index(bin_path: Path, idx_path: Path) -> tuple[int, int]:
    """Compare an index with itself and with the size of the `.bin`; returns sequences and tokens.

    Raises DataError where they do not agree.
    """
    idx_bytes = idx_path.stat().st_size
    with open(idx_path, "rb") as file:
        header = file.read(HEADER.size)
    if len(header) < HEADER.size or not header.startswith(MAGIC):
        raise DataError(f"{idx_path}: not an index of a Megatron dataset (bad magic). {MAKE_AGAIN}")
    _, version, code, sequences, boundaries = HEADER.unpack(header)
    if version != VERSION or code not in TOKEN_TYPES:
        raise DataError(
            f"{idx_path}: version {version}, type code {code}: expected version 1 and integer tokens."
        )
    expected_bytes = HEADER.size + 12 * sequences + 8 * boundaries
    if idx_bytes != expected_bytes:
        raise DataError(
            f"{idx_path}: {idx_bytes:,} bytes, but its header ({sequences:,} sequences) asks for "
            f"{expected_bytes:,}: truncated or damaged. {MAKE_AGAIN}"
        )
    itemsize = TOKEN_TYPES[code].itemsize
    tokens = _check_arrays(idx_path, sequences, boundaries, itemsize)
    bin_bytes = bin_path.stat().st_size
    if bin_bytes != tokens * itemsize:
        raise DataError(
            f"{bin_path}: {bin_bytes:,} bytes, but its index lists {tokens:,} tokens of {itemsize} bytes "
            f"({tokens * itemsize:,} bytes): truncated, damaged, or of another dataset. {MAKE_AGAIN}"
        )
    return sequences, tokens


def _check_arrays(idx_path: Path, sequences: int, boundaries: int, itemsize: int) -> int:
    """Lengths are not negative, offsets are their running sum, boundaries ascend; returns tokens."""
    offset_bytes, previous_boundary = 0, 0
    lengths_at, offsets_at = HEADER.size, HEADER.size + 4 * sequences
    offsets = _pieces(idx_path, np.int64, offsets_at, sequences)
    for lengths, starts in zip(_pieces(idx_path, np.int32, lengths_at, sequences), offsets, strict=True):
        if lengths.min() < 0:
            raise DataError(f"{idx_path}: a sequence has a negative length. {MAKE_AGAIN}")
        ends = np.cumsum(lengths, dtype=np.int64) * itemsize + offset_bytes
        if starts[0] != offset_bytes or not np.array_equal(starts[1:], ends[:-1]):
            raise DataError(
                f"{idx_path}: the offsets of sequences do not follow from their lengths. {MAKE_AGAIN}"
            )
        offset_bytes = int(ends[-1])
    for part in _pieces(idx_path, np.int64, offsets_at + 8 * sequences, boundaries):
        if part[0] < previous_boundary or np.any(np.diff(part) < 0):
            raise DataError(f"{idx_path}: the document boundaries do not ascend. {MAKE_AGAIN}")
        previous_boundary = int(part[-1])
    if previous_boundary != sequences:
        raise DataError(
            f"{idx_path}: the documents end at sequence {previous_boundary:,} of {sequences:,}. {MAKE_AGAIN}"
        )
    return offset_bytes // itemsize


def _pieces(path: Path, dtype: type[np.generic], offset_bytes: int, count: int) -> Iterator[NDArray[Any]]:
    """An array inside a file, a bounded piece at a time."""
    with open(path, "rb") as file:
        file.seek(offset_bytes)
        for start in range(0, count, COPY_ITEMS):
            yield np.fromfile(file, dtype=dtype, count=min(COPY_ITEMS, count - start))


def read_record(prefix: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The `.json` of a dataset, which `shards.convert_shard` describes; None where there is none.

    Raises DataError when the file cannot be read, is damaged, or of another format.
    """
    path = data_files(prefix)[2]
    try:
        record = orjson.loads(path.read_bytes())
        hashed = ("tokenizer",) if is_empty(record) else ("tokenizer", "bin", "idx")
        complete = (
            record["format"] == RECORD_FORMAT
            and isinstance(record["vocab_size"], int)
            and isinstance(record["eod_id"], int)
            and all(isinstance(record[part]["sha256"], str) for part in hashed)
        )
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"{path}: the record cannot be read: {error.strerror}.") from error
    except (orjson.JSONDecodeError, AttributeError, KeyError, TypeError):
        complete = False
    if not complete:
        raise DataError(f"{path}: not a record of format {RECORD_FORMAT}. {MAKE_AGAIN}")
    return dict(record)


def is_empty(record: dict[str, Any]) -> bool:
    """Whether a record stands for an input without documents, which has no `.bin` and no `.idx`."""
    return record.get("documents") == 0 and "bin" not in record and "idx" not in record


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
