"""Megatron-Core's indexed datasets: `.bin` (token ids, one document after the other) and `.idx`.

The layout is that of `megatron/core/datasets/indexed_dataset.py`, which this module matches byte for
byte without needing torch. `.idx`: 9 bytes of magic, uint64 version, uint8 type code, uint64 number
of sequences n, uint64 n + 1; then n int32 lengths in tokens, n int64 byte offsets into `.bin`, and
n + 1 int64 document boundaries. A document is one sequence here.

Megatron-Core's reader asserts a few header fields and notices a truncated `.bin` only when training
reaches it, so a third file, `.json`, records what the pair must be (see `manifest`). All appear at once
or not at all, together with what may accompany them: `.scores.npy` (a float32 per document),
`.loss_mask` (a byte per token of the `.bin`, 1: the token is part of an answer, see `instructions`) and
`.quarantine.jsonl` (which lines of the input hold no document, and why).
"""

import contextlib
import hashlib
import io
import os
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from megads.errors import DataError
from megads.publish import flush_to_disk, open_locked, partial_path

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
# Type codes of Megatron-Core that can hold token ids.
TOKEN_TYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype(np.uint8),
    3: np.dtype(np.int16),
    4: np.dtype(np.int32),
    5: np.dtype(np.int64),
    8: np.dtype(np.uint16),
}
UINT16_VOCABULARY = 65_500  # Megatron-Core stores vocabularies below this as uint16, others as int32
COPY_ITEMS = 1 << 20
SCORES, LOSS_MASK, QUARANTINE = ".scores.npy", ".loss_mask", ".quarantine.jsonl"
SIDECARS = (SCORES, LOSS_MASK, QUARANTINE)
SCORE_TYPE = np.dtype("<f4")


def token_type(vocab_size: int) -> np.dtype[Any]:
    """The element type that Megatron-Core gives to a vocabulary of this size."""
    return np.dtype(np.uint16 if vocab_size < UINT16_VOCABULARY else np.int32)


def data_files(prefix: str | os.PathLike[str]) -> tuple[Path, Path, Path]:
    """The `.bin`, `.idx` and `.json` of a dataset."""
    name = os.fspath(prefix)
    return Path(name + ".bin"), Path(name + ".idx"), Path(name + ".json")


def sidecar_file(prefix: str | os.PathLike[str], ending: str) -> Path:
    """The file of one of `SIDECARS` of a dataset, whether it is there or not."""
    assert ending in SIDECARS
    return Path(os.fspath(prefix) + ending)


def unfinished_files(prefix: str | os.PathLike[str]) -> list[Path]:
    """What a writer that was killed has left of a dataset; a writer that lives has them locked."""
    files = (*data_files(prefix), *(sidecar_file(prefix, ending) for ending in SIDECARS))
    return [partial for file in files if (partial := partial_path(file)).exists()]


def refuse_existing(prefix: str | os.PathLike[str]) -> None:
    """Raise DataError if any file of this dataset is there."""
    existing = [file.name for file in data_files(prefix) if file.exists()]
    if existing:
        raise DataError(
            f"{os.fspath(prefix)}: {', '.join(existing)} exist already. Overwrite them (--overwrite) or "
            "write elsewhere."
        )


def datasets_in_work(directory: str | os.PathLike[str]) -> list[str]:
    """Names of the datasets in a directory that a writer has begun: it is at work, or was killed."""
    ending = partial_path(Path("x.bin")).name.removeprefix(".x")
    return sorted(
        name[1:].removesuffix(ending)
        for name in os.listdir(directory)
        if name.startswith(".") and name.endswith(ending)
    )


