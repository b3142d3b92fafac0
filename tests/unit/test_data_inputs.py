"""Which files are the input: paths, directories, globs, manifests and URLs, and what is refused."""

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from megads.data.documents import read_texts
from megads.data.input_file import InputFile
from megads.data.inputs import (
    find_shards,
    find_sources,
    load_source_table,
    rename_sources,
    shard_stem,
    shards_of_manifest,
)
from megads.errors import ConfigError, DataError

from data_files import write_json_lines  # isort: skip

TABLE = Path(__file__).parents[2] / "configs" / "data" / "dolma_sources.json"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    root = tmp_path / "corpus"
    for name in ("web/b/2.json.gz", "web/1.jsonl", "web/.hidden.json", "books/a.json", ".git/x.json"):
        write_json_lines(root / name, [name])
    (root / "web" / "notes.md").touch()
    return root


def test_what_a_directory_stands_for(corpus: Path) -> None:
    found = find_shards([str(corpus / "web"), str(corpus / "web" / "notes.md")])
    names = [Path(shard.path).relative_to(corpus).as_posix() for shard in found]
    assert names == ["web/1.jsonl", "web/b/2.json.gz", "web/notes.md"], "a file that is named is data"
    (corpus / "none").mkdir()
    for wrong in (corpus / "none", corpus / "missing"):
        with pytest.raises(DataError, match=wrong.name):
            find_shards([str(wrong)])


@pytest.mark.parametrize("where", ["local", "remote"])
def test_files_that_are_passed_over_are_told_of(
    corpus: Path, caplog: pytest.LogCaptureFixture, where: str
) -> None:
    """A format that is not read, or an ending in capitals, would be a loss that nobody notices."""
    (corpus / "beside.jsonl").write_text("{}")
    write_json_lines(corpus / "web" / ".ipynb_checkpoints" / "1.jsonl", ["hidden"])
    root = str(corpus)
    for name in ("web/part-00000", "web/X.JSONL.GZ", "web/b/3.json.bz2"):
        (corpus / name).touch()
    if where == "remote":
        root = f"memory://passed-over/{corpus.name}"
        fsspec.filesystem("memory").put(str(corpus), f"/passed-over/{corpus.name}", recursive=True)
    assert [shard.name for shard in find_sources(root)] == ["a.json", "1.jsonl", "b/2.json.gz"]
    beside, web = caplog.messages
    assert "1 data files lie beside the directories" in beside
    assert "beside.jsonl" in beside
    assert "web: 4 of its files are passed over" in web
    assert "X.JSONL.GZ, 3.json.bz2, notes.md, ..." in web


def test_links(corpus: Path, tmp_path: Path) -> None:
    elsewhere = write_json_lines(tmp_path / "elsewhere" / "deep" / "9.json", ["9"])
    (corpus / "books" / "linked").symlink_to(elsewhere.parents[1])
    (corpus / "sourced").symlink_to(elsewhere.parent)
    with pytest.raises(DataError, match=r"9\.json: given twice, as .*linked/deep/9\.json too"):
        find_sources(str(corpus))
    (corpus / "sourced").unlink()
    names = [shard.name for shard in find_sources(str(corpus))]
    assert names == ["a.json", "linked/deep/9.json", "1.jsonl", "b/2.json.gz"]
    (corpus / "web" / "back").symlink_to(corpus)
    with pytest.raises(DataError, match="back/web: this link leads back to"):
        find_sources(str(corpus))


def test_a_directory_that_cannot_be_read_is_not_taken_for_empty(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = os.scandir

    def refuse(path: Path) -> Iterator[os.DirEntry[str]]:
        if Path(path).name == "b":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match="web/b: the directory cannot be read: Permission denied"):
        find_sources(str(corpus))


def test_a_corpus_is_a_directory_per_source(corpus: Path) -> None:
    shards = find_sources(str(corpus))
    assert [(shard.source, shard.name, shard.stem) for shard in shards] == [
        ("books", "a.json", "a"),
        ("web", "1.jsonl", "1"),
        ("web", "b/2.json.gz", "b__2"),
    ]
    assert [shard.bytes for shard in shards] == [Path(shard.path).stat().st_size for shard in shards]
    version = shards[0].version
    (corpus / "books" / "a.json").touch()
    assert find_sources(str(corpus))[0].version != version
    for wrong, said in ((corpus / "missing", "no such directory"), (corpus / "books", "no subdirectories")):
        with pytest.raises(DataError, match=said):
            find_sources(str(wrong))
    (corpus / "empty").mkdir()
    with pytest.raises(DataError, match="empty: no data files"):
        find_sources(str(corpus))


