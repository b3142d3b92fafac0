"""Checkpoints in an object store, through fsspec: `s3://bucket/prefix`, `gs://`, `file://`, `memory://`.

`URL/step_00000100.<save id>/` holds the files of a checkpoint. `COMMIT.json`, which makes it one, is sent
last, when every other object has been read back and has the size and the SHA-256 of the manifest: an entity
tag says what a store received, and each store computes it in a way of its own; the bytes that a restore would
get are the same everywhere. A name has the id of its save in it, so nothing is ever sent into what another
save has begun. `SUPERSEDED.json` in place of `COMMIT.json`: of a branch that the run left (see
`checkpoint.commit`).
"""

import hashlib
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from megads.checkpoint import commit
from megads.checkpoint.manifest import (
    MANIFEST_NAME,
    Hasher,
    Manifest,
    hash_files,
    read_manifest,
)
from megads.errors import CheckpointError, ConfigError, EnvironmentSetupError
from megads.publish import flush_to_disk

T = TypeVar("T")
logger = logging.getLogger(__name__)

SUPERSEDED_NAME = "SUPERSEDED.json"
ATTEMPTS = 3
FIRST_PAUSE_SECONDS = 1.0
READ_BYTES = 16 * 2**20
FETCHING_THREADS = 8
# How often the other ranks hear from the one that fetches: their collective would time out otherwise.
HEARTBEAT_SECONDS = 60.0
_NAME = re.compile(r"step_\d{8,}\.[0-9a-f]+")


class StoreUnreachable(OSError):
    """The store does not answer, or not as it should; a later try may succeed."""


@dataclass(frozen=True)
class RemoteCheckpoint:
    """A committed checkpoint of the store. `name`: of its directory there."""

    name: str
    manifest: Manifest


@dataclass(frozen=True)
class Listing:
    """What is below the URL, newest first. `partial`: without a manifest; `damaged`: with an unsound one."""

    committed: list[RemoteCheckpoint] = field(default_factory=list)
    superseded: list[RemoteCheckpoint] = field(default_factory=list)
    partial: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)


