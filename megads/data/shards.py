"""One input shard to one output shard, with a record of what became of every line of it.

What is published depends on the content of the input and the recipe alone, not on when, where and
beside what else it was made. Memory is bounded: a batch of lines of about a megabyte, or one line of
at most `max_line_bytes`; the removals of the shard; and what the tokenizer remembers.

The record, PREFIX.json, has the fields that `manifest.check_dataset` needs and

- `input`: path, bytes, version and sha256 of the file as stored; `removals`: file and sha256 of each
- `settings`, `settings_sha256`: of the recipe; `tokenizer`, `engine`, `vocab_size`, `eod_id`
- `documents_in` = `documents` + sum of `quarantined` + sum of `dropped`, both by reason
- `tokens` (ends of documents included), `text_bytes`, `mean_document_tokens`, `mean_document_bytes`
- `loss_mask`, of conversations: bytes, sha256 and `counted_tokens`, those of answers
- `cut`: documents by reason and characters that removals cut; `fim`: documents and share, as found
- `damaged`: null, or why nothing of the file was taken, in tolerant mode
"""

import contextlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megads import __version__
from megads.data.documents import DamagedInputError, Defect, open_input, read_line_batches
from megads.data.encoding import Encoder
from megads.data.indexed import QUARANTINE, IndexedWriter
from megads.data.input_file import InputFile, is_url
from megads.data.inputs import InputShard
from megads.data.manifest import RECORD_FORMAT
from megads.data.recipe import Recipe, settings_sha256
from megads.data.removals import Removal, read_removals, read_removals_header, removals_path
from megads.data.selection import Document, Selection
from megads.errors import DataError

Progress = Callable[[int, int], None]
"""Called with bytes of input read and bytes of text tokenized so far."""


@dataclass(frozen=True, slots=True)
class Shard:
    """What is made of what: an input file and the prefix of its dataset."""

    input: InputShard
    prefix: Path


def convert_shard(shard: Shard, encoder: Encoder, on_progress: Progress | None = None) -> dict[str, Any]:
    """Make the dataset of a shard, replacing what is there, and return its record.

    An input without documents leaves a record and no dataset; so does a damaged one if the recipe is
    tolerant. Otherwise raises DataError, with file and line, for a damaged input, a line without a
    document, too many of them, removals of other content, and a disk that is full; nothing is
    published then.
    """
    try:
        return _convert(shard, encoder, on_progress)
    except DamagedInputError as error:
        if not encoder.recipe.tolerant:
            raise
        return _quarantine_file(shard, encoder, str(error))


def _convert(shard: Shard, encoder: Encoder, on_progress: Progress | None) -> dict[str, Any]:
    recipe = encoder.recipe
    removals = _Removals(shard.input, recipe)
    selection = Selection(recipe, removals.by_line)
    totals = {"text_bytes": 0, "fim_documents": 0, "spm_documents": 0}
    engine = None
    with (
        open_input(shard.input.path) as file,
        IndexedWriter(shard.prefix, encoder.tokenizer.vocab_size, overwrite=True) as writer,
    ):
        for batch in read_line_batches(file, max_line_bytes=recipe.max_line_bytes):
            if documents := selection.documents(batch):
                texts = [document.text for document in documents]
                engine = engine or encoder.tokenizer.use_exact_engine(texts, shard.input.path)
                encoded = encoder.encode(documents)
                scores = _scores(documents, recipe)
                writer.add(encoded.tokens, encoded.lengths, scores, encoded.loss_mask)
                totals["text_bytes"] += sum(map(_utf8_bytes, texts))
                totals["fim_documents"] += encoded.fim_documents
                totals["spm_documents"] += encoded.spm_documents
            if on_progress:
                on_progress(batch.input_bytes_read, totals["text_bytes"])
        removals.check_input(file)
        selection.check_quota(shard.input.path)
        record = _record(shard, encoder, engine, _identity(shard.input, file), removals.files)
        _fill_in(record, selection, writer, totals)
        if selection.first_defects:
            writer.attach(QUARANTINE, selection.quarantine_list())
        (writer.finish if writer.documents else writer.finish_empty)(record)
    return record


