"""Preprocessing that is killed at random moments and started again gives the files of an undisturbed run.

`MEGADS_TEST_KILLS=200 pytest tests/e2e/test_preprocess_kills.py` kills 200 times.
"""

import contextlib
import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megads.data.manifest import read_record
from tests.e2e.commands import ENVIRONMENT, ROOT, tool
from tests.waiting import LONGEST_SECONDS

KILLS = int(os.environ.get("MEGADS_TEST_KILLS", "20"))
SHARDS = 10
BAD_LINE = b'{"id": "bad"}\n'


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources of shards of different sizes, some with a bad line."""
    root = tmp_path_factory.mktemp("kills") / "corpus"
    rng = random.Random(1)
    words = ["".join(rng.choices("abcdefghij", k=rng.randrange(2, 9))) for _ in range(2000)]
    for number in range(SHARDS):
        records = [
            {"id": f"{number}-{i}", "text": " ".join(rng.choices(words, k=rng.randrange(1, 400))), "score": i}
            for i in range(40 * (number + 1))
        ]
        lines = b"".join(json.dumps(record).encode() + b"\n" for record in records)
        path = root / ("web" if number % 2 else "books") / f"{number}.json.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(lines + BAD_LINE * (number % 3 == 0)))
    return root


@pytest.fixture(scope="module")
def tokenizer(corpus: Path) -> Path:
    path = corpus.parent / "t.model"
    arguments = ("--input", corpus / "web" / "7.json.gz", "--output", path, "--vocab-size", 500)
    assert tool("train_tokenizer.py", *arguments).returncode == 0
    return path


def command(corpus: Path, tokenizer: Path, output: Path, workers: int) -> list[str]:
    words = [
        sys.executable, ROOT / "tools" / "preprocess_dolma.py", "--input-root", corpus,
        "--output-root", output, "--tokenizer", tokenizer, "--workers", workers,
        "--tolerant", "--quarantine-quota", 0.1, "--score-field", "score", "--fim-rate", 0.3,
    ]  # fmt: skip
    return [str(word) for word in words]


def files(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def finished_shards(directory: Path) -> int:
    return len(list(directory.rglob("*.idx")))


def kill_one_or_all(process: "subprocess.Popen[bytes]", rng: random.Random) -> None:
    """The whole job, as a machine that goes down; or the parent, or a worker, as for want of memory."""
    if rng.random() < 0.5:
        os.killpg(process.pid, signal.SIGKILL)
        return
    children = psutil.Process(process.pid).children(recursive=True)
    with contextlib.suppress(psutil.NoSuchProcess):  # a worker at its end
        rng.choice([psutil.Process(process.pid), *children]).kill()


def test_killed_runs_end_in_the_same_files(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    environment = os.environ | ENVIRONMENT
    begun = time.monotonic()
    subprocess.run(command(corpus, tokenizer, tmp_path / "whole", 1), env=environment, check=True)
    whole_seconds = time.monotonic() - begun
    expected = files(tmp_path / "whole")
    assert len([name for name in expected if name.endswith(".scores.npy")]) == SHARDS
    records = [
        read_record(tmp_path / "whole" / name.removesuffix(".json")) for name in expected if ".json" in name
    ]
    assert sum(record["quarantined"].get("no_text", 0) for record in records if record) == 4

    rng = random.Random(os.environ.get("MEGADS_TEST_SEED", "0"))
    kills = finished = 0
    interrupted_with = set()
    output = tmp_path / "0"
    while kills < KILLS:
        process = subprocess.Popen(
            command(corpus, tokenizer, output, rng.choice([1, 2, 3])),
            env=environment,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        # At a random moment after so many more shards: by the clock alone, a fast or a slow machine would
        # be killed at its start every time, or never.
        wanted = finished_shards(output) + rng.randrange(3)
        while process.poll() is None and finished_shards(output) < wanted:
            time.sleep(0.002)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=rng.uniform(0, 0.3) * whole_seconds)
        if process.poll() is None:
            kill_one_or_all(process, rng)
            kills += 1
            interrupted_with.add(finished_shards(output))
        if process.wait(timeout=LONGEST_SECONDS) == 0:
            assert files(output) == expected
            finished += 1
            output = tmp_path / str(finished)
    subprocess.run(command(corpus, tokenizer, output, 2), env=environment, check=True)
    assert files(output) == expected
    assert len(interrupted_with) > 2, "the kills all hit at the same point"
