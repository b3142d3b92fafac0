"""From input shards to output shards: the same bytes however it is done, and every line accounted for."""

import gzip
import hashlib
import json
import os
import signal
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megads.config.schema import DataSource
from megads.data import shard_workers
from megads.data import shards as shards_module
from megads.data.documents import read_line_batches
from megads.data.encoding import Encoder
from megads.data.indexed import SCORES, data_files, sidecar_file, token_type
from megads.data.inputs import find_shards, find_sources
from megads.data.manifest import check_dataset, read_record
from megads.data.preprocess import Progress, preprocess
from megads.data.recipe import Recipe
from megads.data.removals import Removal, removals_path, write_removals
from megads.data.shards import Shard, convert_shard
from megads.data.source_files import source_prefixes
from megads.data.tokenizer import load_tokenizer
from megads.data.tokenizer_training import train_sentencepiece
from megads.data.work_division import array_task, check_prefixes, divide
from megads.errors import ConfigError, DataError

from data_files import write_json_lines  # isort: skip

TEXTS = [f"Document {i}: " + " ".join(str(i * j) for j in range(i % 50)) for i in range(400)]


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_sentencepiece(TEXTS, tmp_path_factory.mktemp("tokenizer") / "t.model", 300).path


@pytest.fixture
def recipe(tokenizer_path: Path) -> Recipe:
    return Recipe(str(tokenizer_path))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    write_json_lines(tmp_path / "in" / "web" / "b.json.gz", TEXTS[200:])
    write_json_lines(tmp_path / "in" / "web" / "a.jsonl", [*TEXTS[:150], ""])
    write_json_lines(tmp_path / "in" / "books" / "a.jsonl", TEXTS[150:200])
    return tmp_path / "in"


def shards_of(corpus: Path, output: Path) -> list[Shard]:
    return [Shard(found, output / found.source / found.stem) for found in find_sources(str(corpus))]


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def write_records(path: Path, records: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in records))
    return path


def convert(path: Path, prefix: Path, recipe: Recipe) -> dict[str, Any]:
    return convert_shard(Shard(find_shards([str(path)])[0], prefix), Encoder(recipe))


def ids_of(prefix: Path) -> list[list[int]]:
    dataset = IndexedDataset(str(prefix))
    return [dataset[i].tolist() for i in range(len(dataset))]


@pytest.mark.parametrize("batch_bytes", [700, 1 << 20])
def test_output_does_not_depend_on_workers_or_batches(
    tmp_path: Path, corpus: Path, recipe: Recipe, batch_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = partial(read_line_batches, batch_bytes=batch_bytes)
    monkeypatch.setattr(shards_module, "read_line_batches", read)  # of this process, not of workers
    told: list[Progress] = []
    one = preprocess(shards_of(corpus, tmp_path / "1"), recipe, on_progress=told.append)
    three = preprocess(shards_of(corpus, tmp_path / "3"), recipe, workers=3)
    assert contents(tmp_path / "1") == contents(tmp_path / "3")
    tokenizer = load_tokenizer(recipe.tokenizer)
    expected = {"web/b": TEXTS[200:], "web/a": TEXTS[:150], "books/a": TEXTS[150:200]}
    for name, texts in expected.items():
        read = ids_of(tmp_path / "3" / name)
        assert all(ids[-1] == tokenizer.eod_id for ids in read)
        assert [tokenizer.decode(ids[:-1]) for ids in read] == texts
        info = check_dataset(tmp_path / "3" / name, tokenizer.vocab_size, tokenizer.sha256, full=True)
        assert (info.documents, info.eod_id) == (len(texts), tokenizer.eod_id)
    for summaries in (one, three):
        web = summaries["web"]
        assert (web.shards, web.documents_in, web.documents, dict(web.dropped)) == (
            2,
            351,
            350,
            {"empty_text": 1},
        )
        assert sum(s.text_bytes for s in summaries.values()) == sum(len(t.encode()) for t in TEXTS)
    input_bytes = sum(p.stat().st_size for p in corpus.rglob("*.json*"))
    assert (told[-1].input_bytes_done, told[-1].input_bytes) == (input_bytes, input_bytes)


def test_files_are_those_of_megatron_core(tmp_path: Path, corpus: Path, recipe: Recipe) -> None:
    preprocess(shards_of(corpus, tmp_path / "out"), recipe)
    tokenizer = load_tokenizer(recipe.tokenizer)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=token_type(tokenizer.vocab_size).type)
    for ids in tokenizer.encode_batch(TEXTS[200:]):
        builder.add_document(torch.tensor([*ids, tokenizer.eod_id]), [len(ids) + 1])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for ending in ("bin", "idx"):
        ours = tmp_path / "out" / "web" / f"b.{ending}"
        assert ours.read_bytes() == (tmp_path / f"theirs.{ending}").read_bytes()


