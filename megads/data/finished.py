"""Which shards of a run are done already, and which datasets that are there must not be touched.

A dataset is done when its record says that it was made of this input with these settings. It is made
anew when its input, or what cleaning says about it, has changed since, and when a killed run left it
in between. A dataset of other settings or another input is somebody's work: only `overwrite` replaces it.
"""

from typing import Any

from megads.data.documents import DamagedInputError, open_input
from megads.data.indexed import LOSS_MASK, SCORES, data_files, sidecar_file, unfinished_files
from megads.data.inputs import InputShard
from megads.data.manifest import is_empty, read_record
from megads.data.recipe import Recipe, differing_settings, settings_sha256
from megads.data.shards import Shard, removals_sha256
from megads.errors import DataError

OTHERWISE = "Replace it (--overwrite) or write elsewhere."


def find_finished(
    shard: Shard, recipe: Recipe, settings: dict[str, Any], *, overwrite: bool = False
) -> dict[str, Any] | None:
    """The record of a shard that is done; None where it is to be made.

    Raises DataError for a dataset of other settings or another input unless `overwrite`.
    """
    try:
        record = read_record(shard.prefix)
    except DataError:
        if overwrite:
            return None
        raise
    if record is None:
        _refuse_unknown(shard, overwrite)
        return None
    if (record.get("settings_sha256")) != settings_sha256(settings):
        if not overwrite:
            differ = differing_settings(record.get("settings") or {}, settings)
            raise DataError(f"{shard.prefix}: made with other settings ({differ}). {OTHERWISE}")
        return None
    if not _same_input(record["input"], shard.input):
        if not overwrite and record["input"]["path"] != shard.input.location:
            raise DataError(f"{shard.prefix}: made of another input, {record['input']['path']}. {OTHERWISE}")
        return None
    if [removals["sha256"] for removals in record["removals"]] != removals_sha256(shard.input, recipe):
        return None
    return record if _within_quota(record, recipe) and _is_whole(shard, record) else None


def _refuse_unknown(shard: Shard, overwrite: bool) -> None:
    """Datasets of other programs have no record; those of a killed run have left something else too."""
    there = [file.name for file in data_files(shard.prefix)[:2] if file.exists()]
    if there and not overwrite and not unfinished_files(shard.prefix):
        raise DataError(f"{shard.prefix}: {' and '.join(there)} exist already, without a record. {OTHERWISE}")


def _same_input(recorded: dict[str, Any], shard: InputShard) -> bool:
    if recorded["sha256"] is None or recorded["bytes"] != shard.bytes:
        return False
    if shard.version and recorded["version"] == shard.version:
        return True
    try:  # copied or touched: the content decides
        with open_input(shard.path) as file:
            return bool(file.sha256() == recorded["sha256"])
    except (DamagedInputError, OSError):
        return False


def _within_quota(record: dict[str, Any], recipe: Recipe) -> bool:
    """Whether this run would have accepted what was quarantined then."""
    bad = sum(record["quarantined"].values())
    if recipe.quarantine_quota is None:
        return bad == 0 and record["damaged"] is None
    return bool(bad <= recipe.quarantine_quota * record["documents_in"])


def _is_whole(shard: Shard, record: dict[str, Any]) -> bool:
    """Whether the files are there in their sizes; tools/verify_dataset.py checks their content."""
    if is_empty(record):
        return True
    expected = dict(zip(data_files(shard.prefix), (record["bin"], record["idx"]), strict=False))
    for name, ending in (("scores", SCORES), ("loss_mask", LOSS_MASK)):
        if name in record:
            expected[sidecar_file(shard.prefix, ending)] = record[name]
    return all(path.is_file() and path.stat().st_size == part["bytes"] for path, part in expected.items())
