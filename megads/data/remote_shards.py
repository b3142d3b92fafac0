"""Datasets in an object store: fetched once, whole, to the local cache, through fsspec.

Training reads documents in random order, a few kilobytes here and there. An object store takes tens of
milliseconds for each such read, and a cache of blocks or chunks (fsspec's, Megatron-Core's S3 reader)
fetches megabytes for them. So files are fetched whole, before the first step, below
`data.cache_dir`/remote, which needs room for them; from then on they are files like any other. A fetch
that was interrupted goes on with the files that are missing; a dataset that has changed in the store is
fetched again. `tools/build_index.py` fetches ahead of a job.
"""

import hashlib
import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson

from megads.data.indexed import LOSS_MASK, SCORES, data_files
from megads.data.manifest import check_dataset
from megads.errors import DataError
from megads.publish import publish_file, published

logger = logging.getLogger(__name__)

FETCHING_THREADS = 8
ANY_VOCABULARY = 2**62
# What stores call the version of an object.
VERSION_KEYS = ("ETag", "etag", "md5Hash", "LastModified", "last_modified", "mtime", "created")


def fetch_datasets(url: str, cache_dir: str | os.PathLike[str]) -> tuple[str, ...]:
    """Local prefixes of the dataset with the prefix `url`, or of all datasets in the directory `url`, sorted.

    What is new or has changed is fetched and checked in full, hashes included. Raises DataError when
    there is no dataset, the store cannot be read, or what arrived is not what its record says.
    """
    import fsspec

    url = url.rstrip("/")
    with _store(url):
        filesystem, inside = fsspec.core.url_to_fs(url)
        alone = filesystem.exists(inside + ".idx")
        found = (
            []
            if alone
            else [str(name) for end in ("idx", "bin") for name in filesystem.glob(f"{inside}/*.{end}")]
        )
    prefixes = [inside] if alone else sorted({os.path.splitext(name)[0] for name in found})
    if not prefixes:
        raise DataError(f"{url}: neither a dataset (.idx) nor a directory with datasets.")
    directory = Path(cache_dir) / "remote" / hashlib.sha256(url.encode()).hexdigest()[:16]

    def fetch(prefix: str) -> str:
        local = str(directory / os.path.basename(prefix))
        _fetch_dataset(url, filesystem, prefix, local)
        return local

    with ThreadPoolExecutor(FETCHING_THREADS) as pool:
        return tuple(pool.map(fetch, prefixes))


def _fetch_dataset(url: str, filesystem: Any, prefix: str, local: str) -> None:
    """Bring the local copy of one dataset up to date; what says that it is comes last."""
    endings = [*(path.suffix for path in data_files("x")), SCORES, LOSS_MASK]
    with _store(url):
        there = {ending: prefix + ending for ending in endings if filesystem.exists(prefix + ending)}
        if missing := [prefix + ending for ending in (".bin", ".idx") if ending not in there]:
            raise DataError(f"{url}: {missing[0]}: no such file. Copy the dataset there again.")
        infos = {ending: filesystem.info(path) for ending, path in there.items()}
    seen = {
        ending: [info.get("size"), next((str(info[key]) for key in VERSION_KEYS if info.get(key)), None)]
        for ending, info in infos.items()
    }
    fetched = Path(local + ".fetched")
    state = orjson.dumps({"from": f"{url} {prefix}", "files": seen})
    if fetched.is_file() and fetched.read_bytes() == state and all(os.path.exists(local + e) for e in seen):
        return
    logger.info("Fetching %s: %.1f MB", prefix, sum(size or 0 for size, _ in seen.values()) / 1e6)
    fetched.unlink(missing_ok=True)
    for ending, path in there.items():
        with _store(url), published(Path(local + ending)) as file:
            filesystem.get_file(path, file.name)
    if infos[".bin"].get("size"):  # an empty one is left out later
        check_dataset(local, ANY_VOCABULARY, None, full=True)
    publish_file(fetched, state)


@contextmanager
def _store(url: str) -> Iterator[None]:
    """Every store has errors of its own, and so has a missing package for one."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{url}: cannot be fetched: {type(error).__name__}: {error}") from error
