"""A small Dolma-format corpus of real text, made of what is installed on this machine.

No network: source code, C++ headers, docstrings, documentation, licenses and, where the system has
them, manual pages become sources of their own, each in a directory of gzip JSON lines as Dolma's.
Enough to try every tool and to watch a small model learn; not a corpus to judge models by.
The result depends on the machine and the arguments only.
"""

import argparse
import ast
import gzip
import hashlib
import os
import random
import re
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email import message_from_string
from pathlib import Path

import orjson

from megads.command_line import run_tool
from megads.errors import DataError
from megads.publish import publish_file

STDLIB = Path(sysconfig.get_paths()["stdlib"])
SITE_PACKAGES = Path(sysconfig.get_paths()["purelib"])
SYSTEM_DOCS = Path("/usr/share/doc")
MANUALS = Path("/usr/share/man")
COMMON_LICENSES = Path("/usr/share/common-licenses")

# Their docstrings are the reference source, so their files are no code: a text is in one source only.
REFERENCE_PACKAGES = ("sympy", "numpy", "scipy", "networkx", "torch")

MIN_CHARACTERS = 200
MAX_FILE_BYTES = 200_000
SHARD_BYTES = 4_000_000
# Some packages are huge and repeat themselves: none makes up more of a source than this.
MAX_GROUP_SHARE = 0.2


@dataclass(frozen=True)
class Found:
    """A file that a source can use; `group` is the package or program it is of."""

    path: str
    id: str
    group: str

    @property
    def name(self) -> str:
        return os.path.basename(self.path)


@dataclass(frozen=True)
class Document:
    id: str
    text: str
    created: str


@dataclass(frozen=True)
class Source:
    """One directory of the corpus: its share of the bytes, its files, and how a file gives texts."""

    name: str
    share: float
    find: Callable[[], Iterable[Found]]
    texts: Callable[[Found], Iterable[tuple[str, str]]]
    """(suffix of the id, text) pairs of a file."""


def files_under(
    root: Path,
    endings: tuple[str, ...] = ("",),
    *,
    starts: tuple[str, ...] = ("",),
    skip: tuple[str, ...] = (),
) -> Iterator[Found]:
    """Regular files below `root` with one of the endings and (upper-case) starts, in any order.

    Directories named in `skip` are not entered.
    """
    for directory, subdirectories, names in os.walk(root):
        subdirectories[:] = [d for d in subdirectories if d not in skip]
        inside = directory[len(str(root)) + 1 :]
        for name in names:
            path = f"{directory}/{name}"
            if name.endswith(endings) and name.upper().startswith(starts) and not os.path.islink(path):
                parts = [*filter(None, inside.split("/")), name]
                yield Found(path, "/".join([root.name, *parts]), parts[0])


def find_code() -> Iterator[Found]:
    yield from files_under(STDLIB, (".py",), skip=("site-packages", "dist-packages", "pydoc_data"))
    yield from files_under(SITE_PACKAGES, (".py",), skip=REFERENCE_PACKAGES)


def find_reference() -> Iterator[Found]:
    for package in REFERENCE_PACKAGES:
        for found in files_under(SITE_PACKAGES / package, (".py",), skip=("tests", "testing", "_vendor")):
            yield replace(found, group=package)


def find_headers() -> Iterator[Found]:
    yield from files_under(SITE_PACKAGES, (".h", ".hpp", ".cuh"))
    yield from files_under(Path(sysconfig.get_paths()["include"]), (".h",))


def find_docs() -> Iterator[Found]:
    yield from files_under(STDLIB / "pydoc_data", ("topics.py",))
    yield from files_under(SITE_PACKAGES, ("METADATA", ".md", ".rst"), skip=("licenses",))
    yield from files_under(SYSTEM_DOCS, (".md", ".md.gz", ".rst", ".txt", ".txt.gz"))
    yield from files_under(SYSTEM_DOCS, ("README", "README.gz", "NEWS.gz", "README.Debian", "FAQ", "FAQ.gz"))


def find_licenses() -> Iterator[Found]:
    yield from files_under(SITE_PACKAGES, starts=("LICENSE", "LICENCE", "COPYING", "NOTICE", "AUTHORS"))
    yield from files_under(STDLIB, ("LICENSE.txt",), skip=("site-packages",))
    yield from files_under(COMMON_LICENSES)
    yield from files_under(SYSTEM_DOCS, ("copyright",))


def find_manuals() -> Iterator[Found]:
    for section in range(1, 9):
        for found in files_under(MANUALS / f"man{section}", (f".{section}.gz", f".{section}")):
            # Some programs have a page for each of thousands of subcommands, all much alike.
            yield replace(found, group=re.split(r"[-_.]", found.name, maxsplit=1)[0])
    yield from files_under(SYSTEM_DOCS, ("changelog.gz",))


def whole_text(found: Found) -> Iterator[tuple[str, str]]:
    """The file as it is, unpacked if need be; nothing for what is not UTF-8 text."""
    raw = Path(found.path).read_bytes()
    if found.name.endswith(".gz"):
        raw = gzip.decompress(raw)
    try:
        yield "", raw.decode("utf-8")
    except UnicodeDecodeError:
        return


def docstrings(found: Found) -> Iterator[tuple[str, str]]:
    """Name, signature and docstring of what a module defines, read without importing it."""
    for _, text in whole_text(found):
        if text.count('"""') < 4:
            return
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError):
            return
        yield "", "\n\n\n".join(_docstrings(tree))


