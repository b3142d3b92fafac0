"""The many files of a source as one dataset, with what Megatron-Core's `GPTDataset` asks of one.

A source of Dolma has hundreds of files. One dataset per file, as Megatron-Core has it, costs a set of
index files, a mapping and a line of the blend for each. Here their documents are numbered through, and
where each begins is kept in one file of the index cache, 8 bytes per document.

That file also keeps the verdict of the check: its name is a hash of the path, size and modification time
of every file of the group, so that files which are as they were when they were checked need no reading,
and a file that changed has the whole group checked again.
"""

import contextlib
import hashlib
import json
import logging
import os
from bisect import bisect_right
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from megads.data.bin_files import BinFiles
from megads.data.index_cache import Arrays, index_directory, load_arrays, publish_arrays
from megads.data.indexed import HEADER, LOSS_MASK, TOKEN_TYPES, data_files, sidecar_file
from megads.data.manifest import DatasetInfo, check_dataset, check_index, sequence_lengths
from megads.errors import DataError

logger = logging.getLogger(__name__)

# File servers answer many questions at once far sooner than one after the other.
CHECKING_THREADS = 16
NO_VOCABULARY_LIMIT = 2**62


class ShardGroup:
    """Documents of several indexed datasets, one after the other; read-only.

    `shards` describes the datasets, `sha256` names their content (a hash of the hashes of the `.idx`).
    """

    def __init__(self, path: Path, facts: dict[str, Any], starts: NDArray[np.int64]) -> None:
        self.path = path
        self.shards = tuple(DatasetInfo(**shard) for shard in facts["shards"])
        hashes = "".join(shard.idx_sha256 for shard in self.shards)
        self.sha256 = hashlib.sha256(hashes.encode()).hexdigest()
        self._dtypes = [np.dtype(name) for name in facts["dtypes"]]
        self._starts = starts
        self._first_documents = [0, *np.cumsum([shard.documents for shard in self.shards]).tolist()]
        self._first_tokens = [int(starts[first]) for first in self._first_documents]
        self._bins = BinFiles([str(data_files(shard.prefix)[0]) for shard in self.shards])
        self._loss_masks = BinFiles([str(sidecar_file(shard.prefix, LOSS_MASK)) for shard in self.shards])

    @classmethod
    def open(cls, prefixes: Sequence[str], cache_dir: str | os.PathLike[str]) -> Self:
        """Check the datasets, in full unless they are as they were when last checked; and join them.

        A dataset without tokens is left out with a warning. Raises DataError as `check_dataset` does, and
        when all are empty or the index cache cannot be written.
        """
        path = index_directory(cache_dir) / f"{_state(prefixes)}.shards"
        if (found := load_arrays(path, check=True)) is None:
            _publish_group(path, prefixes)
        else:
            return cls(path, found[0], found[1]["starts"])
        return cls.load(path)

    @classmethod
    def load(cls, path: Path) -> Self:
        """The group that `open` has made or found at `path`, here or in another process."""
        found = load_arrays(path, check=False)
        if found is None:
            raise DataError(
                f"{path}: disappeared, or is not visible here: data.cache_dir must be the same storage on "
                "every node."
            )
        return cls(path, found[0], found[1]["starts"])

    def __len__(self) -> int:
        """The number of documents."""
        return self._first_documents[-1]

    def tokens(self, start: int = 0, stop: int | None = None) -> int:
        """Tokens of the documents from `start` to before `stop`."""
        return int(self._starts[len(self) if stop is None else stop] - self._starts[start])

    def lengths(self, start: int, stop: int) -> NDArray[np.int32]:
        """Tokens of each document from `start` to before `stop` [stop - start]."""
        return np.diff(self._starts[start : stop + 1]).astype(np.int32)

    def lengths_of(self, documents: NDArray[Any]) -> NDArray[np.int64]:
        """Tokens of each of these documents [n]."""
        return self._starts[documents + 1] - self._starts[documents]

    @property
    def sequence_lengths(self) -> NDArray[np.int32]:
        """Tokens of each document [n]; computed, so ask for `lengths` of the part that is needed."""
        return self.lengths(0, len(self))

    @property
    def document_indices(self) -> NDArray[np.int64]:
        """Boundaries of documents in sequences [n + 1]: each document is one sequence."""
        return np.arange(len(self) + 1, dtype=np.int64)

    def shard_of(self, document: int) -> tuple[DatasetInfo, int]:
        """The dataset that holds a document, and the document's number (from 0) there."""
        number = bisect_right(self._first_documents, document) - 1
        return self.shards[number], document - self._first_documents[number]

    @property
    def has_loss_masks(self) -> bool:
        """Whether the documents are conversations, of which only the answers count."""
        return self.shards[0].loss_mask_sha256 is not None

    def get(self, idx: int, offset: int = 0, length: int | None = None) -> NDArray[Any]:
        """Token ids of a document, from `offset` on, `length` of them or all that follow."""
        number, first_token, count = self._locate(idx, offset, length)
        dtype = self._dtypes[number]
        data = self._bins.read(number, first_token * dtype.itemsize, count * dtype.itemsize)
        return np.frombuffer(data, dtype=dtype)

    def loss_mask(self, idx: int, offset: int = 0, length: int | None = None) -> NDArray[np.uint8]:
        """1 for each token, of those that `get` gives, that is part of an answer."""
        return np.frombuffer(self._loss_masks.read(*self._locate(idx, offset, length)), dtype=np.uint8)

    def _locate(self, idx: int, offset: int, length: int | None) -> tuple[int, int, int]:
        """(shard, first token in it, tokens) of a part of a document."""
        document, offset = int(idx), int(offset)
        start, stop = int(self._starts[document]), int(self._starts[document + 1])
        count = stop - start - offset if length is None else int(length)
        if document < 0 or offset < 0 or count < 0 or start + offset + count > stop:
            raise IndexError(
                f"tokens {offset} to {offset + count} of document {document} ({stop - start} tokens)"
            )
        number = bisect_right(self._first_documents, document) - 1
        return number, start + offset - self._first_tokens[number], count

    def __getitem__(self, idx: int) -> NDArray[Any]:
        return self.get(idx)


