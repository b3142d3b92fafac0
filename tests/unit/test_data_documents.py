"""Reading Dolma-format files: every format, and every way in which input can be bad."""

import bz2
import gzip
import json
import lzma
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from megads.data.documents import (
    Defect,
    LineBatch,
    Record,
    parse_records,
    parse_texts,
    read_line_batches,
    read_texts,
)
from megads.errors import DataError

TEXTS = ["first", "second\nwith a line break", "drei: äöü ▁ 🎉", ""]
LINES = b"".join(
    json.dumps({"id": str(i), "text": t, "source": "x"}).encode() + b"\n" for i, t in enumerate(TEXTS)
)


SKIPPABLE_FRAME = struct.pack("<II5s", 0x184D2A50, 5, b"sizes")  # pzstd writes one before each frame


def two_zstd_frames(data: bytes) -> bytes:
    half = len(data) // 2
    compressor = zstandard.ZstdCompressor()
    return compressor.compress(data[:half]) + compressor.compress(data[half:])


def two_gzip_members(data: bytes) -> bytes:
    half = len(data) // 2
    return gzip.compress(data[:half]) + gzip.compress(data[half:])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", LINES),
        ("a.jsonl", LINES.rstrip(b"\n")),
        ("a.jsonl", LINES.replace(b"\n", b"\r\n\n")),
        ("a.json.gz", gzip.compress(LINES)),
        ("a.gz", two_gzip_members(LINES)),
        ("a.jsonl.zst", zstandard.ZstdCompressor().compress(LINES)),
        ("a.zst", two_zstd_frames(LINES)),
        ("a.jsonl.zst", SKIPPABLE_FRAME + SKIPPABLE_FRAME.join([two_zstd_frames(LINES), b""])),
        ("a.unknown", gzip.compress(LINES)),
    ],
)
@pytest.mark.parametrize("batch_bytes", [1, 7, 1 << 20])
def test_every_format_gives_the_texts(tmp_path: Path, name: str, content: bytes, batch_bytes: int) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    batches = list(read_line_batches(path, batch_bytes=batch_bytes))
    assert [text for batch in batches for text in parse_texts(batch)] == TEXTS
    assert batches[-1].input_bytes_read == len(content)


@pytest.mark.parametrize(
    ("bad_line", "said"),
    [
        (b'{"id": "2"}', "no field 'text'"),
        (b'{"text": null}', "is null"),
        (b'{"text": 17}', "found a number"),
        (b'{"text": ["a"]}', "found an array"),
        (b'["text"]', "expected a JSON object, found an array"),
        (b'{"text": "unfinished', "not a JSON object on one line"),
        (b"not json", "not a JSON object on one line"),
        (b'{"text": "\xff\xfe"}', "not UTF-8"),
        (b'{"text": "\\ud800"}', "half a character"),
    ],
)
@pytest.mark.parametrize("batch_bytes", [11, 1 << 20])
def test_a_bad_record_names_file_and_line(
    tmp_path: Path, bad_line: bytes, said: str, batch_bytes: int
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "one"}\n\n{"text": "three"}\n' + bad_line + b'\n{"text": "five"}\n')
    batches = read_line_batches(path, batch_bytes=batch_bytes)
    with pytest.raises(DataError) as caught:
        [parse_texts(batch) for batch in batches]
    assert f"{path}, line 4: " in str(caught.value)
    assert said in str(caught.value)


DEFECTS = {
    "no_text": [b'{"id": "2"}', b"{}"],
    "null_text": [b'{"text": null}'],
    "text_not_a_string": [b'{"text": 17}', b'{"text": 1e999}', b'{"text": {}}', b'{"text": true}'],
    "not_an_object": [b'["text"]', b'"text"', b"null", b"1"],
    "bad_json": [
        b'{"text": "unfinished',
        b"not json",
        b'{"text": "a"} {"text": "b"}',
        b'{"text": "a\tb"}',
        b'{"text": "a", "other": NaN}',
        b'{"text": "a", "other": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
        b'{"text": ' + b"9" * 5000 + b"} x",
    ],
    "bad_utf8": [b'{"text": "\xff"}', b'{"text": "a", "other": "\xff"}', b'{"text": "\xed\xa0\x80"}'],
    "lone_surrogate": [b'{"text": "\\ud800"}', b'{"text": "\\udc00\\ud800"}'],
}


@pytest.mark.parametrize("reason", DEFECTS)
def test_every_defect_has_its_reason_and_harms_no_other_record(reason: str) -> None:
    good = '{"text": "ä", "id": 7}\n'.encode()
    for bad in DEFECTS[reason]:
        first, defect, last = parse_records(LineBatch("x", 5, good + bad + b"\n\n" + good, 0))
        assert isinstance(defect, Defect)
        assert (defect.line, defect.reason) == (6, reason), bad
        assert first == Record(5, "ä", "7", {})
        assert last == Record(8, "ä", "7", {})


