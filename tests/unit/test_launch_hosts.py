"""Programs on several hosts, here by an ssh that stays at home: they end together, whoever ends first."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megads.launch import hosts
from megads.launch.hostfile import Host

SSH = """#!/bin/sh
# ssh OPTIONS... HOST COMMAND
while [ "$1" = -o ]; do shift 2; done
shift
exec sh -c "$*"
"""
# Says who it is and when it is stopped; with a child in a session of its own, as torchrun's.
PROGRAM = """
import os, pathlib, signal, subprocess, sys, time
name, seconds, code = sys.argv[1:]
place = pathlib.Path(name)
child = subprocess.Popen(["sleep", "300"], start_new_session=True)
def stop(number, frame):
    (place / "stopped").touch()
    if code != "stubborn":
        child.kill()
        sys.exit(75)
signal.signal(signal.SIGTERM, stop)
(place / "pids").write_text(f"{os.getpid()} {child.pid}")
end = time.monotonic() + float(seconds)
while time.monotonic() < end:
    time.sleep(0.02)
child.kill()
sys.exit(int(code))
"""
LAUNCHER = """
import os, sys
from megads.launch import host_agent, hosts
from megads.launch.hostfile import Host
program, *places = sys.argv[1:]
commands = tuple(
    (*hosts.SSH, name, f"exec {sys.executable} {hosts.AGENT} {sys.executable} {program} {name} {rest}")
    for name, _, rest in (place.partition(" ") for place in places)
)
sys.exit(hosts.OverSsh(tuple(Host(c[-2], 1) for c in commands), commands).run())
"""
PATIENCE_SECONDS = 60.0


class Launched:
    """A launcher in a process of its own, with the programs on its hosts `a`, `b`, ..."""

    def __init__(self, directory: Path, *programs: str) -> None:
        (directory / "ssh").write_text(SSH)
        (directory / "ssh").chmod(0o755)
        (directory / "program.py").write_text(PROGRAM)
        self.places = [directory / name for name, _ in zip("abc", programs, strict=False)]
        for place in self.places:
            place.mkdir()
        words = [f"{place} {program}" for place, program in zip(self.places, programs, strict=True)]
        self.process = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, str(directory / "program.py"), *words],
            env={**os.environ, "PATH": f"{directory}:{os.environ['PATH']}"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip

    def wait_for_all(self) -> None:
        wait(
            lambda: all((place / "pids").is_file() and (place / "pids").read_text() for place in self.places)
        )

    def pids(self) -> list[int]:
        return [int(pid) for place in self.places for pid in (place / "pids").read_text().split()]

    def wait_for_nobody(self) -> None:
        wait(lambda: not any(alive(pid) for pid in self.pids()))

    def end(self) -> tuple[int, str]:
        text, _ = self.process.communicate(timeout=PATIENCE_SECONDS)
        return self.process.returncode, text


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait(condition: object) -> None:
    assert callable(condition)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def launched(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Launched]:
    made = Launched(tmp_path, *request.param)
    yield made
    if made.process.poll() is None:
        made.process.kill()
        made.process.wait()


@pytest.mark.parametrize("launched", [("0 0", "0.2 0")], indirect=True)
def test_all_end_well(launched: Launched) -> None:
    assert launched.end()[0] == 0
    launched.wait_for_nobody()


@pytest.mark.parametrize("launched", [("300 0", "1 3", "300 0")], indirect=True)
def test_the_first_to_fail_ends_all_and_gives_its_code(launched: Launched) -> None:
    code, text = launched.end()
    assert code == 3
    assert f"{launched.places[1]}: exit code 3; stopping the other hosts" in text
    launched.wait_for_nobody()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("launched", [("300 0", "300 0")], indirect=True)
def test_a_signal_stops_all_in_order(launched: Launched, number: signal.Signals) -> None:
    launched.wait_for_all()
    launched.process.send_signal(number)
    code, text = launched.end()
    assert code == 128 + number
    assert f"{number.name}: stopping all hosts" in text
    assert all((place / "stopped").is_file() for place in launched.places)
    launched.wait_for_nobody()


@pytest.mark.parametrize("launched", [("300 0", "300 0")], indirect=True)
def test_nobody_outlives_a_launcher_that_was_killed(launched: Launched) -> None:
    launched.wait_for_all()
    launched.process.kill()
    launched.wait_for_nobody()
    assert all((place / "stopped").is_file() for place in launched.places)


def test_who_does_not_stop_is_killed_with_all_it_started(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    agent = (
        f"import runpy, sys; sys.path.insert(0, {str(hosts.AGENT.parent)!r}); import host_agent; "
        "host_agent.SECONDS_TO_STOP = 0.3; sys.exit(host_agent.main(sys.argv[1:]))"
    )
    words = [
        sys.executable,
        "-c",
        agent,
        sys.executable,
        tmp_path / "program.py",
        tmp_path,
        "300",
        "stubborn",
    ]
    with subprocess.Popen([str(word) for word in words], stdin=subprocess.PIPE) as process:
        wait(lambda: (tmp_path / "pids").is_file() and (tmp_path / "pids").read_text())
        pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(PATIENCE_SECONDS) == 128 + signal.SIGKILL
    wait(lambda: not any(alive(pid) for pid in pids))


def test_no_secret_stands_on_a_command_line() -> None:
    environment = {"NCCL_DEBUG": "a b", "OMP_NUM_THREADS": "2", "WANDB_API_KEY": "x", "HOME": "/h"}
    (words,) = hosts.over_ssh([Host("h", 1)], 1, 29500, ["--seed", "it's"], environment).commands
    assert words[:-2] == hosts.SSH
    assert "env 'NCCL_DEBUG=a b' OMP_NUM_THREADS=2 " in words[-1]
    assert "WANDB" not in words[-1]
    assert words[-1].startswith(f"cd {os.getcwd()} && exec env ")
    assert words[-1].endswith("""--seed 'it'"'"'s'""")
