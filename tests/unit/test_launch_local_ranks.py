"""The processes of one machine, with small scripts in place of training: environment, ends, signals."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from megads.errors import BudgetReached, RunStopped
from megads.launch import local_ranks
from tests.waiting import LONGEST_SECONDS, content_of, until

# What is printed before the fork, and not flushed, is to be printed once.
LAUNCHER = """
import os, sys
from megads.launch import local_ranks
from megads.launch.local_ranks import fork_ranks
local_ranks.SECONDS_TO_END = {seconds}
def load():
    global loaded_in
    loaded_in = os.getpid()
    sys.stdout.write("loaded " + os.environ["OMP_NUM_THREADS"] + "\\n")
code = fork_ranks({processes}, load)
if code is not None:
    sys.exit(code)
"""
SHOW = """
import json
line = json.dumps({**os.environ, "loaded_in": loaded_in, "session": os.getsid(0)})
os.write(1, (line + "\\n").encode())  # both write to one pipe
"""
# Tells where it is, then waits for SIGTERM to save and agree on 75.
SAVES = """
import os, pathlib, signal, sys, time
def save(number, frame):
    pathlib.Path(sys.argv[1], "saved-" + os.environ["RANK"]).write_text(signal.Signals(number).name)
    sys.exit(75)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, save)
pathlib.Path(sys.argv[1], "ready-" + os.environ["RANK"]).write_text(str(os.getpid()))
time.sleep(600)
"""


def start(tmp_path: Path, processes: int, code: str, seconds: float = 30.0) -> "subprocess.Popen[str]":
    """`seconds`: from SIGTERM to SIGKILL."""
    script = tmp_path / "script.py"
    script.write_text(LAUNCHER.format(processes=processes, seconds=seconds) + code)
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    return subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip


def wait_until_ready(tmp_path: Path, processes: int) -> list[int]:
    """The process ids of the ranks."""
    return [int(content_of(tmp_path / f"ready-{rank}")) for rank in range(processes)]


def test_the_environment_is_torchruns(tmp_path: Path) -> None:
    out, _ = (job := start(tmp_path, 2, SHOW)).communicate(timeout=LONGEST_SECONDS)
    assert job.returncode == 0
    loaded, *lines = out.splitlines()
    assert loaded == "loaded 1", "once, with the number of threads that the processes will have"
    shown = sorted((json.loads(line) for line in lines), key=lambda one: one["RANK"])
    assert [(one["RANK"], one["LOCAL_RANK"]) for one in shown] == [("0", "0"), ("1", "1")]
    names = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "OMP_NUM_THREADS")
    assert [shown[0][name] for name in names] == ["2", "2", "0", "127.0.0.1", "1"]
    assert shown[0]["MASTER_PORT"] == shown[1]["MASTER_PORT"] != "0"
    assert {one["loaded_in"] for one in shown} == {job.pid}
    assert len({job.pid, *(one["session"] for one in shown)}) == 3, "Ctrl-C is for the launcher"


def test_the_first_failure_ends_the_others_and_is_the_exit_code(tmp_path: Path) -> None:
    fails = """
if os.environ["RANK"] == "0":
    while not pathlib.Path(sys.argv[1], "ready-1").exists():
        time.sleep(0.02)
    sys.exit(3)
time.sleep(600)
"""
    code = SAVES.replace("time.sleep(600)", fails)
    job = start(tmp_path, 2, code)
    assert job.wait(timeout=LONGEST_SECONDS) == 3
    assert (tmp_path / "saved-1").read_text() == "SIGTERM"


def test_a_rank_that_is_killed_is_told(tmp_path: Path) -> None:
    job = start(tmp_path, 2, SAVES)
    os.kill(wait_until_ready(tmp_path, 2)[1], signal.SIGKILL)
    _, errors = job.communicate(timeout=LONGEST_SECONDS)
    assert job.returncode == 128 + 9
    assert errors.splitlines() == [
        "rank 1 was ended by SIGKILL; stopping the others",
        "the job ended with exit code 137: rank 1 was ended by SIGKILL",
    ]


def test_a_rank_that_hangs_is_told(tmp_path: Path) -> None:
    """The others time out, and what they say names it no more than themselves."""
    times_out = """
while os.environ["RANK"] == "1" or not pathlib.Path(sys.argv[1], "hangs").exists():
    time.sleep(0.02)
1 / 0
"""
    job = start(tmp_path, 2, SAVES.replace("time.sleep(600)", times_out), seconds=0.5)
    other = wait_until_ready(tmp_path, 2)[1]
    os.kill(other, signal.SIGSTOP)
    until(lambda: psutil.Process(other).status() == psutil.STATUS_STOPPED)
    (tmp_path / "hangs").touch()
    _, errors = job.communicate(timeout=LONGEST_SECONDS)
    assert job.returncode == 1
    assert "rank 1 does not end: killed. If others timed out, it is the one they waited for" in errors
    assert "rank 0 does not end" not in errors


def test_whose_traceback_to_read_is_told(tmp_path: Path) -> None:
    """The other ranks lose a peer, and each has a traceback of its own."""
    code = SAVES.replace("time.sleep(600)", "assert os.environ['RANK'] != '1', 'broken'; time.sleep(600)")
    job = start(tmp_path, 2, code)
    _, errors = job.communicate(timeout=LONGEST_SECONDS)
    assert job.returncode == 1
    last = "the job ended with exit code 1: rank 1 failed first; its traceback is above"
    assert errors.splitlines()[-1] == last


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signals_reach_every_rank_as_they_are(tmp_path: Path, number: signal.Signals) -> None:
    job = start(tmp_path, 2, SAVES)
    wait_until_ready(tmp_path, 2)
    job.send_signal(number)
    assert job.wait(timeout=LONGEST_SECONDS) == RunStopped.exit_code
    assert [(tmp_path / f"saved-{rank}").read_text() for rank in (0, 1)] == [number.name] * 2


def test_ranks_that_agreed_to_stop_are_left_to_end_by_themselves(tmp_path: Path) -> None:
    assert set(local_ranks.AGREED) == {RunStopped.exit_code, BudgetReached.exit_code}
    code = SAVES.replace("time.sleep(600)", "time.sleep(float(os.environ['RANK'])); sys.exit(7)")
    assert start(tmp_path, 2, code).wait(timeout=LONGEST_SECONDS) == BudgetReached.exit_code
    assert not (tmp_path / "saved-1").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
def test_ranks_do_not_outlive_a_launcher_that_is_killed(tmp_path: Path) -> None:
    job = start(tmp_path, 2, SAVES)
    wait_until_ready(tmp_path, 2)
    job.kill()
    job.wait(timeout=LONGEST_SECONDS)
    until(lambda: all((tmp_path / f"saved-{rank}").exists() for rank in (0, 1)))
