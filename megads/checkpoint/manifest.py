"""`COMMIT.json`: what a checkpoint consists of, so that every byte of it can be checked.

The manifest lists each file with its size and SHA-256 and carries a SHA-256 of itself, so a flipped
bit is found wherever it falls. It is read as JSON only: a checkpoint is verified before anything
in it is unpickled. It does not protect against somebody who rewrites the manifest as well;
`checkpoint.pickles` is the defence against hostile content.

The file is JSON as Python's `json` writes it: `NaN` and `Infinity` are allowed in `record`
(a best loss starts at infinity), and floats round-trip bit for bit.
"""

import hashlib
import json
import os
import platform
import stat
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from math import isfinite
from pathlib import Path, PurePosixPath
from typing import Any

from megads.errors import CheckpointError
from megads.publish import flush_to_disk

FORMAT_VERSION = 1
MANIFEST_NAME = "COMMIT.json"
LARGEST_MANIFEST_BYTES = 256 * 2**20
HASH_THREADS = 4
PACKAGES = ("megads", "torch", "megatron-core", "transformer-engine", "numpy")

Hasher = Callable[[Path, list[str]], dict[str, str]]
"""(checkpoint directory, file names in it) to SHA-256 by name; see `hash_files`."""


@dataclass(frozen=True)
class FileEntry:
    """One file as the manifest lists it."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The content of `COMMIT.json`.

    `record` is the caller's JSON (training state, configuration, fingerprints); `metrics` are
    finite numbers or None; names in `files` are POSIX paths relative to the checkpoint.
    """

    step: int
    save_id: str
    files: dict[str, FileEntry]
    record: dict[str, Any]
    metrics: dict[str, float | None]
    config_sha256: str | None
    package_versions: dict[str, str]
    created_unix_seconds: float
    format_version: int = FORMAT_VERSION


def build_manifest(
    step: int, save_id: str, files: dict[str, FileEntry], record: dict[str, Any], metrics: dict[str, float]
) -> Manifest:
    """Builds the manifest of a checkpoint that is complete on disk.

    A metric that is not finite is stored as None, so that a diverged run can still be saved and
    never counts as the best. `config_sha256` is the digest of `record["config"]` where it exists.
    """
    config = record.get("config")
    return Manifest(
        step=step,
        save_id=save_id,
        files=files,
        record=record,
        metrics={name: float(value) if isfinite(value) else None for name, value in metrics.items()},
        config_sha256=None if config is None else digest_json(config),
        package_versions=package_versions(),
        created_unix_seconds=time.time(),
    )


