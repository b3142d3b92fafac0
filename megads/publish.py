"""Files that are there whole, on the disk, or not at all, whatever dies when."""

import errno
import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from megads.errors import DataError


@contextmanager
def published(path: Path) -> Iterator[BinaryIO]:
    """A file to write and read, which gets the name `path` when the block ends and all of it is on the disk.

    It replaces what has the name; a block that raises changes nothing. The directory is made. Of several
    processes that publish one path at once the last one stays; what a killed one leaves the next one
    uses. Raises OSError where the disk does.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path)
    try:
        file = open_locked(partial)
    except BlockingIOError:
        partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
        file = open(partial, "x+b")  # noqa: SIM115
    with file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    flush_to_disk(path.parent)


def publish_file(path: Path, content: bytes) -> None:
    """Publish a small file; raises DataError where it cannot be written."""
    try:
        with published(path) as file:
            file.write(content)
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error}.") from error


def partial_path(path: Path) -> Path:
    """What a file is called until it is whole."""
    return path.with_name(f".{path.name}.partial")


def open_locked(path: Path) -> BinaryIO:
    """Open for writing, emptied, and locked until it is closed or the process ends, however that ends.

    Raises BlockingIOError while another process has it open so, or where files cannot be locked.
    """
    file = open(path, "r+b", opener=lambda name, flags: os.open(name, flags | os.O_CREAT, 0o666))  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The other process may have renamed this very file between our open and our lock.
        if not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
            raise FileNotFoundError
        file.truncate()
    except OSError as error:
        file.close()
        raise BlockingIOError(errno.EAGAIN, "written by another process", str(path)) from error
    return file


def flush_to_disk(path: Path) -> None:
    """`fsync` of a file or a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
