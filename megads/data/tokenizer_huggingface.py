"""Hugging Face `tokenizer.json` files: the `tokenizers` library as reference, gigatoken for speed."""

import logging
import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from megads.data.indexed import token_type
from megads.data.token_engines import GigatokenEngine, why_not_gigatoken
from megads.data.tokenizer import EOD_TOKENS, Tokenizer, no_eod_message
from megads.errors import DataError

logger = logging.getLogger(__name__)

CONTROL_SHAPE = re.compile(r"[<\[].+[>\]]", re.DOTALL)
# How much of a shard is compared before the fast engine is trusted with it: the starts of many documents
# show more than one whole one, and the reference needs 0.1 s for them.
COMPARED_TEXTS = 64
COMPARED_CHARACTERS = 1024
# Compared when a tokenizer is loaded: what patterns, normalizers and added tokens stumble over.
PROBES = (
    *(
        "",
        " ",
        "  leading, trailing  ",
        "\n\n\t mixed \r\n \u00a0s\u2003 x",
        "a\r\r\nb \n c",
        "...!!!???\n\n",
    ),
    *("don't WE'LL they're 'S", "ALLCAPSWord camelCaseWord", "_foo __bar__ $x^2$", "'a\"b`c (d) [e]"),
    *(
        "12345 3.14e-10",
        "１２３ Ⅷ ½ ٣",
        "def f(x):\n    return  x",
        "\x00\x01\x7f\ufeff",
        "x\u0085y\u2028z\u3000w",
    ),
    *("日本語 العربية हिन्दी", "한국어 ไทย ﬁ ß İ", "🎉👩‍👩‍👧 e\u0301", "A\u0300\u0301\u0334b", "▁a▁▁b ▁"),
    " " * 30 + "x" + "\t" * 9 + "y" + "\n" * 9,
)


class HuggingFaceTokenizer(Tokenizer):
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
            if "dropout" in spec["model"]:
                spec["model"]["dropout"] = None
            self._model = tokenizers.Tokenizer.from_str(orjson.dumps(spec).decode())
            self._model.encode_special_tokens = True  # special tokens in a text are text
            self._vocabulary = self._model.get_vocab(with_added_tokens=True)
        except Exception as error:  # the library raises bare Exception
            raise DataError(
                f"{path}: not a tokenizer.json that the tokenizers library reads ({error})."
            ) from error
        if not self._vocabulary:
            raise DataError(f"{path}: the vocabulary is empty.")
        self.vocab_size = max(self._vocabulary.values()) + 1
        self.eod_id = self._find_eod(eod_token or _configured_eod(path))
        names = {text for text in control if text in self._vocabulary}
        names |= {text for text, token_id in self._vocabulary.items() if token_id == self.eod_id}
        self._control_ids = {self._vocabulary[text] for text in names}
        self._control = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))
        self._reference_name = f"tokenizers {version('tokenizers')}"
        self._fast = self._load_fast(spec, names) if fast else None
        self._use_fast = self._fast is not None

    @property
    def engine(self) -> str:  # type: ignore[override]
        return self._fast.name if self._fast is not None and self._use_fast else self._reference_name

    def _find_eod(self, eod_token: str | None) -> int:
        for token in EOD_TOKENS if eod_token is None else (eod_token,):
            if token in self._vocabulary:
                return self._vocabulary[token]
        raise DataError(no_eod_message(self.path, eod_token))

    def control_id(self, token: str) -> int | None:
        token_id = self._vocabulary.get(token)
        return token_id if token_id in self._control_ids else None

    def _load_fast(self, spec: dict[str, Any], control: set[str]) -> GigatokenEngine | None:
        """The fast engine, if it does what the file asks and gives the same ids for all probes."""
        kept = [token for token in spec.get("added_tokens") or () if token["content"] not in control]
        if (reason := why_not_gigatoken(spec, sorted(control))) is not None:
            logger.info("%s: encoded by %s, since %s.", self.path, self._reference_name, reason)
            return None
        spec["added_tokens"] = kept
        try:
            engine = GigatokenEngine(spec, token_type(self.vocab_size))
        except (ImportError, RuntimeError) as error:
            reason = str(error).partition("\n")[0]
            logger.warning(
                "%s: encoded by %s, tens of times slower than gigatoken, which does not load: %s",
                self.path, self._reference_name, reason,
            )  # fmt: skip
            return None
        literals = [f"a{token['content']}b {token['content']} " for token in kept]
        difference = self._difference(engine, [*PROBES, *literals])
        if difference is None:
            return engine
        logger.warning("%s: encoded by %s: %s", self.path, self._reference_name, difference)
        return None

    def use_exact_engine(self, texts: Sequence[str], where: str = "") -> str:
        if self._fast is not None:
            starts = [text[:COMPARED_CHARACTERS] for text in texts[:COMPARED_TEXTS]]
            difference = self._difference(self._fast, starts)
            self._use_fast = difference is None
            if difference is not None:
                logger.warning(
                    "%s: encoded by %s, tens of times slower: %s", where, self._reference_name, difference
                )
        return self.engine

    def _difference(self, engine: GigatokenEngine, texts: Sequence[str]) -> str | None:
        """The first difference between the ids of the engine and of the reference, in words."""
        ids, lengths = self._encode_fast(engine, texts)
        ends = np.cumsum(lengths, dtype=np.int64)
        for number, (expected, end) in enumerate(zip(self._encode_reference(texts), ends, strict=True), 1):
            found = ids[end - lengths[number - 1] : end].tolist()
            if found != expected:
                pairs = enumerate(zip(found, expected, strict=False))
                first = next((i for i, (a, b) in pairs if a != b), min(len(found), len(expected)))
                return (
                    f"in document {number}, from token {first}, {engine.name} has ids "
                    f"{found[first : first + 4]}, {self._reference_name} {expected[first : first + 4]} "
                    f"(after {self.decode(expected[max(0, first - 8) : first])!r})."
                )
        return None

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        if self._fast is None or not self._use_fast:
            return self._encode_reference(texts)
        ids, lengths = self._encode_fast(self._fast, texts)
        ends = np.cumsum(lengths, dtype=np.int64).tolist()
        return [ids[start:end].tolist() for start, end in zip([0, *ends], ends, strict=False)]

    def encode_batch_arrays(self, texts: Sequence[str]) -> tuple[NDArray[Any], NDArray[np.int32]]:
        if self._fast is None or not self._use_fast:
            return super().encode_batch_arrays(texts)
        return self._encode_fast(self._fast, texts)

    def _encode_fast(
        self, engine: GigatokenEngine, texts: Sequence[str]
    ) -> tuple[NDArray[Any], NDArray[np.int32]]:
        ids, lengths, doubtful = engine.encode(texts)
        if doubtful:
            pieces = np.split(ids, np.cumsum(lengths, dtype=np.int64)[:-1])
            exact = self._encode_reference([texts[i] for i in doubtful])
            for i, exact_ids in zip(doubtful, exact, strict=True):
                pieces[i] = np.asarray(exact_ids, dtype=ids.dtype)
                lengths[i] = len(exact_ids)
            ids = np.concatenate(pieces)
        return ids, lengths

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
