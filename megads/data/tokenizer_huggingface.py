"""Hugging Face `tokenizer.json` files: the `tokenizers` library as reference, gigatoken for speed."""

import logging
import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import orjson

from megads.data.indexed import token_type
from megads.data.token_engines import ByteLevelEngine, GigatokenEngine, why_not_gigatoken
from megads.data.tokenizer import EOD_TOKENS, no_eod_message
from megads.data.tokenizer_two_engines import TwoEngineTokenizer
from megads.errors import DataError

logger = logging.getLogger(__name__)

CONTROL_SHAPE = re.compile(r"[<\[].+[>\]]", re.DOTALL)


class HuggingFaceTokenizer(TwoEngineTokenizer):
    """A `tokenizer.json` of the `tokenizers` library, that does not match control tokens.

    Control tokens are the added tokens marked special, and those that look like one (`<...>`, `[...]`):
    DeepSeek's `<｜User｜>` is not marked. They keep their place in the file, since the library numbers
    added tokens anew when one is taken out. Other added tokens, such as runs of spaces in GPT-NeoX's
    vocabulary, are text and stay. Truncation and padding set in the file are switched off, as are
    dropout and the post-processor, which would add tokens of its own.
    """

    kind = "huggingface"

    def __init__(self, path: Path, content: bytes, eod_token: str | None, *, fast: bool = True) -> None:
        import tokenizers

        super().__init__(path, content, f"tokenizers {version('tokenizers')}", fast=fast)
        try:
            spec, control = _text_only(content)
            self._model = tokenizers.Tokenizer.from_str(orjson.dumps(spec).decode())
            self._model.encode_special_tokens = True  # special tokens in a text are text
            self._vocabulary = self._all_tokens(spec)
        except Exception as error:  # the library raises bare Exception
            raise DataError(
                f"{path}: not a tokenizer.json that the tokenizers library reads ({error})."
            ) from error
        if not self._vocabulary:
            raise DataError(f"{path}: the vocabulary is empty.")
        self._source = spec if fast else None  # to parse it again would take 0.1 s
        self.vocab_size = max(self._vocabulary.values()) + 1
        self.eod_id = self._find_eod(eod_token or _configured_eod(path))
        names = {text for text in control if text in self._vocabulary}
        names |= {text for text, token_id in self._vocabulary.items() if token_id == self.eod_id}
        self._control_ids = {self._vocabulary[text] for text in names}
        self._control = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))

    def _all_tokens(self, spec: dict[str, Any]) -> dict[str, int]:
        """The ids of all tokens. Those of added tokens are the library's, which may not be the file's."""
        vocabulary = spec["model"]["vocab"]
        if not isinstance(vocabulary, dict):  # a unigram's has scores
            return self._model.get_vocab(with_added_tokens=True)
        # get_vocab would take 0.1 s to make a copy of what was just read.
        names = [token["content"] for token in spec.get("added_tokens") or ()]
        return vocabulary | {name: self._model.token_to_id(name) for name in names}

    def _find_eod(self, eod_token: str | None) -> int:
        for token in EOD_TOKENS if eod_token is None else (eod_token,):
            if token in self._vocabulary:
                return self._vocabulary[token]
        raise DataError(no_eod_message(self.path, eod_token))

    def control_id(self, token: str) -> int | None:
        token_id = self._vocabulary.get(token)
        return token_id if token_id in self._control_ids else None

    def _make_fast(self, spec: dict[str, Any]) -> GigatokenEngine | None:
        control = {text for text, token_id in self._vocabulary.items() if token_id in self._control_ids}
        spec["added_tokens"] = [t for t in spec.get("added_tokens") or () if t["content"] not in control]
        if (reason := why_not_gigatoken(spec, sorted(control))) is not None:
            logger.info("%s: encoded by %s, since %s.", self.path, self.reference, reason)
            return None
        literals = [f"a{token['content']}b {token['content']} " for token in spec["added_tokens"]]
        return self._checked(lambda: ByteLevelEngine(spec, token_type(self.vocab_size)), literals)

    def _encode_reference(self, texts: Sequence[str]) -> list[list[int]]:
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


def _text_only(content: bytes) -> tuple[dict[str, Any], list[str]]:
    """A tokenizer.json that does nothing but encode text, and the names of its control tokens."""
    spec: dict[str, Any] = orjson.loads(content)
    added = {str(token["content"]): token for token in spec.get("added_tokens") or ()}
    control = [text for text, token in added.items() if token.get("special") or CONTROL_SHAPE.fullmatch(text)]
    for text in control:
        added[text]["special"] = True
    spec["post_processor"] = spec["truncation"] = spec["padding"] = None
    if "dropout" in spec["model"]:
        spec["model"]["dropout"] = None
    return spec, control


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
