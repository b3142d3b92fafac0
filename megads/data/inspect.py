"""What a model will read, for people: documents and samples as text, boundaries marked, with their source.

A sample here is a run of tokens of the datasets as they are stored, documents one after the other;
training cuts the same stream after it shuffled the documents. Pieces that only together make a
character are shown as U+FFFD where a boundary runs through them.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megads.data.fim import TOKEN_NAMES
from megads.data.stored import SourceText, StoredDataset
from megads.data.tokenizer import Tokenizer
from megads.errors import DataError

END = "end of document"
ANSWER, ANSWER_END = "answer", "end of answer"
FIM_PARTS = ("fim begin", "fim hole", "fim end")
CONTEXT_CHARACTERS = 60


@dataclass(frozen=True)
class Piece:
    """A stretch of text, or (then it has no text) a control token by name."""

    text: str = ""
    mark: str | None = None


@dataclass(frozen=True)
class Place:
    """Where a document is: the dataset, its number there (from 0), and its number in all of them."""

    dataset: StoredDataset
    number: int
    overall: int


@dataclass(frozen=True)
class Match:
    """A text found in a document, with what is around it."""

    place: Place
    before: str
    found: str
    after: str


class Collection:
    """Datasets one after the other, their documents and tokens numbered through."""

    def __init__(self, prefixes: Sequence[str], tokenizer: Tokenizer) -> None:
        self.datasets = [dataset for dataset in map(StoredDataset, prefixes) if len(dataset)]
        self.tokenizer = tokenizer
        for dataset in self.datasets:
            recorded = dataset.record and dataset.record["tokenizer"]["sha256"]
            if recorded and recorded != tokenizer.sha256:
                raise DataError(
                    f"{dataset.prefix}: made with another tokenizer (sha256 {recorded[:12]}…) than "
                    f"{tokenizer.path} ({tokenizer.sha256[:12]}…)."
                )
        self._first_documents = [0, *np.cumsum([len(d) for d in self.datasets], dtype=np.int64).tolist()]
        self._first_tokens = [0, *np.cumsum([d.tokens.size for d in self.datasets], dtype=np.int64).tolist()]
        self._fim = _fim_ids(tokenizer)

    @property
    def documents(self) -> int:
        return self._first_documents[-1]

    @property
    def tokens(self) -> int:
        return self._first_tokens[-1]

    def place(self, document: int) -> Place:
        """Where a document is; DataError for one that is not there."""
        if not 0 <= document < self.documents:
            raise DataError(f"There is no document {document:,}: there are {self.documents:,}, from 0.")
        number = bisect_right(self._first_documents, document) - 1
        return Place(self.datasets[number], document - self._first_documents[number], document)

    def pieces(self, ids: NDArray[Any]) -> Iterator[Piece]:
        """Token ids as text, with marks at the ends of documents and the parts of FIM."""
        marks = {**self._fim, self.tokenizer.eod_id: END}
        start = 0
        for place in np.flatnonzero(np.isin(ids, list(marks))).tolist():
            if place > start:
                yield Piece(self.tokenizer.decode(ids[start:place].tolist()))
            yield Piece(mark=marks[int(ids[place])])
            start = place + 1
        if start < ids.size:
            yield Piece(self.tokenizer.decode(ids[start:].tolist()))

    def document_pieces(self, place: Place) -> Iterator[Piece]:
        """A document as text; of a conversation the answers, which alone are learned, between marks."""
        ids = place.dataset.document(place.number)
        if not place.dataset.holds_conversations:
            yield from self.pieces(ids)
            return
        begin = int(place.dataset.starts[place.number])
        loss_mask = place.dataset.loss_mask[begin : begin + ids.size]
        cuts = [0, *(np.flatnonzero(np.diff(loss_mask)) + 1).tolist(), ids.size]
        for start, end in pairwise(cuts):
            yield from [Piece(mark=ANSWER)] if loss_mask[start] else []
            yield from self.pieces(ids[start:end])
            yield from [Piece(mark=ANSWER_END)] if loss_mask[start] else []

    def sample(self, number: int, seq_length: int) -> list[tuple[Place, NDArray[Any]]]:
        """The parts of a sample, each with its document: tokens number * seq_length and on, one more
        than `seq_length` (the last is only ever a label). DataError for a sample that is not there."""
        start, count = number * seq_length, seq_length + 1
        samples = max(0, self.tokens - 1) // seq_length
        if not 0 <= number < samples:
            raise DataError(
                f"There is no sample {number:,} of {seq_length:,} tokens: there are {samples:,}, from 0."
            )
        parts = []
        while count:
            shard = bisect_right(self._first_tokens, start) - 1
            dataset, offset = self.datasets[shard], start - self._first_tokens[shard]
            document = int(np.searchsorted(dataset.starts, offset, side="right")) - 1
            end = min(int(dataset.starts[document + 1]), offset + count)
            place = Place(dataset, document, self._first_documents[shard] + document)
            parts.append((place, np.asarray(dataset.tokens[offset:end])))
            start, count = start + end - offset, count - (end - offset)
        return parts

    def find(self, text: str) -> Iterator[Match]:
        """Where a text first stands in each document that has it, as the document is stored (after FIM)."""
        for document in range(self.documents):
            place = self.place(document)
            read = "".join(piece.text for piece in self.pieces(place.dataset.document(place.number)))
            at = read.find(text)
            if at >= 0:
                end = at + len(text)
                before, after = (
                    read[max(0, at - CONTEXT_CHARACTERS) : at],
                    read[end : end + CONTEXT_CHARACTERS],
                )
                yield Match(place, before, text, after)


def source_of(place: Place, tokenizer: Tokenizer | None = None) -> str:
    """FILE, line N of a document, found by reading the input again; or why that cannot be.

    Conversations need their tokenizer for that.
    """
    record = place.dataset.record
    if record is None:
        return "source unknown: the dataset has no record (.json)"
    try:
        source = SourceText(record, tokenizer)
        for number, document in enumerate(source.documents()):
            if number == place.number:
                return f"{source.path}, line {document.line:,}"
        return f"{source.path}: has no such document any more"
    except DataError as error:
        recorded = (record.get("input") or {}).get("path", "unknown")
        return f"source {recorded}: {error}"


def _fim_ids(tokenizer: Tokenizer) -> dict[int, str]:
    """The FIM control tokens of a vocabulary, by id."""
    for names in TOKEN_NAMES:
        ids = [tokenizer.control_id(name) for name in names]
        if None not in ids:
            return {i: part for i, part in zip(ids, FIM_PARTS, strict=True) if i is not None}
    return {}
