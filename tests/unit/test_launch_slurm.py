"""The job script: every setting in its place, all texts literal; what SLURM says no to is a typed error."""

import json
import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from megads.config.loader import load_config
from megads.config.schema import Config, Slurm
from megads.config.tree import fields_of
from megads.errors import ConfigError, EnvironmentSetupError
from megads.launch import slurm
from megads.launch.slurm import MARK, TEMPLATE, quote_directive, slurm_script, time_limit_seconds
from megads.launch.submit import Submission, check_slurm

HOSTILE = [
    "$(touch bad)", "`touch bad`", "; touch bad #", "' touch bad '", '" touch bad "', "\\",
    "\\\\\" touch bad", "${HOME}", "--wrap=touch bad", "*", "%j", "&& touch bad", "#SBATCH --exclusive",
]  # fmt: skip


def config(**settings: Any) -> Config:
    return load_config(None, {f"distributed.slurm.{name}": value for name, value in settings.items()})


def directives(script: str) -> list[str]:
    return [line[8:] for line in script.splitlines() if line.startswith("#SBATCH ")]


def sbatch_words(line: str) -> list[str]:
    """Splits a directive as sbatch does (tests/e2e/test_slurm.py compares with the real one)."""
    words, word, quote, inside = [], "", "", False
    characters = iter(line)
    for character in characters:
        if character == "\\":
            word, inside = word + next(characters), True
        elif quote:
            word, quote = (word, "") if character == quote else (word + character, quote)
        elif character in "\"'":
            quote, inside = character, True
        elif character == "#":
            break
        elif character == " ":
            words, word, inside = ([*words, word] if inside else words), "", False
        else:
            word, inside = word + character, True
    return [*words, word] if inside else words


def test_every_setting_is_a_directive() -> None:
    script = slurm_script(
        config(
            partition="h100", nodes=3, ntasks_per_node=4, gpus_per_node=4, cpus_per_task=12,
            time="1-12:00:00", mem="500G", job_name="name", output="out-%j", error="err-%j",
            account="acct", qos="high",
            extra_args=["--exclusive", "--constraint=a&b"], signal_seconds=600, requeue=False,
            container_image="img.sqsh", container_mounts=["/data:/data", "/x:/y"],
        ),
        ["--config", "c.json"],
    )  # fmt: skip
    assert [sbatch_words(line) for line in directives(script)] == [
        [word]
        for word in (
            "--job-name=name", "--partition=h100", "--nodes=3", "--ntasks-per-node=4", "--gpus-per-node=4",
            "--cpus-per-task=12", "--mem=500G", "--time=1-12:00:00", f"--chdir={os.getcwd()}",
            "--output=out-%j", "--error=err-%j", "--account=acct", "--qos=high", "--signal=USR1@600",
            "--no-requeue",
            "--open-mode=append", "--exclusive", "--constraint=a&b",
        )
    ]  # fmt: skip
    assert "container=(--container-image=img.sqsh --container-mounts=/data:/data,/x:/y)\n" in script
    assert "python=python\n" in script
    assert 'set -- --config c.json "$@"\n' in script


def test_no_setting_of_the_block_is_forgotten() -> None:
    source = Path(slurm.__file__).read_text(encoding="utf-8")
    elsewhere = {"enabled", "max_tries_without_progress"}  # start.py, restart.py
    for leaf in fields_of(Slurm):
        assert f"slurm.{leaf.name}" in source or leaf.name in elsewhere, leaf.name


def test_the_template_and_the_script_share_the_job() -> None:
    template = TEMPLATE.read_text(encoding="utf-8")
    assert template.count(MARK) == 1
    assert slurm_script(config(), []).endswith(template.partition(MARK)[2])
    for script in (template, slurm_script(config(), ["it's", "$(x)"])):
        checked = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize("text", HOSTILE)
