"""Characters on which two tokenizer libraries can disagree because their Unicode tables differ in age.

Patterns such as `\\p{L}` and normalization depend on tables that grow every year. Over all of Unicode,
the only characters on which gigatoken 0.10 (Unicode 17) and tokenizers 0.23 (Oniguruma, Unicode 16;
normalization of about Unicode 9) give different ids are those that the latter does not know; both
agree on every older one. Which those are is asked of the libraries, since another release of them, or
of Python, knows others.
"""

import functools
import unicodedata
from itertools import chain

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import normalizers, pre_tokenizers

# Code points of new characters, so far, are in the first four planes or in this part of the 15th; what
# follows up to the private planes is unassigned.
ASSIGNED = (range(0x40000), range(0xE0000, 0xE1000))
UNASSIGNED = (range(0x40000, 0xE0000), range(0xE1000, 0xF0000))
# Blocks that were full, or private, before any library in use was made: not worth asking for.
SETTLED = (range(0x4E00, 0x9FF0), range(0xAC00, 0xD7A4), range(0xD800, 0xF900), range(0x20000, 0x2A6D7))
# Where characters are that decompose, or that combine with others; ideographs and syllables left out.
COMPOSING = (
    range(0xC0, 0x3400), range(0xA000, 0xAC00), range(0xF900, 0x20000), range(0x2F800, 0x2FA20),
)  # fmt: skip
SCAN_CHARACTERS = 1 << 20


@functools.cache
def unknown_characters(*, composed: bool) -> NDArray[np.bool_]:
    """For each code point [0x110000]: is it unknown to Python's or to the `tokenizers` library's tables?

    `composed` adds those for which the two disagree on normal form C.
    """
    unknown = np.zeros(0x110000, np.bool_)
    for codes in UNASSIGNED:
        unknown[codes.start : codes.stop] = True
    settled = np.zeros_like(unknown)
    for codes in SETTLED:
        settled[codes.start : codes.stop] = True
    category = unicodedata.category
    for codes in ASSIGNED:
        open_codes = codes.start + np.flatnonzero(~settled[codes.start : codes.stop])
        flags = (category(character) == "Cn" for character in map(chr, open_codes.tolist()))
        unknown[open_codes] = np.fromiter(flags, np.bool_, open_codes.size)
    asked = "".join(map(chr, np.flatnonzero(~(unknown | settled)[: ASSIGNED[0].stop]).tolist()))
    unassigned = pre_tokenizers.Split(tokenizers.Regex(r"\P{Cn}+"), "removed")
    for piece, _ in unassigned.pre_tokenize_str(asked):
        unknown[list(map(ord, piece))] = True
    if composed:
        unknown[[ord(character) for character in _differently_composed()]] = True
    unknown.flags.writeable = False
    return unknown


def contains_any(text: str, characters: NDArray[np.bool_]) -> bool:
    """Whether a character of the text is in the set, given as a flag per code point."""
    for start in range(0, len(text), SCAN_CHARACTERS):
        codes = np.frombuffer(text[start : start + SCAN_CHARACTERS].encode("utf-32-le"), np.uint32)
        if characters.take(codes).any():
            return True
    return False


def _differently_composed() -> set[str]:
    """Characters that take part in what Python and `tokenizers` put into normal form C differently."""
    theirs = normalizers.NFC().normalize_str
    found = set()
    for code in chain(*COMPOSING):
        character = chr(code)
        parts = unicodedata.normalize("NFD", character)
        if parts == character and not unicodedata.combining(character):
            continue
        # Alone, taken apart, and between marks of the highest and of the lowest class.
        for probe in (character, parts, f"a\u0345{character}", f"a{character}\u0334", f"a{character}\u0301"):
            if theirs(probe) != unicodedata.normalize("NFC", probe):
                # All parts must be there for a difference: one of them, the rarest, is enough to know.
                found |= {character, max(parts)}
                break
    return found
