"""Reading Dolma-format corpora: JSON lines, plain or compressed with gzip or zstd.

Dolma (arXiv:2402.00159) stores a document a line, `{"id", "text", "source", ...}`. Files are read as
a stream, so memory is bounded by the longest line. Whatever is wrong with the input stops the read
with a `DataError` that names file and line: a corpus that lost documents without a word is worse
than none. Compression is recognized by content; the ending of the name must not contradict it.
"""

import gzip
import hashlib
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import msgspec
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
SURROGATE = re.compile("[\ud800-\udfff]")
JSON_NAMES = {
    dict: "an object",
    list: "an array",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


class Defect(NamedTuple):
    """A line that holds no document. `reason` is a short stable name, `detail` is for people."""

    line: int
    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class LineBatch:
    """Whole lines of one file, as bytes, with the number of the first (from 1)."""

    path: str
    first_line: int
    data: bytes
    input_bytes_read: int
    """How far the (compressed) file had been read, for progress; 0 for a pipe."""
    defects: tuple[Defect, ...] = ()
    """Lines that were passed over unread; they come before `data`."""


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


class Record(NamedTuple):
    """A document: its line (from 1), text, id where it has one, and the metadata asked for."""

    line: int
    text: str
    id: str | None
    fields: dict[str, Any]

    @property
    def key(self) -> bytes:
        """What random choices about this document depend on: its id, else the hash of its text."""
        if self.id is not None:
            return self.id.encode("utf-8", "surrogatepass")
        return hashlib.sha256(self.text.encode()).digest()


def parse_records(
    batch: LineBatch, text_field: str = "text", fields: Sequence[str] = ()
) -> Iterator[Record | Defect]:
    """The records of a batch in order of their lines; blank lines hold none.

    `fields` are names of metadata to give along, nested ones with dots ("metadata.language"); what a
    record lacks is not in its `fields`. An `id` that is neither string nor integer counts as none.
    A line is a Defect, with reason, when it is: `bad_utf8`; `bad_json`; `lone_surrogate` (an escape
    that stands for no character, which no tokenizer can encode); `not_an_object`; without the field
    (`no_text`); with `null_text` or `text_not_a_string`; or `line_too_long`, see `read_line_batches`.
    """
    yield from batch.defects
    decode, id_attribute, places = _decoder(text_field, tuple(fields))
    # The decoder passes over fields nobody asked for, and does not look at their encoding.
    all_utf8 = _is_utf8(batch.data)
    for line, raw in enumerate(batch.data.split(b"\n"), batch.first_line):
        if not raw or raw.isspace():
            continue
        try:
            found = decode(raw)
            text = found.a0
            if type(text) is not str or not (all_utf8 or _is_utf8(raw)):
                raise ValueError
        except (ValueError, RecursionError) as error:  # msgspec's errors and UnicodeDecodeError among them
            yield _defect(line, raw, text_field, error)
            continue
        record_id = getattr(found, id_attribute)
        if type(record_id) is not str:
            record_id = str(record_id) if type(record_id) is int else None
        yield Record(line, text, record_id, _pick(found, places) if places else {})


def parse_texts(batch: LineBatch, text_field: str = "text") -> list[str]:
    """The text of each record of a batch.

    Raises DataError, with file and line, for the first line that `parse_records` calls a defect.
    """
    texts = []
    for record in parse_records(batch, text_field):
        if isinstance(record, Defect):
            _fail(batch.path, record.line, record.detail)
        texts.append(record.text)
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


@cache
def _decoder(
    text_field: str, fields: tuple[str, ...]
) -> tuple[Callable[[bytes], Any], str, tuple[tuple[str, str, tuple[str, ...]], ...]]:
    """Decodes the top-level fields that are wanted and nothing else.

    Returns the decoder, whose results have attributes `a0` (the text), `a1`, ...; the attribute of the
    id; and for each of `fields` its name, its attribute, and the names below it.
    """
    top_level = list(dict.fromkeys([text_field, "id", *(field.split(".")[0] for field in fields)]))
    attributes = {name: f"a{i}" for i, name in enumerate(top_level)}
    line = msgspec.defstruct(
        "Line",
        [(attribute, Any, msgspec.UNSET) for attribute in attributes.values()],
        rename={attribute: name for name, attribute in attributes.items()},
    )
    places = tuple(
        (field, attributes[first], tuple(below)) for field in fields for first, *below in [field.split(".")]
    )
    return msgspec.json.Decoder(line).decode, attributes["id"], places


def _pick(found: Any, places: tuple[tuple[str, str, tuple[str, ...]], ...]) -> dict[str, Any]:
    fields = {}
    for field, attribute, below in places:
        value = getattr(found, attribute)
        for name in below:
            value = value.get(name, msgspec.UNSET) if isinstance(value, dict) else msgspec.UNSET
        if value is not msgspec.UNSET:
            fields[field] = value
    return fields


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _defect(line: int, raw: bytes, text_field: str, error: Exception) -> Defect:
    """What is wrong with a line that the fast decoder did not give a text of."""
    try:
        decoded = raw.decode()
    except UnicodeDecodeError as bad:
        detail = f"not UTF-8 (byte {bad.start + 1} of the line is 0x{raw[bad.start]:02x})."
        return Defect(line, "bad_utf8", detail)
    try:
        record = json.loads(decoded)
    except (ValueError, RecursionError) as bad:
        return Defect(line, "bad_json", f"not a JSON object on one line: {bad}.")
    if not isinstance(record, dict):
        return Defect(line, "not_an_object", f"expected a JSON object, found {JSON_NAMES[type(record)]}.")
    if text_field not in record:
        return Defect(line, "no_text", f"no field {text_field!r}; the record has {sorted(record)[:20]}.")
    text = record[text_field]
    if text is None:
        return Defect(line, "null_text", f"field {text_field!r} is null; it must be a string.")
    if not isinstance(text, str):
        detail = f"field {text_field!r} must be a string, found {JSON_NAMES[type(text)]}."
        return Defect(line, "text_not_a_string", detail)
    if surrogate := SURROGATE.search(json.dumps(record, ensure_ascii=False)):
        detail = f"an escape stands for half a character: \\u{ord(surrogate[0]):04x}. No text holds that."
        return Defect(line, "lone_surrogate", detail)
    return Defect(line, "bad_json", f"not JSON as RFC 8259 has it: {error}.")


def _fail(path: str, line: int, what: str) -> NoReturn:
    raise DataError(f"{path}, line {line}: {what}")
