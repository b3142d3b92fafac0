"""From text to dataset: the same bytes on any number of processes, and no partial result ever."""

import itertools
import json
import os
import signal
from pathlib import Path

import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megads.data import preprocess as module
from megads.data.documents import LineBatch, read_line_batches
from megads.data.indexed import data_files
from megads.data.manifest import check_dataset
from megads.data.preprocess import Encoder, preprocess
from megads.data.tokenizer import load_tokenizer
from megads.data.tokenizer_training import train_sentencepiece
from megads.errors import DataError

from data_files import write_json_lines  # isort: skip

TEXTS = [f"Document {i}: " + " ".join(str(i * j) for j in range(i % 50)) for i in range(400)]


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_sentencepiece(TEXTS, tmp_path_factory.mktemp("tokenizer") / "t.model", 300).path


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many batches out of little text."""
    monkeypatch.setattr(module, "read_line_batches", lambda path: read_line_batches(path, batch_bytes=2000))


@pytest.mark.usefixtures("small_batches")
def test_output_does_not_depend_on_workers(tmp_path: Path, tokenizer_path: Path) -> None:
    write_json_lines(tmp_path / "in" / "b.json.gz", TEXTS[200:])
    write_json_lines(tmp_path / "in" / "a.jsonl", [*TEXTS[:200], ""])
    seen_bytes: list[int] = []
    for workers in (1, 3):
        with Encoder(tokenizer_path, workers=workers) as encoder:
            summary = preprocess(
                [tmp_path / "in"], tmp_path / str(workers), encoder, on_progress=seen_bytes.append
            )
    for one, three in zip(data_files(tmp_path / "1"), data_files(tmp_path / "3"), strict=True):
        assert one.read_bytes() == three.read_bytes()
    tokenizer = load_tokenizer(tokenizer_path)
    dataset = IndexedDataset(str(tmp_path / "3"))
    assert len(dataset) == len(TEXTS)
    for i, text in enumerate(TEXTS):
        ids = dataset[i].tolist()
        assert ids[-1] == tokenizer.eod_id
        assert tokenizer.decode(ids[:-1]) == text
    assert (summary.documents, summary.empty_documents) == (len(TEXTS), 1)
    assert summary.text_bytes == sum(len(t.encode()) for t in TEXTS)
    info = check_dataset(tmp_path / "3", tokenizer.vocab_size, tokenizer.sha256, full=True)
    assert (info.tokens, info.eod_id) == (summary.tokens, tokenizer.eod_id)
    assert max(seen_bytes) == sum(f.stat().st_size for f in (tmp_path / "in").iterdir())


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_record_stops_everything(tmp_path: Path, tokenizer_path: Path, workers: int) -> None:
    source = write_json_lines(tmp_path / "in.jsonl", TEXTS)
    lines = source.read_text().splitlines()
    lines[300] = json.dumps({"id": "300"})
    source.write_text("\n".join(lines))
    (tmp_path / "out").mkdir()
    with (
        Encoder(tokenizer_path, workers=workers) as encoder,
        pytest.raises(DataError, match=r"in\.jsonl, line 301: "),
    ):
        preprocess([source], tmp_path / "out" / "d", encoder)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.usefixtures("small_batches")
def test_a_killed_process_is_an_error_and_no_hang(tmp_path: Path, tokenizer_path: Path) -> None:
    source = write_json_lines(tmp_path / "in.jsonl", TEXTS)

    def batches_and_a_kill() -> "itertools.chain[LineBatch]":
        all_batches = read_line_batches(source, batch_bytes=2000)
        yield from itertools.islice(all_batches, 3)
        assert encoder._pool is not None
        for pid in list(encoder._pool._processes):
            os.kill(pid, signal.SIGKILL)
        yield from all_batches

    with Encoder(tokenizer_path, workers=2) as encoder, pytest.raises(DataError, match=r"in\.jsonl.*killed"):
        for _ in encoder.encode(batches_and_a_kill()):
            pass


def test_nothing_to_write_is_an_error(tmp_path: Path, tokenizer_path: Path) -> None:
    source = write_json_lines(tmp_path / "in.jsonl", ["", ""])
    with Encoder(tokenizer_path) as encoder, pytest.raises(DataError, match="no document with text"):
        preprocess([source], tmp_path / "out" / "d", encoder)
    assert not list((tmp_path / "out").iterdir())


def test_another_text_field(tmp_path: Path, tokenizer_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"content": "Document 1"}\n')
    with Encoder(tokenizer_path, text_field="content") as encoder:
        assert preprocess([source], tmp_path / "d", encoder).documents == 1
