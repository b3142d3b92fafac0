"""Tokenizers behind one small interface: sentencepiece `.model` and Hugging Face `tokenizer.json`.

Both treat a document as text and nothing else. A literal such as `</s>`, `<|endoftext|>` or
`<｜end▁of▁sentence｜>` inside a web page must not become the control token of that name: the model
would see documents end where none did. Hugging Face tokenizers do turn such literals into control
ids, so their control tokens are not matched here; the ids stay known by name.
"""

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from megads.data.indexed import token_type
from megads.errors import DataError

# Names under which published tokenizers keep their end-of-document token, the likelier first.
EOD_TOKENS = (
    "<｜end▁of▁sentence｜>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|end_of_document|>",
    "</s>",
    "<eos>",
    "[EOS]",
)
CONTROL_SHAPE = re.compile(r"[<\[].+[>\]]", re.DOTALL)
SPACE_MARK = "▁"  # U+2581, what sentencepiece writes for a space


class Tokenizer(ABC):
    """Text to token ids and back.

    Every id is at least 0 and less than `vocab_size`; `eod_id` ends a document and is never the
    result of encoding text. `sha256` is of the tokenizer's file: datasets record it.
    """

    kind: str

    def __init__(self, path: Path, content: bytes) -> None:
        self.path = path
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.vocab_size = 0
        self.eod_id = -1

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without beginning- or end-of-document tokens."""

    def encode_batch_arrays(self, texts: Sequence[str]) -> tuple[NDArray[Any], NDArray[np.int32]]:
        """As `encode_batch`, as all ids in one array, in the element type that a dataset of this
        vocabulary has, and the number of ids of each text [len(texts)].
        """
        encoded = self.encode_batch(texts)
        lengths = np.fromiter(map(len, encoded), np.int32, len(encoded))
        flat = (i for ids in encoded for i in ids)
        return np.fromiter(flat, token_type(self.vocab_size), int(lengths.sum(dtype=np.int64))), lengths

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; control tokens have none."""


def load_tokenizer(path: str | Path, *, eod_token: str | None = None) -> Tokenizer:
    """Load a tokenizer; a directory stands for its `tokenizer.json` or `tokenizer.model`.

    `eod_token` names the end-of-document token; without it: sentencepiece's `eos`, or `eos_token` of
    a `tokenizer_config.json` beside `tokenizer.json`, or the first known name in the vocabulary.
    Raises DataError when the file is missing, is neither kind, or has no end-of-document token.
    """
    path = _tokenizer_file(Path(path))
    content = path.read_bytes()
    is_json = content.lstrip()[:1] == b"{"
    return (HuggingFaceTokenizer if is_json else SentencePieceTokenizer)(path, content, eod_token)


