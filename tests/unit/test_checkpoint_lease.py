"""One writer per checkpoint directory."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megads.checkpoint.lease import LEASE_NAME, DirectoryLease
from megads.errors import CheckpointError

# They hold it until they are killed, or the tests are.
HOLD = (
    "import sys, pathlib\nfrom megads.checkpoint.lease import DirectoryLease\n"
    "try:\n    lease = DirectoryLease(pathlib.Path(sys.argv[1]))\n"
    "except Exception as error:\n    print('refused', flush=True); sys.exit()\n"
    "print('holds', flush=True); sys.stdin.read()\n"
)


def start_holder(directory: Path, program: str = HOLD) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", program, str(directory)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )  # fmt: skip


def test_second_holder_is_refused_by_host_and_process(tmp_path: Path) -> None:
    lease = DirectoryLease(tmp_path)
    with pytest.raises(CheckpointError, match=f"process {os.getpid()} on {socket.gethostname()}"):
        DirectoryLease(tmp_path)
    lease.release()
    lease.release()
    DirectoryLease(tmp_path).release()


def test_lease_of_a_killed_job_is_taken_over(tmp_path: Path, caplog) -> None:
    holder = start_holder(tmp_path)
    assert holder.stdout.readline() == "holds\n"
    with pytest.raises(CheckpointError, match=f"process {holder.pid}"):
        DirectoryLease(tmp_path)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with caplog.at_level(logging.WARNING):
        lease = DirectoryLease(tmp_path)
    assert f"process {holder.pid}" in caplog.text
    with pytest.raises(CheckpointError, match=f"process {os.getpid()}"):
        DirectoryLease(tmp_path)
    lease.release()


def test_of_many_exactly_one_takes_over(tmp_path: Path) -> None:
    (tmp_path / LEASE_NAME).write_text(json.dumps({"host": "gone", "pid": 1}))
    holders = [start_holder(tmp_path) for _ in range(6)]
    try:
        answers = sorted(holder.stdout.readline() for holder in holders)
    finally:
        for holder in holders:
            holder.kill()
            holder.wait()
    assert answers == ["holds\n"] + ["refused\n"] * 5


def test_a_forked_child_does_not_keep_the_lease(tmp_path: Path) -> None:
    """A data-loader worker that outlives its killed trainer must not block the next run."""
    program = (
        "import os, sys, pathlib\nfrom megads.checkpoint.lease import DirectoryLease\n"
        "lease = DirectoryLease(pathlib.Path(sys.argv[1]))\n"
        "child = os.fork()\n"
        "if child == 0:\n    print('forked', os.getpid(), flush=True)\n"
        "sys.stdin.read(); os._exit(0)\n"
    )
    trainer = start_holder(tmp_path, program)
    child = int(trainer.stdout.readline().split()[1])
    try:
        trainer.kill()
        trainer.wait()
        os.kill(child, 0)  # alive
        DirectoryLease(tmp_path).release()
    finally:
        os.kill(child, signal.SIGKILL)


def test_garbage_in_the_lease_file_is_survived(tmp_path: Path, caplog) -> None:
    (tmp_path / LEASE_NAME).write_bytes(b"\xff{")
    with caplog.at_level(logging.WARNING):
        DirectoryLease(tmp_path).release()
    assert "another process" in caplog.text
    caplog.clear()
    DirectoryLease(tmp_path).release()
    assert caplog.text == "", "the one that was released left no garbage"