class ObjectStore:
    """The checkpoints below `url`. Raises ConfigError or EnvironmentSetupError for a URL of no use here."""

    def __init__(self, url: str, pause: Callable[[float], object] = time.sleep) -> None:
        import fsspec

        self.url = url.rstrip("/")
        self._pause = pause
        protocol = url.partition("://")[0]
        # Only directories have to be made; a bucket that is not there is the user's mistake.
        options: dict[str, Any] = {"auto_mkdir": True} if protocol in ("file", "local") else {}
        if protocol == "s3":
            options["use_listings_cache"] = False
        try:
            self._filesystem, self._root = fsspec.core.url_to_fs(self.url, **options)
        except ImportError as error:
            raise EnvironmentSetupError(
                f"checkpointing.mirror.url = {url!r}: {error}; for s3:// pip install megads[s3]"
            ) from error
        except ValueError as error:
            raise ConfigError(
                f"checkpointing.mirror.url = {url!r}: {error}; write s3://bucket/run"
            ) from error

    def name_of(self, manifest: Manifest) -> str:
        """The directory of a checkpoint in the store."""
        return f"{commit.step_name(manifest.step)}.{manifest.save_id}"

    def check(self) -> None:
        """Write an object and remove it: CheckpointError where that is not allowed, or there is no bucket.

        A store that does not answer is a warning: it may be back when there is something to send.
        """
        probe = f"{self._root}/.write-test"
        try:
            self._ask(lambda: self._filesystem.pipe_file(probe, b"writable"))
            self._ask(lambda: self._filesystem.rm_file(probe))
        except (FileNotFoundError, PermissionError) as error:
            raise CheckpointError(
                f"{self.url} cannot be written to: {error}; make the bucket, mend the credentials, or "
                "correct checkpointing.mirror.url"
            ) from error
        except StoreUnreachable as error:
            logger.warning("mirror %s: %s; training starts, checkpoints are sent later", self.url, error)

    def listing(self) -> Listing:
        """What there is. Raises StoreUnreachable."""
        found = Listing()
        try:
            entries = self._ask(lambda: self._list(self._root))
        except FileNotFoundError:
            return found
        names = sorted(str(entry["name"]).rstrip("/").rpartition("/")[2] for entry in entries)
        for name in names:
            if not _NAME.fullmatch(name):
                continue
            try:
                if (manifest := self._manifest(name, MANIFEST_NAME)) is not None:
                    found.committed.append(RemoteCheckpoint(name, manifest))
                elif (manifest := self._manifest(name, SUPERSEDED_NAME)) is not None:
                    found.superseded.append(RemoteCheckpoint(name, manifest))
                else:
                    found.partial.append(name)
            except CheckpointError as error:
                logger.warning("mirror: passed over %s/%s: %s", self.url, name, error)
                found.damaged.append(name)
        for several in (found.committed, found.superseded):
            several.sort(key=lambda one: one.manifest.created_unix_seconds, reverse=True)
        return found

    def _list(self, path: str) -> list[dict[str, Any]]:
        self._filesystem.invalidate_cache()
        listed: list[dict[str, Any]] = self._filesystem.ls(path, detail=True)
        return listed

    def _manifest(self, name: str, file: str) -> Manifest | None:
        try:
            content = self._ask(lambda: self._filesystem.cat_file(f"{self._root}/{name}/{file}"))
        except FileNotFoundError:
            return None
        with tempfile.TemporaryDirectory(prefix="megads-manifest-") as directory:
            (Path(directory) / MANIFEST_NAME).write_bytes(content)
            manifest = read_manifest(Path(directory))
        if self.name_of(manifest) != name:
            raise CheckpointError(f"{name} holds {self.name_of(manifest)}")
        return manifest

    # ------------------------------------------------------------------ sending

    def send(self, path: Path, manifest: Manifest, already_sent: set[str]) -> None:
        """Send a committed checkpoint; `already_sent` objects, which this adds to, are not sent again.

        Raises FileNotFoundError where it was deleted meanwhile, CheckpointError where what is in the store is
        not what the manifest says, StoreUnreachable.
        """
        name = self.name_of(manifest)
        for file, entry in manifest.files.items():
            target = f"{self._root}/{name}/{file}"
            if target not in already_sent:
                self._send_file(path / file, target)
                self._check_object(target, entry.size_bytes, entry.sha256)
                already_sent.add(target)
        # Last: from here on it is a checkpoint.
        self._send_file(path / MANIFEST_NAME, f"{self._root}/{name}/{MANIFEST_NAME}")
        if self._manifest(name, MANIFEST_NAME) is None:
            raise StoreUnreachable(f"{self.url}/{name}: its {MANIFEST_NAME} does not come back")

    def _send_file(self, local: Path, target: str) -> None:
        size_bytes = local.stat().st_size  # of a file that is gone: before the store is asked

        def send() -> None:
            self._filesystem.put_file(str(local), target)

        self._ask(send)
        logger.debug("mirror: sent %s, %d bytes", target, size_bytes)

    def _check_object(self, target: str, size_bytes: int, sha256: str) -> None:
        def read_back() -> tuple[int, str]:
            digest, size = hashlib.sha256(), 0
            with self._filesystem.open(target, "rb", block_size=READ_BYTES) as file:
                while block := file.read(READ_BYTES):
                    digest.update(block)
                    size += len(block)
            return size, digest.hexdigest()

        if self._ask(read_back) != (size_bytes, sha256):
            raise CheckpointError(f"{target}: what is in the store is not what {MANIFEST_NAME} says")

    # ------------------------------------------------------------------ removing

    def set_aside(self, one: RemoteCheckpoint) -> None:
        """Make it no checkpoint any more, without deleting what it consists of."""
        base = f"{self._root}/{one.name}"
        content = self._ask(lambda: self._filesystem.cat_file(f"{base}/{MANIFEST_NAME}"))
        self._ask(lambda: self._filesystem.pipe_file(f"{base}/{SUPERSEDED_NAME}", content))
        self._ask(lambda: self._filesystem.rm_file(f"{base}/{MANIFEST_NAME}"))

    def delete(self, name: str) -> None:
        """Delete a checkpoint, its manifest first; what is gone already is no error."""
        base = f"{self._root}/{name}"

        def remove() -> None:
            self._filesystem.invalidate_cache()
            if self._filesystem.exists(f"{base}/{MANIFEST_NAME}"):
                self._filesystem.rm_file(f"{base}/{MANIFEST_NAME}")
            if self._filesystem.exists(base):
                self._filesystem.rm(base, recursive=True)

        self._ask(remove)

    # ------------------------------------------------------------------ fetching

    def fetch(self, one: RemoteCheckpoint, directory: Path, hasher: Hasher = hash_files) -> Path:
        """Fetch a checkpoint, verified and flushed, into a temporary directory: `commit.commit` is next.

        Raises CheckpointError where it is damaged or partial, StoreUnreachable, OSError for the local disk.
        """
        temporary = commit.create_temporary(directory, one.manifest.step, os.urandom(4).hex())
        try:
            names = list(one.manifest.files)
            self._fetch_files(one.name, names, temporary, heartbeat=lambda: hasher(temporary, []))
            digests = hasher(temporary, names)
            for name, entry in one.manifest.files.items():
                if digests[name] != entry.sha256:
                    raise CheckpointError(
                        f"{self.url}/{one.name}/{name}: damaged, its SHA-256 is {digests[name]}"
                    )
                flush_to_disk(temporary / name)
        except BaseException:
            commit.discard(temporary)
            raise
        return temporary

    def _fetch_files(
        self, name: str, files: Collection[str], directory: Path, heartbeat: Callable[[], object]
    ) -> None:
        def fetch(file: str) -> None:
            local = directory / file
            local.parent.mkdir(parents=True, exist_ok=True)
            self._ask(lambda: self._filesystem.get_file(f"{self._root}/{name}/{file}", str(local)))

        with ThreadPoolExecutor(FETCHING_THREADS, thread_name_prefix="fetch") as pool:
            pending = {pool.submit(fetch, file) for file in files}
            while pending:
                done, pending = wait(pending, timeout=HEARTBEAT_SECONDS)
                heartbeat()
                try:
                    for one in done:
                        one.result()
                except FileNotFoundError as error:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise CheckpointError(f"{self.url}/{name}: partial, {error} is missing") from error
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise

    def _ask(self, question: Callable[[], T]) -> T:
        """The answer of the store, after a few tries; what it says no to is raised at once."""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return question()
            except (FileNotFoundError, PermissionError):
                raise
            except Exception as error:  # every store has errors of its own
                if attempt == ATTEMPTS:
                    raise StoreUnreachable(f"{type(error).__name__}: {error}") from error
                self._pause(FIRST_PAUSE_SECONDS * 2 ** (attempt - 1))
        raise AssertionError