def test_metadata_ids_and_keys() -> None:
    data = (
        b'{"text": "a", "id": "i", "lang": "en", "metadata": {"license": {"name": "mit"}, "stars": 3}}\n'
        b'{"text": "b", "metadata": {"license": "none"}, "id": null}\n'
        b'{"text": "c", "metadata": 5, "lang": null, "id": 1.5}\n'
    )
    batch = LineBatch("x", 1, data, 0)
    wanted = ("lang", "metadata.license.name", "metadata.stars")
    records = [record for record in parse_records(batch, "text", wanted) if isinstance(record, Record)]
    assert [record.fields for record in records] == [
        {"lang": "en", "metadata.license.name": "mit", "metadata.stars": 3},
        {},
        {"lang": None},
    ]
    assert [record.id for record in records] == ["i", None, None]
    assert records[0].key == b"i"
    assert len({record.key for record in records}) == 3
    # The text may be the id, and metadata may be asked for that is the text.
    texts = [record for record in parse_records(batch, "id", ("id", "text")) if isinstance(record, Record)]
    assert texts == [Record(1, "i", "i", {"id": "i", "text": "a"})]


@pytest.mark.parametrize("ending", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "other"])
def test_damaged_compression_is_an_error(tmp_path: Path, ending: str, damage: str) -> None:
    data = b"".join(b'{"text": "%d"}\n' % (i * 7919) for i in range(50_000))
    packed = (
        gzip.compress(data)
        if ending == ".gz"
        else zstandard.ZstdCompressor(write_checksum=True).compress(data)
    )
    flipped = bytearray(packed)
    flipped[len(packed) // 2] ^= 0x10
    content = {"truncated": packed[:-100], "flipped": bytes(flipped), "empty": b"", "other": LINES}[damage]
    path = tmp_path / f"a{ending}"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.(gz|zst), line \d+: "):
        list(read_texts([path]))


@pytest.mark.parametrize(("name", "pack"), [("bzip2", bz2.compress), ("xz", lzma.compress)])
def test_other_formats_are_named(tmp_path: Path, name: str, pack: Callable[[bytes], bytes]) -> None:
    (tmp_path / "a.jsonl").write_bytes(pack(LINES))
    with pytest.raises(DataError, match=rf"a\.jsonl, line 1: .*it is {name}, and what is read is JSON lines"):
        list(read_line_batches(tmp_path / "a.jsonl"))


def test_every_truncation_of_a_zstd_file_is_an_error(tmp_path: Path) -> None:
    packed = two_zstd_frames(LINES)
    first_frame = len(zstandard.ZstdCompressor().compress(LINES[: len(LINES) // 2]))
    path = tmp_path / "a.zst"
    for length in set(range(len(packed))) - {first_frame}:
        path.write_bytes(packed[:length])
        with pytest.raises(DataError):
            list(read_texts([path]))


def test_a_giant_line_is_refused_and_memory_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "bomb.gz"
    path.write_bytes(gzip.compress(b'{"text": "' + bytes(64 << 20)))
    tracemalloc.start()
    with pytest.raises(DataError, match="line 1: the line is longer than 2,097,152 bytes"):
        [parse_texts(batch) for batch in read_line_batches(path, max_line_bytes=2 << 20)]
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 16 << 20


def test_reading_is_a_stream(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl.zst"
    line = json.dumps({"text": "x" * 1000}).encode() + b"\n"
    path.write_bytes(zstandard.ZstdCompressor().compress(line * 40_000))
    tracemalloc.start()
    count = sum(1 for _ in read_texts([path]))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 40_000
    assert peak_bytes < 30 << 20, "the file holds 40 MB in 4 KB"


def test_a_missing_file_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="gone"):
        list(read_texts([tmp_path / "gone.jsonl"]))


@pytest.mark.parametrize("chunk_bytes", [1, 5, 64, 1 << 20])
@pytest.mark.parametrize("final_newline", [True, False])
def test_too_long_lines_are_told_and_cost_no_other_line(
    tmp_path: Path, chunk_bytes: int, final_newline: bool
) -> None:
    """The same records and defects however the file is cut into pieces."""
    lines = [b'{"text": "%d"}' % i for i in range(9)]
    for i in (0, 3, 4, 8):
        lines[i] = b'{"text": "' + b"x" * 40 + b'"}'
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n" * final_newline)
    batches = read_line_batches(path, batch_bytes=chunk_bytes, max_line_bytes=30)
    found = [found for batch in batches for found in parse_records(batch)]
    assert [record.line for record in found] == list(range(1, 10))
    assert [d.line for d in found if isinstance(d, Defect)] == [1, 4, 5, 9]
    assert {d.reason for d in found if isinstance(d, Defect)} == {"line_too_long"}
    assert [(r.line, r.text) for r in found if isinstance(r, Record)] == [
        (i + 1, str(i)) for i in (1, 2, 5, 6, 7)
    ]


def test_an_endless_line_is_passed_over_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "bomb.jsonl.gz"
    good = b'{"text": "good"}\n'
    path.write_bytes(gzip.compress(good + b'{"text": "' + bytes(64 << 20) + b'"}\n' + good))
    tracemalloc.start()
    batches = read_line_batches(path, max_line_bytes=2 << 20)
    found = [found for batch in batches for found in parse_records(batch)]
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [(type(f), f.line) for f in found] == [(Record, 1), (Defect, 2), (Record, 3)]
    assert peak_bytes < 16 << 20