def test_a_rerun_does_only_what_is_missing(tmp_path: Path, corpus: Path, recipe: Recipe) -> None:
    shards = shards_of(corpus, tmp_path / "out")
    preprocess(shards, recipe)
    before = contents(tmp_path / "out")

    def made() -> int:
        summaries = preprocess(shards_of(corpus, tmp_path / "out"), recipe).values()
        return sum(summary.shards - summary.done_before for summary in summaries)

    assert made() == 0
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.bin")}
    data_files(shards[0].prefix)[2].unlink()  # as after a kill: the record comes last
    data_files(shards[0].prefix)[2].with_name(f".{shards[0].prefix.name}.json.partial").touch()
    os.truncate(data_files(shards[1].prefix)[0], 10)
    assert made() == 2
    assert contents(tmp_path / "out") == before
    untouched = data_files(shards[2].prefix)[0]
    assert untouched.stat().st_mtime_ns == times[untouched]
    os.utime(shards[0].input.path)  # touched, with the same content
    assert made() == 0
    write_json_lines(Path(shards[0].input.path), ["other"])
    assert made() == 1
    assert read_record(shards[0].prefix)["documents"] == 1  # type: ignore[index]


def test_inputs_of_the_same_content_are_told_of(
    tmp_path: Path, corpus: Path, recipe: Recipe, caplog: pytest.LogCaptureFixture
) -> None:
    write_json_lines(corpus / "web" / "copy.jsonl", TEXTS[150:200])
    for _ in range(2):  # made now, and done before
        caplog.clear()
        preprocess(shards_of(corpus, tmp_path / "out"), recipe)
        (said,) = caplog.messages
        assert said.startswith("These 2 files have the same content")
        assert f"{corpus}/books/a.jsonl, {corpus}/web/copy.jsonl" in said


def test_datasets_of_others_are_not_replaced(tmp_path: Path, corpus: Path, recipe: Recipe) -> None:
    shards = shards_of(corpus, tmp_path / "out")
    preprocess(shards, recipe)
    other = Recipe(recipe.tokenizer, max_line_bytes=1000)
    before = contents(tmp_path / "out")
    with pytest.raises(
        DataError, match=r"other settings \(max_line_bytes: 16777216, now 1000\).*--overwrite"
    ):
        preprocess(shards, other)
    moved = write_json_lines(tmp_path / "elsewhere" / "a.jsonl", TEXTS)
    with pytest.raises(DataError, match=r"made of another input, .*books/a\.jsonl"):
        preprocess([Shard(find_shards([str(moved)])[0], shards[0].prefix)], recipe)
    assert contents(tmp_path / "out") == before
    assert preprocess(shards, other, overwrite=True)["web"].done_before == 0
    assert preprocess(shards, other)["web"].done_before == 2
    for name in ("json", "idx"):
        (tmp_path / "out" / "books" / f"a.{name}").unlink()
    with pytest.raises(DataError, match=r"a\.bin exist already, without a record"):
        preprocess(shards, other)
    preprocess(shards, other, overwrite=True)


