"""The first pass: one shard, read once, to what the later stages compare, on the disk.

A directory per shard holds, by number of the document (its "row", from 0): `lines` (its line), `sizes`
(characters and bytes of its text); `verdicts` of the rules that need only the document itself; and the
keys of what those rules leave: `documents`, `paragraphs`, `bands`, with the `signatures` behind the
bands. The directory appears whole or not at all, with a record of the input it was made from.

Disk: 36 bytes per document and 28 per paragraph for exact duplicates; for near ones 20 per band and 4
per hash, 728 bytes per document as set. Memory: the same, without signatures, for one shard.
"""

import os
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import orjson
import zstandard
from numpy.typing import NDArray

from megads.data.cleaning import exact, keys, near
from megads.data.cleaning.decontaminate import EvaluationIndex
from megads.data.cleaning.near import NearSettings
from megads.data.cleaning.quality import RULE_SETS, Verdict
from megads.data.cleaning.words import LETTERS, TOKENS, Words, split_words
from megads.data.documents import (
    MAX_LINE_BYTES,
    Defect,
    LineBatch,
    Record,
    open_input,
    parse_records,
    read_line_batches,
)
from megads.data.inputs import InputShard

SIZES = np.dtype([("characters", "<u4"), ("bytes", "<u4")])
CONTAMINATED = "contaminated"
SHOWN_CHARACTERS = 200
type Spans = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class CleaningSettings:
    """What to look for. Everything here changes the result; nothing else does but the input."""

    text_field: str = "text"
    max_line_bytes: int = MAX_LINE_BYTES
    """Longer lines hold no document, here as in preprocessing."""
    exact_documents: bool = True
    min_paragraph_characters: int = 0
    """Paragraphs of at least this length are cut where they were seen before; 0: none are."""
    near: NearSettings | None = None
    quality: tuple[str, ...] = ()
    """Names of RULE_SETS."""
    quality_sources: tuple[str, ...] = ()
    """Sources that the quality rules are for; none named: all."""
    evaluation_sha256: tuple[str, ...] = ()
    ngram_words: int = 13
    min_evaluation_words: int = 8
    evaluation_fields: tuple[str, ...] = ()

    def rules_for(self, source: str) -> tuple[str, ...]:
        return self.quality if not self.quality_sources or source in self.quality_sources else ()


@dataclass
class _Findings:
    """What is kept in memory of a shard until it is written."""

    lines: list[NDArray[np.int64]] = field(default_factory=list)
    sizes: list[NDArray[Any]] = field(default_factory=list)
    verdicts: list[bytes] = field(default_factory=list)
    documents: list[NDArray[Any]] = field(default_factory=list)
    paragraphs: list[NDArray[Any]] = field(default_factory=list)
    bands: list[NDArray[Any]] = field(default_factory=list)
    defects: Counter[str] = field(default_factory=Counter)
    rows: int = 0


def is_scanned(directory: Path, shard: InputShard, digest: str) -> bool:
    """Whether a whole scan of this very input, by these settings, is there."""
    try:
        record = orjson.loads((directory / "scan.json").read_bytes())
        return bool(
            record["digest"] == digest
            and record["bytes"] == shard.bytes
            and record["version"] == shard.version != ""
            and all((directory / name).stat().st_size == size for name, size in record["files"].items())
        )
    except (OSError, orjson.JSONDecodeError, KeyError, TypeError):
        return False


def scan_shard(
    shard: InputShard,
    directory: Path,
    settings: CleaningSettings,
    index: EvaluationIndex | None,
    partitions: int,
    digest: str,
) -> None:
    """Read a shard and publish its scan at `directory`; DataError when it cannot be read."""
    partial = directory.with_name(f".{directory.name}.partial")
    for leftover in (partial, directory):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    findings = _Findings()
    with open(partial / "signatures", "wb") as signatures, open_input(shard.path) as file:
        rules = settings.rules_for(shard.directory)
        for batch in read_line_batches(file, max_line_bytes=settings.max_line_bytes):
            _scan_batch(batch, findings, signatures, settings, rules, index)
        sha256, input_bytes = file.sha256(), file.bytes_read
    np.concatenate([np.empty(0, np.int64), *findings.lines]).tofile(partial / "lines")
    np.concatenate([np.empty(0, SIZES), *findings.sizes]).tofile(partial / "sizes")
    packed = zstandard.ZstdCompressor().compress(b"".join(findings.verdicts))
    (partial / "verdicts").write_bytes(packed)
    keys.write_keys(partial / "documents", findings.documents, keys.DOCUMENT, partitions)
    keys.write_keys(partial / "paragraphs", findings.paragraphs, keys.PARAGRAPH, partitions)
    keys.write_keys(partial / "bands", findings.bands, keys.DOCUMENT, partitions)
    record = {
        "path": shard.path,
        "bytes": input_bytes,
        "version": shard.version,
        "sha256": sha256,
        "digest": digest,
        "documents": findings.rows,
        "defects": dict(sorted(findings.defects.items())),
        "files": {file.name: file.stat().st_size for file in sorted(partial.iterdir())},
    }
    (partial / "scan.json").write_bytes(orjson.dumps(record))
    os.replace(partial, directory)