class IndexedWriter:
    """Streams documents into a `.bin`/`.idx` pair; memory does not grow with the dataset.

    Use as a context manager and call `finish` (or `finish_empty`) inside it; leaving without removes
    what was written.
    Only one process can write a prefix at a time: a second one gets a DataError, while what a killed
    one left behind is reused.
    """

    def __init__(self, prefix: str | os.PathLike[str], vocab_size: int, *, overwrite: bool = False) -> None:
        self.prefix = Path(prefix)
        self.dtype = token_type(vocab_size)
        self.documents = 0
        self.tokens = 0
        self._published = False
        if not overwrite:
            refuse_existing(prefix)
        try:
            self.prefix.parent.mkdir(parents=True, exist_ok=True)
            self._partial = tuple(partial_path(file) for file in data_files(prefix))
            self._lengths = tempfile.TemporaryFile(dir=self.prefix.parent)  # noqa: SIM115
            self._scores = tempfile.TemporaryFile(dir=self.prefix.parent)  # noqa: SIM115
            self._bin = open_locked(self._partial[0], or_unlocked=True)
        except BlockingIOError as error:
            raise DataError(
                f"{self.prefix}: another process is writing this dataset; wait for it to end."
            ) from error
        except OSError as error:
            raise DataError(f"{self.prefix}: cannot be written: {error}.") from error
        self._hash = hashlib.sha256()
        self._scored_documents = 0
        self._loss_mask: BinaryIO | None = None
        self._loss_mask_hash = hashlib.sha256()
        self._counted_tokens = 0
        self._sidecars: dict[str, Path] = {}

    def __enter__(self) -> Self:
        return self

    def add(
        self,
        tokens: NDArray[Any],
        lengths: NDArray[np.int32],
        scores: NDArray[np.float32] | None = None,
        loss_mask: NDArray[np.uint8] | None = None,
    ) -> None:
        """Append documents: their tokens [sum of lengths] in one array, each one's length [n] and, for
        all documents or none, each one's score [n], and 1 for each token that counts [sum of lengths].
        """
        assert tokens.dtype == self.dtype, f"tokens are {tokens.dtype}, the file holds {self.dtype}"
        assert int(lengths.sum(dtype=np.int64)) == tokens.size, "lengths do not add up to the tokens"
        data = np.ascontiguousarray(tokens).data
        self._bin.write(data)
        self._hash.update(data)
        self._lengths.write(lengths.astype(np.int32, copy=False).tobytes())
        if scores is not None:
            assert scores.size == lengths.size, "a score for each document"
            self._scores.write(scores.astype(SCORE_TYPE).tobytes())
            self._scored_documents += scores.size
        if loss_mask is not None:
            self._add_loss_mask(loss_mask)
        self.documents += lengths.size
        self.tokens += tokens.size
        assert self._loss_mask is None or self._loss_mask.tell() == self.tokens, "a byte for each token"

    def _add_loss_mask(self, loss_mask: NDArray[np.uint8]) -> None:
        if self._loss_mask is None:
            partial = partial_path(sidecar_file(self.prefix, LOSS_MASK))
            self._loss_mask = open(partial, "wb")  # noqa: SIM115
            self._sidecars[LOSS_MASK] = partial
        data = np.ascontiguousarray(loss_mask, dtype=np.uint8).data
        self._loss_mask.write(data)
        self._loss_mask_hash.update(data)
        self._counted_tokens += int(loss_mask.sum(dtype=np.int64))

    def attach(self, ending: str, content: bytes) -> None:
        """Add a file, one of `SIDECARS`, that appears together with the dataset."""
        partial = partial_path(sidecar_file(self.prefix, ending))
        with open(partial, "wb") as file:
            self._sidecars[ending] = partial
            file.write(content)
            _to_disk(file)

    def finish(self, record: dict[str, Any]) -> None:
        """Write index and record, bring all to the disk, then give them their names.

        `record` gets the sizes and hashes of the other files added.
        """
        _, idx_partial, _ = self._partial
        idx_hash = self._write_index(idx_partial)
        record["bin"] = {"bytes": self.tokens * self.dtype.itemsize, "sha256": self._hash.hexdigest()}
        record["idx"] = {"bytes": idx_partial.stat().st_size, "sha256": idx_hash}
        if self._scored_documents:
            record["scores"] = self._write_scores()
        if self._loss_mask is not None:
            _to_disk(self._loss_mask)
            record["loss_mask"] = {
                "bytes": self.tokens,
                "sha256": self._loss_mask_hash.hexdigest(),
                "counted_tokens": self._counted_tokens,
            }
        _to_disk(self._bin)
        self._publish(record, data_files(self.prefix)[:2])

    def finish_empty(self, record: dict[str, Any]) -> None:
        """Publish the record and the attached files alone, for an input that holds no document.

        A `.bin` without tokens would stop whoever trains on the other shards.
        """
        assert self.documents == 0, "documents were added"
        self._publish(record, ())

    def _publish(self, record: dict[str, Any], files: tuple[Path, ...]) -> None:
        """Give the files their names. Readers need the `.idx`, so an old one goes first and the new one
        comes last but for the record: no moment shows a mixed pair.
        """
        import orjson

        bin_path, idx_path, record_path = data_files(self.prefix)
        with open(self._partial[2], "wb") as file:
            file.write(orjson.dumps(record, option=orjson.OPT_INDENT_2) + b"\n")
            _to_disk(file)
        for old in (idx_path, record_path):
            old.unlink(missing_ok=True)
        sidecars = [sidecar_file(self.prefix, ending) for ending in SIDECARS]
        for stale in (*sidecars, *(() if files else (bin_path,))):
            if stale.exists():
                stale.unlink()
        for ending, partial in self._sidecars.items():
            os.replace(partial, sidecar_file(self.prefix, ending))
        for partial, path in zip(self._partial, files, strict=False):
            os.replace(partial, path)
        if not files:
            self._partial[0].unlink()
        os.replace(self._partial[2], record_path)
        flush_to_disk(self.prefix.parent)
        self._published = True

    def _write_scores(self) -> dict[str, Any]:
        """Write the `.scores.npy`; returns its size and hash."""
        assert self._scored_documents == self.documents, "some documents have a score and some have none"
        header = io.BytesIO()
        shape = {"descr": SCORE_TYPE.str, "fortran_order": False, "shape": (self.documents,)}
        np.lib.format.write_array_header_1_0(header, shape)
        partial = partial_path(sidecar_file(self.prefix, SCORES))
        digest = hashlib.sha256()
        with open(partial, "wb") as file:
            self._sidecars[SCORES] = partial
            self._scores.seek(0)
            data = header.getvalue()
            while data:
                file.write(data)
                digest.update(data)
                data = self._scores.read(COPY_ITEMS * SCORE_TYPE.itemsize)
            _to_disk(file)
            return {"bytes": file.tell(), "sha256": digest.hexdigest()}

    def _write_index(self, path: Path) -> str:
        """Write the `.idx` in pieces from the spooled lengths; returns its sha256."""
        code = next(code for code, dtype in TOKEN_TYPES.items() if dtype == self.dtype)
        digest = hashlib.sha256()
        with open(path, "wb") as file:

            def put(data: bytes) -> None:
                file.write(data)
                digest.update(data)

            put(HEADER.pack(MAGIC, VERSION, code, self.documents, self.documents + 1))
            for lengths in self._spooled_lengths():
                put(lengths.tobytes())
            offset_bytes = 0
            for lengths in self._spooled_lengths():
                ends = np.cumsum(lengths, dtype=np.int64) * self.dtype.itemsize + offset_bytes
                put(np.concatenate(([offset_bytes], ends[:-1])).astype(np.int64).tobytes())
                offset_bytes = int(ends[-1])
            for start in range(0, self.documents + 1, COPY_ITEMS):
                put(np.arange(start, min(start + COPY_ITEMS, self.documents + 1), dtype=np.int64).tobytes())
            _to_disk(file)
        return digest.hexdigest()

    def _spooled_lengths(self) -> Iterator[NDArray[np.int32]]:
        self._lengths.seek(0)
        while data := self._lengths.read(COPY_ITEMS * 4):
            yield np.frombuffer(data, dtype=np.int32)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._published:
            for partial in (*self._partial, *self._sidecars.values()):
                partial.unlink(missing_ok=True)
        for file in (self._lengths, self._scores, self._loss_mask, self._bin):
            # A full disk does not take what is still to be written, which nobody wants any more.
            with contextlib.suppress(OSError):
                if file is not None:
                    file.close()
        if isinstance(error, OSError):  # the disk is full, say; errors of reading come as DataError
            raise DataError(f"{self.prefix}: cannot be written: {error}.") from error


def _to_disk(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