def test_inputs_without_documents_leave_a_record_alone(tmp_path: Path, corpus: Path, recipe: Recipe) -> None:
    write_json_lines(corpus / "web" / "blank.json.gz", ["", ""])
    (corpus / "web" / "zero.jsonl").touch()
    shards = shards_of(corpus, tmp_path / "out")
    summaries = preprocess(shards, recipe)
    for name, lines in (("blank", 2), ("zero", 0)):
        record = read_record(tmp_path / "out" / "web" / name)
        assert record is not None
        assert (record["documents_in"], record["documents"], record["tokens"]) == (lines, 0, 0)
        assert [p.name for p in (tmp_path / "out" / "web").glob(f"{name}*")] == [f"{name}.json"]
        with pytest.raises(DataError, match="no document"):
            check_dataset(tmp_path / "out" / "web" / name, 300, None)
    assert summaries["web"].shards == 4
    # Training finds the other shards of the source and is not stopped by these.
    prefixes = source_prefixes(DataSource(name="web", subset="web"), str(tmp_path / "out"))
    assert [Path(prefix).name for prefix in prefixes] == ["a", "b"]
    assert preprocess(shards, recipe)["web"].done_before == 4
    write_json_lines(corpus / "web" / "b.json.gz", [""])
    preprocess(shards_of(corpus, tmp_path / "out"), recipe)
    assert not (tmp_path / "out" / "web" / "b.idx").exists(), "a dataset that became empty is gone"


RECORDS = [
    {"id": "0", "text": "zero", "metadata": {"language": "en", "license": ["mit", "x"]}, "quality": 0.5},
    {"id": "1", "text": "one", "metadata": {"language": "de", "license": "mit"}, "quality": 1},
    {"id": "2", "text": "two", "metadata": {"language": "en"}, "quality": 2},
    {
        "id": "3",
        "text": "three keeps this",
        "metadata": {"language": "en", "license": "mit"},
        "quality": -3.25,
    },
    {"id": "4", "text": "four", "metadata": {"language": "fr", "license": "mit"}, "quality": "high"},
    {"id": "5", "text": "", "metadata": {"language": "fr", "license": "mit"}, "quality": 1},
    {"id": "6", "text": "six", "metadata": {"language": "fr", "license": "mit"}, "quality": 1e300},
    {"id": "7", "text": "seven", "metadata": {"language": "fr", "license": "mit"}, "quality": 7},
    {"id": "8", "text": "eight", "metadata": {"language": "fr", "license": "mit"}, "quality": 8},
    "not json\n",
    "\n",
]


def test_filters_scores_removals_and_quarantine_account_for_every_line(
    tmp_path: Path, recipe: Recipe
) -> None:
    source = write_records(tmp_path / "web" / "a.jsonl", RECORDS)
    sha256 = convert(write_records(tmp_path / "web" / "b.jsonl", RECORDS[:1]), tmp_path / "b", recipe)[
        "input"
    ]["sha256"]
    assert len(sha256) == 64
    for directory, entries in (
        ("r1", {4: Removal("paragraph", ((5, 11),)), 8: Removal("near_duplicate")}),
        ("r2", {4: Removal("other", ((10, 16),)), 9: Removal("other", ((0, 5),))}),
    ):
        write_removals(
            removals_path(tmp_path / directory, "web", "a.jsonl"),
            input_file="a.jsonl", input_bytes=1, documents=9, entries=entries,
            input_sha256=hashlib.sha256(source.read_bytes()).hexdigest(),
        )  # fmt: skip
    full = Recipe(
        recipe.tokenizer,
        keep=(("metadata.language", ("en", "fr")), ("metadata.license", ("mit", "bsd"))),
        score_field="quality",
        removals=(str(tmp_path / "r1"), str(tmp_path / "r2")),
        quarantine_quota=0.5,
    )
    record = convert(source, tmp_path / "out" / "a", full)
    assert record["dropped"] == {
        "empty_text": 2, "filtered:metadata.language": 1, "filtered:metadata.license": 1, "near_duplicate": 1,
    }  # fmt: skip
    assert record["quarantined"] == {"bad_json": 1, "bad_score": 2}
    assert (record["documents_in"], record["documents"]) == (10, 2)
    assert record["cut"] == {"documents": {"other": 2, "paragraph": 1}, "characters": 11 + 5}
    tokenizer = load_tokenizer(recipe.tokenizer)
    texts = [tokenizer.decode(ids[:-1]) for ids in ids_of(tmp_path / "out" / "a")]
    assert texts == ["zero", "three"]
    scores = np.load(sidecar_file(tmp_path / "out" / "a", SCORES))
    assert scores.dtype == np.float32
    assert scores.tolist() == [0.5, -3.25]
    listed = [json.loads(line) for line in (tmp_path / "out" / "a.quarantine.jsonl").read_text().splitlines()]
    assert [(entry["line"], entry["reason"]) for entry in listed] == [
        (5, "bad_score"), (7, "bad_score"), (10, "bad_json"),
    ]  # fmt: skip
    # Files beside the dataset go when they are no longer of it.
    convert(write_records(source, RECORDS[:1]), tmp_path / "out" / "a", recipe)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"a.bin", "a.idx", "a.json"}


