"""`CheckpointStore`: saves in the background, loads verified, keeps what is worth keeping.

Every rank makes one and calls the same methods at the same steps. All collectives run in the main
thread on a gloo group of the store's own; the background thread only writes, flushes and hashes
files, so a slow disk can neither block nor interleave with training's communication.

A save that fails (disk full, quota, a dead writer) is a warning: its files are removed, earlier
checkpoints stay, training goes on, the next save tries again. After `max_failures` in a row
TrainingError ends the run. `last_saved` says what is really on disk, `failure` why the newest save is not.
"""

import json
import logging
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch.distributed as dist
from torch.distributed.checkpoint.storage import WriteResult

from megads.checkpoint import commit
from megads.checkpoint.commit import CheckpointInfo
from megads.checkpoint.lease import LEASE_NAME, DirectoryLease
from megads.checkpoint.manifest import MANIFEST_NAME, FileEntry, Hasher, build_manifest, read_manifest, verify
from megads.checkpoint.mirror import CheckpointMirror
from megads.checkpoint.pickles import check_pickles, refuse_unsafe_environment
from megads.checkpoint.ranks import Ranks
from megads.checkpoint.sharded import PlannedSave, load_sharded, plan_save
from megads.config.disk import size_text
from megads.errors import CheckpointError, RunStopped, TrainingError

logger = logging.getLogger(__name__)

Written = tuple[list[WriteResult], dict[str, FileEntry]]
_Outcome = tuple[str | None, Written | None]  # why it failed, or what was written


@dataclass
class _Pending:
    """A save between `save` and its commit."""

    step: int
    save_id: str
    planned: PlannedSave
    record: dict[str, Any]
    metrics: dict[str, float]
    written: Future[Written]


