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

from megads.data.manifest import check_dataset
from megads.data.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[2]
FIVE = {"code", "docs", "headers", "licenses", "reference"}


def start(tool: str, *arguments: object, **options: object) -> "subprocess.Popen[str]":
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tools" / f"{tool}.py"), *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        # A shell's background jobs ignore Ctrl-C, and so would all that they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **options,  # type: ignore[call-overload]
    )  # fmt: skip


def run(tool: str, *arguments: object) -> str:
    process = start(tool, *arguments)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return str(out)


def failure(tool: str, *arguments: object) -> tuple[int, str]:
    process = start(tool, *arguments)
    out, err = process.communicate(timeout=120)
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


def files(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def test_a_whole_corpus_becomes_datasets_with_one_command(
    corpus: Path, tokenizer: Path, tmp_path: Path
) -> None:
    arguments = ("--input-root", corpus, "--tokenizer", tokenizer)
    said = run("preprocess_dolma", *arguments, "--output-root", tmp_path / "one", "--workers", 1)
    run("preprocess_dolma", *arguments, "--output-root", tmp_path / "two", "--workers", 2)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    loaded = load_tokenizer(tokenizer)
    for source in FIVE:
        infos = [
            check_dataset(index.with_suffix(""), loaded.vocab_size, loaded.sha256, full=True)
            for index in (tmp_path / "one" / source).glob("*.idx")
        ]
        assert {info.eod_id for info in infos} == {loaded.eod_id}
        assert f"{sum(info.tokens for info in infos):,}" in said
        assert f"{sum(info.documents for info in infos):,}" in said
    again = run("preprocess_dolma", *arguments, "--output-root", tmp_path / "one")
    assert f"0 shards made, {len(list(corpus.rglob('*.gz')))} done before" in again
    code, said = failure(
        "preprocess_dolma", *arguments, "--output-root", tmp_path / "one", "--text-field", "id"
    )
    assert code == 3
    assert "made with other settings (text_field: 'text', now 'id')" in said
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_names_of_sources_are_printed_as_they_are(tokenizer: Path, tmp_path: Path) -> None:
    """Brackets and colons are markup to the library that draws the tables."""
    for name in ("[web]", "[bold]b", "a :smile: b"):
        (tmp_path / "corpus" / name).mkdir(parents=True)
        (tmp_path / "corpus" / name / "a.jsonl").write_text(f'{{"text": "the text of {name}"}}\n' * 20)
    inputs = ("--input-root", tmp_path / "corpus")
    removals = tmp_path / "removals"
    outputs = (
        run("clean_dolma", *inputs, "--removals", removals, "--exact", "--workers", 1),
        run("preprocess_dolma", *inputs, "--output-root", tmp_path / "plain", "--tokenizer", tokenizer,
            "--fim-rate", 1.0),
    )  # fmt: skip
    for said in outputs:
        for name in ("[web]", "[bold]b", "a :smile: b"):
            assert f"│ {name} " in said
    assert "100.0%" in outputs[1], "the share of fill-in-the-middle"


def test_a_job_array_makes_what_one_job_makes(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    listed = tmp_path / "files.txt"
    listed.write_text("".join(f"{path}\n" for path in sorted(corpus.rglob("*.gz"))))
    common = ("--tokenizer", tokenizer, "--workers", 1)
    run("preprocess_dolma", "--input-root", corpus, "--output-root", tmp_path / "one", *common)
    for task in range(2):
        run(
            "preprocess_dolma", "--manifest", listed, "--output-root", tmp_path / "two", *common,
            "--num-tasks", 2, "--task-id", task,
        )  # fmt: skip
        assert (files(tmp_path / "one") == files(tmp_path / "two")) == (task == 1)


def test_the_batch_script_shares_the_work_of_a_job_array(
    corpus: Path, tokenizer: Path, tmp_path: Path
) -> None:
    """With a stand-in for srun, as SLURM would start each task."""
    srun = tmp_path / "bin" / "srun"
    srun.parent.mkdir()
    srun.write_text('#!/bin/sh\nexec "$@"\n')
    srun.chmod(0o755)
    array = {"SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_MAX": "2", "SLURM_ARRAY_TASK_COUNT": "2"}
    paths = f"{srun.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    shards = []
    for task in ("1", "2"):
        said = subprocess.run(
            ["bash", ROOT / "slurm" / "preprocess_dolma.sbatch", "--input-root", corpus,
             "--output-root", tmp_path / "out", "--tokenizer", tokenizer,
             "--sources", ROOT / "configs" / "data" / "dolma_sources.json"],
            env=os.environ | array
            | {"SLURM_ARRAY_TASK_ID": task, "SLURM_SUBMIT_DIR": str(ROOT), "PATH": paths},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert f"Task {int(task) - 1} of 2" in said.stderr
        shards.append(len(list((tmp_path / "out").rglob("*.idx"))))
    assert 0 < shards[0] < shards[1] == len(list(corpus.rglob("*.gz")))


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
        (("--input", source, *common, "--fim-rate", 2), "fim_rate is 2.0"),
    ):
        code, said = failure("preprocess_dolma", *arguments, "--workers", 2)
        assert code == (2 if "--fim-rate" in arguments else 3)
        assert expected in said
        assert len(said.splitlines()) <= 3
        assert not list(tmp_path.glob("bad/*")), "a partial result was left"
    for arguments, expected in (
        ((*common,), "give one of --input"),
        (("--input", source, *common, "--fim-spm-rate", 0.5), "give that too"),
        (("--input", source, *common, "--max-line-mb", "nan"), "not a number above 0"),
        (("--input", source, *common[2:], "--output", "s3://bucket/d"), "s3://bucket/d is a URL"),
    ):
        code, said = failure("preprocess_dolma", *arguments)
        assert code == 2
        assert expected in said
    assert failure("preprocess_dolma", "--input", source, *common, "--quarantine-quota", 0.1)[0] == 2


def test_several_files_become_a_directory_of_shards(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    mixed = ("--input", corpus / "licenses", corpus / "docs", "--output", tmp_path / "mixed")
    said = run("preprocess_dolma", *mixed, "--tokenizer", tokenizer)
    shards = {path.name for path in (tmp_path / "mixed").glob("*.idx")}
    assert shards == {
        f"{path.parent.name}__{path.name.split('.')[0]}.idx"
        for source in ("licenses", "docs")
        for path in (corpus / source).glob("*.gz")
    }
    assert "mixed" in said
    for ending in ("idx", "bin"):
        (tmp_path / f"mixed.{ending}").touch()
    code, said = failure("preprocess_dolma", *mixed, "--tokenizer", tokenizer)
    assert code == 3
    assert "would hide the shards" in said


def test_tolerant_runs_put_bad_lines_and_files_aside(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    source = tmp_path / "in" / "web"
    source.mkdir(parents=True)
    good = sorted((corpus / "licenses").glob("*.gz"))[0]
    (source / "good.json.gz").write_bytes(good.read_bytes())
    (source / "bad.json").write_bytes(gzip.decompress(good.read_bytes()) + b"not json\n")
    (source / "cut.json.gz").write_bytes(good.read_bytes()[:2000])
    arguments = ("--input-root", tmp_path / "in", "--output-root", tmp_path / "out", "--tokenizer", tokenizer)
    assert failure("preprocess_dolma", *arguments)[0] == 3
    code, said = failure("preprocess_dolma", *arguments, "--tolerant")
    assert code == 3
    assert "more than the quota of 0.001" in said
    said = run("preprocess_dolma", *arguments, "--tolerant", "--quarantine-quota", 0.5)
    assert "quarantined: bad_json 1" in said
    assert {path.name for path in (tmp_path / "out" / "web").iterdir()} == {
        "good.bin", "good.idx", "good.json", "bad.bin", "bad.idx", "bad.json", "bad.quarantine.jsonl",
        "cut.json", "cut.quarantine.jsonl",
    }  # fmt: skip
    # What a tolerant run accepted, a strict one does not.
    code, said = failure("preprocess_dolma", *arguments)
    assert code == 3


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_stop_leaves_nothing(tokenizer: Path, tmp_path: Path, workers: int, stop: signal.Signals) -> None:
    """Stopped in the middle: no file of the dataset, no process."""
    pipes = [tmp_path / f"{i}.jsonl" for i in range(2)]
    for path in pipes:
        os.mkfifo(path)
    process = start(
        "preprocess_dolma", "--input", *pipes, "--output", tmp_path / "out" / "d", "--tokenizer", tokenizer,
        "--workers", workers, start_new_session=True,
    )  # fmt: skip
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(open(path, "wb", buffering=0)) for path in pipes[:workers]]
        for _ in range(100):
            for writer in writers:
                writer.write(b'{"text": "' + b"some text " * 3000 + b'"}\n')
        assert len(list((tmp_path / "out" / "d").glob(".*.bin*"))) == workers
        process.send_signal(stop)
        deadline = time.monotonic() + 60.0
        with contextlib.suppress(BrokenPipeError):
            while process.poll() is None and time.monotonic() < deadline:
                for writer in writers:
                    writer.write(b'{"text": "more"}\n' * 100)
        assert process.wait(timeout=120) == 128 + stop
    assert not list((tmp_path / "out" / "d").iterdir())
    deadline = time.monotonic() + 60.0
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
def test_help_needs_nothing_heavy(tool: str) -> None:
    """So it is there at once."""
    assert "--output" in run(tool, "--help")
    paths = [str(ROOT), str(ROOT / "tools")]
    heavy = {"torch", "transformers", "megatron", "matplotlib", "pandas"}
    code = f"import sys; sys.path[:0] = {paths!r}; import {tool}; print(sorted({heavy} & sys.modules.keys()))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "[]"
