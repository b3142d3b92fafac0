"""Tokenizers behind one small interface: sentencepiece, Hugging Face `tokenizer.json`, and plugins.

All treat a document as text and nothing else. A literal such as `</s>`, `<|endoftext|>` or
`<｜end▁of▁sentence｜>` inside a web page must not become the control token of that name: the model
would see documents end where none did. The ids of control tokens stay known by name.
"""

import hashlib
import importlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
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
PLUGINS = "megads.tokenizers"  # the group of entry points


class Tokenizer(ABC):
    """Text to token ids and back.

    Every id is at least 0 and less than `vocab_size`; `eod_id` ends a document and is never the
    result of encoding text. `sha256` is of all that the ids depend on, the tokenizer's file as a rule:
    datasets record it. `engine` names the library at work, with its version.

    A tokenizer of your own derives from this, is made with (path, eod_token), both possibly None, calls
    `super().__init__(path, content)`, sets `vocab_size`, `eod_id` and `engine`, and implements
    `encode_batch` and `decode`; `docs/tokenizers.md` shows one. Its ids must depend on the text alone.
    """

    kind: str
    engine: str

    def __init__(self, path: Path | None, content: bytes) -> None:
        self.path = Path(type(self).__qualname__) if path is None else path
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.vocab_size = 0
        self.eod_id = -1

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without beginning- or end-of-document tokens."""

    def encode_batch_arrays(self, texts: Sequence[str]) -> tuple[NDArray[Any], NDArray[np.int32]]:
        """As `encode_batch`, as all ids in one array, in the element type that a dataset of this
        vocabulary has, and the number of ids of each text [len(texts)].

        Raises DataError when an id is not of the vocabulary, or ends a document.
        """
        encoded = self.encode_batch(texts)
        lengths = np.fromiter(map(len, encoded), np.int32, len(encoded))
        count = int(lengths.sum(dtype=np.int64))
        ids = np.fromiter((i for ids in encoded for i in ids), np.int64, count)
        wrong = (ids < 0) | (ids >= self.vocab_size) | (ids == self.eod_id)
        if wrong.any():
            raise DataError(
                f"{self.path}: a text was encoded to id {ids[wrong][0]}, which is "
                f"{'the end of a document' if ids[wrong][0] == self.eod_id else 'not in the vocabulary'}."
            )
        return ids.astype(token_type(self.vocab_size)), lengths

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; control tokens have none."""

    def control_id(self, token: str) -> int | None:
        """The id of a control token by its name; None when there is none of that name."""
        return None

    def use_exact_engine(self, texts: Sequence[str], where: str = "") -> str:
        """Settle which engine encodes from now on, by its ids on the first of `texts`; returns its name.

        Where there is a fast engine beside the reference and they differ, the reference is used, and a
        warning tells `where` and how. Call it with the first documents of every shard.
        """
        return self.engine


def load_tokenizer(path: str | Path, *, eod_token: str | None = None) -> Tokenizer:
    """Load a tokenizer; a directory stands for its `tokenizer.json` or `tokenizer.model`.

    `path` may also name a plugin: `package.module:Class`, or an entry point of the group
    `megads.tokenizers`; either with `@PATH` appended, which the plugin is given.
    `eod_token` names the end-of-document token; without it: sentencepiece's `eos`, or `eos_token` of
    a `tokenizer_config.json` beside `tokenizer.json`, or the first known name in the vocabulary.
    Raises DataError when the file is missing, is neither kind, or has no end-of-document token.
    """
    if (plugin := _find_plugin(path)) is not None:
        return _load_plugin(*plugin, eod_token)
    path, content = _read_tokenizer(Path(path))
    if content.lstrip()[:1] == b"{":
        from megads.data.tokenizer_huggingface import HuggingFaceTokenizer

        return HuggingFaceTokenizer(path, content, eod_token)
    from megads.data.tokenizer_sentencepiece import SentencePieceTokenizer

    return SentencePieceTokenizer(path, content, eod_token)


def tokenizer_sha256(path: str | Path) -> str:
    """The `sha256` that `load_tokenizer(path)` would have, without loading it unless it is a plugin."""
    if _find_plugin(path) is not None:
        return load_tokenizer(path).sha256
    return hashlib.sha256(_read_tokenizer(Path(path))[1]).hexdigest()


def no_eod_message(path: Path, eod_token: str | None) -> str:
    looked_for = repr(eod_token) if eod_token else "any of " + ", ".join(EOD_TOKENS)
    return (
        f"{path}: no end-of-document token: the vocabulary lacks {looked_for}. Name the right one "
        "(--eod-token)."
    )


def _read_tokenizer(path: Path) -> tuple[Path, bytes]:
    """The file that a path stands for, and what is in it."""
    file = _tokenizer_file(path)
    try:
        return file, file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: the tokenizer cannot be read: {error.strerror}.") from error


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


def _find_plugin(path: str | Path) -> tuple[str, str | None] | None:
    """("module:Class", what follows @) if `path` names a plugin and no file of that name exists."""
    if Path(path).exists():
        return None
    name, _, argument = str(path).partition("@")
    target = next((point.value for point in entry_points(group=PLUGINS, name=name)), name)
    module, colon, attribute = target.partition(":")
    if not colon or not all(part.isidentifier() for part in [*module.split("."), *attribute.split(".")]):
        return None
    return target, argument or None


def _load_plugin(target: str, argument: str | None, eod_token: str | None) -> Tokenizer:
    module, _, attribute = target.partition(":")
    found: Any
    try:
        found = importlib.import_module(module)
        for name in attribute.split("."):
            found = getattr(found, name)
    except (ImportError, AttributeError) as error:
        raise DataError(f"Tokenizer {target}: {error}. Is its package installed?") from error
    if not (isinstance(found, type) and issubclass(found, Tokenizer)):
        raise DataError(f"Tokenizer {target}: not a subclass of megads.data.tokenizer.Tokenizer.")
    tokenizer: Tokenizer = found(None if argument is None else Path(argument), eod_token)  # type: ignore[arg-type]
    if not 0 <= tokenizer.eod_id < tokenizer.vocab_size:
        raise DataError(
            f"Tokenizer {target}: the end-of-document id {tokenizer.eod_id} is not below its vocabulary "
            f"of {tokenizer.vocab_size:,}."
        )
    return tokenizer
