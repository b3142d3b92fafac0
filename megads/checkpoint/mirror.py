"""A mirror of a run's checkpoints in an object store, for machines that come and go.

On the rank that holds the lease one background thread makes the store hold what is worth keeping of the local
checkpoints, newest first. It compares both sides each time, so whatever was missed while the store was away
is caught up with, as far as it still matters; training never waits for it and never fails by it. On a machine
that has no checkpoint, or an older one, the newest good one of the mirror is fetched and committed.

Every run (with stages: every stage) needs a URL of its own: what another run left there would be taken for
this run's.
"""

import functools
import logging
import threading
import time
from pathlib import Path

from megads.checkpoint import commit
from megads.checkpoint.commit import CheckpointInfo
from megads.checkpoint.manifest import MANIFEST_NAME, Hasher, Manifest, hash_files, read_manifest
from megads.checkpoint.object_store import Listing, ObjectStore, StoreUnreachable
from megads.config.schema import Mirror
from megads.errors import CheckpointError

logger = logging.getLogger(__name__)

LONGEST_PAUSE_SECONDS = 300.0
# While a run waits at its end, and a store comes back, it should not sleep through that.
LONGEST_PAUSE_AT_END_SECONDS = 10.0
# A checkpoint that arrives with other bytes this often is damaged on this side.
MOST_MISMATCHES = 2


def build_mirror(settings: Mirror) -> "CheckpointMirror | None":
    """The configured mirror, if there is one. Raises ConfigError or EnvironmentSetupError."""
    if settings.url is None:
        return None
    return CheckpointMirror(settings.url, settings.keep_last_n, settings.keep_best, settings.wait_seconds)