def test_removals_must_be_there_and_of_this_content(tmp_path: Path, corpus: Path, recipe: Recipe) -> None:
    cleaned = Recipe(recipe.tokenizer, removals=(str(tmp_path / "r"),))
    shards = shards_of(corpus, tmp_path / "out")[:1]
    with pytest.raises(DataError, match="no removals for"):
        preprocess(shards, cleaned)

    def remove(line: int, sha256: str) -> None:
        write_removals(
            removals_path(tmp_path / "r", "books", "a.jsonl"),
            input_file="a", input_bytes=1, input_sha256=sha256, documents=50,
            entries={line: Removal("quality")},
        )  # fmt: skip

    remove(1, "0" * 64)
    with pytest.raises(DataError, match="another content"):
        preprocess(shards, cleaned)
    assert not list((tmp_path / "out").rglob("*.*"))
    sha256 = hashlib.sha256(Path(shards[0].input.path).read_bytes()).hexdigest()
    remove(1, sha256)
    assert preprocess(shards, cleaned)["books"].dropped == {"quality": 1}
    assert preprocess(shards, cleaned)["books"].done_before == 1
    remove(2, sha256)
    assert preprocess(shards, cleaned)["books"].done_before == 0, "cleaned again: made again"


def test_fill_in_the_middle_by_document_whatever_the_order(tmp_path: Path, recipe: Recipe) -> None:
    records = [{"id": str(i), "text": text} for i, text in enumerate(TEXTS)]
    write_records(tmp_path / "in" / "web" / "a.jsonl", records)
    write_records(tmp_path / "in" / "web" / "b.jsonl", records[::-1])
    fim = Recipe(recipe.tokenizer, fim_rate=0.5, fim_spm_rate=0.5, fim_seed=3)
    preprocess(shards_of(tmp_path / "in", tmp_path / "out"), fim, workers=2)
    a, b = ids_of(tmp_path / "out" / "web" / "a"), ids_of(tmp_path / "out" / "web" / "b")
    assert a == b[::-1]
    encoder = Encoder(fim)
    assert encoder._fim is not None
    plain = encoder.tokenizer.encode_batch(TEXTS)
    restored = [encoder._fim.restore(ids[:-1]) for ids in a]
    assert [encoder.tokenizer.decode(ids.tolist()) for ids in restored] == TEXTS
    changed = sum(ids[:-1] != whole for ids, whole in zip(a, plain, strict=True))
    record = read_record(tmp_path / "out" / "web" / "a")
    assert record is not None
    assert record["fim"]["documents"] == changed
    assert 150 < changed < 250
    assert record["fim"]["rate"] == changed / len(TEXTS)
    assert 0 < record["fim"]["spm_documents"] < changed


