"""The supervisor, with small programs in place of training: what is tried again, and what is left over."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megads.config.schema import Config
from megads.errors import BudgetReached, ConfigError, DataError, MegadsError, RunStopped, TrainingError
from megads.launch.progress import saved_checkpoints
from megads.launch.supervisor import Ended, Policy, describe_run
from tests.e2e.commands import ROOT
from tests.waiting import LONGEST_SECONDS, alive, content_of, until

# Saves a checkpoint each time it runs, and is finished with its last.
TRAINS = """
import os, pathlib, signal, sys
d = pathlib.Path(sys.argv[1]); last = int(sys.argv[2])
step = len(list(d.glob("step_*"))) + 1
(d / f"step_{step:08d}").mkdir(parents=True)
(d / f"step_{step:08d}" / "COMMIT.json").write_text("{}")
print("load", [a for a in sys.argv if "load" in a], flush=True)
if step < last:
    os.kill(os.getpid(), signal.SIGKILL)
"""


def supervise(*command: object, checkpoints: Path, tries: int = 3, stop: float = 30) -> list[str]:
    options = [
        "--checkpoints",
        checkpoints,
        "--tries",
        tries,
        "--backoff-seconds",
        0.05,
        "--stop-seconds",
        stop,
    ]
    return [sys.executable, str(ROOT / "tools" / "supervise.py"), *map(str, [*options, "--", *command])]


def run(*command: object, checkpoints: Path, tries: int = 3) -> subprocess.CompletedProcess[str]:
    words = supervise(sys.executable, "-c", *command, checkpoints=checkpoints, tries=tries)
    return subprocess.run(words, capture_output=True, text=True, timeout=LONGEST_SECONDS, check=False)


def test_killed_twice_it_finishes(tmp_path: Path) -> None:
    done = run(TRAINS, tmp_path, 3, checkpoints=tmp_path, tries=1)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("ended by SIGKILL") == 2
    assert "finished after 3 tries" in done.stderr


def test_without_progress_it_is_given_up(tmp_path: Path) -> None:
    """With the last lines of the error, and longer and longer pauses."""
    done = run("import sys; print('the disk', 'is gone', file=sys.stderr); sys.exit(1)", checkpoints=tmp_path)
    assert done.returncode == TrainingError.exit_code
    assert done.stderr.count("the disk is gone") == 4, "three tries, and the report"
    assert "3 tries in a row saved no checkpoint" in done.stderr


def test_pauses_double_up_to_the_longest() -> None:
    policy = Policy(backoff_seconds=10, longest_backoff_seconds=60)
    assert [policy.backoff(tries) for tries in (0, 1, 2, 3, 4, 1000)] == [10, 10, 20, 40, 60, 60]


@pytest.mark.parametrize("kind", [ConfigError, DataError, BudgetReached])
@pytest.mark.parametrize("through_a_launcher", [False, True])
def test_mistakes_are_not_tried_again(
    tmp_path: Path, kind: type[MegadsError], through_a_launcher: bool
) -> None:
    """torchrun makes 1 of every exit code, so the error's own line counts."""
    code = 1 if through_a_launcher else kind.exit_code
    program = (
        f"import sys; print('{kind.__name__}: no', file=sys.stderr); print('report\\n' * 90, file=sys.stderr)"
    )
    done = run(f"{program}; sys.exit({code})", checkpoints=tmp_path)
    assert done.returncode == kind.exit_code
    assert done.stderr.count("try ") == 1


def test_a_stop_of_its_own_is_tried_again(tmp_path: Path) -> None:
    """Another machine of the job was taken away: this one goes on, as long as there is progress."""
    done = run(f"import sys; sys.exit({RunStopped.exit_code})", checkpoints=tmp_path, tries=2)
    assert done.returncode == TrainingError.exit_code
    assert "stopped before its end" in done.stderr


