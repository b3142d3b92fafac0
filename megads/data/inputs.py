"""Which files are the input: paths, directories, globs, lists of them in a file, and fsspec URLs.

A corpus lies as Dolma's does: a directory per source, in it shards of JSON lines. What a shard is
called in the output, and where cleaning keeps its removals, follows from source and name alone.
"""

import glob
import logging
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import orjson

from megads.data.input_file import ENDINGS, InputFile, is_url
from megads.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

STAT_THREADS = 16
LISTED_NAMES = 3


@dataclass(frozen=True, slots=True)
class InputShard:
    """One input file. `bytes` as stored, compressed; 0 for a pipe.

    `name` is relative to the directory called `directory`; `source` is that directory too, or what a
    table of sources makes of it. Cleaning knows a shard as `directory` and `name`. `version` changes
    when the file is written again; it is empty where nobody knows.
    """

    path: str
    source: str
    directory: str
    name: str
    bytes: int
    version: str

    @property
    def location(self) -> str:
        """The URL or absolute path."""
        return self.path if is_url(self.path) else os.path.abspath(self.path)

    @property
    def stem(self) -> str:
        """What its output is called within the source: "a/0001.json.gz" gives "a__0001".

        Directories that become one source may use the same names, so theirs comes first then.
        """
        renamed = self.directory != self.source
        return shard_stem(f"{self.directory}/{self.name}" if renamed else self.name)


def shard_stem(name: str) -> str:
    """The name of an output shard: that of the input without the endings of format and compression."""
    directories, _, file = name.rpartition("/")
    while file.endswith(ENDINGS) and file.rpartition(".")[0]:
        file = file.rpartition(".")[0]
    return "__".join([*filter(None, directories.split("/")), file])


def find_shards(paths: Sequence[str]) -> list[InputShard]:
    """The input files that paths, directories, globs and URLs of any of these stand for, in order.

    The source of a file is the name of the directory that was given, else of the one it lies in. A
    directory stands for its data files at any depth, sorted. Raises DataError for what is not there,
    for a directory or glob without data files, and for a file given twice.
    """
    if not paths:
        raise DataError("No input files were given.")
    return _each_once([shard for path in paths for shard in _expand(path)])


def find_sources(root: str) -> list[InputShard]:
    """The input files of a corpus: each subdirectory of `root` is a source.

    Raises DataError when `root` is no directory, has no subdirectories, or one is without data files.
    """
    directories, files = _list_root(root)
    if not directories:
        raise DataError(f"{root}: no subdirectories; one per source is expected.")
    if data := [name for name in files if name.endswith(ENDINGS)]:
        logger.warning(
            "%s: %d data files lie beside the directories of sources and belong to none, so they are passed "
            "over: %s",
            root,
            len(data),
            _some(data),
        )
    return find_shards(directories)


def shards_of_manifest(path: str | os.PathLike[str]) -> list[InputShard]:
    """The input files that a text file lists: `PATH`, or `SOURCE<tab>PATH`, a line.

    It and the paths may be URLs; relative paths start at the manifest's directory. Without SOURCE it is the
    name of the directory that the file lies in; with it that name becomes part of the shard's. Lines that
    are blank or begin with # say nothing. Raises DataError with the line for a file that is not there,
    and for one that is listed twice.
    """
    path = os.fspath(path)
    try:
        with InputFile(path) as file:
            lines = file.read().decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}.") from error
    directory = path.rpartition("/")[0]
    entries = []
    for number, line in enumerate(lines, 1):
        if line.strip() and not line.startswith("#"):
            source, _, location = line.strip().rpartition("\t")
            if "/" in source or source in (".", ".."):
                raise DataError(
                    f"{path}, line {number}: {source!r} is no name of a source, which is a directory's."
                )
            entries.append((number, source, location))
    if not entries:
        raise DataError(f"{path}: lists no files.")

    def find(entry: tuple[int, str, str]) -> InputShard:
        number, source, location = entry
        try:
            shard = _file(_from(directory, location))
        except DataError as error:
            raise DataError(f"{path}, line {number}: {error}") from error
        if not source:
            return shard
        return replace(shard, source=source, directory=source, name=f"{shard.directory}/{shard.name}")

    with ThreadPoolExecutor(STAT_THREADS) as threads:  # a store answers each question in its own time
        return _each_once(list(threads.map(find, entries)))


