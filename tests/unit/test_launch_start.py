"""What the launcher would start, for each way of asking; every mistake is told before anything starts."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megads.errors import ConfigError, EnvironmentSetupError, MegadsError
from megads.launch import commands
from megads.launch.commands import PRETRAIN, Pretraining, Replacement
from megads.launch.hosts import OverSsh
from megads.launch.options import parse_options
from megads.launch.start import Start, prepare
from megads.launch.submit import Submission

ROOT = Path(__file__).parents[2]
DEBUG = ("--config", str(ROOT / "configs" / "debug.json"))
LARGE = ("--config", str(ROOT / "configs" / "train_config_large.json"))


def start(*argv: object) -> Start:
    return prepare(parse_options([str(word) for word in argv]))[0]


def command(*argv: object) -> list[str]:
    made = start(*argv)
    assert isinstance(made, Pretraining | Replacement)
    return shlex.split(made.describe())


@pytest.fixture
def hostfile(tmp_path: Path) -> Path:
    path = tmp_path / "hosts"
    path.write_text("# two machines\nhost1 slots=1\n\nuser@host2 slots=1  # the other\n")
    return path


def test_one_process_needs_no_launcher() -> None:
    assert command(*DEBUG, "--seed", 7) == [sys.executable, str(PRETRAIN), *DEBUG, "--seed", "7"]


def test_as_many_processes_as_the_layout_needs_or_as_asked() -> None:
    words = command(*DEBUG, "--expert-model-parallel-size", 2)
    assert words[:4] == [sys.executable, str(PRETRAIN), "--nproc-per-node", "2"]
    assert words[4:] == [*DEBUG, "--expert-model-parallel-size", "2"]
    assert command(*DEBUG, "--gpus", 2)[3] == "2"


def test_resume_is_a_setting_of_the_run(tmp_path: Path) -> None:
    assert command(*DEBUG, "--resume", "latest")[-2:] == ["--checkpointing.load", "latest"]
    assert command(*DEBUG, "--resume", tmp_path)[-1] == str(tmp_path)


def test_torchrun_on_each_host_of_a_file(hostfile: Path) -> None:
    made = start(*DEBUG, "--hostfile", hostfile, "--port", 23456)
    assert isinstance(made, OverSsh)
    first, second = made.commands
    assert (first[-2], second[-2]) == ("host1", "user@host2")
    for rank, words in enumerate((first[-1], second[-1])):
        own = f"--nnodes 2 --node-rank {rank} --nproc-per-node 1 --master-addr host1 --master-port 23456"
        assert f"torch.distributed.run {own} {PRETRAIN}" in words
    (only,) = start(*DEBUG, "--hostfile", hostfile, "--nodes", 1, "--gpus", 1).commands  # type: ignore[attr-defined]
    assert "--nnodes 1" in only[-1]


def test_deepspeeds_launcher(monkeypatch: pytest.MonkeyPatch, hostfile: Path) -> None:
    monkeypatch.setattr(commands, "find_spec", lambda name: object())
    words = command(*DEBUG, "--deepspeed", "--gpus", 2)
    assert words[1:8] == [
        "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--no_local_rank", "--master_port", "29500",
    ]  # fmt: skip
    assert words[8:] == [str(PRETRAIN), *DEBUG]
    words = command(*DEBUG, "--deepspeed", "--hostfile", hostfile)
    assert words[8:12] == ["--hostfile", str(hostfile), "--num_nodes", "2"]
    assert command(*DEBUG, "--gpus", 2, "--distributed.launcher", "deepspeed") == command(
        *DEBUG, "--deepspeed", "--gpus", 2, "--distributed.launcher", "deepspeed"
    )


def test_deepspeed_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentSetupError, match="pip install deepspeed"):
        start(*DEBUG, "--deepspeed")


def test_slurm_by_flag_or_by_configuration(tmp_path: Path) -> None:
    for words in ((*LARGE,), (*LARGE, "--submit"), (*DEBUG, "--submit", "--distributed.slurm.nodes", 1)):
        made = start(*words)
        assert isinstance(made, Submission)
        assert made.submit
    made = start(*LARGE, "--write-script", tmp_path / "job.sh", "--nodes", 32, "--gpus", 4)
    assert isinstance(made, Submission)
    assert not made.submit
    assert made.run() == 0
    text = (tmp_path / "job.sh").read_text()
    assert "#SBATCH --nodes=32\n" in text
    assert "#SBATCH --gpus-per-node=4\n" in text
    # On the command line comes before in the file.
    assert isinstance(start(*LARGE, "--hostfile", _hosts(tmp_path)), OverSsh)


def _hosts(tmp_path: Path) -> Path:
    path = tmp_path / "many"
    path.write_text("".join(f"h{number} slots=8\n" for number in range(16)))
    return path


def test_without_gpus_the_number_is_that_of_the_tasks() -> None:
    flags = ("--distributed.slurm.gpus_per_node", 0, "--distributed.device", "cpu", "--gpus", 2)
    made = start(*DEBUG, "--submit", *flags)
    assert isinstance(made, Submission)
    assert "#SBATCH --ntasks-per-node=2\n" in made.describe()
    assert "--gpus-per-node" not in made.describe().partition("# ---- the job")[0]


def test_a_chain_can_start_only_while_none_has_finished() -> None:
    lines = start(*LARGE, "--submit", "--chain", 3).describe().splitlines()[:3]
    assert all("--export=ALL,MEGADS_CHAIN=CHAIN" in line for line in lines)
    assert "--dependency" not in lines[0]
    assert "--dependency=afternotok:JOB1 --kill-on-invalid-dep=yes" in lines[1]
    assert "--dependency=afternotok:JOB1:JOB2 --kill-on-invalid-dep=yes" in lines[2]


def test_a_dry_run_says_what_becomes_of_deepspeeds_settings(tmp_path: Path) -> None:
    flags = ("--distributed.deepspeed.enabled", "--distributed.deepspeed.zero_optimization")
    shown = prepare(parse_options([*DEBUG, *flags, '{"stage": 1, "reduce_bucket_size": 5e8}']))[1].shown
    assert "zero_optimization.stage = 1: distributed.zero_stage" in shown
    assert "zero_optimization.reduce_bucket_size = 500000000.0: no counterpart" in shown


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpus", "0"], "at least 1"),
        (["--gpus", "two"], "two must be a whole number"),
        (["--port", "http"], "http is no free port"),
        (["--port", "80"], "1024"),
        (["--nodes", "2"], "--hostfile FILE"),
        (["--chain", "2"], "give --submit too"),
        (["--submit", "--deepspeed"], "exclude each other"),
        (["--submit", "--hostfile", "x"], "exclude each other"),
        (["--chain", "2", "--write-script", "x"], "leave one of them out"),
        (["--hostfile", "/nowhere"], "cannot be read"),
        (["--resume", "/nowhere/step_1"], "no such checkpoint"),
        (["--resume", __file__], "is a file"),
        (["--world-size", "2"], "--gpus and --nodes"),
        (["--gpuz", "2"], "unknown flag"),
        (["--training.lr", "x"], "unknown flag"),
        (["--tensor-model-parallel-size", "3"], "problem"),
        (["--gpus", "3", "--tensor-model-parallel-size", "2"], "3 processes"),
        (["--submit", "--distributed.slurm.time", "soon"], "no time limit"),
    ],
)
def test_mistakes_are_told_before_anything_starts(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        start(*DEBUG, *words)
    assert said in str(raised.value)


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_options(["--help"])
    shown = capsys.readouterr().out
    for name in (
        "gpus",
        "nodes",
        "hostfile",
        "deepspeed",
        "submit",
        "chain",
        "resume",
        "dry-run",
        "write-script",
    ):
        assert f"--{name}" in shown


def test_it_runs_on_a_login_node() -> None:
    """Nothing heavy is imported on the way to a dry run of the largest configuration."""
    program = (
        "import sys; sys.argv[0] = 'run_training.py'; sys.path.insert(0, 'tools'); import run_training; "
        f"code = run_training.main({[*LARGE, '--dry-run']!r}); "
        "heavy = {'torch', 'numpy', 'megatron', 'matplotlib', 'rich', 'transformers'} & set(sys.modules); "
        "sys.exit(f'{code} {heavy}' if code or heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "sbatch --parsable outputs/large/slurm/pretrain.sbatch" in done.stdout


def test_every_mistake_is_typed() -> None:
    for words in (["--gpus", "x"], ["--hostfile"], ["--config", "/nowhere.json"]):
        with pytest.raises(MegadsError):
            start(*words)