def test_files_and_globs(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = find_shards([str(corpus / "books" / "a.json"), str(corpus / "web" / "**" / "*.gz")])
    assert [(shard.source, shard.name) for shard in shards] == [("books", "a.json"), ("b", "2.json.gz")]
    monkeypatch.chdir(corpus / "web")
    assert [shard.source for shard in find_shards(["1.jsonl"])] == ["web"]
    (corpus / "web" / "x[1].json").write_text("{}")
    assert find_shards(["x[1].json"])[0].name == "x[1].json", "a name is a name before it is a pattern"
    with pytest.raises(DataError, match="no file matches"):
        find_shards([str(corpus / "*.parquet")])
    with pytest.raises(DataError, match="given twice"):
        find_shards(["1.jsonl", "*.jsonl"])
    (corpus / "web" / "gone.json").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"gone\.json"):
        find_shards([str(corpus / "web")])


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("a.json.gz", "a"),
        ("a.jsonl.zst", "a"),
        ("a.b.json", "a.b"),
        ("a", "a"),
        (".gz", ".gz"),
        ("x/y/a.gz", "x__y__a"),
    ],
)
def test_stems(name: str, stem: str) -> None:
    assert shard_stem(name) == stem


def test_a_manifest(corpus: Path) -> None:
    manifest = corpus / "list.txt"
    url = f"file://{corpus}/web/1.jsonl"
    manifest.write_text(f"# comment\n\nbooks/a.json\nother\tweb/b/2.json.gz\n{url}\n")
    shards = shards_of_manifest(manifest)
    assert [(shard.source, shard.name) for shard in shards] == [
        ("books", "a.json"),
        ("other", "b/2.json.gz"),
        ("web", "1.jsonl"),
    ]
    manifest.write_text("books/a.json\nbooks/b.json\n")
    with pytest.raises(DataError, match=r"list\.txt, line 2: .*b\.json: no such file"):
        shards_of_manifest(manifest)
    manifest.write_text("books/a.json\n./books/a.json\n")
    with pytest.raises(DataError, match="given twice"):
        shards_of_manifest(manifest)
    for line, said in (
        ("web", "web: a directory"),
        ("../web\tbooks/a.json", "'../web' is no name of a source"),
    ):
        manifest.write_text(f"books/a.json\n{line}\n")
        with pytest.raises(DataError, match=rf"list\.txt, line 2: .*{said}"):
            shards_of_manifest(manifest)
    manifest.write_text("# nothing\n")
    with pytest.raises(DataError, match="lists no files"):
        shards_of_manifest(manifest)
    with pytest.raises(DataError, match="cannot be read"):
        shards_of_manifest(corpus / "missing.txt")


def test_urls(corpus: Path) -> None:
    store = fsspec.filesystem("memory")
    for path in corpus.rglob("*.js*"):
        store.pipe(f"/bucket/{path.relative_to(corpus)}", path.read_bytes())
    shards = find_sources("memory://bucket")
    local = find_sources(str(corpus))
    assert [(s.source, s.name, s.bytes) for s in shards] == [(s.source, s.name, s.bytes) for s in local]
    assert list(read_texts(s.path for s in shards)) == list(read_texts(s.path for s in local))
    assert [s.name for s in find_shards(["memory://bucket/web/*.jsonl"])] == ["1.jsonl"]
    store.pipe("/bucket/list.txt", b"other\tweb/1.jsonl\n")
    assert [(s.source, s.name) for s in shards_of_manifest("memory://bucket/list.txt")] == [
        ("other", "web/1.jsonl")
    ]
    with InputFile(shards[1].path) as file:
        file.sha256()
        assert file.bytes_read == shards[1].bytes
    for wrong, said in (
        ("memory://bucket/missing.json", "no such file"),
        ("memory://bucket/*.zst", "no file matches"),
        ("nosuch://bucket/a.json", "cannot be read"),
    ):
        with pytest.raises(DataError, match=said):
            find_shards([wrong])
    with pytest.raises(DataError, match=r"line 1: the file cannot be read any further"):
        list(read_texts(["nosuch://bucket/a.json"]))


def test_the_table_of_dolma_sources(tmp_path: Path, corpus: Path) -> None:
    table = json.loads(TABLE.read_text())
    assert len(table["sources"]) == 13
    assert abs(sum(source["weight"] for source in table["sources"]) - 1) < 1e-9
    blend = json.loads((TABLE.parents[1] / "dolma.json").read_text())["data"]["sources"]
    assert [(s["name"], s["subset"], s["weight"]) for s in table["sources"]] == [
        (s["name"], s["subset"], s["weight"]) for s in blend
    ]
    names = load_source_table(TABLE)
    assert names["gutenberg"] == names["dolma_v1_6_gutenberg"] == "dolma_v1_6_gutenberg"
    assert set(names.values()) == {source["subset"] for source in table["sources"]}
    renamed = rename_sources(find_sources(str(corpus)), {"web": "dolma_v1_6_cc"})
    assert [(shard.source, shard.directory, shard.stem) for shard in renamed] == [
        ("books", "books", "a"),
        ("dolma_v1_6_cc", "web", "web__1"),
        ("dolma_v1_6_cc", "web", "web__b__2"),
    ]
    for content in ("[]", "{", '{"sources": [{"name": "a"}]}'):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(ConfigError, match="not a table of sources"):
            load_source_table(tmp_path / "bad.json")
