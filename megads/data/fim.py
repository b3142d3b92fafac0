"""Fill-in-the-middle: documents rearranged so that a causal model learns to infill (arXiv:2207.14255).

DeepSeek-V3 (arXiv:2412.19437, section 4.1) does it as DeepSeek-Coder-V2 (arXiv:2406.11931) did, to a
tenth of the documents, before they are packed:

    prefix, suffix, middle (PSM):   begin prefix hole suffix end middle eod
    suffix, prefix, middle (SPM):   begin hole suffix end prefix middle eod

The second is the variant that the first paper trains together with PSM (its SPMv2). A text is cut at two
characters drawn evenly, so a model also sees cuts inside words. What happens to a document depends
on its key and the seed only: not on its neighbours, the order, or the number of processes.
"""

import hashlib
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megads.data.indexed import token_type
from megads.data.tokenizer import Tokenizer
from megads.errors import ConfigError, DataError

# Names of the tokens before prefix, suffix and middle: DeepSeek's, those of `train_sentencepiece`, and
# those of Qwen and OLMo, StarCoder, Code Llama.
TOKEN_NAMES = (
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    ("<|fim_begin|>", "<|fim_hole|>", "<|fim_end|>"),
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<PRE>", "<SUF>", "<MID>"),
)
Mode = Literal["psm", "spm"]
PERSON = b"megads-fim"  # separates these draws from others with the same seed and key


class FimPieces(NamedTuple):
    """A text cut in three, `prefix + middle + suffix`, and the order they are to be put in."""

    prefix: str
    middle: str
    suffix: str
    mode: Mode


class FillInTheMiddle:
    """Decides by key which documents are rearranged, cuts them, and joins the ids of the pieces.

    `rate` is the share of documents that are rearranged, `spm_rate` the share of those that are in SPM
    order. `tokens` names the three control tokens, where they are not found by a known name.
    Raises ConfigError for a rate outside 0 to 1, DataError when the tokenizer lacks the control tokens
    or does not give back a text from the ids of its pieces.
    """

    def __init__(
        self,
        rate: float,
        spm_rate: float,
        seed: int,
        tokenizer: Tokenizer,
        *,
        tokens: tuple[str, str, str] | None = None,
    ) -> None:
        for name, value in (("rate", rate), ("share of SPM", spm_rate)):
            if not 0 <= value <= 1:
                raise ConfigError(f"Fill-in-the-middle: the {name} is {value}; it must be from 0 to 1.")
        check_pieces_join(tokenizer, "Fill-in-the-middle")
        self.rate = rate
        self.spm_rate = spm_rate
        self.seed = seed
        self.begin_id, self.hole_id, self.end_id = find_tokens(tokenizer, tokens)
        self._dtype = token_type(tokenizer.vocab_size)
        self._secret = seed_bytes(seed)

    def split(self, text: str, key: bytes) -> FimPieces | None:
        """The pieces of the document with this key; None when it stays as it is."""
        digest = hashlib.blake2b(key, digest_size=32, key=self._secret, person=PERSON).digest()
        chosen, order, *cuts = (int.from_bytes(digest[i : i + 8], "little") for i in (0, 8, 16, 24))
        if chosen >= self.rate * 2**64 or not text:
            return None
        # Scaling 64 bits to a length below 2**32 is biased by less than 2**-32.
        first, second = sorted((cut * (len(text) + 1)) >> 64 for cut in cuts)
        mode: Mode = "spm" if order < self.spm_rate * 2**64 else "psm"
        return FimPieces(text[:first], text[first:second], text[second:], mode)

    def join(
        self,
        prefix: Sequence[int] | NDArray[Any],
        middle: Sequence[int] | NDArray[Any],
        suffix: Sequence[int] | NDArray[Any],
        mode: Mode,
    ) -> NDArray[Any]:
        """The ids of the document in the order of `mode`, without an end-of-document token."""
        begin, hole, end = [self.begin_id], [self.hole_id], [self.end_id]
        if mode == "psm":
            parts = [begin, prefix, hole, suffix, end, middle]
        else:
            parts = [begin, hole, suffix, end, prefix, middle]
        return np.concatenate([np.asarray(part, dtype=self._dtype) for part in parts])

    def restore(self, ids: Sequence[int] | NDArray[Any]) -> NDArray[Any]:
        """The ids of a document in reading order, without the control tokens; untouched ones as they are.

        Raises DataError when the control tokens are not as `join` puts them.
        """
        ids = np.asarray(ids)
        places = [np.flatnonzero(ids == token) for token in (self.begin_id, self.hole_id, self.end_id)]
        if not any(place.size for place in places):
            return ids
        if any(place.size != 1 for place in places):
            raise DataError(
                f"Fill-in-the-middle tokens occur {[p.size for p in places]} times, not once each."
            )
        begin, hole, end = (int(place[0]) for place in places)
        if not 0 == begin < hole < end:
            raise DataError(f"Fill-in-the-middle tokens are at {begin}, {hole}, {end}: not in order.")
        # In SPM order what precedes the hole is empty, and what follows `end` is prefix and middle.
        return np.concatenate([ids[1:hole], ids[end + 1 :], ids[hole + 1 : end]])


def seed_bytes(seed: int) -> bytes:
    """A seed as the key of a hash."""
    return seed.to_bytes(16, "little", signed=True)


def check_pieces_join(tokenizer: Tokenizer, what: str) -> None:
    """Raise DataError for tokenizers that put a space before every text they are given."""
    if tokenizer.decode([i for ids in tokenizer.encode_batch(["a", "b"]) for i in ids]) != "ab":
        raise DataError(
            f"{what} encodes pieces of a text one by one, but {tokenizer.path} adds a space to each. Use a "
            "tokenizer without a dummy prefix (tools/train_tokenizer.py makes such)."
        )


def find_tokens(tokenizer: Tokenizer, tokens: tuple[str, str, str] | None) -> tuple[int, int, int]:
    """Ids of the tokens before prefix, suffix and middle: those named, else the first known names.

    Raises DataError when the tokenizer lacks them.
    """
    for names in TOKEN_NAMES if tokens is None else (tokens,):
        begin, hole, end = map(tokenizer.control_id, names)
        if begin is not None and hole is not None and end is not None:
            return begin, hole, end
    looked_for = tokens or " or ".join(names[0] for names in TOKEN_NAMES)
    raise DataError(
        f"{tokenizer.path}: no control tokens for fill-in-the-middle (looked for {looked_for}). Set its rate "
        "to 0 or use a tokenizer that has them."
    )
