"""Where Megatron-Core keeps the shuffled index of samples, made safe to share and to interrupt.

Megatron-Core writes these files in place, takes a file that exists for a whole one, and keys them by
the dataset's path, so a killed build or a dataset made again under its old name would be used as it
is. Here every build gets a directory of its own; a pointer, published after the last file, names the
one that is complete for a fingerprint of contents and settings. What a killed build left is never
read, and may be deleted like everything below `index/`.
"""

import os
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path

from megads.config.schema import Config
from megads.data.indexed import publish_file
from megads.errors import DataError


@dataclass(frozen=True)
class IndexCache:
    """One build of the index: `directory`, and the pointer to publish if it is new."""

    directory: Path
    pointer: Path
    is_new: bool

    @classmethod
    def open(cls, config: Config, fingerprint: str) -> "IndexCache":
        """The complete build of this fingerprint, or a new directory to build in."""
        root = Path(config.data.cache_dir) / "index"
        pointer = root / f"{fingerprint}.complete"
        if pointer.is_file():
            directory = root / pointer.read_text().strip()
            if directory.is_dir():
                return cls(directory, pointer, is_new=False)
        directory = root / f"{fingerprint}-{secrets.token_hex(4)}"
        try:
            directory.mkdir(parents=True)
        except OSError as error:
            raise DataError(
                f"{directory}: cannot be made: {error}. Set data.cache_dir to a writable place."
            ) from error
        return cls(directory, pointer, is_new=True)

    def complete(self) -> None:
        """Bring a new build to the disk and point to it."""
        if self.is_new:
            for file in self.directory.iterdir():
                with open(file, "rb") as handle:
                    os.fsync(handle.fileno())
            publish_file(self.pointer, self.directory.name.encode() + b"\n")

    def discard(self) -> None:
        """Remove a new build that failed."""
        if self.is_new:
            shutil.rmtree(self.directory, ignore_errors=True)
