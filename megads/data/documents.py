"""Reading Dolma-format corpora: JSON lines, plain or compressed with gzip or zstd.

Dolma (arXiv:2402.00159) stores a document a line, `{"id", "text", "source", ...}`. Files are read as
a stream, so memory is bounded by the longest line. Whatever is wrong with the input stops the read
with a `DataError` that names file and line: a corpus that lost documents without a word is worse
than none. Compression is recognized by content; the ending of the name must not contradict it.
"""

import gzip
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import NoReturn

import orjson
import zstandard

from megads.errors import DataError

GZIP_ENDINGS = (".gz",)
ZSTD_ENDINGS = (".zst", ".zstd")
PLAIN_ENDINGS = (".json", ".jsonl", ".ndjson")
ENDINGS = GZIP_ENDINGS + ZSTD_ENDINGS + PLAIN_ENDINGS

GZIP_MAGIC = b"\x1f\x8b"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"

BATCH_BYTES = 1 << 20
MAX_LINE_BYTES = 256 << 20
# Four bytes of zstd can stand for a block of 128 KiB: this much can become 16 MiB at most.
ZSTD_INPUT_BYTES = 512


@dataclass(frozen=True, slots=True)
class LineBatch:
    """Whole lines of one file, as bytes, with the number of the first (from 1)."""

    path: str
    first_line: int
    data: bytes
    input_bytes_read: int
    """How far the (compressed) file had been read, for progress; 0 for a pipe."""


def find_inputs(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Files to read, in order: a file stands for itself, a directory for its data files, sorted.

    Raises DataError for a missing path and for a directory without data files.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(
                p
                for p in path.rglob("*")
                if p.name.endswith(ENDINGS) and not p.name.startswith(".") and p.is_file()
            )
            if not inside:
                raise DataError(f"{path}: no data files in this directory (looked for {', '.join(ENDINGS)}).")
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise DataError(f"{path}: no such file or directory.")
    if not found:
        raise DataError("No input files were given.")
    return found


def read_line_batches(
    path: str | os.PathLike[str], *, batch_bytes: int = BATCH_BYTES, max_line_bytes: int = MAX_LINE_BYTES
) -> Iterator[LineBatch]:
    """Stream a file as batches of whole lines of about `batch_bytes` (a longer line comes whole).

    Raises DataError, with file and line, when the file cannot be opened, is truncated or damaged, or
    holds a line of more than `max_line_bytes`.
    """
    path = os.fspath(path)
    line = 1
    unfinished = bytearray()
    try:
        with open(path, "rb") as file:
            position = file.tell if file.seekable() else int
            for chunk in _decompressed(path, file, batch_bytes):
                end = chunk.rfind(b"\n") + 1
                if len(unfinished) + (chunk.find(b"\n") if end else len(chunk)) > max_line_bytes:
                    _fail(
                        path, line, f"the line is longer than {max_line_bytes:,} bytes; is this JSON lines?"
                    )
                if not end:
                    unfinished += chunk
                    continue
                data = bytes(unfinished) + chunk[:end]
                unfinished = bytearray(chunk[end:])
                yield LineBatch(path, line, data, position())
                line += data.count(b"\n")
            if unfinished:
                yield LineBatch(path, line, bytes(unfinished), position())
    except (EOFError, zlib.error, zstandard.ZstdError, OSError) as error:
        _fail(path, line, f"the file cannot be read any further: {error}. Fetch or make it again.")


def parse_texts(batch: LineBatch, text_field: str = "text") -> list[str]:
    """The text of each record of a batch; blank lines hold no record.

    Raises DataError, with file and line, for bad UTF-8, bad JSON, a line that is not an object, and a
    text that is missing, null or not a string.
    """
    texts = []
    for line, raw in enumerate(batch.data.split(b"\n"), batch.first_line):
        if not raw.strip():
            continue
        try:
            record = orjson.loads(raw)
        except orjson.JSONDecodeError as error:
            _fail(batch.path, line, _explain_bad_json(raw, error))
        if not isinstance(record, dict):
            _fail(batch.path, line, f"expected a JSON object, found a {type(record).__name__}.")
        if text_field not in record:
            _fail(batch.path, line, f"no field {text_field!r}; the record has {sorted(record)}.")
        text = record[text_field]
        if not isinstance(text, str):
            found = "null" if text is None else f"a {type(text).__name__}"
            _fail(batch.path, line, f"field {text_field!r} must be a string, found {found}.")
        texts.append(text)
    return texts


def read_texts(paths: Iterable[str | os.PathLike[str]], text_field: str = "text") -> Iterator[str]:
    """Stream the texts of files, in order; errors as in `read_line_batches` and `parse_texts`."""
    for path in paths:
        for batch in read_line_batches(path):
            yield from parse_texts(batch, text_field)


def _decompressed(path: str, file: BufferedReader, chunk_bytes: int) -> Iterator[bytes]:
    """The content of `file` in non-empty chunks, by the compression its first bytes show."""
    magic = file.peek(4)[:4]  # a pipe cannot be wound back
    is_gzip, is_zstd = magic.startswith(GZIP_MAGIC), magic == ZSTD_MAGIC
    if path.endswith(GZIP_ENDINGS) and not is_gzip:
        raise EOFError("the name ends as gzip's do, but the content is not gzip" if magic else "it is empty")
    if path.endswith(ZSTD_ENDINGS) and not is_zstd:
        raise EOFError("the name ends as zstd's do, but the content is not zstd" if magic else "it is empty")
    read: Callable[[int], bytes]
    if is_zstd:
        yield from _merged(_zstd_frames(file), chunk_bytes)
        return
    # gzip raises EOFError at a truncated member and BadGzipFile, an OSError, at a wrong checksum.
    # read1 takes what a pipe has, where read would loop, deaf to signals, until it had all.
    read = gzip.GzipFile(fileobj=file).read if is_gzip else file.read1
    while chunk := read(chunk_bytes):
        yield chunk


def _zstd_frames(file: BufferedReader) -> Iterator[bytes]:
    """Decompress one zstd frame after the other.

    `stream_reader` would end quietly in the middle of a truncated frame; an object per frame knows
    whether its frame was complete.
    """
    frame = zstandard.ZstdDecompressor().decompressobj()
    begun = False
    while data := file.read(ZSTD_INPUT_BYTES):
        while data:
            begun = True
            if text := frame.decompress(data):
                yield text
            data = frame.unused_data if frame.eof else b""
            if frame.eof:
                frame, begun = zstandard.ZstdDecompressor().decompressobj(), False
    if begun:
        raise EOFError("the zstd frame is truncated")


def _merged(pieces: Iterator[bytes], at_least_bytes: int) -> Iterator[bytes]:
    parts: list[bytes] = []
    size = 0
    for piece in pieces:
        parts.append(piece)
        size += len(piece)
        if size >= at_least_bytes:
            yield b"".join(parts)
            parts, size = [], 0
    if size:
        yield b"".join(parts)


def _explain_bad_json(raw: bytes, error: orjson.JSONDecodeError) -> str:
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as bad:
        return f"not UTF-8 (byte {bad.start + 1} of the line is 0x{raw[bad.start]:02x})."
    return f"not a JSON object on one line: {error}."


def _fail(path: str, line: int, what: str) -> NoReturn:
    raise DataError(f"{path}, line {line}: {what}")
