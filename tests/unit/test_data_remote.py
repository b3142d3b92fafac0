"""Datasets in an object store: fetched once, checked, fetched again when they change."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from megads.config.resolve import resolve
from megads.config.schema import Config
from megads.data.blend import build_datasets
from megads.data.indexed import data_files
from megads.data.remote_shards import fetch_datasets
from megads.data.sources import SampleCounts
from megads.errors import DataError

from data_files import numbered_documents, write_dataset  # isort: skip


@pytest.fixture
def store() -> Iterator[Any]:
    memory = fsspec.filesystem("memory")
    yield memory
    memory.store.clear()


def upload(store: Any, local: Path, name: str) -> None:
    for path in data_files(local):
        store.pipe_file(f"/bucket/{name}{path.suffix}", path.read_bytes())


def test_training_reads_the_same_samples_from_a_store(tmp_path: Path, store: Any) -> None:
    for shard in range(3):
        upload(
            store,
            write_dataset(tmp_path / "a" / str(shard), numbered_documents(40, 3, 400, seed=shard)),
            f"web/{shard}",
        )
    upload(store, write_dataset(tmp_path / "b", numbered_documents(60, 3, 400, seed=9)), "code")

    def samples(paths: dict[str, str]) -> list[list[int]]:
        sources = [{"name": name, "path": path} for name, path in paths.items()]
        config = Config.model_validate(
            {
                "model": {"vocab_size": 500},
                "training": {"seq_length": 16, "total_training_tokens": 3200},
                "data": {"cache_dir": str(tmp_path / "cache"), "split": "100,0,0", "sources": sources},
            }
        )
        train = build_datasets(config, resolve(config, 1, False), SampleCounts(200)).train
        return [train[i]["tokens"].tolist() for i in range(200)]

    remote = samples({"web": "memory://bucket/web", "code": "memory://bucket/code"})
    assert remote == samples({"web": str(tmp_path / "a"), "code": str(tmp_path / "b")})
    store.store.clear()
    with pytest.raises(DataError, match="memory://bucket/web: neither a dataset"):
        samples({"web": "memory://bucket/web"})


def test_only_what_is_new_is_fetched(tmp_path: Path, store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    upload(store, write_dataset(tmp_path / "one", numbered_documents(40, 3, 400)), "web/one")
    fetched: list[str] = []
    real = type(store).get_file

    def counting(self: Any, path: str, target: str, **kwargs: Any) -> None:
        fetched.append(path.rpartition("/")[2])
        real(self, path, target, **kwargs)

    monkeypatch.setattr(type(store), "get_file", counting)
    (local,) = fetch_datasets("memory://bucket/web", tmp_path)
    assert sorted(fetched) == ["one.bin", "one.idx", "one.json"]
    fetched.clear()
    assert fetch_datasets("memory://bucket/web", tmp_path) == (local,)
    assert fetch_datasets("memory://bucket/web/", tmp_path) == (local,)
    assert fetched == []
    upload(store, write_dataset(tmp_path / "two", numbered_documents(30, 3, 400)), "web/two")
    assert len(fetch_datasets("memory://bucket/web", tmp_path)) == 2
    assert sorted(fetched) == ["two.bin", "two.idx", "two.json"]
    fetched.clear()
    upload(store, write_dataset(tmp_path / "one", numbered_documents(41, 3, 400)), "web/one")
    fetch_datasets("memory://bucket/web", tmp_path)
    assert sorted(fetched) == ["one.bin", "one.idx", "one.json"]
    assert Path(local + ".bin").read_bytes() == (tmp_path / "one.bin").read_bytes()
    Path(local + ".idx").unlink()
    fetch_datasets("memory://bucket/web", tmp_path)
    assert Path(local + ".idx").read_bytes() == (tmp_path / "one.idx").read_bytes()
    store.rm("/bucket/web/two.idx")
    with pytest.raises(DataError, match=r"web/two\.idx: no such file"):
        fetch_datasets("memory://bucket/web", tmp_path)


def test_an_interrupted_fetch_leaves_nothing_that_passes_for_whole(
    tmp_path: Path, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(store, write_dataset(tmp_path / "one", numbered_documents(40, 3, 400)), "one")

    def breaks(self: Any, path: str, target: str, **kwargs: Any) -> None:
        Path(target).write_bytes(self.cat_file(path)[:10])
        raise ConnectionResetError("the store hung up")

    with monkeypatch.context() as patched:
        patched.setattr(type(store), "get_file", breaks)
        with pytest.raises(DataError, match="cannot be fetched: ConnectionResetError: the store hung up"):
            fetch_datasets("memory://bucket/one", tmp_path / "cache")
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []
    (local,) = fetch_datasets("memory://bucket/one", tmp_path / "cache")
    assert Path(local + ".bin").read_bytes() == (tmp_path / "one.bin").read_bytes()


def test_what_is_damaged_in_the_store_is_refused(tmp_path: Path, store: Any) -> None:
    upload(store, write_dataset(tmp_path / "one", numbered_documents(40, 3, 400)), "one")
    content = bytearray((tmp_path / "one.bin").read_bytes())
    content[7] ^= 1
    store.pipe_file("/bucket/one.bin", bytes(content))
    for _ in range(2):
        with pytest.raises(DataError, match=r"one\.bin: the content is not what one\.json records"):
            fetch_datasets("memory://bucket/one", tmp_path / "cache")


def test_a_store_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nosuch://bucket/x: cannot be fetched: ValueError"):
        fetch_datasets("nosuch://bucket/x", tmp_path)
