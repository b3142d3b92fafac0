"""The second pass: duplicates over all shards, a partition of the keys at a time.

Documents are numbered through all shards in order, so that the lower number came first and stays.
Stages follow one another, since what one drops must not stand for another's text: equal documents,
near duplicates among what is left, then paragraphs of what is left of those. Each partition's result
is a file that appears whole, so a killed run does again only what is missing.

Memory of a worker: 100 bytes per key of a partition (0.8 GB as set) and a map of one byte per document
of the corpus. The clusters of near duplicates are found in one process: 60 bytes per candidate pair.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megads.data.cleaning import exact, keys, near
from megads.data.cleaning.scan import Scan
from megads.publish import published

SIGNATURE_PAIRS = 1 << 16

REPEATED = np.dtype([("document", "<i8"), ("first", "<i8"), ("start", "<u4"), ("end", "<u4")])
"""A repeated document or paragraph, and the document of its first occurrence."""


@dataclass(frozen=True)
class Corpus:
    """All scans, in order, and the number of the first document of each [scans + 1]."""

    scans: tuple[Scan, ...]
    starts: NDArray[np.int64]

    @classmethod
    def of(cls, scans: Sequence[Scan]) -> "Corpus":
        return cls(tuple(scans), np.cumsum([0, *(scan.documents for scan in scans)], dtype=np.int64))

    @property
    def documents(self) -> int:
        return int(self.starts[-1])

    def shard_of(self, documents: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.searchsorted(self.starts, documents, side="right") - 1


def find_documents(corpus: Corpus, partition: int) -> NDArray[Any]:
    """Documents equal to an earlier one, in one partition; REPEATED [n], by document."""
    found, numbers = _read(corpus, "documents", keys.DOCUMENT, partition)
    later, first = exact.repeats(found)
    return _repeated(numbers[later], numbers[first])


def find_paragraphs(corpus: Corpus, partition: int, dropped: NDArray[np.bool_]) -> NDArray[Any]:
    """Paragraphs seen before in documents that stay; REPEATED [n], by document and place."""
    found, numbers = _read(corpus, "paragraphs", keys.PARAGRAPH, partition)
    stays = ~dropped[numbers]
    found, numbers = found[stays], numbers[stays]
    later, first = exact.repeats(found)
    return _repeated(numbers[later], numbers[first], found["start"][later], found["end"][later])


def find_candidates(corpus: Corpus, partition: int, dropped: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Pairs of documents that share a band, in one partition [pairs, 2], each once.

    Of all pairs of a group of equal bands: each document with the first, and with the one before it.
    That is enough to join the group, and stays linear in its size.
    """
    found, numbers = _read(corpus, "bands", keys.DOCUMENT, partition)
    stays = ~dropped[numbers]
    found, numbers = found[stays], numbers[stays]
    later, first = exact.repeats(found)
    with_first = np.stack((numbers[first], numbers[later]), axis=1)
    neighbours = first[1:] == first[:-1]
    with_previous = np.stack((numbers[later[:-1]], numbers[later[1:]]), axis=1)[neighbours]
    pairs = np.concatenate((with_first, with_previous))
    return np.unique(pairs[pairs[:, 0] != pairs[:, 1]], axis=0)


def near_duplicates(corpus: Corpus, candidates: Sequence[Path], settings: near.NearSettings) -> NDArray[Any]:
    """Documents to drop as near duplicates, with the one of their cluster that stays; REPEATED [n].

    `candidates`: files of pairs, as `find_candidates` makes them.
    """
    found = [np.load(path) for path in candidates]
    pairs = np.unique(np.concatenate([np.empty((0, 2), np.int64), *found]), axis=0)
    similar = np.zeros(len(pairs), bool)
    for start in range(0, len(pairs), SIGNATURE_PAIRS):
        some = pairs[start : start + SIGNATURE_PAIRS]
        first, second = (_signatures(corpus, some[:, side], settings.hashes) for side in (0, 1))
        similar[start : start + SIGNATURE_PAIRS] = near.similarity(first, second) >= settings.threshold
    return _repeated(*near.first_of_clusters(pairs[similar]))


def keep_array(path: Path, make: Callable[[], NDArray[Any]]) -> None:
    """Publish the array that `make` returns as a `.npy`, unless it is there."""
    if not path.exists():
        result = make()
        with published(path) as file:
            np.save(file, result)


def keep_repeated(path: Path, corpus: Corpus, make: Callable[[], NDArray[Any]]) -> None:
    """Publish REPEATED entries, behind where those of each shard start, unless they are there."""
    if not path.exists():
        result = make()
        bounds = np.searchsorted(np.ascontiguousarray(result["document"]), corpus.starts)
        with published(path) as file:
            file.write(bounds.astype(np.int64).tobytes())
            file.write(result.tobytes())


def of_shard(results: Sequence[Path], corpus: Corpus, shard: int) -> NDArray[Any]:
    """The REPEATED entries of one shard in all partitions, by document and place."""
    parts = [np.empty(0, REPEATED)]
    header_bytes = 8 * corpus.starts.size
    for path in results:
        first, last = np.fromfile(path, np.int64, count=2, offset=8 * shard)
        offset = header_bytes + int(first) * REPEATED.itemsize
        parts.append(np.fromfile(path, REPEATED, count=int(last - first), offset=offset))
    found = np.concatenate(parts)
    return found[np.lexsort((found["start"], found["document"]))]


def all_documents(results: Sequence[Path], corpus: Corpus) -> NDArray[np.bool_]:
    """Which documents of the corpus are in the REPEATED entries of any partition [documents]."""
    marked = np.zeros(corpus.documents, bool)
    for path in results:
        marked[np.fromfile(path, REPEATED, offset=8 * corpus.starts.size)["document"]] = True
    return marked


def _read(
    corpus: Corpus, kind: str, dtype: np.dtype[Any], partition: int
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    found, shards = keys.read_partition([scan.keys(kind) for scan in corpus.scans], dtype, partition)
    return found, corpus.starts[shards] + found["row"]


def _repeated(
    documents: NDArray[np.int64],
    first: NDArray[np.int64],
    start: NDArray[Any] | int = 0,
    end: NDArray[Any] | int = 0,
) -> NDArray[Any]:
    result = np.zeros(documents.size, REPEATED)
    result["document"], result["first"], result["start"], result["end"] = documents, first, start, end
    return result[np.lexsort((result["start"], result["document"]))]


def _signatures(corpus: Corpus, documents: NDArray[np.int64], hashes: int) -> NDArray[np.uint32]:
    result = np.empty((documents.size, hashes), np.uint32)
    shards = corpus.shard_of(documents)
    for shard in np.unique(shards):
        here = shards == shard
        rows = documents[here] - corpus.starts[shard]
        result[here] = corpus.scans[shard].signatures(rows, hashes)
    return result
