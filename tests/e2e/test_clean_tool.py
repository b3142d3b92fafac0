"""tools/clean_dolma.py as a user types it: what it finds and leaves, and how it goes on after a stop."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import orjson
import pytest

from megads.data.removals import Removal, read_removals, read_removals_header

ROOT = Path(__file__).parents[2]
SENTENCE = "The river rose in the night and by morning it had taken the bridge and half of the mill with it."
WORDS = [f"w{i}" for i in range(5000)]


def start(*arguments: object) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tools" / "clean_dolma.py"), *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def clean(*arguments: object) -> str:
    process = start(*arguments)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return str(out)


def failure(*arguments: object) -> tuple[int, str]:
    process = start(*arguments)
    out, err = process.communicate(timeout=60)
    assert "Traceback" not in out + err
    return process.returncode, err


def write(path: Path, texts: Sequence[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"id": str(i), "text": text}) + "\n" for i, text in enumerate(texts)))
    return path


def removals(directory: Path, name: str) -> dict[int, Removal]:
    path = directory / f"{name}.removals.zst"
    return read_removals(path, read_removals_header(path).input_sha256)


def contents(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and ".work" not in path.parts
    }


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    rng = random.Random(0)
    long = " ".join(rng.choices(WORDS, k=300))
    write(tmp_path / "corpus" / "web" / "a.jsonl", [long, SENTENCE, "x", f"Not good {SENTENCE}"])
    write(tmp_path / "corpus" / "web" / "b.jsonl", ["x", f"{long} and so on", f"{SENTENCE} \n {SENTENCE}\n"])
    write(tmp_path / "corpus" / "code" / "c.jsonl", ["def f(): pass", "def f():  pass", long[:1000]])
    return tmp_path / "corpus"


def test_every_stage_in_one_run(corpus: Path, tmp_path: Path) -> None:
    evaluation = write(tmp_path / "eval" / "quiz.jsonl", [SENTENCE[:80]])
    arguments = ("--input-root", corpus, "--exact", "--near", "--paragraphs", 50, "--evaluation", evaluation)
    said = clean(*arguments, "--removals", tmp_path / "one", "--workers", 1)
    clean(*arguments, "--removals", tmp_path / "two", "--workers", 2, "--partitions", 1)
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert one.keys() == two.keys() == {
        "report.json", "contaminated.jsonl", "code/c.jsonl.removals.zst",
        "web/a.jsonl.removals.zst", "web/b.jsonl.removals.zst",
    }  # fmt: skip
    contaminated, equal, near = (
        Removal(reason) for reason in ("contaminated", "exact_duplicate", "near_duplicate")
    )
    # Sources in the order of their names: the code comes first.
    assert removals(tmp_path / "one", "code/c.jsonl") == {2: equal}
    for directory in ("one", "two"):
        assert removals(tmp_path / directory, "web/a.jsonl") == {2: contaminated, 4: contaminated}
        assert removals(tmp_path / directory, "web/b.jsonl") == {1: equal, 2: near, 3: contaminated}
    report = orjson.loads(one["report.json"])
    web = report["sources"]["web"]
    assert (web["documents"], web["documents_kept"]) == (7, 2)
    assert web["reasons"]["near_duplicate"]["examples"] == [
        {"shard": "b.jsonl", "line": 2, "detail": "web/a.jsonl:1"}
    ]
    lines = [orjson.loads(line) for line in one["contaminated.jsonl"].splitlines()]
    assert [(line["shard"], line["line"]) for line in lines] == [
        ("web/a.jsonl", 2), ("web/a.jsonl", 4), ("web/b.jsonl", 3),
    ]  # fmt: skip
    assert all(line["detail"].startswith("quiz.jsonl:1:text: The river rose") for line in lines)
    for shown in ("near_duplicate", "contaminated", "28.57", "1 strings of the evaluation sets"):
        assert shown in said


def test_the_corpus_is_not_touched_and_a_second_run_changes_nothing(corpus: Path, tmp_path: Path) -> None:
    before = contents(corpus)
    clean("--input", corpus / "web", corpus / "code", "--removals", tmp_path / "out", "--workers", 1)
    first = contents(tmp_path / "out")
    assert "contaminated.jsonl" not in first
    again = clean("--input", corpus / "web", corpus / "code", "--removals", tmp_path / "out", "--workers", 1)
    assert contents(tmp_path / "out") == first
    assert contents(corpus) == before
    assert "exact_duplicate" in again


def test_quality_for_some_sources(corpus: Path, tmp_path: Path) -> None:
    arguments = ("--input-root", corpus, "--removals", tmp_path / "out", "--workers", 1)
    said = clean(*arguments, "--quality", "gopher", "--quality-sources", "web")
    assert "gopher_word_count" in said
    assert removals(tmp_path / "out", "code/c.jsonl") == {}
    assert set(removals(tmp_path / "out", "web/b.jsonl")) == {1, 2, 3}
    code, err = failure(*arguments, "--quality", "gopher", "--quality-sources", "wbe")
    assert code == 3
    assert "no source is called wbe; the input has code, web" in err


def test_mistakes_are_one_line(corpus: Path, tmp_path: Path) -> None:
    bad = corpus / "web" / "z.json.gz"
    bad.write_bytes(b"not gzip")
    code, err = failure("--input-root", corpus, "--removals", tmp_path / "out", "--workers", 2)
    assert code == 3
    assert "z.json.gz, line 1: " in err
    assert len(err.splitlines()) <= 2
    assert not contents(tmp_path / "out")
    code, err = failure("--input", corpus / "code", "--removals", tmp_path / "p", "--text-field", "txt")
    assert (code, "No line of the 1 files holds a document" in err) == (3, True)
    code, err = failure("--input", corpus / "code", "--removals", tmp_path / "p", "--paragraphs", -5)
    assert (code, "--paragraphs must be" in err) == (2, True)
    code, err = failure("--input", tmp_path / "none", "--removals", tmp_path / "out")
    assert (code, "no such file" in err) == (3, True)
    code, err = failure("--input", corpus, "--removals", tmp_path / "out", "--partitions", 3)
    assert (code, "power of two" in err) == (2, True)
    code, err = failure("--input", corpus / "code", "--removals", tmp_path / "o", "--evaluation", bad)
    assert (code, "z.json.gz" in err) == (3, True)


def test_sigterm_stops_it_and_the_same_command_goes_on(tmp_path: Path) -> None:
    rng = random.Random(1)
    for shard in range(2):
        write(
            tmp_path / "corpus" / "a" / f"{shard}.jsonl", [" ".join(rng.choices(WORDS, k=200)) for _ in "abc"]
        )
    fifo = tmp_path / "corpus" / "a" / "2.jsonl"
    os.mkfifo(fifo)
    options = ("--removals", tmp_path / "out", "--near", "--workers", 2)
    process = start("--input", fifo.parent, fifo, *options)
    # Opened for reading too: neither side waits for the other.
    with open(os.open(fifo, os.O_RDWR), "r+b", buffering=0) as pipe:
        pipe.write(b'{"text": "more"}\n')
        scan = tmp_path / "out" / ".work" / "scan" / "a" / "1.jsonl.scan"
        deadline = time.monotonic() + 60
        while not scan.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert scan.exists()
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    assert not contents(tmp_path / "out")
    fifo.unlink()
    write(fifo, ["x", "more", "more"])
    scanned = (scan / "scan.json").stat().st_mtime_ns
    clean("--input-root", tmp_path / "corpus", *options)
    assert (scan / "scan.json").stat().st_mtime_ns == scanned
    assert removals(tmp_path / "out", "a/2.jsonl") == {3: Removal("near_duplicate")}


def test_help_is_fast_and_needs_no_torch() -> None:
    assert "--near-threshold" in clean("--help")
    code = "import sys, megads.data.cleaning.report; print('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.check_output([sys.executable, "-c", code], text=True, env=environment) == "False\n"
