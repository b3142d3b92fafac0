"""Published files: whole or not there, also with two writers, a full disk, and what a killed one has left."""

import errno
import fcntl
import os
from contextlib import suppress
from pathlib import Path

import pytest

from megads.errors import DataError
from megads.publish import open_locked, partial_path, publish_file, published


def test_a_file_appears_whole_and_replaces_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "made" / "file"
    for content in (b"old and longer", b"new"):
        with published(path) as file:
            file.write(content)
            file.flush()
            assert not path.exists() or path.read_bytes() == b"old and longer"
        assert path.read_bytes() == content
    assert os.listdir(path.parent) == ["file"]


def test_a_block_that_fails_changes_nothing(tmp_path: Path) -> None:
    publish_file(tmp_path / "file", b"old")
    with suppress(KeyError), published(tmp_path / "file") as file:
        file.write(b"half")
        raise KeyError
    assert (tmp_path / "file").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]
    (tmp_path / "directory").mkdir()
    with pytest.raises(DataError, match="directory: cannot be written"):
        publish_file(tmp_path / "directory", b"new")
    assert sorted(os.listdir(tmp_path)) == ["directory", "file"]


def test_two_writers_of_one_path_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with published(path) as first:
        first.write(b"1" * 100_000)
        with published(path) as second:
            second.write(b"2" * 50)
        assert path.read_bytes() == b"2" * 50
        first.write(b"1")
    assert path.read_bytes() == b"1" * 100_001
    assert os.listdir(tmp_path) == ["file"]


def test_what_a_killed_writer_left_is_used(tmp_path: Path) -> None:
    partial = partial_path(tmp_path / "file")
    partial.write_bytes(b"longer than what comes next")
    publish_file(tmp_path / "file", b"short")
    assert (tmp_path / "file").read_bytes() == b"short"
    assert os.listdir(tmp_path) == ["file"]


def test_a_lock_is_held_until_the_file_is_closed(tmp_path: Path) -> None:
    with open_locked(tmp_path / "file"), pytest.raises(BlockingIOError):
        open_locked(tmp_path / "file")
    open_locked(tmp_path / "file").close()


def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(file: object, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    publish_file(tmp_path / "file", b"content")
    assert (tmp_path / "file").read_bytes() == b"content"
    assert not caplog.messages
    with pytest.raises(OSError, match="not implemented"):
        open_locked(tmp_path / "other")
    for _ in range(2):
        open_locked(tmp_path / "other", or_unlocked=True).close()
    (said,) = caplog.messages
    assert said.endswith("cannot be locked (Function not implemented): let no other run write there.")
