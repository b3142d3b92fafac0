"""Spot machines: lost with all they had, killed, noticed; the same command goes on, with the same losses."""

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import orjson
import psutil
import pytest

from megads.checkpoint import commit
from megads.checkpoint.lease import DirectoryLease
from megads.checkpoint.object_store import ObjectStore
from megads.errors import RunStopped, TrainingError
from tests.e2e.commands import (
    ENVIRONMENT,
    ROOT,
    Finished,
    pretrain,
    pretrain_command,
    pretrain_well,
    records,
    run,
    steps,
    write_json,
)
from tests.s3_server import BUCKET, S3Server, s3_server
from tests.waiting import LONGEST_SECONDS, until

STEPS, STOP_STEP = 6, 4
URL = f"s3://{BUCKET}/run"
SAVES = ("--train-iters", STEPS, "--save-interval", 2)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    with s3_server(monkeypatch) as started:
        yield started


def losses(output: Path) -> dict[int, float]:
    return {record["step"]: record["lm_loss"] for record in records(output, "train")}


def test_a_lost_machine_is_restored_from_the_mirror(config: Path, tmp_path: Path, server: S3Server) -> None:
    """Two ranks; everything local is deleted; the same command fetches, finishes, and is the same run."""
    flags = ("--config", config, *SAVES, "--expert-model-parallel-size", 2)
    whole = tmp_path / "whole"
    pretrain_well(*flags, "--output_dir", whole, processes=2)
    lost = ("--output_dir", tmp_path / "lost", "--checkpointing.mirror.url", URL)
    pretrain_well(*flags, *lost, "--training.exit_step", STOP_STEP, processes=2)
    sent = [path for method, path in server.requests if method == "PUT" and path.endswith("COMMIT.json")]
    assert len(sent) == len(set(sent)) == 2, "each checkpoint once, by one rank"
    shutil.rmtree(tmp_path / "lost")

    done = pretrain_well(*flags, *lost, processes=2)
    assert "mirror: fetching" in done.stdout + done.stderr
    assert steps(tmp_path / "lost") == list(range(STOP_STEP + 1, STEPS + 1))
    assert losses(tmp_path / "lost").items() <= losses(whole).items()
    assert ObjectStore(URL).listing().committed[0].manifest.step == STEPS


def test_the_store_is_lost_and_comes_back(config: Path, tmp_path: Path, server: S3Server) -> None:
    """Gone from the first checkpoint on, while it is sent; the mirror has caught up when the run ends."""
    output = tmp_path / "run"
    log = output / "logs" / "rank0.log"
    gone, back = threading.Event(), threading.Event()

    def outage(method: str, path: str) -> bool:
        if method == "PUT" and "/step_" in path and not gone.is_set():
            gone.set()
            server.stop()
        return gone.is_set() and not back.is_set()

    def end_of_outage() -> None:
        # Until training is at its end, and the mirror has found out.
        until(lambda: gone.is_set() and _newest_step(output) == STEPS)
        until(lambda: "training goes on" in log.read_text())
        back.set()
        server.start()

    server.fails = outage
    thread = threading.Thread(target=end_of_outage, daemon=True)
    thread.start()
    pretrain_well("--config", config, *SAVES, "--checkpointing.mirror.url", URL)
    thread.join(timeout=60)
    assert back.is_set()
    assert steps(output) == list(range(1, STEPS + 1))
    assert ObjectStore(URL).listing().committed[0].manifest.step == STEPS


def _newest_step(output: Path) -> int | None:
    newest = commit.latest(output / "checkpoints")
    return newest.step if newest else None


class Notice(BaseHTTPRequestHandler):
    """404 until the run has taken a step, then notice."""

    metrics = Path()

    def do_GET(self) -> None:
        self.send_response(200 if self.metrics.exists() else 404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_notice_saves_and_stops_all_ranks(config: Path, tmp_path: Path) -> None:
    Notice.metrics = tmp_path / "run" / "metrics.jsonl"
    with ThreadingHTTPServer(("127.0.0.1", 0), Notice) as metadata:
        threading.Thread(target=metadata.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{metadata.server_port}/notice"
        done = pretrain(
            "--config", config, "--train-iters", 100000, "--checkpointing.preemption.notice", url,
            "--checkpointing.preemption.interval_seconds", 0.05, "--expert-model-parallel-size", 2,
            processes=2,
        )  # fmt: skip
        metadata.shutdown()
    text = done.stdout + done.stderr
    assert "RunStopped: preemption notice: saved after step" in text, text
    assert f"exitcode  : {RunStopped.exit_code}" in text, "of every rank, under torchrun"
    newest = commit.latest(tmp_path / "run" / "checkpoints")
    assert newest is not None
    assert newest.step == steps(tmp_path / "run")[-1]


def supervise_command(command: Sequence[str], tries: int) -> list[str]:
    options = ["--tries", str(tries), "--backoff-seconds", "0.1"]
    return [sys.executable, str(ROOT / "tools" / "supervise.py"), *options, "--", *command]


def test_a_run_that_is_killed_twice_finishes(config: Path, tmp_path: Path) -> None:
    """Without an end until the second kill, however late that is; it gets one while the third try waits."""
    output, closed = tmp_path / "run", tmp_path / "closed"
    flags = ("--config", config, "--train-iters", 100_000, "--save-interval", 5)
    waiting = ("bash", "-c", 'while [ -e "$0" ]; do sleep 0.05; done; exec "$@"', str(closed))
    supervisor = subprocess.Popen(
        supervise_command([*waiting, *pretrain_command(*flags)], tries=2), cwd=ROOT,
        env=os.environ | ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    for _ in range(2):
        closed.unlink(missing_ok=True)
        _wait_for_a_checkpoint(output)
        closed.touch()
        [child] = psutil.Process(supervisor.pid).children()
        child.kill()
        child.wait(LONGEST_SECONDS)
    settings = orjson.loads(config.read_bytes())
    settings["training"]["exit_step"] = steps(output)[-1] + 5
    write_json(config, settings)
    closed.unlink()
    _, text = supervisor.communicate(timeout=LONGEST_SECONDS)
    assert supervisor.returncode == 0, text
    assert text.count("ended by SIGKILL") == 2
    pretrain_well(*flags, "--output_dir", tmp_path / "whole")
    assert losses(output) == losses(tmp_path / "whole")


def _wait_for_a_checkpoint(output: Path) -> None:
    """Later than those that are there."""
    earlier = _newest_step(output) or 0
    until(lambda: (_newest_step(output) or 0) > earlier)


def test_a_run_that_always_fails_is_given_up(config: Path, tmp_path: Path) -> None:
    """A checkpoint directory in use by another job fails each time; it is told, and there is an end."""
    directory = tmp_path / "run" / "checkpoints"
    directory.mkdir(parents=True)
    lease = DirectoryLease(directory)
    done: Finished = run(supervise_command(pretrain_command("--config", config), tries=2))
    lease.release()
    assert done.returncode == TrainingError.exit_code, done.stderr
    assert "2 tries in a row" in done.stderr
    assert done.stderr.count("is in use by process") == 3, "two tries, and the report"