def test_combined_tokens_are_split_by_document_whatever_the_order(tmp_path: Path) -> None:
    texts = [f"word {i}.\n\nnext word;\n(end)!\n" * (i % 7 + 1) for i in range(100)]
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    pattern = tokenizers.Regex(r"\p{P}+[\r\n]*|\s?\p{L}+|\s+|\d")
    model.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Split(pattern, "isolated"),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, show_progress=False, initial_alphabet=alphabet)
    model.train_from_iterator(texts, trainer)
    model.add_special_tokens(["<|endoftext|>"])
    model.save(str(tmp_path / "tokenizer.json"))
    records = [{"id": str(i), "text": text} for i, text in enumerate(texts)]
    write_records(tmp_path / "in" / "web" / "a.jsonl", records)
    write_records(tmp_path / "in" / "web" / "b.jsonl", records[::-1])
    read = {}
    for rate in (0.0, 0.5):
        recipe = Recipe(str(tmp_path / "tokenizer.json"), split_punctuation_rate=rate)
        preprocess(shards_of(tmp_path / "in", tmp_path / str(rate)), recipe)
        read[rate] = ids_of(tmp_path / str(rate) / "web" / "a")
        assert read[rate] == ids_of(tmp_path / str(rate) / "web" / "b")[::-1]
        tokenizer = load_tokenizer(recipe.tokenizer)
        assert [tokenizer.decode(ids[:-1]) for ids in read[rate]] == texts
    pieces = {i: tokenizer.decode([i]) for ids in read[0.0] for i in ids}
    combined = {i for i, piece in pieces.items() if piece.endswith("\n") and piece.strip()}
    whole, left = (sum(i in combined for ids in read[rate] for i in ids) for rate in (0.0, 0.5))
    assert whole == 3 * sum(i % 7 + 1 for i in range(100))
    assert 0.4 * whole < left < 0.6 * whole


def test_documents_without_id_are_known_by_their_text(tmp_path: Path, recipe: Recipe) -> None:
    write_records(tmp_path / "in" / "web" / "a.jsonl", [{"text": text} for text in TEXTS])
    write_records(tmp_path / "in" / "web" / "b.jsonl", [{"text": text, "id": None} for text in TEXTS[::-1]])
    preprocess(shards_of(tmp_path / "in", tmp_path / "out"), Recipe(recipe.tokenizer, fim_rate=0.5))
    assert ids_of(tmp_path / "out" / "web" / "a") == ids_of(tmp_path / "out" / "web" / "b")[::-1]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_record_stops_everything(tmp_path: Path, corpus: Path, recipe: Recipe, workers: int) -> None:
    lines = (corpus / "web" / "a.jsonl").read_text().splitlines()
    lines[100] = json.dumps({"id": "100"})
    (corpus / "web" / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"a\.jsonl, line 101: no field 'text'"):
        preprocess(shards_of(corpus, tmp_path / "out"), recipe, workers=workers)
    assert not list((tmp_path / "out" / "web").glob("a.*"))
    assert not list((tmp_path / "out").rglob(".*")), "a partial file was left"