def _docstrings(node: ast.AST) -> Iterator[str]:
    """Docstrings of a module, its classes and functions, and their methods, in order."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        if entry := _docstring(node):
            yield entry
        if isinstance(node, ast.Module | ast.ClassDef):
            for child in node.body:
                yield from _docstrings(child)


def _docstring(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str | None:
    doc = ast.get_docstring(node)
    if doc is None or isinstance(node, ast.Module):
        return doc
    if isinstance(node, ast.ClassDef):
        return f"class {node.name}\n\n{doc}"
    return f"{node.name}({ast.unparse(node.args)})\n\n{doc}"


def documentation(found: Found) -> Iterator[tuple[str, str]]:
    """Topics of Python's help, descriptions of packages, or the file as it is."""
    for suffix, text in whole_text(found):
        if found.name == "topics.py":
            for node in ast.parse(text).body:
                if isinstance(node, ast.Assign):
                    for topic, topic_text in ast.literal_eval(node.value).items():
                        yield f"#{topic}", topic_text
        elif found.name == "METADATA":
            yield suffix, str(message_from_string(text).get_payload())
        else:
            yield suffix, text


# From the scarcest to the most plentiful: what one cannot fill falls to those after it.
SOURCES = (
    Source("licenses", 0.06, find_licenses, whole_text),
    Source("docs", 0.14, find_docs, documentation),
    Source("manuals", 0.12, find_manuals, whole_text),
    Source("headers", 0.16, find_headers, whole_text),
    Source("reference", 0.22, find_reference, docstrings),
    Source("code", 0.30, find_code, whole_text),
)


def collect(source: Source, limit_bytes: int, seed: int, seen: set[bytes]) -> Iterator[Document]:
    """Documents of a source in seeded random order, up to `limit_bytes`, without repeated texts."""
    found = sorted(set(source.find()), key=lambda file: file.id)
    random.Random(f"{seed} {source.name}").shuffle(found)
    groups = len({file.group for file in found})
    group_limit = limit_bytes * (MAX_GROUP_SHARE if groups > 1 / MAX_GROUP_SHARE else 1.0)
    taken: dict[str, int] = {}
    for file in found:
        if sum(taken.values()) >= limit_bytes:
            return
        try:
            stat = os.stat(file.path)
            if taken.get(file.group, 0) >= group_limit or (
                stat.st_size > MAX_FILE_BYTES and not file.path.endswith(".py")
            ):
                continue
            texts = list(source.texts(file))
        except (OSError, EOFError):
            continue  # unreadable here; the corpus is of what can be read
        created = datetime.fromtimestamp(int(stat.st_mtime), UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        for suffix, text in texts:
            text_bytes = len(text.encode("utf-8", "ignore"))
            digest = hashlib.sha256(" ".join(text.split()).encode("utf-8", "ignore")).digest()
            if len(text) < MIN_CHARACTERS or text_bytes > MAX_FILE_BYTES or digest in seen:
                continue
            seen.add(digest)
            taken[file.group] = taken.get(file.group, 0) + text_bytes
            yield Document(f"{source.name}/{file.id}{suffix}", text, created)


def write_shards(source: str, documents: Iterable[Document], directory: Path) -> tuple[int, int]:
    """Write documents as `SOURCE-0000.json.gz` and on; returns documents and bytes of text."""
    count = total_bytes = shard = size = 0
    lines: list[bytes] = []

    def flush() -> None:
        nonlocal lines, size, shard
        if lines:
            path = directory / f"{source}-{shard:04d}.json.gz"
            publish_file(path, gzip.compress(b"".join(lines), 6, mtime=0))
            lines, size, shard = [], 0, shard + 1

    for document in documents:
        record = {
            "id": document.id,
            "text": document.text,
            "source": source,
            "added": document.created,
            "created": document.created,
            "metadata": {"length": len(document.text)},
        }
        try:
            lines.append(orjson.dumps(record) + b"\n")
        except TypeError:
            continue  # a lone surrogate: no UTF-8 can hold it
        text_bytes = len(document.text.encode())
        count, total_bytes, size = count + 1, total_bytes + text_bytes, size + text_bytes
        if size >= SHARD_BYTES:
            flush()
    flush()
    return count, total_bytes


def make_corpus(output: Path, megabytes: float, seed: int, *, overwrite: bool) -> list[tuple[str, int, int]]:
    """Write the corpus; returns (source, documents, bytes of text) of those that found text."""
    old = [file for source in SOURCES for file in output.glob(f"{source.name}/{source.name}-*.json.gz")]
    if old and not overwrite:
        raise DataError(
            f"{output}: holds a sample corpus already. Replace it with --overwrite or write elsewhere."
        )
    for file in old:
        file.unlink()
    left_bytes = int(megabytes * 1e6)
    seen: set[bytes] = set()
    made = []
    for position, source in enumerate(SOURCES):
        limit_bytes = int(left_bytes * source.share / sum(s.share for s in SOURCES[position:]))
        documents, text_bytes = write_shards(
            source.name, collect(source, limit_bytes, seed, seen), output / source.name
        )
        left_bytes -= text_bytes
        if documents:
            made.append((source.name, documents, text_bytes))
    return made


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="directory; a subdirectory per source")
    parser.add_argument("--mb", type=float, default=24, help="megabytes of text (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of choice and order (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace a sample corpus that is there")
    options = parser.parse_args(arguments)
    if options.mb <= 0:
        parser.error("--mb must be positive")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    return run_tool(lambda: run(options))


def run(options: argparse.Namespace) -> None:
    made = make_corpus(options.output, options.mb, options.seed, overwrite=options.overwrite)
    for source, documents, text_bytes in made:
        print(f"{source:<10} {documents:>7,} documents {text_bytes / 1e6:>7.2f} MB")
    print(f"{len(made)} sources in {options.output}")


if __name__ == "__main__":
    sys.exit(main())