def _scan_batch(
    batch: LineBatch,
    findings: _Findings,
    signatures: BinaryIO,
    settings: CleaningSettings,
    rules: tuple[str, ...],
    index: EvaluationIndex | None,
) -> None:
    records: list[Record] = []
    for found in parse_records(batch, settings.text_field):
        if isinstance(found, Defect):
            findings.defects[found.reason] += 1
        else:
            records.append(found)
    if not records:
        return
    texts = [record.text for record in records]
    findings.lines.append(np.array([record.line for record in records], np.int64))
    sizes = np.empty(len(records), SIZES)
    sizes["characters"] = [len(text) for text in texts]
    sizes["bytes"] = [len(text.encode()) for text in texts]
    findings.sizes.append(sizes)
    first_row, findings.rows = findings.rows, findings.rows + len(records)

    tokens = _words(texts, TOKENS) if rules else []
    letters = _words(texts, LETTERS) if index or settings.near else []
    dropped = np.zeros(len(texts), bool)
    cut: dict[int, Spans] = {}
    for i, text in enumerate(texts):
        verdict = _contaminated(text, letters[i], index) if index else None
        for rule in rules:
            # Lines that one set of rules cuts do not end the search: another may drop the document.
            if verdict is None or verdict.spans is not None:
                verdict = RULE_SETS[rule](text, tokens[i]) or verdict
        if verdict is not None:
            if verdict.spans is None:
                dropped[i] = True
            else:
                cut[i] = verdict.spans
            entry = {
                "row": first_row + i,
                "rule": verdict.rule,
                "detail": verdict.detail,
                "spans": verdict.spans,
            }
            findings.verdicts.append(orjson.dumps(entry) + b"\n")
    kept = np.flatnonzero(~dropped)
    rows = kept + first_row
    if settings.exact_documents:
        hashes = b"".join(exact.text_key(texts[i]) for i in kept)
        findings.documents.append(keys.entries(keys.DOCUMENT, hashes, rows))
    if settings.min_paragraph_characters:
        findings.paragraphs.append(_paragraphs(texts, kept, cut, first_row, settings))
    if settings.near:
        of_all = near.signatures(
            [words if keep else words[:0] for words, keep in zip(letters, ~dropped, strict=True)],
            settings.near,
        )
        signatures.write(of_all.tobytes())
        findings.bands.append(_bands(of_all, first_row, settings.near))


def _words(texts: list[str], kind: int) -> list[Words]:
    return [words for (words,) in split_words(texts, kind)]


def _contaminated(text: str, words: Words, index: EvaluationIndex) -> Verdict | None:
    overlap = index.overlap(words)
    if overlap is None:
        return None
    shared = text[overlap.start : min(overlap.end, overlap.start + SHOWN_CHARACTERS)]
    return Verdict(CONTAMINATED, f"{overlap.item}: {shared}")


def _paragraphs(
    texts: list[str],
    kept: NDArray[np.int64],
    cut: dict[int, Spans],
    first_row: int,
    settings: CleaningSettings,
) -> NDArray[Any]:
    """Entries of the paragraphs that no rule cuts: one that goes must not stand for another that stays."""
    found = [
        (first_row + i, paragraph)
        for i in kept.tolist()
        for paragraph in exact.paragraphs(texts[i], settings.min_paragraph_characters)
        if not any(start < paragraph.end and paragraph.start < end for start, end in cut.get(i, ()))
    ]
    result = keys.entries(keys.PARAGRAPH, b"".join(p.key for _, p in found), [row for row, _ in found])
    result["start"] = [p.start for _, p in found]
    result["end"] = [p.end for _, p in found]
    return result


def _bands(signatures: NDArray[np.uint32], first_row: int, settings: NearSettings) -> NDArray[Any]:
    """Entries of the bands of documents that have words."""
    some = np.flatnonzero(signatures[:, 0] != near.NO_SHINGLE)
    rows = np.repeat(some + first_row, settings.bands)
    return keys.entries(keys.DOCUMENT, near.band_keys(signatures[some], settings).reshape(-1, 2), rows)


@dataclass(frozen=True)
class Scan:
    """A scan, read back."""

    directory: Path
    source: str
    name: str
    path: str
    bytes: int
    sha256: str
    documents: int
    defects: dict[str, int]

    def keys(self, kind: str) -> Path:
        """Where the keys of `documents`, `paragraphs` or `bands` are."""
        return self.directory / kind

    def lines(self) -> NDArray[np.int64]:
        return np.fromfile(self.directory / "lines", np.int64)

    def sizes(self) -> NDArray[Any]:
        return np.fromfile(self.directory / "sizes", SIZES)

    def signatures(self, rows: NDArray[np.int64], hashes: int) -> NDArray[np.uint32]:
        """Signatures of some documents [rows, hashes]."""
        mapped = np.memmap(self.directory / "signatures", np.uint32, "r").reshape(-1, hashes)
        return mapped[rows]

    def verdicts(self) -> dict[int, Verdict]:
        """By row, what was decided from the documents alone."""
        content = zstandard.ZstdDecompressor().decompress((self.directory / "verdicts").read_bytes())
        result = {}
        for raw in content.splitlines():
            entry = orjson.loads(raw)
            spans = entry["spans"] and tuple((start, end) for start, end in entry["spans"])
            result[entry["row"]] = Verdict(entry["rule"], entry["detail"], spans)
        return result


def read_scan(directory: Path, shard: InputShard) -> Scan:
    record = orjson.loads((directory / "scan.json").read_bytes())
    return Scan(
        directory,
        shard.directory,
        shard.name,
        shard.path,
        record["bytes"],
        record["sha256"],
        record["documents"],
        record["defects"],
    )
