"""The commit protocol: a checkpoint is there whole or not at all, whatever dies when.

A save writes into `step_00000100.tmp-<id>`, a directory never used before. When all files are
flushed and hashed, `COMMIT.json` is written, and the directory gets its final name,
`step_00000100`: that rename is the commit. What else lies in a checkpoint directory:

- `step_00000100-2`: step 100 saved again (a run that went back). It replaces the first without a
  moment at which neither exists; the greater number wins.
- `*.superseded-<id>`: replaced, or of a branch that the run left: a commit of step 100 sets later
  steps aside, or the next resume would return to them. Pruned once the new branch has passed them.
- `*.bad`: failed its verification. Kept for inspection, never deleted.
- `*.tmp-<id>`, `*.deleting-<id>`: leftovers of a killed run, removed by the next save.
- `latest`: name of the newest checkpoint, a hint for people and scripts. The directory scan is the
  truth, so a stale or garbage pointer harms nothing.

Plain files only, no torch. Where ranks share the work, rank 0 alone calls the functions here. The
holder of the directory's lease (`checkpoint.lease`) may save, prune and quarantine.

Sources: the failure list in PyTorch's and Megatron-Core's savers (neither flushes all it writes),
and the write-flush-rename order of "All File Systems Are Not Created Equal" (OSDI 2014).
"""

import errno
import logging
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megads.checkpoint.manifest import (
    MANIFEST_NAME,
    Hasher,
    Manifest,
    check_listing,
    hash_files,
    read_manifest,
    verify,
    write_manifest,
)
from megads.errors import CheckpointError
from megads.publish import flush_to_disk

__all__ = [
    "CheckpointInfo", "commit", "committed", "create_temporary", "discard", "kept", "latest", "newest_good",
    "phase", "prune", "quarantine", "read_record", "remove_leftovers", "verify",
]  # fmt: skip

logger = logging.getLogger(__name__)

POINTER_NAME = "latest"
BEST_METRIC = "validation_loss"
_FINAL_NAME = re.compile(r"step_(\d{8,})(?:-([2-9]|[1-9]\d+))?")
_LEFTOVER = re.compile(r"(step_\d{8,}(-\d+)?\.(tmp|deleting)|latest\.tmp)-[0-9a-f]+")
_SUPERSEDED = re.compile(r"step_(\d{8,})(-\d+)?\.superseded-[0-9a-f]+")


@dataclass(frozen=True, order=True)
class CheckpointInfo:
    """A checkpoint directory; ordered by step, then by how often the step was saved."""

    step: int
    generation: int
    path: Path = field(compare=False)


def phase(name: str) -> None:
    """Marks a point of the protocol at which a crash must be harmless; the crash tests replace it."""
    logger.debug("checkpoint phase: %s", name)


def committed(directory: Path | str) -> list[CheckpointInfo]:
    """The committed checkpoints, oldest first; not verified."""
    return [info for info in _final_directories(Path(directory)) if (info.path / MANIFEST_NAME).is_file()]


def latest(directory: Path | str) -> CheckpointInfo | None:
    """The newest committed checkpoint by scan, not verified; None where there is none."""
    found = committed(directory)
    return found[-1] if found else None


def read_record(path: Path | str) -> dict[str, Any]:
    """The `record` a checkpoint was saved with, from `COMMIT.json` alone; nothing else is read."""
    return read_manifest(Path(path)).record


def _final_directories(directory: Path) -> list[CheckpointInfo]:
    """Directories with a final name, with or without a manifest, oldest first."""
    if not directory.is_dir():
        return []
    found = []
    for entry in os.scandir(directory):
        match = _FINAL_NAME.fullmatch(entry.name)
        if match and entry.is_dir(follow_symlinks=False):
            found.append(CheckpointInfo(int(match[1]), int(match[2] or 1), Path(entry.path)))
    return sorted(found)


def step_name(step: int) -> str:
    """Directory name of a step."""
    return f"step_{step:08d}"


def create_temporary(directory: Path, step: int, save_id: str) -> Path:
    """Makes the directory that a save writes into. `save_id`: hexadecimal, never used before."""
    temporary = directory / f"{step_name(step)}.tmp-{save_id}"
    temporary.mkdir()
    flush_to_disk(directory)
    phase("temporary_created")
    return temporary


