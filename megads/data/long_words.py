"""Words of megabytes, encoded window by window to the very ids that the whole word has.

A word here is what the pre-tokenizer does not cut: millions of letters without a space, a line of dashes.
Byte-pair encoding needs about 25 bytes of memory for each of its bytes. It applies, again and again, the
merge of the lowest rank, the leftmost first, so what it does between two places that no merge crosses
depends on nothing outside. It follows that tokens are the encoding of a word exactly if each two
neighbours are the encoding of what they spell. Windows of a word overlap; where both encodings have the
same token at the same place, the left one up to it and the right one from it on hold such neighbours
only: they are the encoding of the whole.
"""

import itertools
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import Any

import numpy as np
import orjson
import tokenizers
from numpy.typing import NDArray

WINDOW_CHARACTERS = 1 << 18
OVERLAP_BYTES = 1 << 14
# What long words are made of: a pattern, what must not follow, and an example. In DeepSeek's pattern `/word`
# ends where ASCII does, `word` goes on.
KINDS = (
    ("[A-Za-z]", r"[^\x00-\x7f]", "aBxyZQ"),
    (r"[!-/:-@\[-`{-~]", "(?!)", "=-*'/"),
    ("[\u4e00-\u9fa5]", "(?!)", "\u4e2d\u6587"),
    (" ", "(?!)", "  "),
    (r"\n", "(?!)", "\n\n"),
)
# And, by general category, of any script. Chinese characters and kana are words of their own to DeepSeek.
CATEGORIES = ("LM", "L", "PS")
SEPARATE_SCRIPTS = range(0x3040, 0xA000)
HIGHEST = 0x20000
# The only letters that normal form C joins with one another.
JAMO = (range(0x1100, 0x1200), range(0xA960, 0xA980), range(0xD7B0, 0xD800))
# A run of a category is looked for where so many characters are of it: to say which are takes 0.3 s.
SAMPLE_CHARACTERS = 512
BEFORE = ("", "a", "Z's", " ", "9", ".", ")\n", "\u00e9", "\u4e2d", "\r\n-", "_")
AFTER = ("", "a", "I'm", " b", "7", ".\n", "(x", "\u00e9", "\u6587", "\r\n", "\n c", "\u0301")

Encode = Callable[[str], NDArray[Any]]


