"""The fast engine: gigatoken, used where its ids are the reference's.

gigatoken (https://github.com/marcelroed/gigatoken) splits text by hand-written state machines and
remembers every word it has met, which makes it 50 times as fast as the `tokenizers` library and 7 times
as fast as sentencepiece, the references. What it takes to get the very same ids:

- It accepts settings that it then ignores. `why_not_gigatoken` lets through only those that it has.
- Its Unicode tables are newer than those of `tokenizers`, so characters of the last few years are letters
  to one and unassigned to the other. Texts with such characters are reported, to be encoded by the
  reference (see `unicode_gaps`).
- Its memory of words has no bound. The engine is made anew when it has grown by `CACHE_BYTES`, and long
  texts are handed over in parts, cut where the tokenizer cuts anyway, or in a long word (see `long_words`).

That the ids are equal is not taken on trust: `TwoEngineTokenizer.use_exact_engine` compares them.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import orjson
import psutil
import tokenizers
from numpy.typing import NDArray

from megads.data.long_words import Encode, LongWords
from megads.data.unicode_gaps import contains_any, unknown_characters

# The process may grow by this much before the engine is made anew. 200 MB of prose, code and tables make it
# grow by 80 MB; words that never repeat fill a table that doubles at 134 MB, which this stays below.
CACHE_BYTES = 112 << 20
# Making the engine anew costs 0.3 to 0.6 s: not more often than this, whatever else the process allocates.
RENEWAL_TEXT_CHARACTERS = 8 << 20
# Longer texts are handed over in parts, between which the growth is looked at.
PART_CHARACTERS = 1 << 20
# A line break between ASCII characters that are no space: runs of spaces are split by what follows them.
LINE_START = re.compile(r"(?<=[!-~])\n(?=[A-Za-z])")
# What stands before and after such a place, to see that every word ends there.
BEFORE_LINES = (
    "a",
    "Zed",
    "it's",
    " 9",
    "123",
    "a.",
    "\n.",
    " ;",
    ")",
    "`",
    "'",
    "(",
    "_",
    "$",
    "é!",
    "中。x",
    "\r\n-",
    "🎉=",
)
AFTER_LINES = ("a", "Word", "I'm", "x1", "Z\n", "s ", "ve")
PRE_TOKENIZER_PIECES = {"Split", "Digits", "ByteLevel"}


def why_not_gigatoken(spec: dict[str, Any], control: Sequence[str]) -> str | None:
    """None when gigatoken is known to do all that the tokenizer.json `spec` asks; else what it does not.

    `control` names the added tokens that are not to be matched.
    """
    model, normalizer = spec.get("model") or {}, spec.get("normalizer")
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        return "it is not a byte-level BPE"
    for setting in ("ignore_merges", "continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(setting):
            return f"it sets {setting}"
    if not _is_nothing(normalizer) and normalizer != {"type": "NFC"}:
        return "its normalizer is neither none nor NFC"
    if not _is_byte_level(spec.get("pre_tokenizer")):
        return "its pre-tokenizer is not a pattern and a byte-level mapping"
    alphabet = _byte_alphabet()
    spelled = {"".join(alphabet[byte] for byte in token.encode()): token for token in control}
    if reachable := spelled.keys() & model["vocab"].keys():  # what merges make is in the vocabulary
        for merged in map(_merged, model.get("merges") or ()):
            if merged in reachable:
                return f"merges lead to the control token {spelled[merged]!r}"
    return None


class GigatokenEngine:
    """gigatoken on the content of a `tokenizer.json`, whose added tokens are those that text may match.

    Raises RuntimeError when gigatoken cannot read `spec` and ImportError when it is not installed.
    """

    _cut_at_lines = False

    def __init__(self, spec: dict[str, Any], dtype: np.dtype[Any]) -> None:
        from gigatoken import gigatoken_rs

        self.name = f"gigatoken {version('gigatoken')}"
        self.dtype = dtype
        self.renewals = 0
        self._load = gigatoken_rs.load_hf_json
        self._json = orjson.dumps(spec)
        self._renew()

    def encode(self, texts: Sequence[str]) -> tuple[NDArray[Any], NDArray[np.int32], list[int]]:
        """All ids in one array, the number of ids of each text, and which texts need the reference.

        The ids of those texts may be wrong.
        """
        # Text by text: the call for a batch keeps a second memory of words, and imports awkward for 0.3 s.
        if max(map(len, texts), default=0) <= PART_CHARACTERS:
            pieces = list(map(self._model.encode, texts))
            self._bound_memory(sum(map(len, texts)))
        else:
            pieces = [self._encode_long(text) for text in texts]
        offsets = np.zeros(len(pieces) + 1, np.int64)
        np.cumsum([piece.size for piece in pieces], out=offsets[1:])
        ids = _joined(pieces).astype(self.dtype, copy=False)
        return ids, np.diff(offsets).astype(np.int32), self._doubtful(texts, ids, offsets)

    def by_reference(self, text: str, reference: Encode) -> NDArray[Any]:
        """What the reference makes of a text, with no more memory for it than is needed."""
        return reference(text)

    def _encode_long(self, text: str) -> NDArray[np.int32]:
        pieces = []
        for part in self._parts(text):
            pieces.append(self._encode_part(part))
        return _joined(pieces)

    def _encode_part(self, part: str) -> NDArray[np.uint32]:
        ids: NDArray[np.uint32] = self._model.encode(part)
        self._bound_memory(len(part))
        return ids

    def _doubtful(self, texts: Sequence[str], ids: NDArray[Any], offsets: NDArray[np.int64]) -> list[int]:
        """Which texts need the reference."""
        return []

    def _parts(self, text: str) -> Iterator[str]:
        start = 0
        while self._cut_at_lines and len(text) - start > PART_CHARACTERS:
            cut = LINE_START.search(text, start + PART_CHARACTERS)
            if cut is None:
                break
            yield text[start : cut.end()]
            start = cut.end()
        yield text[start:] if start else text

    def _renew(self) -> None:
        self._model: Any = None  # the old one goes before the new one comes
        self._model = self._load(self._json)
        self._characters = 0
        self._start_bytes = _process_bytes()

    def _bound_memory(self, characters: int) -> None:
        self._characters += characters
        if self._characters > RENEWAL_TEXT_CHARACTERS and _process_bytes() - self._start_bytes > CACHE_BYTES:
            self._renew()
            self.renewals += 1


class ByteLevelEngine(GigatokenEngine):
    """For a byte-level BPE that `why_not_gigatoken` finds nothing against."""

    def __init__(self, spec: dict[str, Any], dtype: np.dtype[Any]) -> None:
        super().__init__(spec, dtype)
        has_normalizer = not _is_nothing(spec.get("normalizer"))
        self._unknown = unknown_characters(composed=has_normalizer)
        self._suspicious = None if has_normalizer else _suspicious_tokens(spec, self._unknown)
        self._cut_at_lines = _lines_stand_alone(spec)
        self._long_words = LongWords(spec, self._unknown, composed=has_normalizer)

    def _encode_part(self, part: str) -> NDArray[np.uint32]:
        return self._long_words.encode(part, super()._encode_part)

    def by_reference(self, text: str, reference: Encode) -> NDArray[Any]:
        return self._long_words.encode(text, reference)

    def _doubtful(self, texts: Sequence[str], ids: NDArray[Any], offsets: NDArray[np.int64]) -> list[int]:
        """Texts with characters unknown to the reference.

        Without a normalizer such a character is in one token, or begins at the end of one, which a look at
        the ids tells faster than one at the text.
        """
        candidates = [i for i, text in enumerate(texts) if not text.isascii()]
        if self._suspicious is not None and candidates:
            hits = self._suspicious.take(ids)
            candidates = [i for i in candidates if hits[offsets[i] : offsets[i + 1]].any()]
        return [i for i in candidates if contains_any(texts[i], self._unknown)]


class SentencePieceEngine(GigatokenEngine):
    """For a sentencepiece BPE with byte fallback, given as the content of its `.model`.

    `spelled` is a character that the caller encodes otherwise than sentencepiece does: texts that hold it
    are left to the reference. Raises ValueError for other kinds of model.
    """

    def __init__(self, content: bytes, dtype: np.dtype[Any], control: Iterable[str], spelled: str) -> None:
        from gigatoken._load.sentencepiece import sentencepiece_to_tokenizer_json

        spec = orjson.loads(sentencepiece_to_tokenizer_json(content))
        changes = {step["type"] for step in spec["normalizer"]["normalizers"]}
        if not changes <= {"Prepend", "Replace"} or len(spec["normalizer"]["normalizers"]) > len(changes):
            raise ValueError("its normalizer does more than mark spaces")
        control = set(control)
        spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] not in control]
        # Merges were derived from the vocabulary: none must spell a piece that text does not match.
        merges = spec["model"]["merges"]
        spec["model"]["merges"] = [merge for merge in merges if _merged(merge) not in control]
        super().__init__(spec, dtype)
        self._spelled = spelled

    def _doubtful(self, texts: Sequence[str], ids: NDArray[Any], offsets: NDArray[np.int64]) -> list[int]:
        return [i for i, text in enumerate(texts) if self._spelled and self._spelled in text]


def _process_bytes() -> int:
    """Memory of this process, which may be a fork of the one that made the engine."""
    return int(psutil.Process().memory_info().rss)


def _is_nothing(normalizer: Any) -> bool:
    return normalizer is None or (normalizer.get("type") == "Sequence" and not normalizer.get("normalizers"))


def _is_byte_level(pre_tokenizer: Any) -> bool:
    """A sequence of patterns that ends in ByteLevel, or ByteLevel with its own pattern (GPT-2's)."""
    if pre_tokenizer is None:
        return False
    pieces = pre_tokenizer["pretokenizers"] if pre_tokenizer.get("type") == "Sequence" else [pre_tokenizer]
    if not pieces or any(piece.get("type") not in PRE_TOKENIZER_PIECES for piece in pieces):
        return False
    own_pattern = [piece.get("use_regex", True) for piece in pieces if piece["type"] == "ByteLevel"]
    has_split = any(piece["type"] == "Split" for piece in pieces)
    return pieces[-1]["type"] == "ByteLevel" and own_pattern == [not has_split]


def _merged(merge: Any) -> str:
    """The token that a merge makes; files write merges as "a b" or as ["a", "b"]."""
    return "".join(merge.split(" ", 1) if isinstance(merge, str) else merge)


def _joined(pieces: list[NDArray[Any]]) -> NDArray[np.int32]:
    """All ids in one array, without a copy where there is one piece; they are far below 2^31."""
    ids = pieces[0] if len(pieces) == 1 else np.concatenate(pieces or [np.empty(0, np.uint32)])
    return ids.view(np.int32)


def _suspicious_tokens(spec: dict[str, Any], unknown: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """For each id: does the token hold an unknown character, or end in what may be the start of one?

    All tokens at once, as vocabularies are large: each UTF-8 lead byte and what follows it in its token
    stand for a range of code points, of one if the character is whole.
    """
    vocabulary: dict[str, int] = spec["model"]["vocab"]
    added = {token["content"]: token["id"] for token in spec["added_tokens"]}
    suspicious = np.zeros(max([*vocabulary.values(), *added.values()]) + 1, np.bool_)
    data, owner = _bytes_of_tokens(vocabulary)
    starts = np.flatnonzero(data >= 0xC0)
    lead = data[starts]
    needed = 2 + (lead >= 0xE0) + (lead >= 0xF0)
    code, given = lead & (0x7F >> needed), np.ones_like(lead)
    for offset in (1, 2, 3):
        following = data[starts + offset]
        inside = (given == offset) & (offset < needed) & (owner[starts + offset] == owner[starts])
        inside &= (following & 0xC0) == 0x80
        code, given = np.where(inside, code << 6 | following & 0x3F, code), given + inside
    whole_or_cut = (given == needed) | (owner[starts + given] != owner[starts])
    unknown_before = np.concatenate(([0], np.cumsum(unknown)))
    first, last = (np.minimum(bound << 6 * (needed - given), unknown.size) for bound in (code, code + 1))
    found = whole_or_cut & (unknown_before[last] > unknown_before[first])
    suspicious[owner[starts[found]]] = True
    for token, token_id in added.items():
        suspicious[token_id] = contains_any(token, unknown)
    return suspicious


def _bytes_of_tokens(vocabulary: dict[str, int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The bytes of all tokens of a byte-level vocabulary, and the id of the token that each is of.

    What is not of the byte alphabet, in a control token, is 0. Four zeros, of no token, follow.
    """
    byte_of = np.zeros(1 << 9, np.int64)
    alphabet = _byte_alphabet()
    byte_of[list(map(ord, alphabet.values()))] = list(alphabet)
    codes = np.frombuffer("".join(vocabulary).encode("utf-32-le"), np.uint32)
    ids = np.fromiter(vocabulary.values(), np.int64, len(vocabulary))
    owner = np.repeat(ids, np.fromiter(map(len, vocabulary), np.int64, len(vocabulary)))
    end = np.zeros(4, np.int64)
    return np.concatenate((byte_of[np.minimum(codes, byte_of.size - 1)], end)), np.concatenate(
        (owner, end - 1)
    )


def _byte_alphabet() -> dict[int, str]:
    """The character that stands for each byte in byte-level vocabularies (GPT-2's `bytes_to_unicode`)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(rest)}


def _lines_stand_alone(spec: dict[str, Any]) -> bool:
    """Whether this tokenizer treats what is before and after a `LINE_START` as if it stood alone."""
    for token in spec["added_tokens"]:
        if token.get("lstrip") or token.get("rstrip") or token.get("single_word") or "\n" in token["content"]:
            return False
    first = spec["pre_tokenizer"]
    pieces = first["pretokenizers"] if first["type"] == "Sequence" else [first]
    if any(piece.get("add_prefix_space") for piece in pieces):
        return False  # each part would get a space of its own
    plain = {"added_tokens": [], "normalizer": None, "pre_tokenizer": first}
    model = {"type": "BPE", "vocab": {}, "merges": []}
    words = tokenizers.Tokenizer.from_str(orjson.dumps({**plain, "model": model}).decode()).pre_tokenizer
    for before in BEFORE_LINES:
        for after in AFTER_LINES:
            left, right = f"{before}\n", after
            apart = [word for word, _ in words.pre_tokenize_str(left) + words.pre_tokenize_str(right)]
            if [word for word, _ in words.pre_tokenize_str(left + right)] != apart:
                return False
    return True
