"""Whether a job that ended starts again: by its exit code, and by what it has saved since."""

import os
from pathlib import Path

import pytest

from megads.errors import ConfigError, RunStopped, TrainingError
from megads.launch.restart import FINAL, Tries, judge, main

STOPPED = RunStopped.exit_code


@pytest.mark.parametrize(
    ("code", "tries", "again"),
    [
        (STOPPED, 0, True), (STOPPED, 2, True), (STOPPED, 3, False),
        (1, 0, True), (1, 2, True), (1, 3, False),
        (137, 0, True), (TrainingError.exit_code, 1, True), (FINAL + ConfigError.exit_code, 0, False),
    ],
)  # fmt: skip
def test_judge(code: int, tries: int, again: bool) -> None:
    verdict = judge(code, Tries("1", frozenset(), frozenset(), tries), most=3)
    assert verdict.again is again
    assert verdict.why


class Run:
    """A run without a process: only its checkpoints."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.arguments = [
            "--",
            "--output_dir",
            str(directory),
            "--distributed.slurm.max_tries_without_progress",
            "2",
        ]

    def save(self, name: str) -> None:
        checkpoint = self.directory / "checkpoints" / name
        checkpoint.mkdir(parents=True)
        (checkpoint / "COMMIT.json").write_text("{}")

    def before(self, job: str = "7") -> int:
        return main(["before", "--job", job, *self.arguments])

    def after(self, code: int = 1, job: str = "7") -> int:
        return main(["after", "--code", str(code), "--job", job, *self.arguments])


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "run")


def test_a_job_without_progress_is_given_up(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run.save("step_00000001")  # of an earlier job
    assert run.before() == 0
    assert [run.after(), run.before(), run.after()] == [0, 0, 1]
    assert "max_tries_without_progress" in capsys.readouterr().err
    assert run.after(job="8") == 0, "another job begins anew"


def test_progress_is_a_new_checkpoint(run: Run) -> None:
    run.before()
    assert run.after() == 0
    run.save("step_00000002")
    assert [run.after(), run.after(), run.after()] == [0, 0, 1]
    run.save("step_00000001-2")  # of a run that went back: an earlier step, saved later
    assert run.after() == 0
    (run.directory / "checkpoints" / "step_00000002").rename(
        run.directory / "checkpoints" / "step_00000002.bad"
    )
    assert [run.after(), run.after()] == [0, 1], "one set aside is no new one"


def test_a_clock_that_is_behind_hides_no_progress(run: Run) -> None:
    """Each try may be on another node, with a clock of its own."""
    run.save("step_00000001")
    run.before()
    run.save("step_00000002")
    os.utime(run.directory / "checkpoints" / "step_00000002" / "COMMIT.json", (1, 1))
    assert [run.after(), run.after(), run.after()] == [0, 0, 1]


def test_a_try_goes_on_from_what_the_job_has_saved(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """And not from the checkpoint that the user gave to the first one."""
    run.save("step_00000009")
    run.before()
    run.after()
    run.before()
    assert capsys.readouterr().out == ""
    run.save("step_00000004")  # resumed by hand from step 3
    run.after()
    run.before()
    assert capsys.readouterr().out == "--checkpointing.load=latest\n"


def test_a_mistake_is_not_repeated(run: Run) -> None:
    assert run.before() == 0
    run.save("step_00000001")
    assert run.after(FINAL + 2) == 1
    assert main(["before", "--job", "1", "--", "--config", "/nowhere.json"]) == ConfigError.exit_code


def test_a_damaged_record_is_as_none(run: Run) -> None:
    run.before()
    (run.directory / "restarts.json").write_text("{")
    assert run.after() == 0


def test_stages_count_together(run: Run) -> None:
    stages = '{"stages": [{"name": "a"}, {"name": "b"}]}'
    (run.directory).mkdir()
    (run.directory / "c.json").write_text(stages)
    run.arguments += ["--config", str(run.directory / "c.json")]
    run.before()
    assert run.after() == 0
    (run.directory / "b" / "checkpoints" / "step_00000001").mkdir(parents=True)
    (run.directory / "b" / "checkpoints" / "step_00000001" / "COMMIT.json").write_text("{}")
    assert [run.after(), run.after(), run.after()] == [0, 0, 1]
