"""Programs on several hosts, here by an ssh that stays at home: they end together, whoever ends first."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megads.launch import hosts
from megads.launch.hostfile import Host
from tests.waiting import LONGEST_SECONDS, alive, content_of, until

SSH = """#!/bin/sh
# ssh OPTIONS... HOST COMMAND
while [ "$1" = -o ]; do shift 2; done
shift
exec sh -c "$*"
"""
# Says who it is and when it is stopped; with a child in a session of its own, as torchrun's. It ends after
# some seconds, or when it is told to.
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
while time.monotonic() < end and not (place / "end").exists():
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
# Sends itself a signal as soon as it has started the first process.
AT_ONCE = """
import os, signal, subprocess
class Signalled(subprocess.Popen):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        os.kill(os.getpid(), signal.SIGTERM)
subprocess.Popen = Signalled
"""


class Launched:
    """A launcher in a process of its own, with the programs on its hosts `a`, `b`, ..."""

    def __init__(self, directory: Path, *programs: str, first: str = "") -> None:
        (directory / "ssh").write_text(SSH)
        (directory / "ssh").chmod(0o755)
        (directory / "program.py").write_text(PROGRAM)
        self.places = [directory / name for name, _ in zip("abc", programs, strict=False)]
        for place in self.places:
            place.mkdir()
        words = [f"{place} {program}" for place, program in zip(self.places, programs, strict=True)]
        self.process = subprocess.Popen(
            [sys.executable, "-c", first + LAUNCHER, str(directory / "program.py"), *words],
            env={**os.environ, "PATH": f"{directory}:{os.environ['PATH']}"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip

    def pids(self) -> list[int]:
        """Of all programs and their children, once they have started."""
        return [int(pid) for place in self.places for pid in content_of(place / "pids").split()]

    def wait_for_nobody(self) -> None:
        pids = self.pids()
        until(lambda: not any(alive(pid) for pid in pids))

    def end(self) -> tuple[int, str]:
        text, _ = self.process.communicate(timeout=LONGEST_SECONDS)
        return self.process.returncode, text


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


@pytest.mark.parametrize("launched", [("300 0", "300 3", "300 0")], indirect=True)
def test_the_first_to_fail_ends_all_and_gives_its_code(launched: Launched) -> None:
    launched.pids()
    (launched.places[1] / "end").touch()
    code, text = launched.end()
    assert code == 3
    assert f"{launched.places[1]}: exit code 3; stopping the other hosts" in text
    launched.wait_for_nobody()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("launched", [("300 0", "300 0")], indirect=True)
def test_a_signal_stops_all_in_order(launched: Launched, number: signal.Signals) -> None:
    launched.pids()
    launched.process.send_signal(number)
    code, text = launched.end()
    assert code == 128 + number
    assert f"{number.name}: stopping all hosts" in text
    assert all((place / "stopped").is_file() for place in launched.places)
    launched.wait_for_nobody()


def test_a_signal_that_comes_as_the_hosts_are_started_stops_them(tmp_path: Path) -> None:
    code, text = Launched(tmp_path, "300 0", first=AT_ONCE).end()
    assert code == 128 + signal.SIGTERM
    assert "SIGTERM: stopping all hosts" in text


@pytest.mark.parametrize("launched", [("300 0", "300 0")], indirect=True)
def test_nobody_outlives_a_launcher_that_was_killed(launched: Launched) -> None:
    launched.pids()
    launched.process.kill()
    launched.wait_for_nobody()
    assert all((place / "stopped").is_file() for place in launched.places)


def agent(directory: Path, program: str, *arguments: str, first: str = "") -> "subprocess.Popen[bytes]":
    """The agent itself, after `first`, with the tests' program, or another."""
    (directory / "program.py").write_text(program)
    code = (
        f"import sys; sys.path.insert(0, {str(hosts.AGENT.parent)!r}); import host_agent\n{first}\n"
        "sys.exit(host_agent.main(sys.argv[1:]))"
    )
    words = [
        sys.executable,
        "-c",
        code,
        sys.executable,
        directory / "program.py",
        directory,
        "300",
        "stubborn",
    ]
    return subprocess.Popen([str(word) for word in words], stdin=subprocess.PIPE)


def test_who_does_not_stop_is_killed_with_all_it_started(tmp_path: Path) -> None:
    soon = "host_agent.SECONDS_TO_STOP = 0.3"
    with agent(tmp_path, PROGRAM, "300", "stubborn", first=soon) as process:
        pids = [int(pid) for pid in content_of(tmp_path / "pids").split()]
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(LONGEST_SECONDS) == 128 + signal.SIGKILL
    until(lambda: not any(alive(pid) for pid in pids))


# Has a child as soon as it is to stop, and leaves it, in a session of its own.
LEAVES = """
import os, pathlib, signal, subprocess, sys
def stop(number, frame):
    child = subprocess.Popen(["sleep", "300"], start_new_session=True)
    (pathlib.Path(sys.argv[1]) / "left").write_text(str(child.pid))
    os._exit(0)
signal.signal(signal.SIGTERM, stop)
(pathlib.Path(sys.argv[1]) / "pids").write_text(str(os.getpid()))
signal.pause()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux gives orphans to another than init")
def test_a_child_that_is_left_on_the_way_out_is_ended_too(tmp_path: Path) -> None:
    with agent(tmp_path, LEAVES) as process:
        content_of(tmp_path / "pids")
        process.send_signal(signal.SIGTERM)
        left = int(content_of(tmp_path / "left"))
        process.wait(LONGEST_SECONDS)
    until(lambda: not alive(left))


def test_a_signal_that_comes_as_the_program_is_started_stops_it(tmp_path: Path) -> None:
    with agent(tmp_path, PROGRAM, "300", "0", first=AT_ONCE) as process:
        # By itself, where it has got so far.
        assert process.wait(LONGEST_SECONDS) in (128 + signal.SIGTERM, 75)


def test_no_secret_stands_on_a_command_line() -> None:
    environment = {"NCCL_DEBUG": "a b", "OMP_NUM_THREADS": "2", "WANDB_API_KEY": "x", "HOME": "/h"}
    (words,) = hosts.over_ssh([Host("h", 1)], 1, 29500, ["--seed", "it's"], environment).commands
    assert words[:-2] == hosts.SSH
    assert "env 'NCCL_DEBUG=a b' OMP_NUM_THREADS=2 " in words[-1]
    assert "WANDB" not in words[-1]
    assert words[-1].startswith(f"cd {os.getcwd()} && exec env ")
    assert words[-1].endswith("""--seed 'it'"'"'s'""")
