"""Texts to arrays of words: where each lies, and a 64-bit hash of it, without a Python loop over words.

All rules of cleaning that speak of words share this pass. A word's hash is a polynomial in its code
points (Karp and Rabin, 1987) modulo 2^64, taken from running sums for all words at once, then mixed;
a run of n words is a polynomial in theirs. Letters are lowercased. Text is handled in pieces, so that
memory beyond the text and its words (24 bytes each) is bounded.

What is a word: a run of characters without whitespace (`TOKENS`), as Gopher's rules count them; or a
run of letters, digits and marks (`LETTERS`), which ignores punctuation. In scripts written without
spaces each character is a word.
"""

import sys
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

PIECE_CHARACTERS = 1 << 16  # x 8 bytes: stays in the second-level cache

SPACE, PUNCTUATION, DIGIT, LETTER, IDEOGRAPH = range(5)
TOKENS, LETTERS = PUNCTUATION, DIGIT
"""Kinds of words, as the least class of character that they may hold."""

# Thai, Lao, Myanmar, Khmer; kana; Han and its extensions.
WITHOUT_SPACES = (
    (0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3040, 0x30FF),
    (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF),
)  # fmt: skip

WORD_BASE = 0x9E3779B97F4A7C15
NGRAM_BASE = 0xD6E8FEB86659FD93


@dataclass(frozen=True, slots=True)
class Words:
    """The words of one text, in order, each array [n]."""

    hashes: NDArray[np.uint64]
    starts: NDArray[np.int64]
    """First character of each."""
    ends: NDArray[np.int64]
    """The character after the last."""
    classes: NDArray[np.uint8]
    """The highest class of a character in it: DIGIT where there is no letter, for one."""

    def __len__(self) -> int:
        return int(self.hashes.size)

    def __getitem__(self, some: slice) -> "Words":
        return Words(self.hashes[some], self.starts[some], self.ends[some], self.classes[some])


def split_words(texts: Sequence[str], *kinds: int) -> list[tuple[Words, ...]]:
    """The words of each text, once for each of `kinds` (TOKENS, LETTERS)."""
    parts: list[list[list[Words]]] = [[[] for _ in kinds] for _ in texts]
    for group in _groups(texts):
        joined = "".join(piece for _, _, piece in group)
        classes, sums = _scan(joined)
        # A break at the seams: the last word of one piece does not run on into the next.
        bounds = np.cumsum([0, *(len(piece) for _, _, piece in group)])
        for which, kind in enumerate(kinds):
            words = _words(classes, sums, bounds, kind)
            cuts = np.searchsorted(words.starts, bounds).tolist()
            for k, (text, offset, _) in enumerate(group):
                part = words[cuts[k] : cuts[k + 1]]
                shift = offset - int(bounds[k])
                parts[text][which].append(
                    Words(part.hashes, part.starts + shift, part.ends + shift, part.classes)
                )
    return [tuple(map(_joined, of_text)) for of_text in parts]


