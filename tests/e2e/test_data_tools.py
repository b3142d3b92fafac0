"""The command lines of the data tools, one after the other, as a user types them."""

import contextlib
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megads.data.indexed import data_files
from megads.data.manifest import check_dataset
from megads.data.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[2]
FIVE = {"code", "docs", "headers", "licenses", "reference"}


def start(tool: str, *arguments: object, **options: object) -> "subprocess.Popen[str]":
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tools" / f"{tool}.py"), *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **options,  # type: ignore[call-overload]
    )  # fmt: skip


def run(tool: str, *arguments: object) -> str:
    process = start(tool, *arguments)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return str(out)


def failure(tool: str, *arguments: object) -> tuple[int, str]:
    process = start(tool, *arguments)
    out, err = process.communicate(timeout=60)
    assert "Traceback" not in out + err
    return process.returncode, err


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sample") / "corpus"
    run("make_sample_corpus", "--output", path, "--mb", 3)
    return path


@pytest.fixture(scope="module")
def tokenizer(corpus: Path) -> Path:
    path = corpus.parent / "tokenizer.model"
    said = run("train_tokenizer", "--input", corpus, "--output", path, "--vocab-size", 2000)
    assert "2,000 pieces" in said
    return path


def test_the_corpus_is_dolma_format_in_five_sources_or_more(corpus: Path) -> None:
    assert {directory.name for directory in corpus.iterdir()} >= FIVE
    texts: list[str] = []
    total_bytes = 0
    for source in FIVE:
        records = [
            json.loads(line)
            for file in sorted((corpus / source).glob("*.json.gz"))
            for line in gzip.decompress(file.read_bytes()).splitlines()
        ]
        assert records
        assert len({record["id"] for record in records}) == len(records)
        for record in records:
            assert set(record) == {"id", "text", "source", "added", "created", "metadata"}
            assert record["source"] == source
        source_bytes = sum(len(record["text"].encode()) for record in records)
        assert source_bytes > 50_000, source
        total_bytes += source_bytes
        texts += [record["text"] for record in records]
    assert len(set(texts)) == len(texts), "a text occurs twice"
    assert 2e6 < total_bytes < 4e6


def test_the_corpus_is_the_same_each_time(corpus: Path, tmp_path: Path) -> None:
    run("make_sample_corpus", "--output", tmp_path / "again", "--mb", 3)
    run("make_sample_corpus", "--output", tmp_path / "other", "--mb", 3, "--seed", 1)
    files = sorted(path.relative_to(corpus) for path in corpus.rglob("*.gz"))
    assert files
    for again, same in (("again", True), ("other", False)):
        assert (
            sorted(path.relative_to(tmp_path / again) for path in (tmp_path / again).rglob("*.gz")) == files
        )
        equal = all((tmp_path / again / name).read_bytes() == (corpus / name).read_bytes() for name in files)
        assert equal == same
    code, said = failure("make_sample_corpus", "--output", corpus)
    assert code == 3
    assert "--overwrite" in said


def test_a_whole_corpus_becomes_datasets_with_one_command(
    corpus: Path, tokenizer: Path, tmp_path: Path
) -> None:
    arguments = ("--input-root", corpus, "--tokenizer", tokenizer)
    said = run("preprocess_dolma", *arguments, "--output-root", tmp_path / "one", "--workers", 1)
    run("preprocess_dolma", *arguments, "--output-root", tmp_path / "two", "--workers", 2)
    loaded = load_tokenizer(tokenizer)
    for source in FIVE:
        info = check_dataset(tmp_path / "one" / source, loaded.vocab_size, loaded.sha256, full=True)
        assert info.eod_id == loaded.eod_id
        assert f"{info.tokens:,}" in said
        assert f"{info.documents:,}" in said
        for one, two in zip(
            data_files(tmp_path / "one" / source), data_files(tmp_path / "two" / source), strict=True
        ):
            assert one.read_bytes() == two.read_bytes()
    code, said = failure("preprocess_dolma", *arguments, "--output-root", tmp_path / "one")
    assert code == 3
    assert "exist already" in said


def test_one_dataset_and_what_can_go_wrong(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    source = sorted((corpus / "licenses").glob("*.gz"))[0]
    output = tmp_path / "out" / "licenses"
    run("preprocess_dolma", "--input", source, "--output", output, "--tokenizer", tokenizer, "--workers", 1)
    run("preprocess_dolma", "--input", source, "--output", output, "--tokenizer", tokenizer, "--overwrite")
    assert {path.name for path in output.parent.iterdir()} == {
        f"licenses.{e}" for e in ("bin", "idx", "json")
    }

    truncated = tmp_path / "truncated.json.gz"
    truncated.write_bytes(source.read_bytes()[:-1000])
    common = ("--output", tmp_path / "bad" / "d", "--tokenizer", tokenizer)
    for arguments, expected in (
        (("--input", truncated, *common), "truncated.json.gz, line "),
        (("--input", tmp_path / "missing", *common), "missing: no such file"),
        (
            ("--input", source, "--output", tmp_path / "bad" / "d", "--tokenizer", source),
            "neither a sentencepiece",
        ),
        (("--input", source, *common, "--text-field", "body"), "line 1: no field 'body'"),
    ):
        code, said = failure("preprocess_dolma", *arguments, "--workers", 2)
        assert code == 3
        assert expected in said
        assert len(said.splitlines()) <= 3
        assert not list(tmp_path.glob("bad/*")), "a partial result was left"
    assert failure("preprocess_dolma", *common)[0] == 2


def test_sigterm_leaves_nothing(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    """Stopped in the middle: no file of the dataset, no process."""
    fifo = tmp_path / "endless.jsonl"
    os.mkfifo(fifo)
    process = start(
        "preprocess_dolma", "--input", fifo, "--output", tmp_path / "out" / "d", "--tokenizer", tokenizer,
        "--workers", 2, start_new_session=True,
    )  # fmt: skip
    with open(fifo, "wb", buffering=0) as pipe:
        for _ in range(100):
            pipe.write(b'{"text": "' + b"some text " * 3000 + b'"}\n')
        assert list((tmp_path / "out").glob(".d.bin*"))
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(BrokenPipeError):
            while process.poll() is None:
                pipe.write(b'{"text": "more"}\n' * 100)
        assert process.wait(timeout=30) == 128 + signal.SIGTERM
    assert not list((tmp_path / "out").iterdir())
    deadline = time.monotonic() + 5.0
    while session_lives(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not session_lives(process.pid), "a worker outlived the tool"


def session_lives(pid: int) -> bool:
    try:
        os.killpg(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("tool", ["make_sample_corpus", "train_tokenizer", "preprocess_dolma"])
def test_help_is_fast_and_needs_no_torch(tool: str) -> None:
    begun = time.monotonic()
    assert "--output" in run(tool, "--help")
    assert time.monotonic() - begun < 2.0
    paths = [str(ROOT), str(ROOT / "tools")]
    code = f"import sys; sys.path[:0] = {paths!r}; import {tool}; print('torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "False"