def tokenizer_sha256(path: str | Path) -> str:
    """The `sha256` that `load_tokenizer(path)` would have, without loading it."""
    with open(_tokenizer_file(Path(path)), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _tokenizer_file(path: Path) -> Path:
    if path.is_dir():
        for name in ("tokenizer.json", "tokenizer.model"):
            if (path / name).is_file():
                return path / name
        raise DataError(f"{path}: the directory holds neither tokenizer.json nor tokenizer.model.")
    if not path.is_file():
        raise DataError(
            f"{path}: no such tokenizer. Train one with tools/train_tokenizer.py or give another path."
        )
    return path


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model (arXiv:1808.06226), BPE or unigram.

    sentencepiece writes a space as U+2581 and so cannot tell a U+2581 in the text from a space. Models
    that can spell any byte and add no space of their own (`train_sentencepiece` makes such) get it
    spelled in bytes here, which makes `decode(encode(text)) == text` hold for every text.
    """

    kind = "sentencepiece"

    def __init__(self, path: Path, content: bytes, eod_token: str | None) -> None:
        import sentencepiece

        super().__init__(path, content)
        try:
            if not content:
                raise RuntimeError("the file is empty")
            self._model = sentencepiece.SentencePieceProcessor(model_proto=content)
            self.vocab_size = self._model.get_piece_size()
        except RuntimeError as error:
            raise DataError(
                f"{path}: neither a sentencepiece model nor a tokenizer.json ({error})."
            ) from error
        self.eod_id = self._find_eod(eod_token)
        mark_ids = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        adds_no_space = self._model.encode("a", out_type=str) == ["a"]
        self._mark_ids = mark_ids if adds_no_space and all(map(self._model.is_byte, mark_ids)) else None

    def _find_eod(self, eod_token: str | None) -> int:
        if eod_token is None and self._model.eos_id() >= 0:
            return int(self._model.eos_id())
        for token in EOD_TOKENS if eod_token is None else (eod_token,):
            token_id = self._model.piece_to_id(token)
            if self._model.is_control(token_id) and self._model.id_to_piece(token_id) == token:
                return int(token_id)
        raise DataError(_no_eod(self.path, eod_token))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encoded: list[list[int]] = self._model.encode(list(texts), num_threads=1)
        if self._mark_ids is not None:
            for i, text in enumerate(texts):
                if SPACE_MARK in text:
                    encoded[i] = self._encode_around_marks(text, self._mark_ids)
        return encoded

    def _encode_around_marks(self, text: str, mark_ids: list[int]) -> list[int]:
        first, *rest = self._model.encode(text.split(SPACE_MARK), num_threads=1)
        ids: list[int] = list(first)
        for part in rest:
            ids += mark_ids
            ids += part
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._model.decode([int(i) for i in ids]))


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json` of the `tokenizers` library, that does not match control tokens.

    Control tokens are the added tokens marked special, and those that look like one (`<...>`, `[...]`):
    DeepSeek's `<｜User｜>` is not marked. They keep their place in the file, since the library numbers
    added tokens anew when one is taken out. Other added tokens, such as runs of spaces in GPT-NeoX's
    vocabulary, are text and stay. Truncation and padding set in the file are switched off, as is the
    post-processor, which would add tokens of its own.
    """

    kind = "huggingface"

    def __init__(self, path: Path, content: bytes, eod_token: str | None) -> None:
        import tokenizers

        super().__init__(path, content)
        try:
            spec: dict[str, Any] = orjson.loads(content)
            added = {str(token["content"]): token for token in spec.get("added_tokens") or ()}
            control = [
                text for text, token in added.items() if token.get("special") or CONTROL_SHAPE.fullmatch(text)
            ]
            for text in control:
                added[text]["special"] = True
            spec["post_processor"] = spec["truncation"] = spec["padding"] = None
            self._model = tokenizers.Tokenizer.from_str(orjson.dumps(spec).decode())
            self._model.encode_special_tokens = True  # special tokens in a text are text
            vocabulary = self._model.get_vocab(with_added_tokens=True)
        except Exception as error:  # the library raises bare Exception
            raise DataError(
                f"{path}: not a tokenizer.json that the tokenizers library reads ({error})."
            ) from error
        if not vocabulary:
            raise DataError(f"{path}: the vocabulary is empty.")
        self.vocab_size = max(vocabulary.values()) + 1
        self.eod_id = self._find_eod(eod_token or _configured_eod(path), vocabulary)
        names = {text for text, token_id in vocabulary.items() if text in control or token_id == self.eod_id}
        self._control_ids = {vocabulary[text] for text in names}
        self._control = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))

    def _find_eod(self, eod_token: str | None, vocabulary: dict[str, int]) -> int:
        for token in EOD_TOKENS if eod_token is None else (eod_token,):
            if token in vocabulary:
                return vocabulary[token]
        raise DataError(_no_eod(self.path, eod_token))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encoded = [list(e.ids) for e in self._model.encode_batch_fast(list(texts), add_special_tokens=False)]
        for i, text in enumerate(texts):
            if not self._control_ids.isdisjoint(encoded[i]) and self._control.search(text):
                encoded[i] = self._encode_in_parts(text)
        return encoded

    def _encode_in_parts(self, text: str) -> list[int]:
        """Cut control literals after their first character, for models that hold them as plain pieces."""
        parts, start = [], 0
        for literal in self._control.finditer(text):
            parts.append(text[start : literal.start() + 1])
            start = literal.start() + 1
        parts.append(text[start:])
        return [i for e in self._model.encode_batch_fast(parts, add_special_tokens=False) for i in e.ids]

    def decode(self, ids: Sequence[int]) -> str:
        text = [int(i) for i in ids if int(i) not in self._control_ids]
        return str(self._model.decode(text, skip_special_tokens=False))


def _configured_eod(path: Path) -> str | None:
    """`eos_token` of the `tokenizer_config.json` beside a `tokenizer.json`, if there is one."""
    beside = path.with_name("tokenizer_config.json")
    if not beside.is_file():
        return None
    try:
        token = orjson.loads(beside.read_bytes()).get("eos_token")
    except (orjson.JSONDecodeError, AttributeError) as error:
        raise DataError(f"{beside}: not a JSON object ({error}).") from error
    name = token.get("content") if isinstance(token, dict) else token
    return name if isinstance(name, str) else None


def _no_eod(path: Path, eod_token: str | None) -> str:
    looked_for = repr(eod_token) if eod_token else "any of " + ", ".join(EOD_TOKENS)
    return (
        f"{path}: no end-of-document token: the vocabulary lacks {looked_for}. Name the right one "
        "(--eod-token)."
    )
