"""Random splitting of tokens that combine punctuation and line breaks (DeepSeek-V3, arXiv:2412.19437, 4.1).

V3's vocabulary has tokens such as `.\\n\\n` and `;\\n`. A model that always sees them whole is at a loss
when a prompt ends in `.` and the line break is for it to write (token boundary bias). So a share of
them is split into what the tokenizer makes of the punctuation and of the line breaks by themselves.
Which ones depends on the document's key, the seed and the place in the document only.
"""

import hashlib
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megads.data.fim import check_pieces_join, seed_bytes
from megads.data.tokenizer import Tokenizer
from megads.errors import ConfigError, DataError

PERSON = b"megads-split"  # separates these draws from others with the same seed and key
LINE_BREAKS = "\r\n"


class RandomTokenSplitter:
    """Splits each combined token with probability `rate`.

    Raises ConfigError for a rate outside 0 to 1, DataError when the vocabulary has no such token or the
    tokenizer does not give back a text from the ids of its pieces.
    """

    def __init__(self, tokenizer: Tokenizer, rate: float, seed: int) -> None:
        if not 0 <= rate <= 1:
            raise ConfigError(f"Splitting of tokens: the rate is {rate}; it must be from 0 to 1.")
        check_pieces_join(tokenizer, "Splitting of tokens")
        self.rate = rate
        self.seed = seed
        self.splits = combined_tokens(tokenizer)
        """The ids that may be split, and the ids of their parts."""
        if not self.splits:
            raise DataError(
                f"{tokenizer.path}: no token combines punctuation and line breaks, so none can be split. "
                "Leave the option out."
            )
        self._secret = seed_bytes(seed)
        self._combined = np.zeros(tokenizer.vocab_size, np.bool_)
        self._combined[list(self.splits)] = True
        # Parts of all splits in one array; for each id where its parts start and how many they are.
        self._parts = np.array([part for parts in self.splits.values() for part in parts], np.int64)
        self._counts = np.zeros(tokenizer.vocab_size, np.int64)
        self._counts[list(self.splits)] = [len(parts) for parts in self.splits.values()]
        self._starts = np.zeros(tokenizer.vocab_size, np.int64)
        self._starts[list(self.splits)] = np.cumsum([0, *map(len, self.splits.values())])[:-1]

    def apply(
        self, ids: NDArray[Any], lengths: NDArray[np.int32], keys: Sequence[bytes]
    ) -> tuple[NDArray[Any], NDArray[np.int32]]:
        """The ids of documents, one after the other, and the length of each [len(keys)], with splits.

        The text stays the same. `ids` is returned as it is when nothing is split.
        """
        assert len(keys) == lengths.size, "one key per document"
        places = np.flatnonzero(self._combined.take(ids))
        starts_of_documents = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
        counts = np.diff(np.searchsorted(places, starts_of_documents))
        documents = np.repeat(np.arange(lengths.size), counts)
        states = self._states(keys, np.flatnonzero(counts))
        chosen = _draws(states[documents], places - starts_of_documents[documents]) < self.rate
        places, documents = places[chosen], documents[chosen]
        if not places.size:
            return ids, lengths
        split_ids = ids[places]
        starts, extra = self._starts[split_ids], self._counts[split_ids] - 1
        # The further parts of each: consecutive places in `_parts`, without a loop over the splits.
        extra_before = np.cumsum(extra) - extra
        within = np.arange(extra.sum()) - np.repeat(extra_before, extra)
        rest = self._parts[np.repeat(starts + 1, extra) + within]
        split = np.insert(ids, np.repeat(places + 1, extra), rest.astype(ids.dtype))
        split[places + extra_before] = self._parts[starts]
        grown = np.bincount(documents, weights=extra, minlength=lengths.size).astype(np.int32)
        return split, lengths + grown

    def _states(self, keys: Sequence[bytes], documents: NDArray[np.int64]) -> NDArray[np.uint64]:
        """The start of the draws of each of these documents, 0 for others [len(keys)]."""
        states = np.zeros(len(keys), np.uint64)
        for document in documents.tolist():
            digest = hashlib.blake2b(keys[document], digest_size=8, key=self._secret, person=PERSON).digest()
            states[document] = int.from_bytes(digest, "little")
        return states


def _draws(states: NDArray[np.uint64], offsets: NDArray[np.int64]) -> NDArray[np.float64]:
    """A number in [0, 1) for each place in a document: SplitMix64 (Steele et al., 2014), at that step."""
    z = states + (offsets.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def combined_tokens(tokenizer: Tokenizer) -> dict[int, tuple[int, ...]]:
    """Ids of tokens that are punctuation or symbols and then line breaks, and the ids of their parts.

    Parts are what the tokenizer makes of either side by itself, where together they are the same text.
    """
    texts = {}
    for token_id in range(tokenizer.vocab_size):
        text = tokenizer.decode([token_id])
        marks = text.rstrip(LINE_BREAKS)
        if marks != text and _is_punctuation(marks.removeprefix(" ")):
            texts[token_id] = (marks, text[len(marks) :])
    sides = tokenizer.encode_batch([side for both in texts.values() for side in both])
    splits = {}
    for number, (token_id, (marks, breaks)) in enumerate(texts.items()):
        parts = (*sides[2 * number], *sides[2 * number + 1])
        if tokenizer.decode(parts) == marks + breaks and token_id not in parts:
            splits[token_id] = parts
    return splits


def _is_punctuation(text: str) -> bool:
    # U+FFFD, which is a symbol, stands for part of a character here.
    return bool(text) and all(c != "\ufffd" and unicodedata.category(c)[0] in "PS" for c in text)
