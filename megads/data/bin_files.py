"""Reading ranges of many `.bin` files, of which only some are kept open.

Reads are `pread`s, not page faults of a mapping: a file that was truncated, or a file server that went
away, is an error with a name and not a SIGBUS that ends the process without a word.
"""

import os
from collections import OrderedDict
from collections.abc import Sequence

from megads.errors import DataError

# Well below the usual limit of 1,024 open files of a process.
MOST_OPEN_FILES = 128


class BinFiles:
    """Ranges of bytes of numbered files; at most `most_open` of them are open at any time.

    Safe to use on both sides of a fork: positions are not shared.
    """

    def __init__(self, paths: Sequence[str], most_open: int = MOST_OPEN_FILES) -> None:
        assert most_open > 0
        self._paths = paths
        self._most_open = most_open
        self._open: OrderedDict[int, int] = OrderedDict()

    def read(self, number: int, offset_bytes: int, size_bytes: int) -> bytes:
        """Bytes of one file. Raises DataError where it has none there, or cannot be read."""
        try:
            descriptor = self._descriptor(number)
            data = os.pread(descriptor, size_bytes, offset_bytes)
            while len(data) < size_bytes:  # Linux returns at most 2 GiB at once
                more = os.pread(descriptor, size_bytes - len(data), offset_bytes + len(data))
                if not more:
                    raise DataError(
                        f"{self._paths[number]}: ends before byte {offset_bytes + size_bytes:,}; it was "
                        "whole when the run started. Put it back and resume from the last checkpoint."
                    )
                data += more
        except OSError as error:
            raise DataError(
                f"{self._paths[number]}: cannot be read: {error}. Mend it, then resume from a checkpoint."
            ) from error
        return data

    def _descriptor(self, number: int) -> int:
        descriptor = self._open.get(number)
        if descriptor is not None:
            self._open.move_to_end(number)
            return descriptor
        if len(self._open) >= self._most_open:
            os.close(self._open.popitem(last=False)[1])
        descriptor = os.open(self._paths[number], os.O_RDONLY | os.O_CLOEXEC)
        self._open[number] = descriptor
        return descriptor

    def close(self) -> None:
        """Close all files; a later read opens again what it needs."""
        while self._open:
            os.close(self._open.popitem()[1])

    def __del__(self) -> None:
        self.close()