class LongWords:
    """Finds and encodes long words for a byte-level BPE, given as its `tokenizer.json`.

    Only kinds of words are cut of which the pre-tokenizer shows that it makes one word of them, however
    long, whatever is around it; others are encoded whole. `unknown` flags the code points [0x110000] that
    libraries disagree on; `composed` tells of a normal form.
    """

    def __init__(self, spec: dict[str, Any], unknown: NDArray[np.bool_], *, composed: bool) -> None:
        self._spec = {key: spec[key] for key in ("pre_tokenizer", "added_tokens")}
        self._unknown, self._composed = unknown, composed
        vocabulary: dict[str, int] = spec["model"]["vocab"]
        ids = np.fromiter(vocabulary.values(), np.int64, len(vocabulary))
        # A character of a byte-level vocabulary is a byte. Added tokens are in no word that is cut, so theirs
        # does not matter, but no two tokens shall end at the same place.
        self._token_bytes = np.ones(ids.max(initial=0) + 1, np.int64)
        self._token_bytes[ids] = np.fromiter(map(len, vocabulary), np.int64, len(vocabulary))

    def encode(self, text: str, encode: Encode) -> NDArray[Any]:
        """What `encode` makes of the text, which it is given in windows where a word is long."""
        pieces: list[NDArray[Any]] = []
        ids: NDArray[Any] | None = None  # of the end of the last window, where the next one begins
        start = 0
        for end in self._window_ends(text):
            if (ids := self._continued(pieces, ids, encode(text[start:end]))) is None:
                return encode(text)
            tokens, characters = self._end_of(ids, text[max(start, end - OVERLAP_BYTES) : end])
            pieces.append(ids[: ids.size - tokens])
            ids, start = ids[ids.size - tokens :], end - characters
        if (ids := self._continued(pieces, ids, encode(text[start:]))) is None:
            return encode(text)
        return np.concatenate([*pieces, ids]) if pieces else ids

    def _window_ends(self, text: str) -> Iterator[int]:
        """Where in long words windows may end, a whole window behind where it began or another ended."""
        run_end = 0
        # Only at the start of each window: text that has no long words shall not be searched for them.
        for start in range(0, len(text) - WINDOW_CHARACTERS, WINDOW_CHARACTERS):
            if start >= run_end and (run := self._run_at(text, start)):
                run_end = run.end()
            if start + WINDOW_CHARACTERS <= run_end:
                yield start + WINDOW_CHARACTERS

    def _run_at(self, text: str, start: int) -> re.Match[str] | None:
        if (run := self._run.match(text, start)) is not None:
            return run
        sample = {unicodedata.category(c)[0] for c in text[start : start + SAMPLE_CHARACTERS]}
        if any(sample <= set(categories) for categories in CATEGORIES):
            return self._run_of_category.match(text, start)
        return None

    @cached_property
    def _run(self) -> re.Pattern[str]:
        return self._runs((kind, excluded, 8 * example) for kind, excluded, example in KINDS)

    @cached_property
    def _run_of_category(self) -> re.Pattern[str]:
        alphabets = {"".join(self._of_category(categories)) for categories in CATEGORIES}
        # Every character once, and a few of them in all surroundings: all of them there would take a minute.
        whole = [alphabet for alphabet in sorted(alphabets, key=len) if self._is_one_word(alphabet, "", "")]
        return self._runs(
            (_character_class(alphabet), "(?!)", alphabet[:: len(alphabet) // 32]) for alphabet in whole
        )

    def _of_category(self, categories: str) -> Iterator[str]:
        """Characters beyond ASCII; where there is a normal form, those that it leaves alone, and no marks."""
        for code in range(0x80, HIGHEST):
            character = chr(code)
            if (
                unicodedata.category(character)[0] in categories
                and code not in SEPARATE_SCRIPTS
                and not self._unknown[code]
                and not (self._composed and not _stands_alone(character))
            ):
                yield character

    def _runs(self, kinds: Iterable[tuple[str, str, str]]) -> re.Pattern[str]:
        """A pattern of long runs of those kinds that are one word, and hold no added token."""
        added = [token["content"] for token in self._spec["added_tokens"]]
        patterns = [
            f"{kind}{{{WINDOW_CHARACTERS},}}+(?!{excluded})"
            for kind, excluded, example in kinds
            if all(
                self._is_one_word(example, before, after)
                for before, after in itertools.product(BEFORE, AFTER)
                if not re.match(excluded, after)
            )
            and not any(re.fullmatch(f"{kind}+", text) for text in added)
        ]
        return re.compile("|".join(patterns) or "(?!)")

    def _is_one_word(self, run: str, before: str, after: str) -> bool:
        """Whether characters are cut nowhere, and what is around them as it would be around each half."""
        left, right = self._words(before + run), self._words(run + after)
        return self._words(before + run + run + after) == [*left[:-1], left[-1] + right[0], *right[1:]]

    def _words(self, text: str) -> list[str]:
        return [word for word, _ in self._pre_tokenizer.pre_tokenize_str(text)]

    @cached_property
    def _pre_tokenizer(self) -> tokenizers.pre_tokenizers.PreTokenizer:
        plain = {"added_tokens": [], "normalizer": None, "pre_tokenizer": self._spec["pre_tokenizer"]}
        model = {"type": "BPE", "vocab": {}, "merges": []}
        return tokenizers.Tokenizer.from_str(orjson.dumps(plain | {"model": model}).decode()).pre_tokenizer

    def _continued(
        self, pieces: list[NDArray[Any]], overlap: NDArray[Any] | None, ids: NDArray[Any]
    ) -> NDArray[Any] | None:
        """What remains of `ids` when `pieces` has got the part of the overlap before it; None if they do not
        meet there.
        """
        if overlap is None:
            return ids
        if (meeting := self._meeting(overlap, ids)) is None:
            return None
        pieces.append(overlap[: meeting[0]])
        return ids[meeting[1] :]

    def _end_of(self, ids: NDArray[Any], text: str) -> tuple[int, int]:
        """How many tokens and characters at the end make up the overlap, which begins with a character.

        It begins with a token too: what repeats in steps would otherwise be out of step for ever.
        """
        data = np.frombuffer(text.encode(), np.uint8)[-OVERLAP_BYTES:]
        is_start = (data & 0xC0) != 0x80
        sizes = np.cumsum(self._token_bytes.take(ids[: -OVERLAP_BYTES - 1 : -1], mode="clip"))
        sizes = sizes[sizes <= data.size]
        fitting = np.flatnonzero(is_start[data.size - sizes])
        if not fitting.size:
            return 0, 0
        return int(fitting[-1]) + 1, int(is_start[data.size - sizes[fitting[-1]] :].sum())

    def _meeting(self, left: NDArray[Any], right: NDArray[Any]) -> tuple[int, int] | None:
        """Numbers of a token that both hold at the same place; None if there is none."""
        right = right[:OVERLAP_BYTES]
        # By where they end: the same token then starts at the same place.
        left_ends, right_ends = (np.cumsum(self._token_bytes.take(ids, mode="clip")) for ids in (left, right))
        _, in_left, in_right = np.intersect1d(left_ends, right_ends, assume_unique=True, return_indices=True)
        same = np.flatnonzero(left[in_left] == right[in_right])
        return (int(in_left[same[0]]), int(in_right[same[0]])) if same.size else None


def _character_class(characters: Iterable[str]) -> str:
    """A regular expression for one of the characters, which are in order."""
    runs = itertools.groupby(enumerate(map(ord, characters)), lambda entry: entry[1] - entry[0])
    ranges = ([code for _, code in run] for _, run in runs)
    return "[" + "".join(f"{chr(codes[0])}-{chr(codes[-1])}" for codes in ranges) + "]"


def _stands_alone(character: str) -> bool:
    """Whether normal form C leaves a character as it is, whatever stands before or after it."""
    return (
        unicodedata.category(character)[0] != "M"
        and not any(ord(character) in jamo for jamo in JAMO)
        and unicodedata.is_normalized("NFC", character)
    )
