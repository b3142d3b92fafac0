"""The fast engine: gigatoken, used where its ids are the reference's.

gigatoken (https://github.com/marcelroed/gigatoken) splits text by hand-written state machines and
remembers every word it has met, which makes it 50 times as fast as the `tokenizers` library and 7 times
as fast as sentencepiece, the references. What it takes to get the very same ids:

- It accepts settings that it then ignores. `why_not_gigatoken` lets through only those that it has.
- Its Unicode tables are newer than those of `tokenizers`, so characters of the last few years are letters
  to one and unassigned to the other. Texts with such characters are reported, to be encoded by the
  reference (see `unicode_gaps`).
- Its memory of words has no bound. The engine is made anew when it has grown by `CACHE_BYTES`, and long
  texts are handed over in parts, cut where the tokenizer cuts anyway.

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

from megads.data.unicode_gaps import contains_any, unknown_characters

# The process may grow by this much before the engine is made anew. 200 MB of prose, code and tables make it
# grow by 80 MB; words that never repeat fill a table that doubles at 134 MB, which this stays below.
CACHE_BYTES = 112 << 20
# Making the engine anew costs 0.3 to 0.6 s: not more often than this, whatever else the process allocates.
RENEWAL_TEXT_CHARACTERS = 8 << 20
# Longer texts are handed over in parts, between which the growth is looked at.
PART_CHARACTERS = 4 << 20
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
    merged = {_merged(merge) for merge in model.get("merges") or ()}
    alphabet = _byte_alphabet()
    for token in control:
        if "".join(alphabet[byte] for byte in token.encode()) in merged:
            return f"merges lead to the control token {token!r}"
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
        self._process = psutil.Process()
        self._renew()

    def encode(self, texts: Sequence[str]) -> tuple[NDArray[Any], NDArray[np.int32], list[int]]:
        """All ids in one array, the number of ids of each text, and which texts need the reference.

        The ids of those texts may be wrong.
        """
        parts: list[str] = []
        parts_of_text = [0]
        for text in texts:
            parts += self._parts(text)
            parts_of_text.append(len(parts))
        if len(parts) == len(texts):  # no text was cut
            ids, offsets = self._encode_parts(parts)
        else:
            pieces = [self._encode_parts([part])[0] for part in parts]
            ids = np.concatenate(pieces)
            offsets = np.cumsum([0, *(piece.size for piece in pieces)])[parts_of_text]
        return ids, np.diff(offsets).astype(np.int32), self._doubtful(texts, ids, offsets)

    def _encode_parts(self, parts: list[str]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """All ids, and where in them each part starts, and ends [len(parts) + 1]."""
        layout = self._model.encode_batch(parts, parallel=False).layout
        offsets = np.asarray(layout.offsets.data)
        ids = np.asarray(layout.content.data)[offsets[0] : offsets[-1]]
        ids = ids.view(np.int32) if self.dtype == np.int32 else ids.astype(self.dtype)
        self._bound_memory(sum(map(len, parts)))
        return ids, offsets - offsets[0]

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
        self._start_bytes = self._process.memory_info().rss

    def _bound_memory(self, characters: int) -> None:
        self._characters += characters
        if (
            self._characters > RENEWAL_TEXT_CHARACTERS
            and self._process.memory_info().rss - self._start_bytes > CACHE_BYTES
        ):
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

    def _doubtful(self, texts: Sequence[str], ids: NDArray[Any], offsets: NDArray[np.int64]) -> list[int]:
        """Texts with characters unknown to the reference.

        Without a normalizer such a character is in one token, or begins at the end of one, which a look at
        the ids tells faster than one at the text.
        """
        candidates = [i for i, text in enumerate(texts) if not text.isascii()]
        if self._suspicious is not None and candidates:
            hits = np.flatnonzero(self._suspicious.take(ids))
            hit_texts = set((np.searchsorted(offsets, hits, side="right") - 1).tolist())
            candidates = [i for i in candidates if i in hit_texts]
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


def _suspicious_tokens(spec: dict[str, Any], unknown: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """For each id: does the token hold an unknown character, or end in what may be the start of one?"""
    alphabet = _byte_alphabet()
    byte_of = str.maketrans({character: chr(byte) for byte, character in alphabet.items()})
    # Most tokens are of ASCII bytes alone: a pattern tells them apart in a fraction of the time.
    beyond_ascii = re.compile("[" + "".join(alphabet[byte] for byte in range(0x80, 0x100)) + "]").search
    flags = unknown.tobytes()
    vocabulary: dict[str, int] = spec["model"]["vocab"]
    added = {token["content"]: token["id"] for token in spec["added_tokens"]}
    suspicious = np.zeros(max([*vocabulary.values(), *added.values()]) + 1, np.bool_)
    for token, token_id in vocabulary.items():
        if beyond_ascii(token) is None:
            continue
        try:
            data = token.translate(byte_of).encode("latin-1")
        except UnicodeEncodeError:  # not of the byte alphabet: a control token, which no merge leads to
            continue
        text = data.decode(errors="ignore")
        in_full = not text.isascii() and any(flags[ord(character)] for character in text)
        suspicious[token_id] = in_full or 1 in flags[_started_character(data)]
    for token, token_id in added.items():
        suspicious[token_id] = contains_any(token, unknown)
    return suspicious


def _started_character(data: bytes) -> slice:
    """The code points of the UTF-8 character that starts, but does not end, at the end of `data`."""
    for given in range(1, min(4, len(data) + 1)):
        lead = data[-given]
        if lead < 0x80:
            break
        if lead >= 0xC0:
            needed = 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
            code = lead & (0xFF >> (needed + 1))
            for byte in data[len(data) - given + 1 :]:
                code = code << 6 | byte & 0x3F
            width = 1 << 6 * max(0, needed - given)
            return slice(code * width, (code + 1) * width) if given < needed else slice(0)
    return slice(0)


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
