"""Which documents of a shard go into the dataset, and what became of all the others.

Every line that is not blank is counted once: as a document that is kept, as one that was dropped on
purpose, or as a line that is quarantined because it holds no document. Nothing else can become of it.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import orjson

from megads.data.documents import Defect, LineBatch, Record, parse_records
from megads.data.recipe import Recipe
from megads.data.removals import Removal
from megads.errors import DataError

if TYPE_CHECKING:
    from megads.data.chat_template import Piece

LISTED_DEFECTS = 1000
MAX_SCORE = float(np.finfo(np.float32).max)


class Document(NamedTuple):
    """A document as it is tokenized; a conversation in `pieces`. `key` is empty where nothing is chosen by
    chance."""

    line: int
    text: str
    key: bytes
    score: float
    pieces: "tuple[Piece, ...]" = ()


class Selection:
    """Picks the documents of one shard, in order, and keeps the books.

    `removals` are by line: those of several cleaning runs act together, and a whole document that one
    of them drops is dropped. Reasons of drops: `filtered:FIELD`, `empty_text`, and those of the
    removals. Characters that removals cut are counted in `cut_characters`.
    """

    def __init__(self, recipe: Recipe, removals: Mapping[int, Sequence[Removal]]) -> None:
        self.recipe = recipe
        self.removals = removals
        self.lines_with_records = 0
        self.quarantined: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        self.cut: Counter[str] = Counter()
        self.cut_characters = 0
        self.first_defects: list[Defect] = []
        self._keep = [(field, frozenset(values)) for field, values in recipe.keep]
        self._parse = _parser(recipe)

    def documents(self, batch: LineBatch) -> list[Document]:
        """The documents of a batch that are kept.

        Raises DataError, with file and line, at the first defect unless the recipe is tolerant.
        """
        chosen = []
        for found in self._parse(batch):
            self.lines_with_records += 1
            outcome = found if isinstance(found, Defect) else self._choose(batch.path, found)
            if isinstance(outcome, Document):
                chosen.append(outcome)
            elif isinstance(outcome, Defect):
                self._quarantine(batch.path, outcome)
            else:
                self.dropped[outcome] += 1
        return chosen

    def check_quota(self, path: str) -> None:
        """Raise DataError if more of the shard is quarantined than the quota allows."""
        quota, bad = self.recipe.quarantine_quota, self.quarantined.total()
        if quota is not None and bad > quota * self.lines_with_records:
            first = self.first_defects[0]
            raise DataError(
                f"{path}: {bad:,} of {self.lines_with_records:,} lines hold no document "
                f"({describe(self.quarantined)}), more than the quota of {quota:g}. The first is line "
                f"{first.line}: {first.detail} Mend the file, or raise --quarantine-quota."
            )

    def quarantine_list(self) -> bytes:
        """The first LISTED_DEFECTS quarantined lines as JSON lines, for people."""
        return b"".join(orjson.dumps(defect._asdict()) + b"\n" for defect in self.first_defects)

    def _choose(self, path: str, record: Record) -> Document | Defect | str:
        """The document, what is wrong with it, or the reason why it is dropped."""
        for field, values in self._keep:
            if values.isdisjoint(_as_words(record.fields.get(field))):
                return f"filtered:{field}"
        text = record.text
        for removal in self.removals.get(record.line, ()):
            if removal.spans is None:
                return removal.reason
        if record.line in self.removals:
            text = self._cut(path, record)
        if not text:
            return "empty_text"
        score = 0.0
        if self.recipe.score_field:
            value = record.fields.get(self.recipe.score_field)
            if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= MAX_SCORE:
                what = f"field {self.recipe.score_field!r} must be a number that float32 can hold"
                return Defect(record.line, "bad_score", f"{what}, found {str(value)[:40]!r}.")
            score = float(value)
        # The key is of the record as it came: cleaning does not change what chance does to it.
        key = record.key if self.recipe.needs_keys else b""
        return Document(record.line, text, key, score, record.pieces)

    def _cut(self, path: str, record: Record) -> str:
        removals = self.removals[record.line]
        spans: list[tuple[int, int]] = []
        for start, end in sorted(span for removal in removals for span in removal.spans or ()):
            if spans and start <= spans[-1][1]:
                spans[-1] = (spans[-1][0], max(end, spans[-1][1]))
            else:
                spans.append((start, end))
        try:
            text = Removal("", tuple(spans)).cut(record.text)
        except ValueError as error:
            raise DataError(
                f"{path}, line {record.line}: the removals do not fit the text: {error}. "
                "Clean with the same text field."
            ) from error
        self.cut.update(removal.reason for removal in removals)
        self.cut_characters += len(record.text) - len(text)
        return text

    def _quarantine(self, path: str, defect: Defect) -> None:
        if not self.recipe.tolerant:
            raise DataError(f"{path}, line {defect.line}: {defect.detail}")
        self.quarantined[defect.reason] += 1
        if len(self.first_defects) < LISTED_DEFECTS:
            self.first_defects.append(defect)


def _parser(recipe: Recipe) -> Callable[[LineBatch], Iterator[Record | Defect]]:
    """What makes records of lines."""
    if recipe.chat is not None:
        from megads.data.instructions import ConversationParser

        return ConversationParser(recipe.chat, recipe.fields).parse
    return partial(parse_records, text_field=recipe.text_field, fields=recipe.fields)


def describe(counts: Mapping[str, int]) -> str:
    """Counts by reason for people: "bad_json 2, no_text 1"."""
    return ", ".join(f"{reason} {count:,}" for reason, count in sorted(counts.items()))


def _as_words(value: Any) -> list[str]:
    """What the value of a field can equal: itself, as JSON writes it, or each item of a list."""
    values = value if isinstance(value, list) else [value]
    return [str(v).lower() if isinstance(v, bool) else str(v) for v in values if v is not None]
