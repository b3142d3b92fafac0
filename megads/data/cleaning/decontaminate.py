"""Documents that share a run of words with an evaluation set, as in GPT-3 (arXiv:2005.14165, appendix C).

Every string of an evaluation item is looked for by all its runs of `ngram_words` words, lowercased and
without punctuation. A string with fewer words, but at least `min_words`, is looked for as a whole;
what is shorter still is not looked for, since ordinary text would match it, and is counted. Hashes of
64 bits are compared: among 10^12 words against 10^6 runs a wrong match has a probability of 0.05.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from megads.data.cleaning.words import LETTERS, Words, ngram_hashes, split_words
from megads.data.documents import read_line_batches
from megads.errors import DataError

FILTER_BITS_PER_ENTRY = 32


@dataclass(frozen=True)
class Overlap:
    """Where a document and an evaluation item meet: characters of the document, and the item."""

    start: int
    end: int
    item: str
    """FILE:LINE:FIELD"""


class EvaluationIndex:
    """The runs of words of evaluation files, to look documents up in.

    `files`: JSON lines, plain or compressed, paths or URLs. `fields`: only these top-level fields; all
    strings, nested ones too, without it. Raises DataError for unreadable files and for those with nothing to
    look for.
    """

    def __init__(
        self,
        files: Sequence[str | os.PathLike[str]],
        *,
        ngram_words: int = 13,
        min_words: int = 8,
        fields: Sequence[str] = (),
    ) -> None:
        self.items: list[str] = []
        self.too_short = 0
        """Strings of fewer than `min_words` words."""
        found: dict[int, list[tuple[NDArray[np.uint64], int]]] = {}
        for file in files:
            before = len(self.items)
            for place, text in _strings(os.fspath(file), fields):
                ((words,),) = split_words([text], LETTERS)
                if len(words) < min_words:
                    self.too_short += 1
                    continue
                length = min(ngram_words, len(words))
                found.setdefault(length, []).append((ngram_hashes(words.hashes, length), len(self.items)))
                self.items.append(f"{PurePosixPath(file).name}:{place}")
            if len(self.items) == before:
                raise DataError(
                    f"{file}: no string of at least {min_words} words to look for"
                    + (f" in the fields {', '.join(fields)}." if fields else ".")
                )
        self._tables = {length: _Table(parts) for length, parts in sorted(found.items())}

    def overlap(self, words: Words) -> Overlap | None:
        """The first shared run of words in a document (its LETTERS), longest runs looked for first."""
        for length, table in reversed(self._tables.items()):
            hit = table.first(ngram_hashes(words.hashes, length))
            if hit is not None:
                place, item = hit
                return Overlap(
                    int(words.starts[place]), int(words.ends[place + length - 1]), self.items[item]
                )
        return None


class _Table:
    """Sorted hashes, each with its first item, behind a bitmap that most lookups end at."""

    def __init__(self, parts: list[tuple[NDArray[np.uint64], int]]) -> None:
        hashes = np.concatenate([hashes for hashes, _ in parts])
        items = np.repeat([item for _, item in parts], [hashes.size for hashes, _ in parts])
        self.hashes, first = np.unique(hashes, return_index=True)
        self.items = items[first]
        self._shift = np.uint64(64 - (hashes.size * FILTER_BITS_PER_ENTRY).bit_length())
        self._filter = np.zeros(1 << (64 - int(self._shift)), bool)
        self._filter[hashes >> self._shift] = True

    def first(self, hashes: NDArray[np.uint64]) -> tuple[int, int] | None:
        places = np.flatnonzero(self._filter[hashes >> self._shift])
        if not places.size:
            return None
        at = np.minimum(np.searchsorted(self.hashes, hashes[places]), self.hashes.size - 1)
        hits = np.flatnonzero(self.hashes[at] == hashes[places])
        return (int(places[hits[0]]), int(self.items[at[hits[0]]])) if hits.size else None


def _strings(path: str, fields: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(LINE:FIELD, string) of every string in a file."""
    for batch in read_line_batches(path):
        for too_long in batch.defects:
            raise DataError(f"{path}, line {too_long.line}: {too_long.detail}")
        for line, raw in enumerate(batch.data.split(b"\n"), batch.first_line):
            if not raw.strip():
                continue
            try:
                record = orjson.loads(raw)
            except orjson.JSONDecodeError as error:
                raise DataError(f"{path}, line {line}: not JSON: {error}.") from error
            if fields:
                if not isinstance(record, dict):
                    raise DataError(f"{path}, line {line}: not a JSON object, so it has none of the fields.")
                record = {name: record[name] for name in fields if name in record}
            for name, text in _nested(record, ""):
                yield f"{line}:{name}", text


def _nested(value: Any, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _nested(inner, f"{name}.{key}" if name else str(key))