def test_a_killed_process_is_an_error_and_no_hang(
    tmp_path: Path, corpus: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    fifo = tmp_path / "endless.jsonl"
    os.mkfifo(fifo)
    keep_open = os.open(fifo, os.O_RDWR)
    give = shard_workers._Pool._give

    def give_and_kill(self: Any, pipe: Any, waiting: Any) -> None:
        give(self, pipe, waiting)
        if (shard := self._working_on.get(pipe)) and shard.input.path == str(fifo):
            os.kill(self._processes[pipe].pid, signal.SIGKILL)

    monkeypatch.setattr(shard_workers._Pool, "_give", give_and_kill)
    endless = Shard(find_shards([str(fifo)])[0], tmp_path / "out" / "web" / "endless")
    shards = [endless, *shards_of(corpus, tmp_path / "out")]
    with pytest.raises(DataError, match=r"endless\.jsonl: the process that converted it was killed"):
        preprocess(shards, recipe, workers=2)
    os.close(keep_open)
    assert not list((tmp_path / "out").rglob(".*"))


def test_another_text_field(tmp_path: Path, recipe: Recipe) -> None:
    source = write_records(tmp_path / "in.jsonl", [{"content": "Document 1"}])
    assert convert(source, tmp_path / "d", Recipe(recipe.tokenizer, text_field="content"))["documents"] == 1


def test_work_is_divided_by_bytes(tmp_path: Path) -> None:
    sizes = [5, 90, 30, 30, 30, 5, 60, 40, 10]
    for i, size in enumerate(sizes):
        (tmp_path / f"{i}.jsonl").write_bytes(b"x" * size)
    shards = [Shard(found, tmp_path / found.stem) for found in find_shards([str(tmp_path)])]
    parts = divide(shards, 3)
    loads = [[shard.input.bytes for shard in part] for part in parts]
    assert sorted(bytes_ for load in loads for bytes_ in load) == sorted(sizes)
    assert [sum(load) for load in loads] == [100, 100, 100]
    assert all(load == sorted(load, reverse=True) for load in loads)
    assert divide(shards[::-1], 3) == parts, "tasks that list the files otherwise agree all the same"
    assert [len(part) for part in divide(shards[:2], 3)] == [1, 1, 0]
    with pytest.raises(DataError, match="would both become"):
        check_prefixes([shards[0], Shard(shards[1].input, shards[0].prefix)])


def test_tasks_of_a_job_array(tmp_path: Path) -> None:
    slurm = {f"SLURM_ARRAY_TASK_{k}": v for k, v in (("MIN", "1"), ("MAX", "4"), ("COUNT", "4"), ("ID", "3"))}
    assert array_task(None, None, {}) == (1, 0)
    assert array_task(None, None, slurm) == (4, 2)
    assert array_task(8, 7, slurm) == (8, 7)
    for num_tasks, task_id, environment, said in (
        (4, None, {}, "belong together"),
        (0, 0, {}, "at least 1"),
        (None, None, {"SLURM_ARRAY_TASK_ID": "3"}, "SLURM_ARRAY_TASK_MIN.*Give --num-tasks"),
        (4, 4, {}, "from 0 to 3"),
        (None, None, slurm | {"SLURM_ARRAY_TASK_MAX": "7"}, "without gaps"),
    ):
        with pytest.raises(ConfigError, match=said):
            array_task(num_tasks, task_id, environment)


def test_tasks_together_make_what_one_makes(tmp_path: Path, corpus: Path, recipe: Recipe) -> None:
    preprocess(shards_of(corpus, tmp_path / "one"), recipe)
    for task in range(3):
        preprocess(divide(shards_of(corpus, tmp_path / "three"), 3)[task], recipe)
    assert contents(tmp_path / "one") == contents(tmp_path / "three")


def test_shares_are_shares(recipe: Recipe) -> None:
    for setting in ("fim_rate", "fim_spm_rate", "split_punctuation_rate", "quarantine_quota"):
        for wrong in (-0.1, 1.1):
            with pytest.raises(ConfigError, match=f"{setting} is {wrong}"):
                Recipe(recipe.tokenizer, **{setting: wrong})  # type: ignore[arg-type]


def test_a_copied_corpus_is_known_by_its_content(tmp_path: Path, corpus: Path, recipe: Recipe) -> None:
    preprocess(shards_of(corpus, tmp_path / "out"), recipe)
    copy = tmp_path / "copy"
    for path in corpus.rglob("*.json*"):
        (copy / path.relative_to(corpus)).parent.mkdir(parents=True, exist_ok=True)
        (copy / path.relative_to(corpus)).write_bytes(path.read_bytes())
    assert preprocess(shards_of(copy, tmp_path / "out"), recipe)["web"].done_before == 2
    packed = corpus / "web" / "b.json.gz"
    packed.write_bytes(gzip.compress(gzip.decompress(packed.read_bytes()), 1))
    assert preprocess(shards_of(corpus, tmp_path / "out"), recipe)["web"].done_before == 1