class CheckpointStore:
    """The checkpoints of one directory; it must be on a file system that all ranks share.

    `keep_last_n`: newest checkpoints kept, 0 for all; `keep_best`: also the one with the lowest
    `metrics["validation_loss"]`. `group`: a gloo group over all ranks; without it one is made. Rank 0
    sends what is committed to the `mirror`, and restores from it.
    Takes the directory's lease; CheckpointError where another job holds it.
    """

    def __init__(
        self,
        directory: str | Path,
        keep_last_n: int = 5,
        keep_best: bool = True,
        async_save: bool = True,
        group: dist.ProcessGroup | None = None,
        max_failures: int = 3,
        mirror: CheckpointMirror | None = None,
    ) -> None:
        self.directory = Path(directory).absolute()
        self._mirror = mirror
        self.last_saved: CheckpointInfo | None = None
        self._keep_last_n, self._keep_best = keep_last_n, keep_best
        self._async_save, self._max_failures = async_save, max_failures
        self.failure: str | None = None
        self._failures = 0
        self._structure_checked = False
        self._verified: Path | None = None
        self._pending: _Pending | None = None
        self._pruning: Future[list[Path]] | None = None
        self._lease: DirectoryLease | None = None
        self._ranks = Ranks(group)
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        try:
            self._check_shared(self._ranks.first(self._open_directory))
        except BaseException:
            self.close(abandon=True)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        # All ranks agreed on a stop: they come here together, as at the end of a run.
        self.close(abandon=kind is not None and not issubclass(kind, RunStopped))

    def _open_directory(self) -> bytes:
        """Rank 0: takes the lease; returns what its file says."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._lease = DirectoryLease(self.directory)
            lease = self._lease.path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"{self.directory}: cannot be used for checkpoints: {error}") from error
        if self._mirror is not None:
            self._mirror.store.check()
        return lease

    def _check_shared(self, lease: bytes) -> None:
        """Every rank must find rank 0's lease in the directory, or it is not the same one."""
        try:
            found = (self.directory / LEASE_NAME).read_bytes()
        except OSError:
            found = b""
        failure = (
            f"{self.directory} is not the directory that rank 0 sees; "
            "checkpointing.save_dir must be on a file system that all nodes share"
        )
        self._ranks.check_all(None if found == lease else failure)

    # ---------------------------------------------------------------- saving

    def save(
        self,
        step: int,
        sharded_state_dict: dict[str, Any],
        record: dict[str, Any],
        metrics: dict[str, float] | None = None,
    ) -> None:
        """Saves the state after `step`; returns when it is copied (async) or committed.

        `sharded_state_dict` (Megatron-Core's, consumed) may hold plain values beside its shards.
        `record` is JSON, readable without loading: `config`, `tokens`, `tokenizer_sha256`,
        `data_fingerprints`, `layout`, training state; rank 0's is stored, as it is now. A save that
        is still being written is waited for first.
        """
        if self._pending is not None:
            logger.info(
                "step %d: waiting for the checkpoint of step %d to be written", step, self._pending.step
            )
        self.wait()
        record = json.loads(json.dumps(record))  # the caller may go on changing it
        save_id = self._ranks.broadcast(os.urandom(4).hex())
        try:
            temporary = self._ranks.first(lambda: self._prepare(step, save_id))
        except (CheckpointError, OSError) as error:
            self._count_failure(step, str(error))
            return
        planned = plan_save(
            sharded_state_dict,
            temporary,
            self._ranks,
            copy=self._async_save,
            check=not self._structure_checked,
        )
        self._structure_checked = True
        commit.phase("staged")
        written: Future[Written] = self._threads.submit(_write, planned)
        self._pending = _Pending(step, save_id, planned, record, dict(metrics or {}), written)
        if not self._async_save:
            self.wait()

    def poll(self) -> CheckpointInfo | None:
        """Call every step: commits a background save that all ranks have written.

        Returns the checkpoint on the step that commits it. Raises TrainingError after
        `max_failures` failed saves in a row.
        """
        self._report_pruning(block=False)
        if self._pending is None or not self._ranks.all_true(self._pending.written.done()):
            return None
        return self._finish()

    def wait(self) -> CheckpointInfo | None:
        """Waits for a background save and for the deletion of old checkpoints."""
        info = None
        if self._pending is not None:
            wait([self._pending.written])
            info = self._finish()
        self._report_pruning(block=True)
        return info

    def close(self, abandon: bool = False) -> None:
        """Finishes what is under way, waits a bounded time for the mirror, and gives the lease back.

        `abandon`: without any collective and without a commit, for the way out of a failed run,
        where other ranks may be gone; the half-written save is removed by the next run.
        """
        try:
            if not abandon:
                self.wait()
                self._finish_mirror()
        finally:
            if self._mirror is not None:
                self._mirror.stop()
            self._threads.shutdown(wait=not abandon, cancel_futures=True)
            self._pending = None
            if self._lease is not None:
                self._lease.release()
                self._lease = None
            self._ranks.close()

    def _finish_mirror(self) -> None:
        # Collective: a launcher ends the job, with rank 0 in it, when another rank has stopped.
        if (mirror := self._mirror) is not None:
            self._ranks.first(lambda: mirror.finish(self.directory))

    def _prepare(self, step: int, save_id: str) -> Path:
        commit.remove_leftovers(self.directory)
        return commit.create_temporary(self.directory, step, save_id)

    def _finish(self) -> CheckpointInfo | None:
        """Collective: gathers what each rank wrote; rank 0 commits it, or removes it if any failed."""
        assert self._pending is not None
        pending, self._pending = self._pending, None
        error = pending.written.exception()
        mine: _Outcome = (self._explain(error), None) if error else (None, pending.written.result())
        gathered = self._ranks.gather(mine)
        try:
            info = self._ranks.first(lambda: self._commit_or_discard(pending, gathered))
        except (CheckpointError, OSError) as failure:
            self._count_failure(pending.step, str(failure))
            return None
        self._failures, self.failure = 0, None
        self.last_saved = info
        if self._ranks.rank == 0:
            if self._mirror is not None:
                self._mirror.update(self.directory)
            self._pruning = self._threads.submit(self._prune, info)
        return info

    def _prune(self, hashed: CheckpointInfo) -> list[Path]:
        spared = self._mirror.uploading if self._mirror is not None else None
        return commit.prune(self.directory, self._keep_last_n, self._keep_best, hashed, spared)

    def _commit_or_discard(self, pending: _Pending, gathered: list[_Outcome]) -> CheckpointInfo:
        try:
            return self._commit(pending, gathered)
        except BaseException:
            commit.discard(pending.planned.directory)
            raise

    def _commit(self, pending: _Pending, gathered: list[_Outcome]) -> CheckpointInfo:
        failures = [f"rank {rank}: {text}" for rank, (text, _) in enumerate(gathered) if text]
        if failures:
            raise CheckpointError("; ".join(failures[:4]))
        commit.phase("shards_written")
        results = [written[0] for _, written in gathered if written]
        files = pending.planned.write_metadata(results)
        for _, written in gathered:
            assert written is not None
            assert not files.keys() & written[1].keys(), "two ranks wrote one file"
            files |= written[1]
        commit.phase("metadata_written")
        manifest = build_manifest(pending.step, pending.save_id, files, pending.record, pending.metrics)
        return commit.commit(pending.planned.directory, manifest)

    def _explain(self, error: BaseException) -> str:
        """With the space that is left, before anything is removed: torch says nothing of a full disk."""
        try:
            free = f"{size_text(shutil.disk_usage(self.directory).free)} free"
        except OSError:  # the directory itself is gone; the other ranks wait for what this one says
            free = f"{self.directory} is gone"
        return f"{type(error).__name__}: {error} ({free})"

    def _count_failure(self, step: int, reason: str) -> None:
        self._failures += 1
        self.failure = f"the checkpoint of step {step} was not saved: {reason}"
        if self._ranks.rank == 0:
            logger.warning(
                "the checkpoint of step %d was not saved (failure %d of %d in a row): %s; "
                "earlier checkpoints are intact, training goes on",
                step,
                self._failures,
                self._max_failures,
                reason,
            )
        if self._failures >= self._max_failures:
            raise TrainingError(
                f"{self._failures} saves in a row failed, the last of step {step}: {reason}. "
                f"Make room in or mend {self.directory}, then start again: the run resumes from "
                f"{self.last_saved.path.name if self.last_saved else 'its newest checkpoint'}"
            )

    def _report_pruning(self, block: bool) -> None:
        if self._pruning is None or not (block or self._pruning.done()):
            return
        pruning, self._pruning = self._pruning, None
        if error := pruning.exception():
            logger.warning("old checkpoints could not be deleted: %s", error)

    # --------------------------------------------------------------- loading

    def find(self, source: str | Path = "latest") -> CheckpointInfo | None:
        """The checkpoint to load, verified; collective.

        `source`: "latest" of this directory or its mirror (None where there is none), a checkpoint, or
        another directory of checkpoints. Falls back past damaged ones, which are set aside if the directory
        is ours; CheckpointError where nothing good is left. Read its `record` next
        (`commit.read_record`), to build the model that `load` fills.
        """
        info = self._ranks.first_with_hasher(lambda hasher: self._find(source, hasher))
        self._verified = info.path if info else None
        return info

    def find_before(self, step: int) -> CheckpointInfo | None:
        """The newest good checkpoint of an earlier step than `step`, verified; collective."""
        info = self._ranks.first_with_hasher(
            lambda hasher: commit.newest_good(self.directory, hasher, before=step)
        )
        self._verified = info.path if info else None
        return info

    def _find(self, source: str | Path, hasher: Hasher) -> CheckpointInfo | None:
        refuse_unsafe_environment()
        path = self.directory if source == "latest" else Path(source).absolute()
        if path == self.directory:
            return self._newest(hasher)
        if path.is_dir() and not (path / MANIFEST_NAME).exists() and commit.latest(path):
            return commit.newest_good(path, hasher, move_bad=False)
        return CheckpointInfo(verify(path, hasher).step, 1, path)

    def _newest(self, hasher: Hasher) -> CheckpointInfo | None:
        if self._mirror is None:
            return commit.newest_good(self.directory, hasher)
        try:
            local, failure = commit.newest_good(self.directory, hasher), None
        except CheckpointError as error:
            local, failure = None, error
        restored = self._mirror.restore(self.directory, local, hasher)
        if restored is None and failure is not None:
            raise failure
        return restored or local

    def load(
        self, source: str | Path, sharded_state_dict: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Loads a checkpoint in the layout of `sharded_state_dict`: (state, record); collective.

        `source` as for `find`, which is done first unless it has just been done for this path;
        None where "latest" finds none. The manifest is verified and the pickles are checked before
        anything is unpickled.
        """
        refuse_unsafe_environment()
        path = Path(source).absolute() if source != "latest" else None
        if path is None or path != self._verified:
            info = self.find(source)
            if info is None:
                return None
            path = info.path
        manifest = self._ranks.first(lambda: read_manifest(path))
        self._ranks.first(lambda: check_pickles(path, set(manifest.files)))
        state = load_sharded(path, sharded_state_dict, self._ranks)
        self._verified = None
        return state, manifest.record


def _write(planned: PlannedSave) -> Written:
    commit.phase("writing")
    written = planned.write()
    commit.phase("rank_written")
    return written
