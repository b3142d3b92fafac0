"""A lease on a checkpoint directory, so that two jobs cannot write into it.

An advisory lock (`flock`) on the file `.lease`, held as long as the holder lives: the kernel drops
it with the process, so a lease whose holder was killed is free at once, and of several jobs that
want it exactly one gets it. The file says who holds it.

Limits: the lock is as good as the file system's `flock`. Local file systems and NFSv4 have it;
Lustre needs the mount option `flock` (with `localflock` only jobs of one node see each other).
Where there is none, a warning is logged and the directory is used without a lease.
"""

import errno
import fcntl
import json
import logging
import os
import socket
import time
from pathlib import Path

from megads.errors import CheckpointError

logger = logging.getLogger(__name__)

LEASE_NAME = ".lease"
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}


class DirectoryLease:
    """Holds the lease on `directory` from construction to `release`.

    Raises CheckpointError that names host and process of the holder where another one has it.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / LEASE_NAME
        self._descriptor: int | None = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        # A forked child (a data-loader worker) shares the lock and would keep it after our death.
        os.register_at_fork(after_in_child=self._forget)
        try:
            self._lock()
            self._write_holder()
        except BaseException:
            self._forget()
            raise

    def _lock(self) -> None:
        assert self._descriptor is not None
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"{self.path.parent} is in use by {self._describe_holder()}; "
                "stop that job or give this one a directory of its own (checkpointing.save_dir)"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            logger.warning(
                "%s: this file system has no locks (%s); a second job that writes here would not be noticed",
                self.path.parent,
                error,
            )
            return
        if os.fstat(self._descriptor).st_size:
            logger.warning(
                "taking over %s: %s ended without releasing it", self.path.parent, self._describe_holder()
            )

    def _write_holder(self) -> None:
        assert self._descriptor is not None
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "since_unix_seconds": time.time()}
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, json.dumps(holder).encode(), 0)
        os.fsync(self._descriptor)

    def _describe_holder(self) -> str:
        assert self._descriptor is not None
        try:
            holder = json.loads(os.pread(self._descriptor, 4096, 0))
            return f"process {holder['pid']} on {holder['host']}"
        except (ValueError, KeyError, TypeError):
            return "another process"

    def release(self) -> None:
        """Gives the lease back; the file stays, as unlinking a lock file races with its next holder."""
        if self._descriptor is not None:
            os.ftruncate(self._descriptor, 0)
            self._forget()

    def _forget(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
