"""What cleaning takes out of a corpus, handed to preprocessing as a small file per input shard.

A corpus itself is never changed. For the input shard SUBSET/NAME the file is
DIRECTORY/SUBSET/NAME.removals.zst: zstd-compressed JSON lines, a header that says which content it
belongs to, then one entry per touched document, by line number (from 1, in the decompressed shard):
`{"line": 7, "reason": "near_duplicate"}` drops the document; with `"spans": [[start, end], ...]` those
characters (code points, end excluded) of its text are cut and the rest stays.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import zstandard

from megads.errors import DataError
from megads.publish import publish_file

REMOVALS_FORMAT = "megads-removals-1"
REMOVALS_ENDING = ".removals.zst"
CLEAN_AGAIN = "Run tools/clean_dolma.py again."


@dataclass(frozen=True, slots=True)
class Removal:
    """Why a document is dropped, or which characters of its text are cut (then `spans` is not None)."""

    reason: str
    spans: tuple[tuple[int, int], ...] | None = None

    def cut(self, text: str) -> str:
        """`text` without the spans; raises ValueError where they reach past its end."""
        assert self.spans is not None, "a whole document is dropped, not cut"
        if self.spans[-1][1] > len(text):
            raise ValueError(f"a span ends at character {self.spans[-1][1]:,} of {len(text):,}")
        starts = (0, *(end for _, end in self.spans))
        ends = (*(start for start, _ in self.spans), len(text))
        return "".join(text[start:end] for start, end in zip(starts, ends, strict=True))


@dataclass(frozen=True, slots=True)
class RemovalsHeader:
    """The shard that a removals file belongs to, and how many of its documents it touches."""

    input_file: str
    input_bytes: int
    """Size of the shard as it lies on the disk, compressed."""
    input_sha256: str
    documents: int
    removed: dict[str, int]
    """Entries by reason, cuts included."""
    run: str | None = None
    """Digest of the settings and of all inputs of the cleaning run."""


def removals_path(directory: str | os.PathLike[str], subset: str, shard_name: str) -> Path:
    """Where the removals of the shard `subset`/`shard_name` lie ('' for no subset)."""
    return Path(directory) / subset / (shard_name + REMOVALS_ENDING)


def write_removals(
    path: str | os.PathLike[str],
    *,
    input_file: str,
    input_bytes: int,
    input_sha256: str,
    documents: int,
    entries: Mapping[int, Removal],
    run: str | None = None,
) -> RemovalsHeader:
    """Publish the removals of one shard, atomically; `entries` by line number, in any order."""
    lines = []
    for line, removal in sorted(entries.items()):
        entry: dict[str, Any] = {"line": line, "reason": removal.reason}
        if removal.spans is not None:
            assert _in_order(removal.spans), f"line {line}: spans {removal.spans}"
            entry["spans"] = removal.spans
        lines.append(orjson.dumps(entry))
    removed = Counter(removal.reason for removal in entries.values())
    header = RemovalsHeader(
        input_file, input_bytes, input_sha256, documents, dict(sorted(removed.items())), run
    )
    first = {
        "format": REMOVALS_FORMAT,
        "input": {"file": input_file, "bytes": input_bytes, "sha256": input_sha256},
        "documents": documents,
        "removed": header.removed,
        "run": run,
    }
    content = b"".join(line + b"\n" for line in (orjson.dumps(first), *lines))
    publish_file(Path(path), zstandard.ZstdCompressor(write_checksum=True).compress(content))
    return header


def read_removals(path: str | os.PathLike[str], input_sha256: str) -> dict[int, Removal]:
    """Removals by line number of the shard whose compressed content has this hash.

    Raises DataError when the file is missing or damaged, or belongs to other content.
    """
    header = read_removals_header(path)
    if header.input_sha256 != input_sha256:
        raise DataError(
            f"{path}: made for another content of {header.input_file} (sha256 {header.input_sha256[:12]}…, "
            f"the shard's is {input_sha256[:12]}…). {CLEAN_AGAIN}"
        )
    removals: dict[int, Removal] = {}
    previous = 0
    for number, entry in _lines(path):
        if number == 1:
            continue
        try:
            line, reason, spans = entry["line"], entry["reason"], entry.get("spans")
            spans = None if spans is None else tuple((int(start), int(end)) for start, end in spans)
            sound = (
                isinstance(line, int)
                and line > previous
                and isinstance(reason, str)
                and (spans is None or _in_order(spans))
            )
        except (KeyError, TypeError, ValueError, AttributeError):
            sound = False
        if not sound:
            raise DataError(f"{path}, line {number}: not an entry in ascending order. {CLEAN_AGAIN}")
        removals[line] = Removal(reason, spans)
        previous = line
    if len(removals) != sum(header.removed.values()):
        raise DataError(
            f"{path}: {len(removals):,} entries, its header counts {sum(header.removed.values()):,}. "
            f"{CLEAN_AGAIN}"
        )
    return removals


def read_removals_header(path: str | os.PathLike[str]) -> RemovalsHeader:
    """The first line of a removals file; DataError when it is missing or damaged."""
    try:
        _, first = next(_lines(path))
        if first["format"] != REMOVALS_FORMAT:
            raise KeyError("format")
        source = first["input"]
        return RemovalsHeader(
            str(source["file"]),
            int(source["bytes"]),
            str(source["sha256"]),
            int(first["documents"]),
            {str(reason): int(count) for reason, count in first["removed"].items()},
            first.get("run"),
        )
    except (StopIteration, KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: no header of format {REMOVALS_FORMAT}. {CLEAN_AGAIN}") from error


def _lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, Any]]:
    """(number from 1, parsed) of each line."""
    try:
        packed = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path}: the removals cannot be read: {error}.") from error
    try:
        # decompressobj, not decompress: it can tell that a frame is cut short.
        frame = zstandard.ZstdDecompressor().decompressobj()
        content = frame.decompress(packed)
        if not frame.eof or frame.unused_data:
            raise zstandard.ZstdError("truncated, or followed by other data")
    except zstandard.ZstdError as error:
        raise DataError(f"{path}: the removals are damaged: {error}. {CLEAN_AGAIN}") from error
    for number, raw in enumerate(content.splitlines(), 1):
        try:
            yield number, orjson.loads(raw)
        except orjson.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: not JSON: {error}. {CLEAN_AGAIN}") from error


def _in_order(spans: Iterable[tuple[int, int]]) -> bool:
    """At least one span, none empty, ascending, not overlapping."""
    previous, count = 0, 0
    for start, end in spans:
        if not previous <= start < end:
            return False
        previous, count = end, count + 1
    return count > 0
