"""Whether a dataset is what its record says, and what its input says: every check that can be made.

Always: record, sizes, pointers, the hash of the index, and the books (documents in = documents out +
quarantined + dropped). Unless quick: the hashes of all files; every token id below the vocabulary; each
document with one end, at its end, or (conversations, which end as their template has it) with tokens that
count; and, where the input is, the input read again: the same hash, the same counts by reason, and, where
the tokenizer is, sampled documents token by token and as text.
"""

import hashlib
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from megads.data.encoding import Encoder
from megads.data.fim import TOKEN_NAMES, FillInTheMiddle
from megads.data.indexed import (
    LOSS_MASK,
    SCORES,
    data_files,
    datasets_in_work,
    sidecar_file,
    unfinished_files,
)
from megads.data.manifest import check_dataset
from megads.data.recipe import differing_settings, settings_sha256
from megads.data.selection import Document, describe
from megads.data.stored import SourceText, StoredDataset
from megads.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_sha256
from megads.errors import MegadsError

PIECE_TOKENS = 1 << 22
NO_VOCABULARY = 2**31
LISTED = 5


@dataclass(frozen=True)
class VerifySettings:
    """How closely to look."""

    quick: bool = False
    tokenizer: str | None = None
    sample_documents: int = 20
    """Documents of each dataset that are compared with their text."""
    seed: int = 0


@dataclass
class Verification:
    """What was found of one dataset. It is sound if there are no problems; `unchecked` says what could
    not be looked at."""

    prefix: str
    problems: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    documents: int = 0
    tokens: int = 0
    text_bytes: int | None = None
    tokenizer_sha256: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    length_quantiles: tuple[int, ...] = ()
    """Tokens of the shortest, the median and the longest document."""
    distinct_ids: int | None = None
    compared_documents: int = 0


def verify_dataset(settings: VerifySettings, prefix: str) -> Verification:
    """Check one dataset; nothing that is wrong with it is raised."""
    found = Verification(prefix)
    try:
        dataset = StoredDataset(prefix)
        _check_structure(dataset, found, settings)
        if found.problems:
            return found
        if dataset.record is None:
            found.unchecked.append("no record (.json): nothing says what the files must be")
        else:
            _check_books(dataset.record, found)
        if not settings.quick:
            _check_tokens(dataset, found)
            _check_source(dataset, found, settings)
    except (MegadsError, OSError) as error:
        found.problems.append(str(error))
    return found


def check_complete(paths: Sequence[Path], found: Sequence[Verification]) -> list[str]:
    """Datasets below these directories that a run has begun and not finished; those of `found` tell of it."""
    known = {one.prefix for one in found}
    directories = {Path(directory) for path in paths for directory, _, _ in os.walk(path)}
    return [
        f"{directory / name}: is being made, or was when a run was killed; preprocess to the end"
        for directory in sorted(directories)
        for name in datasets_in_work(directory)
        if str(directory / name) not in known
    ]


def check_together(found: Sequence[Verification]) -> list[str]:
    """Problems between datasets that would be trained on together."""
    problems = []
    tokenizers: dict[str, str] = {}
    first_in: dict[Path, Verification] = {}
    for one in found:
        if one.tokenizer_sha256:
            tokenizers.setdefault(one.tokenizer_sha256, one.prefix)
        if one.settings:
            first = first_in.setdefault(Path(one.prefix).parent, one)
            if differing := differing_settings(first.settings, one.settings):
                problems.append(f"{first.prefix} and {one.prefix}: one source, other settings ({differing})")
    if len(tokenizers) > 1:
        named = ", ".join(f"{prefix} ({sha256[:12]}…)" for sha256, prefix in tokenizers.items())
        problems.append(f"made with different tokenizers: {named}")
    return problems


def _check_structure(dataset: StoredDataset, found: Verification, settings: VerifySettings) -> None:
    record = dataset.record
    found.documents, found.tokens = len(dataset), int(dataset.lengths.sum(dtype=np.int64))
    found.problems += [f"{file}: left by a run that was killed" for file in unfinished_files(dataset.prefix)]
    if record is not None:
        found.text_bytes = record.get("text_bytes")
        found.tokenizer_sha256 = record["tokenizer"]["sha256"]
        found.settings = record.get("settings") or {}
    if dataset.is_empty:
        stray = [file.name for file in data_files(dataset.prefix)[:2] if file.exists()]
        if stray:
            found.problems.append(f"{dataset.prefix}: the record says no documents, but there is {stray[0]}")
        return
    vocab_size = NO_VOCABULARY if record is None else record["vocab_size"]
    check_dataset(dataset.prefix, vocab_size, None, full=not settings.quick)
    shortest, median, longest = np.quantile(dataset.lengths, (0, 0.5, 1), method="lower").tolist()
    found.length_quantiles = (int(shortest), int(median), int(longest))
    if record is not None and "scores" in record:
        _check_scores(dataset, record["scores"], found)


