"""Reading Dolma-format corpora: JSON lines, plain or compressed with gzip or zstd.

Dolma (arXiv:2402.00159) stores a document a line, `{"id", "text", "source", ...}`. Files are read as
a stream, so memory is bounded by the longest line. Whatever is wrong with a line is told, with its
number and a reason: a corpus that lost documents without a word is worse than none.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import msgspec
import numpy as np
import orjson

from megads.data.input_file import READ_ERRORS, InputFile, decompressed
from megads.errors import DataError

if TYPE_CHECKING:
    from megads.data.chat_template import Piece

BATCH_BYTES = 1 << 20
MAX_LINE_BYTES = 16 << 20
NEWLINE = ord("\n")
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


class DamagedInputError(DataError):
    """An input file cannot be read to its end: cut short, changed on the way, or out of reach."""


def read_line_batches(
    source: str | os.PathLike[str] | InputFile,
    *,
    batch_bytes: int = BATCH_BYTES,
    max_line_bytes: int = MAX_LINE_BYTES,
) -> Iterator[LineBatch]:
    """Stream a file as batches of whole lines of about `batch_bytes` (a longer line comes whole).

    A line of more than `max_line_bytes` is passed over without being held; a batch without data tells
    of it in its `defects`, as soon as the line is known to be too long. Memory is bounded by the two
    sizes. Raises DamagedInputError, with file and line, when the file cannot be opened, is truncated
    or damaged. A file that is handed over open stays open.
    """
    path = source.path if isinstance(source, InputFile) else os.fspath(source)
    first_line, data = 1, b""
    try:
        with nullcontext(source) if isinstance(source, InputFile) else InputFile(source) as file:
            for first_line, data, defects in _whole_lines(decompressed(file, batch_bytes), max_line_bytes):
                yield LineBatch(path, first_line, data, file.bytes_read, defects)
    except READ_ERRORS as error:
        raise _damaged(path, first_line + _count_newlines(data), error) from error


def open_input(path: str | os.PathLike[str]) -> InputFile:
    """Open a file for `read_line_batches`; raises DamagedInputError when that cannot be."""
    try:
        return InputFile(path)
    except OSError as error:
        raise _damaged(os.fspath(path), 1, error) from error


def _damaged(path: str, line: int, error: Exception) -> DamagedInputError:
    what = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    mend = "Make it readable" if isinstance(error, PermissionError) else "Fetch or make it again"
    return DamagedInputError(f"{path}, line {line}: the file cannot be read any further: {what}. {mend}.")


Lines = tuple[int, bytes, tuple[Defect, ...]]


def _whole_lines(chunks: Iterator[bytes], max_line_bytes: int) -> Iterator[Lines]:
    """Whole lines, with the number of the first; a too long line is a defect without data.

    What is passed over comes as empty pieces, so that the reader of a bomb notices that time passes.
    """
    line, skipping = 1, False
    unfinished = bytearray()
    for piece in chunks:
        chunk = piece
        if skipping:
            if (end := chunk.find(b"\n")) < 0:
                yield line, b"", ()
                continue
            chunk, line, skipping = chunk[end + 1 :], line + 1, False
        end = chunk.find(b"\n")
        if len(unfinished) + (len(chunk) if end < 0 else end) > max_line_bytes:
            yield line, b"", (_too_long(line, max_line_bytes),)
            unfinished.clear()
            if skipping := end < 0:
                continue
            chunk, line = chunk[end + 1 :], line + 1
        if end := chunk.rfind(b"\n") + 1:
            data = bytes(unfinished) + chunk[:end]
            unfinished = bytearray(chunk[end:])
            yield from _without_too_long(line, data, max_line_bytes)
            line += _count_newlines(data)
        else:
            unfinished += chunk
    yield from _without_too_long(line, bytes(unfinished), max_line_bytes)


def _without_too_long(first_line: int, data: bytes, max_line_bytes: int) -> Iterator[Lines]:
    """`data` as it is or, if it holds too long lines, in parts between them."""
    if len(data) <= max_line_bytes:
        if data:
            yield first_line, data, ()
        return
    part: list[bytes] = []
    for line, raw in enumerate(data.removesuffix(b"\n").split(b"\n"), first_line):
        if len(raw) <= max_line_bytes:
            part.append(raw)
            continue
        if part:
            yield line - len(part), b"\n".join(part) + b"\n", ()
        yield line, b"", (_too_long(line, max_line_bytes),)
        part = []
    if part:
        yield first_line + data.removesuffix(b"\n").count(b"\n") + 1 - len(part), b"\n".join(part) + b"\n", ()


def _count_newlines(data: bytes) -> int:
    return int(np.count_nonzero(np.frombuffer(data, np.uint8) == NEWLINE))  # ten times bytes.count


def _too_long(line: int, max_line_bytes: int) -> Defect:
    return Defect(
        line,
        "line_too_long",
        f"the line is longer than {max_line_bytes:,} bytes; is this JSON lines? (--max-line-mb)",
    )


class Record(NamedTuple):
    """A document: its line (from 1), text, id where it has one, and the metadata asked for.

    `pieces` are those of a conversation, of which the text is a part (see `instructions`).
    """

    line: int
    text: str
    id: str | None
    fields: dict[str, Any]
    pieces: "tuple[Piece, ...]" = ()

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
    if data.isascii():
        return True
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _defect(line: int, raw: bytes, text_field: str, error: Exception) -> Defect:
    """What is wrong with a line that the fast decoder did not give a text of."""
    record = _slowly_decoded(line, raw)
    if isinstance(record, Defect):
        return record
    if text_field not in record:
        return Defect(line, "no_text", f"no field {text_field!r}; the record has {sorted(record)[:20]}.")
    text = record[text_field]
    if text is None:
        return Defect(line, "null_text", f"field {text_field!r} is null; it must be a string.")
    if not isinstance(text, str):
        detail = f"field {text_field!r} must be a string, found {JSON_NAMES[type(text)]}."
        return Defect(line, "text_not_a_string", detail)
    return _not_strict(line, record, error)


def decode_object(line: int, raw: bytes) -> dict[str, Any] | Defect:
    """All that a line holds, or why it holds no object: `bad_utf8`, `bad_json`, `not_an_object`,
    `lone_surrogate`.
    """
    try:
        content = orjson.loads(raw)
        if isinstance(content, dict):
            return content
        raise ValueError
    except (ValueError, RecursionError) as error:
        record = _slowly_decoded(line, raw)
        return record if isinstance(record, Defect) else _not_strict(line, record, error)


def pick_field(content: dict[str, Any], name: str) -> list[Any]:
    """[the value] of a field, whose name may be nested with dots; [] where there is none."""
    value: Any = content
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            return []
        value = value[part]
    return [value]


def _slowly_decoded(line: int, raw: bytes) -> dict[str, Any] | Defect:
    """The object on a line by Python's own decoder, which says what is wrong and forgives a little more."""
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
    return record


def _not_strict(line: int, record: dict[str, Any], error: Exception) -> Defect:
    """Why an object that Python's decoder takes is refused by stricter ones."""
    if surrogate := SURROGATE.search(json.dumps(record, ensure_ascii=False)):
        detail = f"an escape stands for half a character: \\u{ord(surrogate[0]):04x}. No text holds that."
        return Defect(line, "lone_surrogate", detail)
    return Defect(line, "bad_json", f"not JSON as RFC 8259 has it: {error}.")


def _fail(path: str, line: int, what: str) -> NoReturn:
    raise DataError(f"{path}, line {line}: {what}")
