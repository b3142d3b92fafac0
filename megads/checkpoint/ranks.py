"""The few collectives that a checkpoint store needs, on a gloo group of its own.

A group of its own keeps them apart from training's collectives, and gloo works from host memory on
any machine. All ranks call each of these at the same point, from the main thread.
"""

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megads.checkpoint.manifest import Hasher, hash_files
from megads.errors import CheckpointError

T = TypeVar("T")
TIMEOUT = datetime.timedelta(minutes=60)  # one rank may read its share of a large checkpoint meanwhile


class Ranks:
    """All ranks of the job. Without `group` a gloo group over the world is made, and destroyed by `close`."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._own = group is None
        self._group: Any = dist.new_group(backend="gloo", timeout=TIMEOUT) if group is None else group
        self.rank = dist.get_rank(self._group)
        self.size = dist.get_world_size(self._group)

    def close(self) -> None:
        """Destroys the group, if it is ours; not a collective."""
        if self._own and self._group is not None:
            dist.destroy_process_group(self._group)
        self._group = None

    def all_true(self, value: bool) -> bool:
        """Whether `value` is true on every rank."""
        flag = torch.tensor(int(value), dtype=torch.int32)
        dist.all_reduce(flag, op=dist.ReduceOp.MIN, group=self._group)
        return bool(flag.item())

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in rank order, on rank 0; an empty list elsewhere."""
        values: list[Any] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object(value, values, group=self._group, group_dst=0)
        return values or []

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value on every rank."""
        values = [value]
        dist.broadcast_object_list(values, group=self._group, group_src=0)
        return values[0]

    def first(self, function: Callable[[], T]) -> T:
        """Runs `function` on rank 0 and returns its result everywhere.

        What it raises is raised on every rank: on the others a user's error or a failing disk as
        CheckpointError, anything else, a bug, as RuntimeError.
        """
        if self.rank != 0:
            result: T = self._receive(self.broadcast(None))
            return result
        return self._send(function)

    def first_with_hasher(self, function: Callable[[Hasher], T]) -> T:
        """As `first`, with a hasher that spreads the files over all ranks.

        Rank 0 runs `function`; the others hash what it asks for until it is done.
        """
        if self.rank == 0:
            return self._send(lambda: function(self._hash_together))
        while True:
            kind, value = self.broadcast(None)
            if kind != "hash":
                result: T = self._receive((kind, value))
                return result
            self._hash_share(*value)

    def check_all(self, failure: str | None) -> None:
        """Raises the first rank's failure, as CheckpointError, on every rank."""
        failures = [f"rank {rank}: {text}" for rank, text in enumerate(self.gather(failure)) if text]
        if message := self.broadcast(failures[0] if failures else ""):
            raise CheckpointError(message)

    def _send(self, function: Callable[[], T]) -> T:
        try:
            result = function()
        except Exception as error:
            kind = "refused" if isinstance(error, CheckpointError | OSError) else "bug"
            self.broadcast((kind, str(error)))  # or the other ranks would wait for ever
            raise
        self.broadcast(("done", result))
        return result

    @staticmethod
    def _receive(message: tuple[str, Any]) -> Any:
        kind, value = message
        if kind == "done":
            return value
        raise CheckpointError(value) if kind == "refused" else RuntimeError(f"rank 0 failed: {value}")

    def _hash_together(self, root: Path, names: list[str]) -> dict[str, str]:
        self.broadcast(("hash", (root, names)))
        return self._hash_share(root, names)

    def _hash_share(self, root: Path, names: list[str]) -> dict[str, str]:
        digests: dict[str, str] = {}
        for share in self.gather(hash_files(root, names[self.rank :: self.size])):
            digests |= share
        return digests