def commit(temporary: Path, manifest: Manifest) -> CheckpointInfo:
    """Turns a complete temporary directory into a checkpoint. The files in it are flushed already.

    Raises CheckpointError where the directory does not hold what the manifest lists, OSError where
    the disk fails; in both cases nothing was committed.
    """
    directory = temporary.parent
    check_listing(temporary, manifest)
    for folder, _, _ in os.walk(temporary):
        flush_to_disk(Path(folder))
    phase("files_flushed")
    write_manifest(temporary, manifest)
    flush_to_disk(temporary)
    phase("manifest_written")

    others = _final_directories(directory)
    for other in others:
        if other.step > manifest.step:
            logger.warning(
                "%s is of a branch that the run left at step %d: set aside", other.path, manifest.step
            )
            _move_aside(other.path, f"superseded-{manifest.save_id}")
    phase("later_steps_set_aside")

    same_step = [other for other in others if other.step == manifest.step]
    generation = 1 + max((other.generation for other in same_step), default=0)
    name = step_name(manifest.step) + (f"-{generation}" if generation > 1 else "")
    final = directory / name
    temporary.rename(final)
    flush_to_disk(directory)
    phase("renamed")

    # From here on the checkpoint is committed: what follows may fail without undoing it.
    try:
        for other in same_step:
            _move_aside(other.path, f"superseded-{manifest.save_id}")
        phase("same_step_replaced")
        _write_pointer(directory, name, manifest.save_id)
    except OSError as error:
        logger.warning("%s is committed, but tidying up after it failed: %s", final, error)
    phase("pointer_moved")
    return CheckpointInfo(manifest.step, generation, final)


def _write_pointer(directory: Path, name: str, save_id: str) -> None:
    temporary = directory / f"{POINTER_NAME}.tmp-{save_id}"
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(name + "\n")
        file.flush()
        os.fsync(file.fileno())
    phase("pointer_written")
    temporary.replace(directory / POINTER_NAME)
    flush_to_disk(directory)


def _move_aside(path: Path, suffix: str) -> Path:
    """Renames a checkpoint so that no scan takes it for one; numbered where the name is taken."""
    for number in range(1, 1000):
        target = path.with_name(f"{path.name}.{suffix}" + (f"-{number}" if number > 1 else ""))
        try:
            if not target.exists():
                path.rename(target)
                flush_to_disk(path.parent)
                return target
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
    raise CheckpointError(f"{path}: cannot be set aside, too many names like {path.name}.{suffix} are taken")


def quarantine(path: Path, reason: str) -> Path:
    """Sets a damaged checkpoint aside as `.bad` and warns with the reason; returns where it is now."""
    target = _move_aside(path, "bad")
    logger.warning("checkpoint set aside as %s: %s", target, reason)
    return target


def newest_good(
    directory: Path | str,
    hasher: Hasher | None = hash_files,
    move_bad: bool = True,
    before: int | None = None,
) -> CheckpointInfo | None:
    """The newest checkpoint (of an earlier step than `before`) that passes `verify`.

    Falls back one at a time.

    Each one that fails is reported with its bad file and, with `move_bad`, set aside as `.bad`.
    None where the directory never held a checkpoint. Where it holds damaged ones only, now or set
    aside earlier, CheckpointError: a run must not silently start over at step 0.
    """
    directory = Path(directory)
    reasons: list[str] = []
    for info in reversed(_final_directories(directory)):
        if before is not None and info.step >= before:
            continue
        try:
            manifest = verify(info.path, hasher)
            if manifest.step != info.step:
                raise CheckpointError(f"{info.path}: holds step {manifest.step}, its name says {info.step}")
        except CheckpointError as error:
            reasons.append(str(error))
            if move_bad:
                quarantine(info.path, str(error))
            else:
                logger.warning("checkpoint passed over: %s", error)
            continue
        if before is None:
            _report_pointer(directory, info)
        return info
    set_aside = sorted(directory.glob("step_*.bad*")) if before is None else []
    if reasons or set_aside:
        raise CheckpointError(
            f"{directory}: no checkpoint is good. {'; '.join(reasons[:3]) or f'See {set_aside[-1]}'}. "
            "Restore one from a backup, or remove the damaged ones to start afresh"
        )
    return None