def _check_scores(dataset: StoredDataset, recorded: dict[str, Any], found: Verification) -> None:
    path = sidecar_file(dataset.prefix, SCORES)
    try:
        with open(path, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        count = np.load(path, mmap_mode="r").shape
    except (OSError, ValueError) as error:
        found.problems.append(f"{path}: cannot be read: {error}")
        return
    if sha256 != recorded["sha256"] or count != (len(dataset),):
        found.problems.append(f"{path}: not the scores that the record was written with")


def _check_books(record: dict[str, Any], found: Verification) -> None:
    """Conservation, and the record against the index."""
    if "documents_in" not in record:
        found.unchecked.append("the record is of an older version: it does not say what was left out")
        return
    name = data_files(found.prefix)[2]
    quarantined, dropped = sum(record["quarantined"].values()), sum(record["dropped"].values())
    if record["documents_in"] != record["documents"] + quarantined + dropped:
        found.problems.append(
            f"{name}: {record['documents_in']:,} documents in, but {record['documents']:,} out, "
            f"{quarantined:,} quarantined and {dropped:,} dropped"
        )
    for what, in_index in (("documents", found.documents), ("tokens", found.tokens)):
        if record[what] != in_index:
            found.problems.append(f"{name}: {record[what]:,} {what}, but the index has {in_index:,}")
    if settings_sha256(record["settings"]) != record["settings_sha256"]:
        found.problems.append(f"{name}: the settings are not those of their hash")


def _check_tokens(dataset: StoredDataset, found: Verification) -> None:
    """Ids within the vocabulary; an end of document at the end of each document and nowhere else."""
    record = dataset.record
    if record is None or dataset.is_empty:
        return
    bin_path = data_files(dataset.prefix)[0]
    vocab_size, eod_id = record["vocab_size"], record["eod_id"]
    seen = np.zeros(vocab_size, bool)
    ends = 0
    for start in range(0, found.tokens, PIECE_TOKENS):
        ids = dataset.tokens[start : start + PIECE_TOKENS]
        wrong = np.flatnonzero((ids < 0) | (ids >= vocab_size))
        if wrong.size:
            place = start + int(wrong[0])
            found.problems.append(
                f"{bin_path}: id {ids[wrong[0]]} at token {place:,} (document "
                f"{_document_of(dataset, place):,}) is not in the vocabulary of {vocab_size:,}"
            )
            return
        seen[ids] = True
        ends += int(np.count_nonzero(ids == eod_id))
    found.distinct_ids = int(seen.sum())
    if dataset.holds_conversations:
        _check_loss_mask(dataset, record["loss_mask"], found)
        return
    last = dataset.tokens[dataset.starts[1:] - 1]
    open_ended = np.flatnonzero((last != eod_id) | (dataset.lengths == 0))
    if open_ended.size:
        found.problems.append(
            f"{bin_path}: {open_ended.size:,} documents do not end with the end-of-document token, the first "
            f"is document {open_ended[0]:,}"
        )
    elif ends != found.documents:
        found.problems.append(f"{bin_path}: {ends - found.documents:,} ends of documents inside documents")


def _check_loss_mask(dataset: StoredDataset, recorded: dict[str, Any], found: Verification) -> None:
    """Only 0 and 1, as many as recorded, and some of an answer in every conversation."""
    path = sidecar_file(dataset.prefix, LOSS_MASK)
    counted = np.add.reduceat(dataset.loss_mask, dataset.starts[:-1], dtype=np.int64)
    if dataset.loss_mask.max() > 1 or int(counted.sum()) != recorded["counted_tokens"]:
        found.problems.append(f"{path}: not the mask that the record was written with")
    elif not counted.all():
        first = int(np.flatnonzero(counted == 0)[0])
        found.problems.append(f"{path}: no token counts of document {first:,}")


def _document_of(dataset: StoredDataset, token: int) -> int:
    return int(np.searchsorted(dataset.starts, token, side="right")) - 1


def _check_source(dataset: StoredDataset, found: Verification, settings: VerifySettings) -> None:
    """The input again: its hash, what became of its lines, and sampled documents."""
    record = dataset.record
    if record is None:
        return
    tokenizer = None
    if settings.tokenizer is not None:
        if tokenizer_sha256(settings.tokenizer) != found.tokenizer_sha256:
            found.problems.append(f"{dataset.prefix}: made with another tokenizer than {settings.tokenizer}")
            return
        eod_token = record.get("settings", {}).get("eod_token")
        tokenizer = load_tokenizer(settings.tokenizer, eod_token=eod_token)
    try:
        source = SourceText(record, tokenizer)
    except MegadsError as error:
        found.unchecked.append(f"text: {error}")
        return
    if record["damaged"] is not None:
        found.unchecked.append(f"text: the input was damaged: {record['damaged']}")
        return
    chosen = _sample(found.documents, settings)
    sampled = {n: document for n, document in enumerate(source.documents()) if n in chosen}
    if source.sha256 != record["input"]["sha256"]:
        found.problems.append(f"{source.path}: not the content that {dataset.prefix} was made from")
        return
    selection = source.selection
    recount = {
        "documents_in": selection.lines_with_records,
        "quarantined": dict(sorted(selection.quarantined.items())),
        "dropped": dict(sorted(selection.dropped.items())),
    }
    for what, count in recount.items():
        if count != record[what]:
            shown = (
                describe(c) or "none" if isinstance(c, dict) else f"{c:,}" for c in (record[what], count)
            )
            found.problems.append(
                "{}: {} is {} in the record, {} in the input".format(source.path, what, *shown)
            )
    if settings.tokenizer is None:
        found.unchecked.append("text of documents: no tokenizer was given")
    else:
        _compare(dataset, source, sampled, found, settings.tokenizer)


def _sample(documents: int, settings: VerifySettings) -> set[int]:
    """The first and the last document, and some between."""
    rng = random.Random(settings.seed)
    count = min(documents, settings.sample_documents)
    return {0, documents - 1, *rng.sample(range(documents), count)} if documents else set()


def _compare(
    dataset: StoredDataset,
    source: SourceText,
    sampled: dict[int, Document],
    found: Verification,
    tokenizer: str,
) -> None:
    """Encode sampled documents again, and read what is stored as text."""
    encoder = Encoder(replace(source.recipe, tokenizer=tokenizer))
    documents = list(sampled.values())
    encoder.tokenizer.use_exact_engine([document.text for document in documents], dataset.prefix)
    wrong, changed = [], 0
    for number, document in sampled.items():
        stored = dataset.document(number)
        encoded = encoder.encode([document])
        begin, end = dataset.starts[number : number + 2]
        same_mask = encoded.loss_mask is None or np.array_equal(
            encoded.loss_mask, dataset.loss_mask[begin:end]
        )
        if not (same_mask and np.array_equal(encoded.tokens, stored)):
            wrong.append((number, document.line))
        elif not _reads_as(stored, document.text, encoder.tokenizer):
            changed += 1
    found.compared_documents = len(sampled)
    for number, line in wrong[:LISTED]:
        found.problems.append(
            f"{dataset.prefix}: document {number:,} ({source.path}, line {line:,}): not the tokens of its "
            "text"
        )
    if changed:
        found.unchecked.append(
            f"text: the tokens of {changed} of {len(sampled)} sampled documents are right, but this "
            "tokenizer does not give a text back as it was"
        )


def _reads_as(stored: Any, text: str, tokenizer: Tokenizer) -> bool:
    """Whether the stored ids, put in reading order, decode to the text; control tokens have none."""
    ids = stored[:-1] if stored[-1] == tokenizer.eod_id else stored
    controls = [tokenizer.control_id(name) for names in TOKEN_NAMES for name in names]
    if np.isin(ids, [control for control in controls if control is not None]).any():
        ids = FillInTheMiddle(0.0, 0.0, 0, tokenizer).restore(ids)
    return tokenizer.decode(ids.tolist()) == text


def one_line(found: Verification) -> str:
    """What was found of a sound dataset, in a line."""
    parts = [f"{found.documents:,} documents", f"{found.tokens:,} tokens"]
    if found.text_bytes and found.tokens:
        parts.append(f"{found.text_bytes / found.tokens:.2f} bytes/token")
    if found.length_quantiles:
        parts.append("lengths {:,} / {:,} / {:,}".format(*found.length_quantiles))
    if found.distinct_ids is not None:
        parts.append(f"{found.distinct_ids:,} distinct ids")
    if found.compared_documents:
        parts.append(f"{found.compared_documents} compared with their text")
    return f"{Path(found.prefix)}: " + ", ".join(parts)