WAITS = """
import os, signal, subprocess, sys, time
def stop(number, frame):
    print("RunStopped: saved", file=sys.stderr, flush=True)
    sys.exit(75)
signal.signal(signal.{name}, stop)
open(sys.argv[1], "w").write(str(os.getpid()))
while True:
    time.sleep(0.05)
"""
# As torchrun: the worker is in a session of its own, and SIGUSR1 would end the launcher.
LAUNCHES = """
import subprocess, sys
worker = subprocess.Popen([sys.executable, "-c", sys.argv[1], *sys.argv[2:]], start_new_session=True)
sys.exit(1 if worker.wait() else 0)
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"])
def test_signals_are_passed_on(tmp_path: Path, name: str) -> None:
    program = WAITS.format(name=name)
    inside = [sys.executable, "-c", program, tmp_path / "pid"]
    if name == "SIGUSR1":
        inside = [sys.executable, "-c", LAUNCHES, program, tmp_path / "pid"]
    process = subprocess.Popen(supervise(*inside, checkpoints=tmp_path), stderr=subprocess.PIPE, text=True)
    pid = int(content_of(tmp_path / "pid"))
    process.send_signal(signal.Signals[name])
    _, text = process.communicate(timeout=LONGEST_SECONDS)
    assert process.returncode == RunStopped.exit_code, text
    assert not alive(pid)


def test_no_process_is_left_behind(tmp_path: Path) -> None:
    """A launcher that was killed leaves its worker, in a session of its own, to the supervisor."""
    file = str(tmp_path / "pid")
    worker = f"import os, time; open({file!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    program = (
        "import os, signal, subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, '-c', {worker!r}], start_new_session=True)\n"
        f"while not os.path.exists({file!r}) or not os.path.getsize({file!r}): time.sleep(0.02)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = run(program, checkpoints=tmp_path, tries=1)
    assert done.returncode == TrainingError.exit_code
    assert not alive(int(content_of(tmp_path / "pid")))


def test_who_does_not_stop_is_ended_by_force(tmp_path: Path) -> None:
    program = f"""
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
open({str(tmp_path / "pid")!r}, "w").write(str(os.getpid()))
time.sleep(600)
"""
    command = supervise(sys.executable, "-c", program, checkpoints=tmp_path, stop=0.3)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    pid = int(content_of(tmp_path / "pid"))
    process.terminate()
    _, text = process.communicate(timeout=LONGEST_SECONDS)
    assert process.returncode == 128 + signal.SIGTERM, text
    assert "by force" in text
    assert not alive(pid)


def test_the_run_ends_with_its_supervisor(tmp_path: Path) -> None:
    program = WAITS.format(name="SIGTERM")
    process = subprocess.Popen(
        supervise(sys.executable, "-c", program, tmp_path / "pid", checkpoints=tmp_path),
        stderr=subprocess.PIPE,
    )
    pid = int(content_of(tmp_path / "pid"))
    process.kill()
    process.wait()
    until(lambda: not alive(pid))


# Is killed when it has forked the command, which then has not been started yet.
KILLED_AT_THE_FORK = """
import os, pathlib, signal, sys, time
from megads.launch import supervisor
end_with = supervisor._end_with
def late(pid):
    pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))
    os.kill(pid, signal.SIGKILL)
    while os.getppid() == pid:
        time.sleep(0.02)
    end_with(pid)
supervisor._end_with = late
command = [sys.executable, "-c", "import time; time.sleep(600)"]
supervisor.Supervisor(command, supervisor.Run(()), supervisor.Policy()).supervise()
"""


def test_a_run_that_is_being_started_ends_with_its_supervisor(tmp_path: Path) -> None:
    words = [sys.executable, "-c", KILLED_AT_THE_FORK, str(tmp_path / "pid")]
    assert subprocess.run(words, check=False).returncode == -signal.SIGKILL
    pid = int(content_of(tmp_path / "pid"))
    until(lambda: not alive(pid))


# After the first try it goes back: step 5 again, saved later, as after a spike of the loss.
GOES_BACK = """
import os, pathlib, signal, sys
d = pathlib.Path(sys.argv[1])
names = [name for name in ("step_00000009", "step_00000005", "step_00000005-2") if not (d / name).exists()]
if not names:
    sys.exit(0)
(d / names[0]).mkdir(parents=True)
(d / names[0] / "COMMIT.json").write_text("{}")
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_an_earlier_step_saved_later_is_progress(tmp_path: Path) -> None:
    done = run(GOES_BACK, tmp_path, checkpoints=tmp_path, tries=1)
    assert done.returncode == 0, done.stderr
    assert "finished after 4 tries" in done.stderr


def test_saved_checkpoints_are_ordered_by_stage_first(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    assert saved_checkpoints([a, b]) == frozenset()
    for directory, name in ((a, "step_00000900"), (a, "step_00000100-2"), (a, "step_00000950.bad")):
        (directory / name).mkdir(parents=True)
        (directory / name / "COMMIT.json").write_text("{}")
    assert sorted(one[:3] for one in saved_checkpoints([a, b])) == [(0, 100, 2), (0, 900, 1)]
    (b / "step_00000001").mkdir(parents=True)
    assert max(saved_checkpoints([a, b])).step == 900, "not committed"
    (b / "step_00000001" / "COMMIT.json").write_text("{}")
    assert max(saved_checkpoints([a, b]))[:3] == (1, 1, 1)


def test_what_a_command_says_of_itself(tmp_path: Path) -> None:
    flags = ["--output_dir", str(tmp_path), "--checkpointing.preemption.notice", "aws"]
    run = describe_run(["torchrun", "--nproc-per-node", "2", "pretrain_megads.py", *flags])
    assert run.directories == (tmp_path / "checkpoints",)
    assert run.preemption.notice == "aws"
    assert run.again == ("--checkpointing.load=latest",)
    assert describe_run(["tools/run_training.py", "--gpus", "2", *flags]).again == ("--resume", "latest")
    with pytest.raises(ConfigError, match="--checkpoints"):
        describe_run(["python", "other.py"])
    with pytest.raises(ConfigError, match="SLURM"):
        describe_run(["tools/run_training.py", "--submit", *flags])
    assert Config().checkpointing.preemption.notice is None


def test_errors_of_a_host_and_a_rank_are_read() -> None:
    assert Ended(1, ("node3: rank 5: DataError: bad", "node3: Traceback", "x")).error is DataError
    assert Ended(1, ("a DataError happened",)).error is None
    assert Ended(RunStopped.exit_code, ()).error is RunStopped
    assert Ended(137, ()).error is None
