"""Words of megabytes, encoded window by window to the very ids that the whole word has.

A word here is what the pre-tokenizer does not cut: millions of letters without a space, a line of dashes.
Byte-pair encoding needs about 25 bytes of memory for each of its bytes. It applies, again and again, the
merge of the lowest rank, the leftmost first, so what it does between two places that no merge crosses
depends on nothing outside. It follows that tokens are the encoding of a word exactly if each two
neighbours are the encoding of what they spell. Windows of a word overlap; where both encodings have the
same token at the same place, the left one up to it and the right one from it on hold such neighbours
only: they are the encoding of the whole.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import orjson
import tokenizers
from numpy.typing import NDArray

WINDOW_CHARACTERS = 1 << 18
OVERLAP_BYTES = 1 << 14
# What long words are made of: a pattern, what must not follow, and an example. In each of them all
# characters have one size. In DeepSeek's pattern `/word` ends where ASCII does, `word` goes on.
KINDS = (
    ("[A-Za-z]", r"[^\x00-\x7f]", "aBxyZQ"),
    (r"[!-/:-@\[-`{-~]", "(?!)", "=-*'/"),
    ("[\u4e00-\u9fa5]", "(?!)", "\u4e2d\u6587"),
    (" ", "(?!)", "  "),
    (r"\n", "(?!)", "\n\n"),
)
BEFORE = ("", "a", "Z's", " ", "9", ".", ")\n", "\u00e9", "\u4e2d", "\r\n-", "_")
AFTER = ("", "a", "I'm", " b", "7", ".\n", "(x", "\u00e9", "\u6587", "\r\n", "\n c", "\u0301")

Encode = Callable[[str], NDArray[Any]]


class LongWords:
    """Finds and encodes long words for a byte-level BPE, given as its `tokenizer.json`.

    Only kinds of words are cut of which the pre-tokenizer shows that it makes one word of them, however
    long, whatever is around it; others are encoded whole.
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        plain = {"added_tokens": [], "normalizer": None, "pre_tokenizer": spec["pre_tokenizer"]}
        model = {"type": "BPE", "vocab": {}, "merges": []}
        words = tokenizers.Tokenizer.from_str(orjson.dumps(plain | {"model": model}).decode()).pre_tokenizer
        added = [token["content"] for token in spec["added_tokens"]]
        kinds = [
            f"{kind}{{{WINDOW_CHARACTERS},}}+(?!{excluded})"
            for kind, excluded, example in KINDS
            if _is_one_word(words, 8 * example, [text for text in AFTER if not re.match(excluded, text)])
            and not any(re.fullmatch(f"{kind}+", text) for text in added)
        ]
        self._run = re.compile("|".join(kinds) or "(?!)")
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
        for end, character_bytes in self._window_ends(text):
            if (ids := self._continued(pieces, ids, encode(text[start:end]))) is None:
                return encode(text)
            tokens, overlap_bytes = self._end_of(ids, character_bytes)
            pieces.append(ids[: ids.size - tokens])
            ids, start = ids[ids.size - tokens :], end - overlap_bytes // character_bytes
        if (ids := self._continued(pieces, ids, encode(text[start:]))) is None:
            return encode(text)
        return np.concatenate([*pieces, ids]) if pieces else ids

    def _window_ends(self, text: str) -> Iterator[tuple[int, int]]:
        """Where in long words windows may end, a whole window behind where it began or another ended, and
        the size of the characters there in bytes.
        """
        run_end = 0
        # Only at the start of each window: text that has no long words shall not be searched for them.
        for start in range(0, len(text) - WINDOW_CHARACTERS, WINDOW_CHARACTERS):
            if start >= run_end and (run := self._run.match(text, start)):
                run_end = run.end()
            if start + WINDOW_CHARACTERS <= run_end:
                yield start + WINDOW_CHARACTERS, len(text[start].encode())

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

    def _end_of(self, ids: NDArray[Any], character_bytes: int) -> tuple[int, int]:
        """How many tokens and bytes at the end make up the overlap, which begins with a character.

        It begins with a token too: what repeats in steps would otherwise be out of step for ever.
        """
        sizes = np.cumsum(self._token_bytes.take(ids[: -OVERLAP_BYTES - 1 : -1], mode="clip"))
        fitting = np.flatnonzero((sizes <= OVERLAP_BYTES) & (sizes % character_bytes == 0))
        return (int(fitting[-1]) + 1, int(sizes[fitting[-1]])) if fitting.size else (0, 0)

    def _meeting(self, left: NDArray[Any], right: NDArray[Any]) -> tuple[int, int] | None:
        """Numbers of a token that both hold at the same place; None if there is none."""
        right = right[:OVERLAP_BYTES]
        # By where they end: the same token then starts at the same place.
        left_ends, right_ends = (np.cumsum(self._token_bytes.take(ids, mode="clip")) for ids in (left, right))
        _, in_left, in_right = np.intersect1d(left_ends, right_ends, assume_unique=True, return_indices=True)
        same = np.flatnonzero(left[in_left] == right[in_right])
        return (int(in_left[same[0]]), int(in_right[same[0]])) if same.size else None


def _is_one_word(words: tokenizers.pre_tokenizers.PreTokenizer, run: str, followers: list[str]) -> bool:
    """Whether a run of characters is cut nowhere, and what is around it as it would be around each half."""

    def pieces(text: str) -> list[str]:
        return [piece for piece, _ in words.pre_tokenize_str(text)]

    for before in BEFORE:
        for after in followers:
            left, right = pieces(before + run), pieces(run + after)
            if pieces(before + run + run + after) != [*left[:-1], left[-1] + right[0], *right[1:]]:
                return False
    return True