class CheckpointMirror:
    """Mirrors the checkpoints of a directory below `url`; `keep_last_n` and `keep_best` as locally.

    `wait_seconds`: how long `finish` waits for what is not sent yet.
    """

    def __init__(
        self,
        url: str,
        keep_last_n: int = 2,
        keep_best: bool = True,
        wait_seconds: float = 600.0,
        first_pause_seconds: float = 2.0,
    ) -> None:
        self._stop = threading.Event()
        self.store = ObjectStore(url, pause=self._stop.wait)
        self.uploading: Path | None = None
        """The local checkpoint that is being sent: retention leaves it alone."""
        self._keep_last_n, self._keep_best = keep_last_n, keep_best
        self._wait_seconds, self._first_pause_seconds = wait_seconds, first_pause_seconds
        self._sent: set[str] = set()
        self._mismatches: dict[str, int] = {}
        self._changed = threading.Condition()
        self._asked = self._done = 0
        self._there: set[str] = set()
        self._finishing = False
        self._thread: threading.Thread | None = None

    # ------------------------------------------------------------------ the way there

    def update(self, directory: Path) -> None:
        """Send what is new in `directory`, in the background; returns at once."""
        if self._thread is None:
            # A daemon: a store that hangs must not keep a finished run from ending.
            self._thread = threading.Thread(target=self._run, args=(directory,), name="mirror", daemon=True)
            self._thread.start()
        with self._changed:
            self._asked += 1
            self._changed.notify_all()

    def finish(self, directory: Path) -> bool:
        """Wait, for `wait_seconds` at most, until all is sent; says what is not. Whether all is."""
        self._finishing = True
        self.update(directory)
        with self._changed:
            if not self._changed.wait_for(lambda: self._done >= self._asked, timeout=1.0):
                logger.info("mirror %s: waiting up to %.0f s for it", self.store.url, self._wait_seconds)
            complete = self._changed.wait_for(lambda: self._done >= self._asked, timeout=self._wait_seconds)
        self.stop()
        missing = [
            info.path.name
            for info, manifest in self._wanted(directory)
            if self.store.name_of(manifest) not in self._there
        ]
        if not complete or missing:
            names = ", ".join(missing) or "the newest checkpoints"
            logger.warning(
                "mirror %s: not mirrored when the run ended: %s; they are in %s, and the next run of this "
                "directory sends them",
                self.store.url,
                names,
                directory,
            )
            return False
        return True

    def stop(self) -> None:
        """Send no more; what is half sent is no checkpoint, and goes with a later retention."""
        self._stop.set()
        with self._changed:
            self._changed.notify_all()

    def _run(self, directory: Path) -> None:
        asked, pause_seconds = 0, 0.0
        while True:
            with self._changed:
                # After a failure for a while only; a new checkpoint, or the end of the run, ends that too.
                self._changed.wait_for(
                    functools.partial(self._has_work, asked), timeout=pause_seconds or None
                )
                asked = self._asked
            if self._stop.is_set():
                return
            try:
                self.catch_up(directory)
            except Exception as error:  # training goes on whatever it is
                longest = LONGEST_PAUSE_AT_END_SECONDS if self._finishing else LONGEST_PAUSE_SECONDS
                pause_seconds = min(max(2 * pause_seconds, self._first_pause_seconds), longest)
                logger.warning(
                    "mirror %s: %s: %s; training goes on, next try in %.0f s",
                    self.store.url,
                    type(error).__name__,
                    error,
                    pause_seconds,
                )
                continue
            finally:
                self.uploading = None
            pause_seconds = 0.0
            with self._changed:
                self._done = asked
                self._changed.notify_all()

    def _has_work(self, seen: int) -> bool:
        return self._stop.is_set() or self._asked > seen

    def catch_up(self, directory: Path) -> None:
        """Make the store hold what is to be kept of `directory`, newest first, then prune there.

        Raises StoreUnreachable, or OSError; what was sent until then is not sent again.
        """
        listing = self.store.listing()
        self._there = {one.name for one in listing.committed}
        # Not before the store has answered: while it was waited for, newer ones may have been saved.
        wanted = self._wanted(directory)
        for number, (info, manifest) in enumerate(wanted):
            name = self.store.name_of(manifest)
            if name not in self._there and not self._send(info, manifest):
                continue
            self._there.add(name)
            if number == 0:
                self._leave_other_branches(manifest, listing)
        self._prune([self.store.name_of(manifest) for _, manifest in wanted])

    def _wanted(self, directory: Path) -> list[tuple[CheckpointInfo, Manifest]]:
        return commit.kept(_with_manifests(directory), self._keep_last_n, self._keep_best)

    def _send(self, info: CheckpointInfo, manifest: Manifest) -> bool:
        """Send one checkpoint; False where it was deleted meanwhile, or is damaged."""
        name = self.store.name_of(manifest)
        if self._mismatches.get(name, 0) >= MOST_MISMATCHES:
            return False
        self.uploading = info.path
        began = time.monotonic()
        try:
            self.store.send(info.path, manifest, self._sent)
        except FileNotFoundError:
            if (info.path / MANIFEST_NAME).exists():
                raise
            return False
        except CheckpointError as error:
            self._mismatches[name] = self._mismatches.get(name, 0) + 1
            raise StoreUnreachable(str(error)) from error
        size_bytes = sum(entry.size_bytes for entry in manifest.files.values())
        logger.info(
            "mirror: %s is at %s/%s, %.1f MB in %.1f s",
            info.path.name, self.store.url, name, size_bytes / 1e6, time.monotonic() - began,
        )  # fmt: skip
        return True

    def _leave_other_branches(self, newest: Manifest, listing: Listing) -> None:
        """As a local commit does: later steps saved earlier, and the same step, are set aside."""
        for one in listing.committed:
            earlier = one.manifest.created_unix_seconds < newest.created_unix_seconds
            if one.manifest.save_id != newest.save_id and one.manifest.step >= newest.step and earlier:
                logger.warning("mirror: %s is of a branch that the run left: set aside", one.name)
                self.store.set_aside(one)

    def _prune(self, wanted: list[str]) -> None:
        listing = self.store.listing()
        if not listing.committed:
            return
        candidates = [(one, one.manifest) for one in listing.committed]
        keep = {one.name for one, _ in commit.kept(candidates, self._keep_last_n, self._keep_best)}
        newest_step = listing.committed[0].manifest.step
        doomed = [one.name for one in listing.committed if one.name not in keep]
        doomed += [one.name for one in listing.superseded if one.manifest.step <= newest_step]
        doomed += [name for name in listing.partial if name not in wanted]
        if self._keep_last_n:
            for name in doomed:
                self.store.delete(name)

    # ------------------------------------------------------------------ the way back

    def restore(
        self, directory: Path, local: CheckpointInfo | None, hasher: Hasher = hash_files
    ) -> CheckpointInfo | None:
        """The newest good checkpoint of the mirror, committed in `directory`; None: `local` is no older.

        Damaged and partial ones are passed over. Raises CheckpointError where the store cannot be asked, or
        holds damaged ones only, and there is no `local` one: a run must not silently start over.
        """
        saved = read_manifest(local.path).created_unix_seconds if local else float("-inf")
        reasons: list[str] = []
        try:
            listing = self.store.listing()
            reasons += [f"{name} is damaged" for name in listing.damaged]
            for name in listing.partial:
                logger.warning(
                    "mirror: passed over %s/%s: it was never sent to its end", self.store.url, name
                )
            for one in listing.committed:
                if one.manifest.created_unix_seconds <= saved:
                    break
                logger.info("mirror: fetching %s/%s", self.store.url, one.name)
                try:
                    fetched = self.store.fetch(one, directory, hasher)
                except CheckpointError as error:
                    reasons.append(str(error))
                    logger.warning("mirror: passed over: %s", error)
                    continue
                return commit.commit(fetched, one.manifest)
        except (StoreUnreachable, PermissionError) as error:
            reasons.append(str(error))
            if local is not None:
                logger.warning(
                    "mirror %s: %s; going on from %s, whether or not there is a newer one there",
                    self.store.url,
                    error,
                    local.path,
                )
        if local is None and reasons:
            raise CheckpointError(
                f"{directory} has no good checkpoint, and none could be restored from {self.store.url}: "
                f"{'; '.join(reasons[:3])}. Mend the store, or start afresh with --load null"
            )
        return None


def _with_manifests(directory: Path) -> list[tuple[CheckpointInfo, Manifest]]:
    """Newest first; those that cannot be read, or are being deleted, are left out."""
    found = []
    for info in reversed(commit.committed(directory)):
        try:
            found.append((info, read_manifest(info.path)))
        except CheckpointError as error:
            logger.debug("mirror: %s", error)
    return found
