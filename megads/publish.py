"""Files that are there whole, on the disk, or not at all, whatever dies when."""

import errno
import fcntl
import logging
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import BinaryIO

from megads.errors import DataError

logger = logging.getLogger(__name__)

# What file systems without locks say: NFS without its lock service, Lustre mounted without "flock".
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


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
    except OSError as error:
        if not isinstance(error, BlockingIOError) and error.errno not in NO_LOCKS:
            raise
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


def open_locked(path: Path, *, or_unlocked: bool = False) -> BinaryIO:
    """Open for writing, emptied, and locked until it is closed or the process ends, however that ends.

    Raises BlockingIOError while another process has it open so. Where files cannot be locked: another
    OSError or, with `or_unlocked`, a warning and no lock.
    """
    file = open(path, "r+b", opener=lambda name, flags: os.open(name, flags | os.O_CREAT, 0o666))  # noqa: SIM115
    try:
        _lock(file, path, or_unlocked)
        file.truncate()
    except OSError:
        file.close()
        raise
    return file


def flush_to_disk(path: Path) -> None:
    """`fsync` of a file or a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _lock(file: BinaryIO, path: Path, or_unlocked: bool) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if not or_unlocked or error.errno not in NO_LOCKS:
            raise
        _warn_of_no_locks(path.parent, error.strerror)
    try:  # whoever had it locked may have renamed this very file between our open and our lock
        same = os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        same = False
    if not same:
        raise BlockingIOError(errno.EAGAIN, "written by another process", str(path))


@cache
def _warn_of_no_locks(directory: Path, why: str) -> None:
    """Once per directory."""
    logger.warning("Files in %s cannot be locked (%s): let no other run write there.", directory, why)