def package_versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that decide what a checkpoint means."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def digest_json(value: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys."""
    plain = json.loads(json.dumps(value))  # keys that were numbers sort as the strings they become
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Writes and flushes `COMMIT.json`; the caller flushes the directory."""
    content = {name: value for name, value in vars(manifest).items() if name != "files"}
    content["files"] = {name: vars(entry) for name, entry in sorted(manifest.files.items())}
    text = json.dumps({**content, "manifest_sha256": digest_json(content)}, indent=1)
    with open(directory / MANIFEST_NAME, "w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_manifest(path: Path) -> Manifest:
    """Reads `COMMIT.json` of the checkpoint at `path`; raises CheckpointError where it is not sound."""
    file = path / MANIFEST_NAME
    try:
        status = file.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST_MANIFEST_BYTES:
            raise CheckpointError(f"{file}: not a regular file of at most {LARGEST_MANIFEST_BYTES} bytes")
        content = json.loads(file.read_bytes())
        claimed = content.pop("manifest_sha256")
        if digest_json(content) != claimed:
            raise CheckpointError(f"{file}: damaged, its content does not match its own SHA-256")
        if content["format_version"] != FORMAT_VERSION:
            raise CheckpointError(
                f"{file}: format {content['format_version']}, this version reads {FORMAT_VERSION}; "
                "use the version of megads that wrote it"
            )
        content["files"] = {name: FileEntry(**entry) for name, entry in content["files"].items()}
        manifest = Manifest(**content)
        check_names(manifest.files)
        return manifest
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: {MANIFEST_NAME} is missing, the checkpoint was never committed"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file}: not a manifest: {type(error).__name__}: {error}") from error


def check_names(names: Iterable[str]) -> None:
    """Refuses names that lead out of the checkpoint."""
    for name in names:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or str(path) != name or name in ("", ".", MANIFEST_NAME):
            raise ValueError(f"file name {name!r} is not a plain relative path")


def hash_files(root: Path, names: list[str]) -> dict[str, str]:
    """SHA-256 (hex) of files below `root`, by name, on a few threads.

    A file that cannot be read gets the reason in place of a digest, so that a bad sector is
    reported like any other damage.
    """

    def digest(name: str) -> str:
        try:
            with open(root / name, "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            return f"unreadable: {error}"

    with ThreadPoolExecutor(max_workers=max(1, min(HASH_THREADS, len(names)))) as pool:
        return dict(zip(names, pool.map(digest, names), strict=True))


def seal_files(root: Path, names: list[str]) -> dict[str, FileEntry]:
    """Flushes files to the device, then reads them back for size and SHA-256.

    Raises OSError, as the write path does.
    """
    for name in names:
        flush_to_disk(root / name)
    digests = hash_files(root, names)
    for name, digest in digests.items():
        if digest.startswith("unreadable"):
            raise OSError(f"{root / name}: {digest}")
    return {name: FileEntry((root / name).stat().st_size, digests[name]) for name in names}


def list_files(path: Path) -> dict[str, int]:
    """Size in bytes of every file of a checkpoint but the manifest; refuses anything not a plain file."""
    sizes: dict[str, int] = {}
    pending = [path]
    while pending:
        directory = pending.pop()
        for entry in os.scandir(directory):
            name = PurePosixPath(Path(entry.path).relative_to(path)).as_posix()
            if entry.is_symlink():
                raise CheckpointError(f"{entry.path}: a symbolic link, which a checkpoint never holds")
            if entry.is_dir(follow_symlinks=False):
                pending.append(Path(entry.path))
            elif not entry.is_file(follow_symlinks=False):
                raise CheckpointError(f"{entry.path}: not a regular file")
            elif name != MANIFEST_NAME:
                sizes[name] = entry.stat(follow_symlinks=False).st_size
    return sizes


def check_listing(path: Path, manifest: Manifest) -> None:
    """Checks that exactly the listed files are there, each with its size."""
    found = list_files(path)
    for name, entry in manifest.files.items():
        if name not in found:
            raise CheckpointError(f"{path / name}: missing, though {MANIFEST_NAME} lists it")
        if found[name] != entry.size_bytes:
            raise CheckpointError(
                f"{path / name}: {found[name]} bytes, {MANIFEST_NAME} says {entry.size_bytes}"
            )
    if unlisted := sorted(found.keys() - manifest.files.keys()):
        raise CheckpointError(f"{path / unlisted[0]}: not listed in {MANIFEST_NAME}")


def verify(path: Path | str, hasher: Hasher | None = hash_files) -> Manifest:
    """Checks a checkpoint against its manifest and returns it; CheckpointError names the first bad file.

    Checked: the manifest's own digest, no missing, unlisted or irregular file, no symbolic link,
    sizes, and contents. `hasher=None` leaves the contents out.
    """
    path = Path(path)
    if path.is_symlink() or not path.is_dir():
        raise CheckpointError(f"{path}: no checkpoint there; give the directory that holds {MANIFEST_NAME}")
    manifest = read_manifest(path)
    try:
        check_listing(path, manifest)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be listed: {error}") from error
    if hasher is not None:
        digests = hasher(path, list(manifest.files))
        for name, entry in manifest.files.items():
            if digests[name] != entry.sha256:
                raise CheckpointError(
                    f"{path / name}: damaged, SHA-256 is {digests[name]}, {MANIFEST_NAME} says {entry.sha256}"
                )
    return manifest
