"""The datasets of each source of a run: where they lie, and that they fit the model and each other."""

import glob
import logging
import os
from difflib import get_close_matches
from pathlib import Path

from megads.config.schema import Config, DataSource
from megads.data.indexed import data_files, datasets_in_work
from megads.data.input_file import is_url
from megads.data.manifest import DatasetInfo, check_dataset
from megads.data.remote_shards import fetch_datasets
from megads.data.shard_group import ShardGroup
from megads.data.tokenizer import load_tokenizer, tokenizer_sha256
from megads.errors import ConfigError, DataError

logger = logging.getLogger(__name__)


def source_prefixes(source: DataSource, cache_dir: str) -> tuple[str, ...]:
    """Prefixes of a source: as given, a directory for all the datasets in it, sorted.

    What is given as an fsspec URL is fetched to `cache_dir`.

    Raises ConfigError when the source says neither path nor subset, DataError for what is not there, a
    directory without datasets, and a dataset listed twice.
    """
    if source.path is None and source.subset is None:
        raise ConfigError(f"data.sources, {source.name!r}: give it a path or a subset.")
    paths = (str(Path(cache_dir) / (source.subset or "")),) if source.path is None else source.path
    prefixes: list[str] = []
    for path in (paths,) if isinstance(paths, str) else paths:
        if is_url(path):
            prefixes += fetch_datasets(path, cache_dir)
            continue
        if not Path(path).is_dir() or data_files(path)[1].exists():
            _check_exists(path, source.name)
            prefixes.append(path)
            continue
        if in_work := datasets_in_work(path):
            logger.warning(
                "%s: %d datasets of source %s are being made, or were when a run was killed, and are not "
                "read: %s. Preprocess to the end first.",
                path,
                len(in_work),
                source.name,
                ", ".join(in_work[:3]) + (", ..." if len(in_work) > 3 else ""),
            )
        # A `.bin` that has lost its `.idx` is not passed over: it is refused when it is opened.
        inside = {
            os.path.splitext(name)[0]
            for end in ("idx", "bin")
            for name in glob.glob(f"{glob.escape(path)}/*.{end}")
        }
        if not inside:
            below = sorted({Path(name).parent.name for name in glob.glob(f"{glob.escape(path)}/*/*.idx")})
            raise DataError(
                f"{path}: no dataset (.idx) for source {source.name!r} in this directory"
                + (f"; there are in those below it: {', '.join(below[:5])}." if below else ".")
            )
        prefixes += sorted(inside)
    seen: set[str] = set()
    for prefix in prefixes:
        if (file := _index_file(prefix)) in seen:
            raise DataError(
                f"data.sources, {source.name!r}: {prefix} is listed twice, so its documents would come twice "
                "in an epoch. Remove one; a larger weight reads a source more often."
            )
        seen.add(file)
    return tuple(prefixes)


def _check_exists(prefix: str, source: str) -> None:
    """Raise DataError, with names that are there instead, if there is no file of this dataset."""
    bin_path, idx_path, _ = data_files(prefix)
    if bin_path.exists() or idx_path.exists():
        return
    beside = {path.name if path.is_dir() else path.stem for path in Path(prefix).parent.glob("[!.]*")}
    near = get_close_matches(Path(prefix).name, beside, 3)
    raise DataError(
        f"{bin_path}: no such file, which source {source!r} names"
        + (f"; did you mean {' or '.join(near)}?" if near else ".")
        + " Make the dataset with tools/preprocess_dolma.py."
    )


def _index_file(prefix: str) -> str:
    """The `.idx`, whatever links lead to it."""
    return os.path.realpath(data_files(prefix)[1])


def open_sources(config: Config, names: list[str]) -> dict[str, ShardGroup]:
    """The datasets of these sources, checked against the model's vocabulary and one tokenizer.

    Raises ConfigError and DataError as `source_prefixes`, `ShardGroup.open` and `check_dataset` do.
    """
    sha256 = tokenizer_sha256(config.data.tokenizer_path) if config.data.tokenizer_path else None
    groups: dict[str, ShardGroup] = {}
    for source in config.data.sources:
        if source.name not in names:
            continue
        group = ShardGroup.open(source_prefixes(source, config.data.cache_dir), config.data.cache_dir)
        for info in group.shards:
            sha256 = sha256 or info.tokenizer_sha256  # the first one binds the others
            if not _fits(info, config.model.vocab_size, sha256):
                check_dataset(info.prefix, config.model.vocab_size, sha256)  # says what is wrong
        if without := [info.prefix for info in group.shards if info.tokenizer_sha256 is None]:
            more = f" and {len(without) - 1:,} more datasets" if len(without) > 1 else ""
            logger.warning("%s%s: no .json record, so the tokenizer cannot be checked.", without[0], more)
        groups[source.name] = group
    _warn_of_shared(groups)
    return groups


def _warn_of_shared(groups: dict[str, ShardGroup]) -> None:
    """Two sources of the same data split it into training and validation each in its own way."""
    read_by: dict[str, str] = {}
    for name, group in groups.items():
        for info in group.shards:
            other = read_by.setdefault(_index_file(info.prefix), name)
            if other != name:
                logger.warning(
                    "Sources %s and %s both read %s: its documents come by the weights of both, and what one "
                    "holds back for validation the other may train on.",
                    other,
                    name,
                    info.prefix,
                )


def _fits(info: DatasetInfo, vocab_size: int, sha256: str | None) -> bool:
    if info.tokenizer_sha256 is None or info.vocab_size is None:
        return True
    return info.tokenizer_sha256 == sha256 and info.vocab_size <= vocab_size


def end_of_document(config: Config, infos: list[DatasetInfo]) -> tuple[int | None, str | None]:
    """The end-of-document id of the records, else of the tokenizer; and the tokenizer's hash."""
    recorded = {info.eod_id for info in infos if info.eod_id is not None}
    if len(recorded) > 1:
        raise DataError(
            f"The datasets end their documents with different ids {sorted(recorded)}; preprocess them alike."
        )
    sha256 = next((info.tokenizer_sha256 for info in infos if info.tokenizer_sha256), None)
    if recorded:
        return recorded.pop(), sha256
    if config.data.tokenizer_path:
        tokenizer = load_tokenizer(config.data.tokenizer_path)
        return tokenizer.eod_id, tokenizer.sha256
    needed_by = [
        name
        for name in ("reset_position_ids", "document_mask", "eod_mask_loss")
        if getattr(config.data, name)
    ]
    if needed_by:
        raise DataError(
            f"data.{needed_by[0]} needs the end-of-document id, which datasets without a .json record do not "
            "tell: set data.tokenizer_path."
        )
    return None, None