def ngram_hashes(hashes: NDArray[np.uint64], n: int) -> NDArray[np.uint64]:
    """The hash of each run of n words [max(0, words - n + 1)], by doubling: log n passes."""
    if hashes.size < n:
        return np.empty(0, np.uint64)
    result, width = hashes, 1
    for bit in bin(n)[3:]:
        result = result[:-width] * _power(width) + result[width:]
        width *= 2
        if bit == "1":
            result = result[:-1] * _power(1) + hashes[width:]
            width += 1
    return mix(result)


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A permutation of 64-bit values that spreads every bit over all others (the murmur3 finalizer)."""
    values = values ^ (values >> np.uint64(33))
    values *= np.uint64(0xFF51AFD7ED558CCD)
    values ^= values >> np.uint64(33)
    values *= np.uint64(0xC4CEB9FE1A85EC53)
    values ^= values >> np.uint64(33)
    return values


def _groups(texts: Sequence[str]) -> Iterator[list[tuple[int, int, str]]]:
    """(number of the text, offset in it, piece), in lists of about PIECE_CHARACTERS."""
    group: list[tuple[int, int, str]] = []
    size = 0
    for number, text in enumerate(texts):
        for offset, piece in _pieces(text):
            if size and size + len(piece) > PIECE_CHARACTERS:
                yield group
                group, size = [], 0
            group.append((number, offset, piece))
            size += len(piece)
    if group:
        yield group


def _pieces(text: str) -> Iterator[tuple[int, str]]:
    """A long text, cut before a space where there is one."""
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        end = max(
            text.rfind(" ", start, start + PIECE_CHARACTERS),
            text.rfind("\n", start, start + PIECE_CHARACTERS),
        )
        end = end if end > start else start + PIECE_CHARACTERS
        yield start, _lowered(text[start:end])
        start = end
    yield start, _lowered(text[start:])


def _lowered(text: str) -> str:
    """Lowercase of the same length, so that positions hold; a few letters (İ) have none and stay."""
    lowered = text.lower()
    if len(lowered) == len(text):
        return lowered
    return "".join(low if len(low := letter.lower()) == 1 else letter for letter in text)


def _scan(text: str) -> tuple[NDArray[np.uint8], NDArray[np.uint64]]:
    """Class of each character [n], and running sums of code point times power [n + 1]."""
    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    classes = _class_table()[points]
    sums = np.empty(points.size + 1, np.uint64)
    sums[0] = 0
    terms = points.astype(np.uint64)
    terms += np.uint64(1)
    terms *= _powers(points.size)[0]
    np.cumsum(terms, out=sums[1:])
    return classes, sums


def _words(
    classes: NDArray[np.uint8], sums: NDArray[np.uint64], bounds: NDArray[np.int64], kind: int
) -> Words:
    inside = np.zeros(classes.size + 1, bool)  # one character more, so that the last word ends
    inside[:-1] = classes >= kind
    begins = inside.copy()
    begins[1:] &= ~inside[:-1]
    alone = np.flatnonzero(classes == IDEOGRAPH)
    begins[alone] = True
    begins[alone + 1] |= inside[alone + 1]
    seams = bounds[1:-1]
    begins[seams] |= inside[seams]
    finishes = inside[:-1] & (begins[1:] | ~inside[1:])
    starts, ends = np.flatnonzero(begins), np.flatnonzero(finishes) + 1
    hashes = (sums[ends] - sums[starts]) * _powers(classes.size)[1][starts]
    # Runs to the next word's start; what lies between is of a lower class.
    highest = np.maximum.reduceat(classes, starts) if starts.size else np.empty(0, np.uint8)
    return Words(mix(hashes), starts, ends, highest)


def _joined(parts: list[Words]) -> Words:
    if len(parts) == 1:
        return parts[0]
    return Words(
        np.concatenate([part.hashes for part in parts]),
        np.concatenate([part.starts for part in parts]),
        np.concatenate([part.ends for part in parts]),
        np.concatenate([part.classes for part in parts]),
    )


@cache
def _power(exponent: int) -> np.uint64:
    return np.uint64(pow(NGRAM_BASE, exponent, 1 << 64))


_known: list[tuple[NDArray[np.uint64], NDArray[np.uint64]]] = []


def _powers(count: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """base^i and base^-i modulo 2^64, each [count]; the base is odd, so it has an inverse."""
    if not _known or _known[-1][0].size < count:
        size = max(count, PIECE_CHARACTERS)
        both = []
        for base in (WORD_BASE, pow(WORD_BASE, -1, 1 << 64)):
            powers = np.full(size, base, np.uint64)
            powers[0] = 1
            both.append(np.multiply.accumulate(powers))
        _known[:] = [(both[0], both[1])]
    forward, backward = _known[-1]
    return forward[:count], backward[:count]


@cache
def _class_table() -> NDArray[Any]:
    """The class of each code point."""
    table = np.full(sys.maxunicode + 1, PUNCTUATION, np.uint8)
    for point in range(0x20000):  # beyond are Han, by the ranges, and private use
        character = chr(point)
        if character.isspace():
            table[point] = SPACE
        elif character.isalpha() or unicodedata.category(character).startswith("M"):
            table[point] = LETTER
        elif character.isalnum():
            table[point] = DIGIT
    for first, last in WITHOUT_SPACES:
        table[first : last + 1] = np.where(table[first : last + 1] == SPACE, SPACE, IDEOGRAPH)
    return table