def _from(directory: str, location: str) -> str:
    """The path or URL of what may be given relative to a directory, which may be a URL itself."""
    if is_url(location) or location.startswith("/"):
        return location
    return f"{directory}/{location}" if is_url(directory) else os.path.join(directory, location)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:LISTED_NAMES]) + (", ..." if len(names) > LISTED_NAMES else "")


def load_source_table(path: str | os.PathLike[str]) -> dict[str, str]:
    """Directory, name or subset to subset, of a table as configs/data/dolma_sources.json."""
    try:
        table = orjson.loads(Path(path).read_bytes())
        return {
            alias: entry["subset"]
            for entry in table["sources"]
            for alias in (entry["subset"], entry["name"], *entry.get("directories", ()))
        }
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error}.") from error
    except (orjson.JSONDecodeError, KeyError, TypeError) as error:
        raise ConfigError(
            f'{path}: not a table of sources ({error!r}); expected {{"sources": [{{"name", "subset", '
            '"directories"}]}.'
        ) from error


def rename_sources(shards: Iterable[InputShard], table: Mapping[str, str]) -> list[InputShard]:
    """Sources by the names of a table; those it does not have keep theirs."""
    return [replace(shard, source=table.get(shard.source, shard.source)) for shard in shards]


def _each_once(shards: list[InputShard]) -> list[InputShard]:
    seen: dict[str, InputShard] = {}
    for shard in shards:
        file = shard.path if is_url(shard.path) else os.path.realpath(shard.path)
        if (other := seen.setdefault(file, shard)) is not shard:
            also = f", as {other.path} too" if other.path != shard.path else ""
            raise DataError(f"{shard.path}: given twice{also}; its documents would count twice.")
    return shards


def _expand(path: str) -> list[InputShard]:
    if is_url(path):
        return _expand_url(path)
    if Path(path).is_dir():
        inside = _data_files(path, sorted(_files_below(Path(path))), lambda file: file.name)
        source = Path(path).resolve().name
        return [
            replace(_file(str(p)), source=source, directory=source, name=p.relative_to(path).as_posix())
            for p in inside
        ]
    if not Path(path).exists() and glob.has_magic(path):
        matches = sorted(glob.glob(path, recursive=True))
        if not matches:
            raise DataError(f"{path}: no file matches.")
        return [shard for match in matches for shard in _expand(match)]
    return [_file(path)]


def _data_files[File](directory: str, files: Iterable[File], name_of: Callable[[File], str]) -> list[File]:
    """The files of a directory that are data by their names; the others are told of. DataError for none."""
    data: list[File] = []
    others: list[File] = []
    for file in files:
        (data if name_of(file).endswith(ENDINGS) else others).append(file)
    if others:
        logger.warning(
            "%s: %d of its files are passed over, whose names do not end in %s: %s",
            directory,
            len(others),
            " ".join(ENDINGS),
            _some([name_of(file) for file in others]),
        )
    if not data:
        raise DataError(f"{directory}: no data files in this directory (looked for {', '.join(ENDINGS)}).")
    return data


def _files_below(directory: Path, above: tuple[str, ...] = ()) -> Iterator[Path]:
    """The files at any depth, through links too; neither pipes nor what begins with a dot."""
    real = os.path.realpath(directory)
    if real in above:
        raise DataError(f"{directory}: this link leads back to {real}, where it lies in. Remove it.")
    try:
        entries = [entry for entry in os.scandir(directory) if not entry.name.startswith(".")]
    except OSError as error:
        raise DataError(f"{directory}: the directory cannot be read: {error.strerror}.") from error
    for entry in entries:
        if entry.is_dir():
            yield from _files_below(directory / entry.name, (*above, real))
        elif entry.is_file() or not os.path.exists(entry.path):  # a broken link is told of when it is opened
            yield directory / entry.name