def _report_pointer(directory: Path, newest: CheckpointInfo) -> None:
    try:
        name = (directory / POINTER_NAME).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return
    if name != newest.path.name:
        logger.info(
            "the pointer %s says %r, the newest good checkpoint is %s",
            directory / POINTER_NAME,
            name[:80],
            newest.path.name,
        )


def discard(temporary: Path) -> None:
    """Removes the directory of a save that failed; what cannot be removed now goes with the next save."""
    shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(directory: Path) -> list[Path]:
    """Removes what killed runs left half written or half deleted.

    Only for the holder of the lease with no save of its own under way. A straggling process of the
    dead run may still write there: it gets errors, and no committed checkpoint is ever touched.
    """
    leftovers = [Path(entry.path) for entry in os.scandir(directory) if _LEFTOVER.fullmatch(entry.name)]
    for path in leftovers:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        phase("leftover_removed")
    return leftovers


def prune(
    directory: Path | str,
    keep_last_n: int,
    keep_best: bool = False,
    hashed: CheckpointInfo | None = None,
    spared: Path | None = None,
) -> list[Path]:
    """Deletes old checkpoints; returns the ones deleted.

    Kept: the newest `keep_last_n` that are sound (0: all), and with `keep_best` the sound one with
    the lowest finite `metrics["validation_loss"]`. Sound means manifest, file list and sizes; the
    newest must pass in full, contents too, unless it is `hashed`, which its writers have just read
    back. If the newest is not sound nothing is deleted. Damaged ones are left for `newest_good`, and
    `spared`, which someone is reading, for the next time.
    """
    directory = Path(directory)
    if keep_last_n == 0:
        return []
    sound: list[tuple[CheckpointInfo, Manifest]] = []
    for info in reversed(committed(directory)):
        newest = not sound
        try:
            sound.append((info, verify(info.path, hash_files if newest and info != hashed else None)))
        except CheckpointError as error:
            if newest:
                logger.warning("no old checkpoint is deleted, as the newest is damaged: %s", error)
                return []
            logger.warning("a damaged checkpoint does not count as kept: %s", error)
    keep = {info for info, _ in kept(sound, keep_last_n, keep_best)}
    doomed = [info.path for info, _ in reversed(sound) if info not in keep and info.path != spared]
    if sound:
        doomed += _overtaken(directory, sound[0][0].step)
    for path in doomed:
        _delete(path)
    return doomed


def kept[T](
    found: Sequence[tuple[T, Manifest]], keep_last_n: int, keep_best: bool
) -> list[tuple[T, Manifest]]:
    """Of checkpoints, newest first, those that retention keeps: `keep_last_n` (0: all) and the best.

    The best has the lowest finite validation loss; of equals it is the newest.
    """
    newest = list(found[: keep_last_n or None])
    scored = [
        (loss, number)
        for number, (_, manifest) in enumerate(found)
        if (loss := manifest.metrics.get(BEST_METRIC)) is not None
    ]
    if keep_best and scored and (best := min(scored)[1]) >= len(newest):
        newest.append(found[best])
    return newest


def _overtaken(directory: Path, newest_step: int) -> list[Path]:
    """Superseded checkpoints whose step the run has reached again."""
    found = ((_SUPERSEDED.match(entry.name), entry) for entry in os.scandir(directory))
    return sorted(Path(entry.path) for match, entry in found if match and int(match[1]) <= newest_step)


def _delete(path: Path) -> None:
    """Deletes a checkpoint; a kill half-way leaves a name that no scan takes for a checkpoint."""
    doomed = path.with_name(f"{path.name.split('.')[0]}.deleting-{os.urandom(4).hex()}")
    path.rename(doomed)
    flush_to_disk(path.parent)
    phase("prune_renamed")
    shutil.rmtree(doomed, ignore_errors=True)
    phase("pruned")