def _state(prefixes: Sequence[str]) -> str:
    """Names a group by what its files look like from outside: path, size, time of last change."""

    def look_at(prefix: str) -> list[Any]:
        seen: list[Any] = [os.path.abspath(prefix)]
        for path in data_files(prefix):
            try:
                status = os.stat(path)
                seen += [status.st_size, status.st_mtime_ns]
            except FileNotFoundError:
                seen.append(None)
        with contextlib.suppress(FileNotFoundError):
            status = os.stat(sidecar_file(prefix, LOSS_MASK))
            seen += [LOSS_MASK, status.st_size, status.st_mtime_ns]
        return seen

    with ThreadPoolExecutor(CHECKING_THREADS) as pool:
        seen = list(pool.map(look_at, prefixes))
    seen.append([field.name for field in fields(DatasetInfo)])  # another version keeps other facts
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:32]


def _publish_group(path: Path, prefixes: Sequence[str]) -> None:
    """Check every dataset in full and write what the group needs to know of them."""
    kept = [prefix for prefix in prefixes if not _is_empty(prefix)]
    for prefix in sorted(set(prefixes) - set(kept)):
        logger.warning("%s holds no tokens: it is left out.", prefix)
    with ThreadPoolExecutor(CHECKING_THREADS) as pool:
        shards = list(pool.map(lambda prefix: check_dataset(prefix, NO_VOCABULARY_LIMIT, None), kept))
        dtypes = list(pool.map(_token_type, kept))
    if not shards:
        raise DataError(f"{', '.join(prefixes[:3])}: no tokens in any of the {len(prefixes)} datasets.")
    plain = [shard.prefix for shard in shards if shard.loss_mask_sha256 is None]
    if plain and len(plain) < len(shards):
        raise DataError(
            f"{plain[0]}: holds text, while other datasets of the same source hold conversations. Make them "
            "two sources."
        )

    def fill(arrays: Arrays) -> None:
        starts, document, tokens = arrays["starts"], 0, 0
        starts[0] = 0
        for shard in shards:
            part = starts[document + 1 : document + 1 + shard.documents]
            np.cumsum(sequence_lengths(shard.prefix), dtype=np.int64, out=part)
            part += tokens
            document += shard.documents
            tokens += shard.tokens

    documents = sum(shard.documents for shard in shards)
    facts = {"shards": [asdict(shard) for shard in shards], "dtypes": [dtype.str for dtype in dtypes]}
    publish_arrays(path, facts, {"starts": (np.dtype(np.int64), (documents + 1,))}, fill)


def _is_empty(prefix: str) -> bool:
    """Whether a dataset has no tokens, by its index too; DataError for one that has lost them."""
    bin_path, idx_path, _ = data_files(prefix)
    if not (idx_path.is_file() and bin_path.is_file()) or bin_path.stat().st_size > 0:
        return False
    return check_index(bin_path, idx_path)[1] == 0


def _token_type(prefix: str) -> np.dtype[Any]:
    with open(data_files(prefix)[1], "rb") as file:
        return TOKEN_TYPES[HEADER.unpack(file.read(HEADER.size))[2]]
