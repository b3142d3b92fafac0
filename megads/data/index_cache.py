"""Files of the index below `data.cache_dir`/index: arrays, there whole or not at all, checked when opened.

Megatron-Core writes such files in place and takes one that exists for a whole one, so a killed build is
read as if it were complete. Here a file gets its name when its last byte is on the disk, and ends with a
checksum. Its name holds a hash of all that its content follows from, so a file is never out of date; two
builds at once write the same bytes, and the last one stays. All of `index/` may be deleted at any time.
"""

import logging
import math
import os
import struct
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import orjson
from numpy.typing import NDArray

from megads.errors import DataError
from megads.publish import published

logger = logging.getLogger(__name__)

MAGIC = b"MegaDS index 1\n\0"
SIZES = struct.Struct("<QQ")  # of the header, of all before the checksum
CHECKSUM = struct.Struct("<I")
ALIGNMENT_BYTES = 64
COPY_BYTES = 16 << 20

Arrays = dict[str, NDArray[Any]]
Shapes = Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]]


def index_directory(cache_dir: str | os.PathLike[str]) -> Path:
    """Where the index of the datasets of this cache lies."""
    return Path(cache_dir) / "index"


def publish_arrays(path: Path, facts: dict[str, Any], shapes: Shapes, fill: Callable[[Arrays], None]) -> None:
    """Write a file of arrays, which `fill` fills in place, and JSON facts about them; atomically.

    Raises DataError when it cannot be written.
    """
    try:
        with published(path) as file:
            layout, end_bytes = _write_header(file, facts, shapes)
            # A full disk is an error here; met while writing to the mapping it would be a SIGBUS.
            os.posix_fallocate(file.fileno(), 0, end_bytes + CHECKSUM.size)
            arrays = {
                name: np.memmap(file, dtype=dtype, mode="r+", offset=offset_bytes, shape=shape)
                for name, (dtype, shape, offset_bytes) in layout.items()
            }
            fill({name: array.view(np.ndarray) for name, array in arrays.items()})
            for array in arrays.values():
                array.flush()
            del arrays
            checksum = CHECKSUM.pack(_checksum(file, end_bytes))
            file.seek(end_bytes)
            file.write(checksum)
    except OSError as error:
        raise DataError(
            f"{path}: the index cannot be written: {error}. data.cache_dir must be writable, and the same "
            "storage on every node."
        ) from error


def load_arrays(path: Path, *, check: bool) -> tuple[dict[str, Any], Arrays] | None:
    """Facts and arrays (mapped, read-only) of a file; None where there is none, or a damaged one.

    `check` compares the checksum of the whole file, and warns of a damaged one; without it only sizes
    are compared, for a file that another process has just checked.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(len(MAGIC) + SIZES.size)
            found_bytes = os.fstat(file.fileno()).st_size
            whole = len(head) == len(MAGIC) + SIZES.size and head.startswith(MAGIC)
            header_bytes, end_bytes = SIZES.unpack(head[len(MAGIC) :]) if whole else (0, 0)
            whole = whole and found_bytes == end_bytes + CHECKSUM.size
            if whole and check:
                file.seek(end_bytes)
                whole = CHECKSUM.unpack(file.read(CHECKSUM.size))[0] == _checksum(file, end_bytes)
            if not whole:
                logger.warning("%s is damaged: it is made again", path)
                return None
            file.seek(len(head))
            header = orjson.loads(file.read(header_bytes))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"{path}: the index cannot be read: {error}.") from error
    return header["facts"], {
        name: np.memmap(path, dtype=np.dtype(dtype), mode="r", offset=offset, shape=tuple(shape)).view(
            np.ndarray
        )
        for name, (dtype, shape, offset) in header["arrays"].items()
    }


def _write_header(
    file: BinaryIO, facts: dict[str, Any], shapes: Shapes
) -> tuple[dict[str, tuple[np.dtype[Any], tuple[int, ...], int]], int]:
    """Returns dtype, shape and offset in bytes of each array, and the end of the last one."""
    # Offsets have one width, so that the header does not grow when they are put in.
    described = {name: [dtype.str, list(shape), 10**18] for name, (dtype, shape) in shapes.items()}
    header_bytes = len(orjson.dumps({"facts": facts, "arrays": described}))
    offset_bytes = len(MAGIC) + SIZES.size + header_bytes
    layout = {}
    for name, (dtype, shape) in shapes.items():
        offset_bytes += -offset_bytes % ALIGNMENT_BYTES
        layout[name] = (dtype, shape, offset_bytes)
        described[name][2] = offset_bytes
        offset_bytes += dtype.itemsize * math.prod(shape)
    header = orjson.dumps({"facts": facts, "arrays": described}).ljust(header_bytes)
    file.write(MAGIC + SIZES.pack(header_bytes, offset_bytes) + header)
    file.flush()
    return layout, offset_bytes


def _checksum(file: BinaryIO, end_bytes: int) -> int:
    """CRC-32 of the first `end_bytes` of a file."""
    crc, left_bytes = 0, end_bytes
    file.seek(0)
    while left_bytes > 0 and (data := file.read(min(COPY_BYTES, left_bytes))):
        crc = zlib.crc32(data, crc)
        left_bytes -= len(data)
    return crc
