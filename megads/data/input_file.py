"""One input file: opened wherever it lies, counted and hashed while it is read, decompressed in pieces.

Compression is recognized by content; the ending of the name must not contradict it. No piece exceeds
`chunk_bytes` by more than a block, however much a few bytes of input stand for, so a decompression
bomb costs time and no memory.
"""

import gzip
import hashlib
import io
import os
import zlib
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self, cast

import zstandard
from isal import igzip, isal_zlib

GZIP_ENDINGS = (".gz",)
ZSTD_ENDINGS = (".zst", ".zstd")
PLAIN_ENDINGS = (".json", ".jsonl", ".ndjson")
ENDINGS = GZIP_ENDINGS + ZSTD_ENDINGS + PLAIN_ENDINGS

GZIP_MAGIC = b"\x1f\x8b"
ZSTD_MAGICS = (
    b"\x28\xb5\x2f\xfd",
    *(bytes([byte]) + b"\x2a\x4d\x18" for byte in range(0x50, 0x60)),  # a skippable frame: pzstd begins so
)
UNREAD_MAGICS = {b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"PAR1": "Parquet", b"PK\x03\x04": "zip"}

READ_BYTES = 1 << 18
# Four bytes of zstd can stand for a block of 128 KiB: this much can become 16 MiB at most.
ZSTD_INPUT_BYTES = 512

# What a file that is cut short, changed, or out of reach raises while it is read.
READ_ERRORS: tuple[type[Exception], ...] = (
    EOFError,
    zlib.error,
    cast(type[Exception], isal_zlib.error),  # its type stub calls the class an instance
    zstandard.ZstdError,
    OSError,
)
assert issubclass(gzip.BadGzipFile, OSError)


def is_url(path: str) -> bool:
    """Whether a path is for fsspec ("s3://bucket/key") and not of a mounted file system."""
    return "://" in path


class InputFile(io.RawIOBase):
    """The bytes of a file as they are stored, read once from start to end.

    `bytes_read` says how far, and `sha256` hashes what is left and gives the hash of all of it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self.bytes_read = 0
        self._hash = hashlib.sha256()
        self._file: Any = _open_url(self.path) if is_url(self.path) else open(self.path, "rb", buffering=0)  # noqa: SIM115

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        try:
            count = int(self._file.readinto(view) or 0)
        except OSError:
            raise
        except Exception as error:  # stores have errors of their own
            if not is_url(self.path):
                raise
            raise OSError(str(error)) from error
        self._hash.update(view[:count])
        self.bytes_read += count
        return count

    def sha256(self) -> str:
        while self.read(READ_BYTES):
            pass
        return self._hash.hexdigest()

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def decompressed(source: InputFile, chunk_bytes: int) -> Iterator[bytes]:
    """The content of a file in non-empty pieces of about `chunk_bytes`; raises READ_ERRORS."""
    file = io.BufferedReader(source, READ_BYTES)
    try:
        magic = file.peek(5)[:5]  # a pipe cannot be wound back
        _check_format(source.path, magic)
        if magic.startswith(ZSTD_MAGICS):
            yield from _merged(_zstd_frames(file), chunk_bytes)
            return
        # gzip raises EOFError at a truncated member and BadGzipFile, an OSError, at a wrong checksum.
        # read1 takes what a pipe has, where read would loop, deaf to signals, until it had all.
        read = igzip.IGzipFile(fileobj=file).read if magic.startswith(GZIP_MAGIC) else file.read1
        while chunk := read(chunk_bytes):
            yield chunk
    finally:
        file.detach()


def _open_url(url: str) -> Any:
    import fsspec

    try:
        return fsspec.open(url, "rb").open()
    except OSError:
        raise
    except Exception as error:  # an unknown protocol, a missing client library, a refused login
        raise OSError(str(error)) from error


def _check_format(path: str, magic: bytes) -> None:
    """Raise EOFError for what is not the compression of its name, or one that is not read."""
    for name, endings, is_right in (
        ("gzip", GZIP_ENDINGS, magic.startswith(GZIP_MAGIC)),
        ("zstd", ZSTD_ENDINGS, magic.startswith(ZSTD_MAGICS)),
    ):
        if path.endswith(endings) and not is_right:
            contradicted = f"the name ends as {name}'s do, but the content is not {name}"
            raise EOFError(contradicted if magic else "it is empty")
    for unread, name in UNREAD_MAGICS.items():
        if magic.startswith(unread):
            raise EOFError(f"it is {name}, and what is read is JSON lines, plain or as gzip or zstd")


def _zstd_frames(file: "io.BufferedReader[InputFile]") -> Iterator[bytes]:
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