def _file(path: str) -> InputShard:
    if is_url(path):
        filesystem, inside = _filesystem(path)
        return _remote(path, _ask(path, lambda: filesystem.info(inside)))
    try:
        status = Path(path).stat()
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file or directory.") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}.") from error
    if stat.S_ISDIR(status.st_mode):
        raise DataError(f"{path}: a directory, where a file is expected.")
    directory, name = Path(path).absolute().parts[-2:]
    return InputShard(path, directory, directory, name, status.st_size, f"mtime {status.st_mtime_ns}")


def _expand_url(url: str) -> list[InputShard]:
    filesystem, inside = _filesystem(url)

    def files(listed: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
        return sorted((name, info) for name, info in listed.items() if info["type"] == "file")

    if glob.has_magic(inside):
        matches = files(_ask(url, lambda: filesystem.glob(inside, detail=True)))
        if not matches:
            raise DataError(f"{url}: no file matches.")
        return [_remote(filesystem.unstrip_protocol(name), info) for name, info in matches]
    if not _ask(url, lambda: filesystem.isdir(inside)):
        return [_file(url)]
    below = files(_ask(url, lambda: filesystem.find(inside, detail=True)))
    top = inside.rstrip("/")
    visible = (file for file in below if "/." not in file[0][len(top) :])
    below = _data_files(url, visible, lambda file: PurePosixPath(file[0]).name)
    source = PurePosixPath(top).name
    return [
        replace(
            _remote(filesystem.unstrip_protocol(name), info),
            source=source,
            directory=source,
            name=name[len(top) :].lstrip("/"),
        )
        for name, info in below
    ]


def _list_root(root: str) -> tuple[list[str], list[str]]:
    """The directories in a directory, and the names of the files beside them; nothing hidden."""
    if is_url(root):
        filesystem, inside = _filesystem(root)
        listed = _ask(root, lambda: filesystem.ls(inside, detail=True))
        found = [(str(info["name"]), info["type"] == "directory") for info in listed]
        found = [(filesystem.unstrip_protocol(name), is_directory) for name, is_directory in found]
    elif not Path(root).is_dir():
        raise DataError(f"{root}: no such directory.")
    else:
        try:
            found = [(str(path), path.is_dir()) for path in Path(root).iterdir()]
        except OSError as error:
            raise DataError(f"{root}: the directory cannot be read: {error.strerror}.") from error
    visible = sorted((path, is_it) for path, is_it in found if not PurePosixPath(path).name.startswith("."))
    directories = [path for path, is_directory in visible if is_directory]
    return directories, [PurePosixPath(path).name for path, is_directory in visible if not is_directory]


def _remote(url: str, info: Mapping[str, Any]) -> InputShard:
    """`info` is fsspec's; stores name the version of an object differently, if they do."""
    versions = (info.get(key) for key in ("ETag", "etag", "mtime", "LastModified", "last_modified"))
    version = next((str(value) for value in versions if value), "")
    path = PurePosixPath(url.partition("://")[2])
    directory = path.parent.name
    return InputShard(url, directory, directory, path.name, int(info.get("size") or 0), version)


def _filesystem(url: str) -> tuple[Any, str]:
    import fsspec

    filesystem, inside = _ask(url, lambda: fsspec.core.url_to_fs(url))
    return filesystem, str(inside)


def _ask(url: str, question: Any) -> Any:
    """The answer of a store; whatever it raises becomes a DataError with the URL."""
    try:
        return question()
    except FileNotFoundError as error:
        raise DataError(f"{url}: no such file or directory.") from error
    except Exception as error:  # each store has errors of its own
        raise DataError(f"{url}: cannot be read: {error}.") from error
