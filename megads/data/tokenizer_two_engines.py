"""A tokenizer with a fast engine beside the reference, which is used only where both give the same ids."""

import logging
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megads.data.token_engines import GigatokenEngine
from megads.data.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

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


class TwoEngineTokenizer(Tokenizer):
    """Encodes by the reference, named `reference`, or by the fast engine, which is made when first needed.

    Training only asks a tokenizer for its ids of control tokens, and shall not pay for an engine.
    """

    def __init__(self, path: Path, content: bytes, reference: str, *, fast: bool) -> None:
        super().__init__(path, content)
        self.reference = reference
        self._source: Any = content if fast else None  # what the fast engine is made from, until it is made
        self._use_fast = fast

    @property
    def engine(self) -> str:  # type: ignore[override]
        return self._fast.name if self._use_fast and self._fast is not None else self.reference

    @abstractmethod
    def _encode_reference(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text by the reference."""

    @abstractmethod
    def _make_fast(self, source: Any) -> GigatokenEngine | None:
        """The fast engine from `_source`, by `_checked`; None where it will not do."""

    @cached_property
    def _fast(self) -> GigatokenEngine | None:
        source, self._source = self._source, None
        return None if source is None else self._make_fast(source)

    def _checked(
        self, make: Callable[[], GigatokenEngine], probes: Sequence[str] = ()
    ) -> GigatokenEngine | None:
        """The engine that `make` makes, if it loads and gives the reference's ids for all probes."""
        try:
            engine = make()
        except (ImportError, RuntimeError) as error:
            reason: str | None = "gigatoken does not load: " + str(error).partition("\n")[0]
        else:
            reason = self._difference(engine, [*PROBES, *probes])
            if reason is None:
                return engine
        logger.warning("%s: encoded by %s, several times slower: %s", self.path, self.reference, reason)
        return None

    def use_exact_engine(self, texts: Sequence[str], where: str = "") -> str:
        if self._fast is not None:
            starts = [text[:COMPARED_CHARACTERS] for text in texts[:COMPARED_TEXTS]]
            difference = self._difference(self._fast, starts)
            self._use_fast = difference is None
            if difference is not None:
                logger.warning(
                    "%s: encoded by %s, several times slower: %s", where, self.reference, difference
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
                    f"{found[first : first + 4]}, {self.reference} {expected[first : first + 4]} "
                    f"(after {self.decode(expected[max(0, first - 8) : first])!r})."
                )
        return None

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        if not self._use_fast or self._fast is None:
            return self._encode_reference(texts)
        ids, lengths = self._encode_fast(self._fast, texts)
        ends = np.cumsum(lengths, dtype=np.int64).tolist()
        return [ids[start:end].tolist() for start, end in zip([0, *ends], ends, strict=False)]

    def encode_batch_arrays(self, texts: Sequence[str]) -> tuple[NDArray[Any], NDArray[np.int32]]:
        if not self._use_fast or self._fast is None:
            return super().encode_batch_arrays(texts)
        return self._encode_fast(self._fast, texts)

    def _encode_fast(
        self, engine: GigatokenEngine, texts: Sequence[str]
    ) -> tuple[NDArray[Any], NDArray[np.int32]]:
        ids, lengths, doubtful = engine.encode(texts)
        if doubtful:
            pieces = np.split(ids, np.cumsum(lengths, dtype=np.int64)[:-1])
            for i in doubtful:
                pieces[i] = engine.by_reference(texts[i], self._reference_ids).astype(ids.dtype, copy=False)
                lengths[i] = pieces[i].size
            ids = np.concatenate(pieces)
        return ids, lengths

    def _reference_ids(self, text: str) -> NDArray[np.int64]:
        return np.asarray(self._encode_reference([text])[0], np.int64)