def _quarantine_file(shard: Shard, encoder: Encoder, why: str) -> dict[str, Any]:
    """Publish that nothing of this file was taken. Nobody knows how many documents it would have held."""
    identity = {"path": shard.input.location, "bytes": shard.input.bytes, "version": "", "sha256": None}
    with contextlib.suppress(DamagedInputError, OSError):  # without a hash the next run tries again
        if is_url(shard.input.path) or Path(shard.input.path).is_file():
            with open_input(shard.input.path) as file:
                identity = _identity(shard.input, file)
    record = _record(shard, encoder, None, identity, [])
    selection = Selection(encoder.recipe, {})
    selection.first_defects.append(Defect(0, "damaged_file", why))
    with IndexedWriter(shard.prefix, encoder.tokenizer.vocab_size, overwrite=True) as writer:
        _fill_in(record, selection, writer, {"text_bytes": 0, "fim_documents": 0, "spm_documents": 0})
        record["damaged"] = why
        writer.attach(QUARANTINE, selection.quarantine_list())
        writer.finish_empty(record)
    return record


def _identity(shard: InputShard, file: InputFile) -> dict[str, Any]:
    sha256 = file.sha256()
    return {"path": shard.location, "bytes": file.bytes_read, "version": shard.version, "sha256": sha256}


def _record(
    shard: Shard,
    encoder: Encoder,
    engine: str | None,
    identity: dict[str, Any],
    removals: list[dict[str, str]],
) -> dict[str, Any]:
    """The part of the record that does not count documents."""
    tokenizer = encoder.tokenizer
    return {
        "format": RECORD_FORMAT,
        "megads_version": __version__,
        "source": shard.input.source,
        "input": identity,
        "removals": removals,
        "settings": encoder.settings,
        "settings_sha256": settings_sha256(encoder.settings),
        "tokenizer": {
            "kind": tokenizer.kind,
            "file": tokenizer.path.name if tokenizer.path else None,
            "sha256": tokenizer.sha256,
        },
        "engine": engine,
        "vocab_size": tokenizer.vocab_size,
        "eod_id": tokenizer.eod_id,
        "damaged": None,
    }


def _fill_in(
    record: dict[str, Any], selection: Selection, writer: IndexedWriter, totals: Mapping[str, int]
) -> None:
    """Add the counts; they must add up."""
    documents, text_bytes = writer.documents, totals["text_bytes"]
    assert selection.lines_with_records == (
        documents + selection.quarantined.total() + selection.dropped.total()
    ), "a document was lost"
    record |= {
        "documents_in": selection.lines_with_records,
        "documents": documents,
        "quarantined": dict(sorted(selection.quarantined.items())),
        "dropped": dict(sorted(selection.dropped.items())),
        "cut": {
            "documents": dict(sorted(selection.cut.items())),
            "characters": selection.cut_characters,
        },
        "tokens": writer.tokens,
        "text_bytes": text_bytes,
        "mean_document_tokens": round(writer.tokens / documents, 3) if documents else 0.0,
        "mean_document_bytes": round(text_bytes / documents, 3) if documents else 0.0,
        "fim": {
            "documents": totals["fim_documents"],
            "spm_documents": totals["spm_documents"],
            "rate": round(totals["fim_documents"] / documents, 6) if documents else 0.0,
        },
    }


class _Removals:
    """The removals of one shard from all the directories of a recipe."""

    def __init__(self, shard: InputShard, recipe: Recipe) -> None:
        self.by_line: dict[int, list[Removal]] = {}
        self.files: list[dict[str, str]] = []
        self._made_for: list[tuple[Path, str]] = []
        for directory in recipe.removals:
            path = removals_path(directory, shard.directory, shard.name)
            if not path.is_file():
                raise DataError(
                    f"{path}: no removals for {shard.path}. Finish tools/clean_dolma.py on this corpus "
                    "first, or leave out --removals."
                )
            header = read_removals_header(path)
            self._made_for.append((path, header.input_sha256))
            for line, removal in read_removals(path, header.input_sha256).items():
                self.by_line.setdefault(line, []).append(removal)
            self.files.append({"file": os.fspath(path), "sha256": _file_sha256(path)})

    def check_input(self, file: InputFile) -> None:
        """Raise DataError unless the removals were made for what was read; hashing it first would take
        reading it twice.
        """
        for path in (path for path, sha256 in self._made_for if sha256 != file.sha256()):
            read_removals(path, file.sha256())  # says what is wrong


def removals_sha256(shard: InputShard, recipe: Recipe) -> list[str | None]:
    """Hash of the removals of a shard in each directory of a recipe; None where it has none yet."""
    paths = [removals_path(directory, shard.directory, shard.name) for directory in recipe.removals]
    return [_file_sha256(path) if path.is_file() else None for path in paths]


def _file_sha256(path: Path) -> str:
    with InputFile(path) as file:
        return file.sha256()


def _scores(documents: list[Document], recipe: Recipe) -> NDArray[np.float32] | None:
    if recipe.score_field is None:
        return None
    return np.array([document.score for document in documents], dtype=np.float32)


def _utf8_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())
