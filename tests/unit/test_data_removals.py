"""Removals: what is written is read back, and nothing damaged or foreign is applied."""

from pathlib import Path

import orjson
import pytest
import zstandard

from megads.data.removals import (
    Removal,
    read_removals,
    read_removals_header,
    removals_path,
    write_removals,
)
from megads.errors import DataError

SHA256 = "5" * 64
ENTRIES = {
    9: Removal("near_duplicate"),
    2: Removal("duplicate_paragraph", ((0, 4), (4, 6), (9, 10))),
    4: Removal("near_duplicate"),
}


def write(path: Path, entries: dict[int, Removal] = ENTRIES) -> Path:
    write_removals(
        path, input_file="a.json.gz", input_bytes=77, input_sha256=SHA256, documents=10, entries=entries
    )
    return path


def repack(path: Path, lines: list[bytes]) -> None:
    path.write_bytes(zstandard.ZstdCompressor().compress(b"".join(line + b"\n" for line in lines)))


def unpack(path: Path) -> list[bytes]:
    return zstandard.ZstdDecompressor().decompress(path.read_bytes()).splitlines()


def test_round_trip(tmp_path: Path) -> None:
    path = write(removals_path(tmp_path, "web", "a.json.gz"))
    assert path == tmp_path / "web" / "a.json.gz.removals.zst"
    assert read_removals(path, SHA256) == ENTRIES
    assert list(read_removals(path, SHA256)) == [2, 4, 9]
    header = read_removals_header(path)
    assert (header.input_file, header.input_bytes, header.documents) == ("a.json.gz", 77, 10)
    assert header.removed == {"near_duplicate": 2, "duplicate_paragraph": 1}
    assert orjson.loads(unpack(path)[1]) == {
        "line": 2,
        "reason": "duplicate_paragraph",
        "spans": [[0, 4], [4, 6], [9, 10]],
    }
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_no_entries(tmp_path: Path) -> None:
    assert read_removals(write(tmp_path / "none", {}), SHA256) == {}


def test_cutting() -> None:
    assert ENTRIES[2].cut("0123456789") == "678"
    assert Removal("x", ((1, 2),)).cut("ä🎉b") == "äb"
    assert Removal("x", ((0, 3),)).cut("abc") == ""
    with pytest.raises(ValueError, match="character 10 of 9"):
        ENTRIES[2].cut("012345678")


def test_other_content_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="another content of"):
        read_removals(write(tmp_path / "a"), "6" * 64)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a")
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError):
            read_removals(path, SHA256)
    with pytest.raises(DataError, match="cannot be read"):
        read_removals(tmp_path / "missing", SHA256)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda lines: lines[:-1], "2 entries, its header counts 3"),
        (lambda lines: [lines[0], lines[2], lines[1], lines[3]], "line 3: not an entry in ascending order"),
        (lambda lines: [*lines[:3], b"{}"], "line 4: not an entry"),
        (lambda lines: [*lines[:3], b"oops"], "line 4: not JSON"),
        (lambda lines: [lines[0].replace(b"removals-1", b"removals-9"), *lines[1:]], "no header of format"),
        (lambda lines: [b"[]"], "no header of format"),
        (lambda lines: [], "no header of format"),
        (lambda lines: [lines[0], lines[1].replace(b"[4,6]", b"[3,6]"), *lines[2:]], "line 2: not an entry"),
        (lambda lines: [lines[0], lines[1].replace(b"[4,6]", b"[4]"), *lines[2:]], "line 2: not an entry"),
    ],
)
def test_damage_is_named(tmp_path: Path, change: object, said: str) -> None:
    path = write(tmp_path / "a")
    repack(path, change(unpack(path)))  # type: ignore[operator]
    with pytest.raises(DataError, match=said):
        read_removals(path, SHA256)
