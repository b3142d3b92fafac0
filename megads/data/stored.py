"""Datasets as they lie on the disk, one at a time, and the text they were made from: for people's tools.

Training reads through `shard_group`; here a dataset is opened by its prefix, also a damaged one.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megads.data.chat_format import ChatFormat
from megads.data.documents import open_input, read_line_batches
from megads.data.indexed import HEADER, LOSS_MASK, TOKEN_TYPES, data_files, sidecar_file
from megads.data.input_file import is_url
from megads.data.manifest import is_empty, read_record, sequence_lengths
from megads.data.recipe import Recipe
from megads.data.removals import Removal, read_removals
from megads.data.selection import Document, Selection
from megads.data.tokenizer import Tokenizer
from megads.errors import DataError


class StoredDataset:
    """The documents of one indexed dataset; `check_dataset` says whether they can be trusted."""

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        self.prefix = os.fspath(prefix)
        self.record = read_record(prefix)
        self.is_empty = self.record is not None and is_empty(self.record)
        bin_path, idx_path, _ = data_files(prefix)
        if self.is_empty:
            self.lengths = np.empty(0, np.int32)
            self.tokens = np.empty(0, np.uint16)
            return
        try:
            with open(idx_path, "rb") as file:
                code = HEADER.unpack(file.read(HEADER.size))[2]
            self.lengths = sequence_lengths(prefix)
            dtype = TOKEN_TYPES[code]
            self.tokens = np.memmap(bin_path, dtype, "r") if bin_path.stat().st_size else np.empty(0, dtype)
            """Token ids of all documents [tokens], mapped."""
        except (OSError, KeyError, ValueError) as error:  # struct.error is a ValueError
            raise DataError(f"{prefix}: not a dataset that can be read: {error}.") from error

    def __len__(self) -> int:
        return int(self.lengths.size)

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """The first token of each document, and the end of the last [documents + 1]."""
        starts = np.zeros(len(self) + 1, np.int64)
        np.cumsum(self.lengths, out=starts[1:])
        return starts

    def document(self, number: int) -> NDArray[Any]:
        """Token ids of a document, its end included."""
        return np.asarray(self.tokens[self.starts[number] : self.starts[number + 1]])

    @property
    def holds_conversations(self) -> bool:
        """Whether only some tokens count, and documents end without a token that says so."""
        return self.record is not None and "loss_mask" in self.record

    @cached_property
    def loss_mask(self) -> NDArray[np.uint8]:
        """1 for each token of an answer [tokens], mapped; of `holds_conversations` only."""
        path = sidecar_file(self.prefix, LOSS_MASK)
        try:
            loss_mask = np.memmap(path, np.uint8, "r")
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: cannot be read: {error}.") from error
        if loss_mask.size != self.tokens.size:
            raise DataError(f"{path}: {loss_mask.size:,} bytes for {self.tokens.size:,} tokens.")
        return loss_mask


def find_datasets(paths: Sequence[str | os.PathLike[str]]) -> list[str]:
    """Prefixes of datasets: as given (with or without an ending), a directory for all below it, sorted.

    Raises DataError for what is neither, and for a directory without datasets.
    """
    found: list[str] = []
    for path in (os.fspath(path) for path in paths):
        prefix = next((path.removesuffix(e) for e in (".bin", ".idx", ".json") if path.endswith(e)), path)
        if any(file.exists() for file in data_files(prefix)):
            found.append(prefix)
            continue
        if not Path(path).is_dir():
            raise DataError(f"{path}: neither a dataset nor a directory of datasets.")
        inside = {
            str(file.with_suffix(""))
            for file in Path(path).rglob("*")
            if file.suffix in (".bin", ".idx") or (file.suffix == ".json" and _is_record(file))
        }
        inside = {prefix for prefix in inside if not Path(prefix).name.startswith(".")}
        if not inside:
            raise DataError(f"{path}: no datasets (.idx) in this directory.")
        found += sorted(inside)
    return list(dict.fromkeys(found))


def _is_record(path: Path) -> bool:
    """Whether a `.json` belongs to a dataset, maybe a damaged one; directories hold other ones too."""
    try:
        with open(path, "rb") as file:
            return b'"megads-indexed-' in file.read(200)
    except OSError:
        return False


@dataclass
class SourceText:
    """The input that a dataset was made from, read again as its record says.

    Conversations need the `tokenizer` for that. Raises DataError for a record without an input, an input that
    is not there, and removals that are not there or are other ones.
    """

    record: dict[str, Any]
    tokenizer: Tokenizer | None = None

    def __post_init__(self) -> None:
        recorded = self.record.get("input") or {}
        self.path: str = recorded.get("path") or ""
        if not self.path or "settings" not in self.record:
            raise DataError("the record does not say what the dataset was made from")
        if not is_url(self.path) and not Path(self.path).is_file():
            raise DataError(f"the input {self.path} is not here")
        settings = self.record["settings"]
        self.recipe = Recipe(
            tokenizer="",
            eod_token=settings["eod_token"],
            text_field=settings["text_field"],
            max_line_bytes=settings["max_line_bytes"],
            keep=tuple((field, tuple(values)) for field, values in settings["keep"].items()),
            score_field=settings["score_field"],
            fim_rate=settings["fim_rate"],
            fim_spm_rate=settings["fim_spm_rate"],
            fim_seed=settings["fim_seed"],
            split_punctuation_rate=settings["split_punctuation_rate"],
            split_punctuation_seed=settings["split_punctuation_seed"],
            chat=self._chat(settings),
            quarantine_quota=1.0,  # bad lines are counted again, not complained about
        )
        self.selection = Selection(self.recipe, self._removals())
        self.sha256 = ""
        """Of the input as stored, once `documents` has been read to the end."""

    def documents(self) -> Iterator[Document]:
        """The documents of the dataset, in order."""
        with open_input(self.path) as file:
            for batch in read_line_batches(file, max_line_bytes=self.recipe.max_line_bytes):
                yield from self.selection.documents(batch)
            self.sha256 = file.sha256()

    def _chat(self, settings: dict[str, Any]) -> ChatFormat | None:
        if "chat" not in settings:
            return None
        if self.tokenizer is None:
            raise DataError("conversations are rendered again only with their tokenizer, and none was given")
        return ChatFormat.of_record(settings["chat"], self.tokenizer, settings["eod_token"])

    def _removals(self) -> dict[int, list[Removal]]:
        by_line: dict[int, list[Removal]] = {}
        for file in self.record["removals"]:
            if not Path(file["file"]).is_file():
                raise DataError(f"the removals {file['file']} are not here")
            for line, removal in read_removals(file["file"], self.record["input"]["sha256"]).items():
                by_line.setdefault(line, []).append(removal)
        return by_line
