"""Exact duplicates, of documents and of paragraphs: 128-bit hashes of text with its whitespace evened out.

The hash is BLAKE2b (RFC 7693) of the text in Unicode's NFC with every run of whitespace as one space.
At 128 bits a wrong match among 10^12 texts has a probability of 10^-15, also where someone would want
one; there is no Bloom filter and so none of its false positives.
"""

import hashlib
import unicodedata
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

HASH_BYTES = 16


class Paragraph(NamedTuple):
    """A line of a text and the line breaks after it: what would be cut, and what it is known by."""

    start: int
    end: int
    key: bytes


def text_key(text: str) -> bytes:
    """16 bytes that two texts share if and only if they differ in whitespace at most."""
    evened = " ".join(text.split())
    if not evened.isascii():
        evened = unicodedata.normalize("NFC", evened)
    return hashlib.blake2b(evened.encode(), digest_size=HASH_BYTES).digest()


def paragraphs(text: str, min_characters: int) -> Iterator[Paragraph]:
    """The paragraphs (lines) of at least `min_characters`, whitespace at their ends not counted."""
    start, length = 0, len(text)
    begun = False  # something visible came before
    while start < length:
        end = text.find("\n", start)
        end = length if end < 0 else end
        # Most lines are short; they are passed by without a copy.
        if end - start >= min_characters and len(line := text[start:end].strip()) >= min_characters:
            after = end
            while after < length and text[after] in "\r\n":
                after += 1
            # Blank lines at the start of the text go with its first paragraph.
            yield Paragraph(start if begun else 0, after, text_key(line))
            begun = True
            start = after
            continue
        begun = begun or bool(text[start:end].strip())
        start = end + 1


def repeats(keys: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which entries came before: the places of the later ones, and of each one's first occurrence.

    `keys` [n] has fields `high` and `low` (uint64), in the order in which "first" is meant.
    """
    if not keys.size:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    high, low = keys["high"], keys["low"]
    order = np.argsort(high, kind="stable")
    equal = high[order[1:]] == high[order[:-1]]
    differ = low[order[1:]] != low[order[:-1]]
    if np.any(equal & differ):
        order = np.lexsort((low, high))  # stable too, and slower
        equal = (high[order[1:]] == high[order[:-1]]) & (low[order[1:]] == low[order[:-1]])
    later = np.concatenate(([False], equal))
    first_of_group = np.maximum.accumulate(np.where(later, 0, np.arange(order.size)))
    return order[later], order[first_of_group[later]]