def test_texts_that_mean_something_to_a_shell_are_literal(text: str, tmp_path: Path) -> None:
    made = slurm_script(
        config(
            job_name=text, output=text, account=text, container_image=text, extra_args=[f"--comment={text}"]
        ),
        ["--experiment_name", text],
    )
    found = [sbatch_words(line) for line in directives(made)]
    for expected in (f"--job-name={text}", f"--output={text}", f"--account={text}", f"--comment={text}"):
        assert [expected] in found
    # What bash makes of the lines between the directives and the job.
    settings = made.partition(MARK)[0] + 'printf "%s\\0" "${container[@]}" "$@"'
    done = subprocess.run(["bash", "-c", settings], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split("\0")[:-1] == [f"--container-image={text}", "--experiment_name", text]
    assert not list(tmp_path.iterdir())


def test_quotes_only_where_they_are_needed() -> None:
    assert quote_directive("--time=1-00:00:00") == "--time=1-00:00:00"
    assert quote_directive('a "b" \\c') == r'"a \"b\" \\c"'


@pytest.mark.parametrize("bad", ["a\n#SBATCH --x", "a\rb", "a\0b", "a\x1bb", "a\u2028b"])
def test_line_breaks_and_control_characters_are_refused(bad: str) -> None:
    for name in ("job_name", "output", "error", "partition", "account", "qos", "container_image"):
        with pytest.raises(ConfigError, match=f"slurm.{name}"):
            slurm_script(config(**{name: bad}), [])
    with pytest.raises(ConfigError, match="control character"):
        slurm_script(config(extra_args=[f"--comment={bad}"]), [])
    if "\u2028" not in bad and "\x1b" not in bad:
        with pytest.raises(ConfigError, match="argument"):
            slurm_script(config(), ["--experiment_name", bad])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"gpus_per_node": 8, "ntasks_per_node": 3}, "set ntasks_per_node to 8, or to 1"),
        ({"gpus_per_node": 8, "cpus_per_task": 4}, "cpus_per_task to at least 8"),
        ({"time": "soon"}, "is no time limit"),
        ({"time": "1:60:00:00"}, "is no time limit"),
        ({"time": "4"}, "not within the time limit"),
        ({"mem": "lots"}, "is no amount of memory"),
        ({"job_name": ""}, "is empty"),
        ({"extra_args": ["exclusive"]}, "no option of sbatch"),
        ({"extra_args": ["--constraint h100"]}, "no option of sbatch"),
        ({"extra_args": ["--nodes=3"]}, "distributed.slurm.nodes"),
        ({"extra_args": ["-A=x"]}, "distributed.slurm.account"),
        ({"container_mounts": ["/a:/b"]}, "needs container_image"),
        ({"container_image": "x", "container_mounts": ["/a:/b,/c:/d"]}, "one mount per entry"),
    ],
)
def test_a_block_that_cannot_be_a_job(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        slurm_script(config(**settings), [])
    assert said in str(raised.value)


def test_time_limits_in_all_their_forms() -> None:
    hour = 3600
    for text, seconds in (
        ("90", 1.5 * hour), ("90:30", 1.5 * hour + 30), ("1:30:00", 1.5 * hour), ("2-0", 48 * hour),
        ("2-1:30", 49.5 * hour), ("2-1:30:30", 49.5 * hour + 30), ("UNLIMITED", float("inf")),
    ):  # fmt: skip
        assert time_limit_seconds(text) == seconds, text
    assert time_limit_seconds("1-") is None


def fake(directory: Path, name: str, body: str) -> None:
    path = directory / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Commands of a SLURM with one partition, that say which job was submitted."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("sh", "wc"):
        (programs / name).symlink_to(f"/bin/{name}")
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.chdir(tmp_path)
    fake(programs, "sinfo", "echo gpu; echo debug")
    fake(programs, "sbatch", f'echo "$@" >> {tmp_path}/submitted; wc -l < {tmp_path}/submitted')
    return tmp_path


def submission(cluster: Path, jobs: int | None = None, **settings: Any) -> Submission:
    return Submission(config(**settings), ("--seed", "1"), cluster / "job.sh", jobs)


def test_a_chain_is_submitted_job_by_job(cluster: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert submission(cluster, 3, output="made/%j.out").run() == 0
    lines = [shlex.split(line) for line in (cluster / "submitted").read_text().splitlines()]
    names = {word for line in lines for word in line if word.startswith("--export=")}
    assert len(names) == 1, "the jobs of a chain know each other by one name"
    assert [word for line in lines for word in line if word.startswith("--dependency")] == [
        "--dependency=afternotok:1", "--dependency=afternotok:1:2",
    ]  # fmt: skip
    assert (cluster / "made").is_dir(), "SLURM would not make it, and the job would have no log"
    assert "scancel 1 2 3" in capsys.readouterr().out


def test_what_slurm_says_no_to(cluster: Path) -> None:
    with pytest.raises(ConfigError, match="no partition 'gpus'; did you mean gpu"):
        check_slurm(config(partition="gpus"))
    fake(cluster / "bin", "sbatch", "echo 'sbatch: error: Invalid qos specification' >&2; exit 1")
    with pytest.raises(EnvironmentSetupError, match="Invalid qos"):
        submission(cluster).run()
    (cluster / "bin" / "sbatch").unlink()
    with pytest.raises(EnvironmentSetupError, match="sbatch is not on the PATH"):
        submission(cluster).run()
    assert not (cluster / "submitted").exists()


def test_a_script_that_cannot_be_written(cluster: Path) -> None:
    (cluster / "file").write_text("")
    with pytest.raises(EnvironmentSetupError, match="cannot write the job script"):
        Submission(config(), (), cluster / "file" / "job.sh").run()


def test_as_the_guide_writes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`create_slurm_script(config, 'configs/x.json', 'my_job.sh')`."""
    from tests.meta.test_readme import load_tool

    path = tmp_path / "c.json"
    path.write_text(json.dumps({"distributed": {"slurm": {"nodes": 2}}}))
    text = load_tool("tools/run_training.py").create_slurm_script(
        load_config(path), path, tmp_path / "job.sh"
    )
    assert (tmp_path / "job.sh").read_text() == text
    assert os.access(tmp_path / "job.sh", os.X_OK)
    assert f'set -- --config {path} "$@"' in text
