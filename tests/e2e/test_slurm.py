"""Jobs on a real SLURM of two nodes: the time limit, a dead node, cancelling, chains, arrays."""

import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.commands import ROOT, Finished, pretrain_well, records, run, steps, tool, write_json
from tests.e2e.conftest import tiny_config
from tests.e2e.slurm_cluster import NODES, SlurmCluster, missing
from tests.unit.test_launch_slurm import HOSTILE

pytestmark = pytest.mark.skipif(missing() is not None, reason=f"no SLURM can be started: {missing()}")

LAST_STEP = 30
# Of the run that nothing happened to: those that are stopped are compared with it as far as it goes.
KNOWN_STEPS = 200
# Far more than a fast machine takes before what is to happen to a run happens.
MANY_STEPS = 100_000
HOSTILE_NAME = "a 'b' \"c\" $(touch bad) `touch bad` \\d; #"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    made = SlurmCluster(tmp_path_factory.mktemp("slurm"))
    try:
        made.start()
        yield made
    finally:
        made.stop()


class Job:
    """A run on two nodes, its configuration and what it leaves behind."""

    def __init__(self, cluster: SlurmCluster, config: Path, directory: Path) -> None:
        self.cluster, self.config, self.output = cluster, config, directory / "run"
        self.log = directory / "log.txt"
        self.change(
            output_dir=str(self.output),
            distributed={
                "device": "cpu",
                "slurm": {
                    "partition": "debug", "nodes": 2, "gpus_per_node": 0, "cpus_per_task": 1, "mem": "0",
                    "time": "10", "signal_seconds": 20,
                    "job_name": HOSTILE_NAME, "extra_args": [f"--comment={' '.join(HOSTILE)}"],
                    "output": str(self.log), "error": str(self.log),
                },
            },
        )  # fmt: skip

    def change(self, **settings: Any) -> None:
        """Settings of the configuration, which every try reads anew."""
        content = json.loads(self.config.read_text(encoding="utf-8"))
        for name, value in settings.items():
            content[name] = content.get(name, {}) | value if isinstance(value, dict) else value
        write_json(self.config, content)

    def train(self, exit_step: int | None, save_interval: int = 0) -> None:
        """Long by its schedules, and ended at `exit_step`."""
        settings = {"train_steps": MANY_STEPS, "exit_step": exit_step, "save_interval": save_interval}
        self.change(training=settings)

    def submit(self, *flags: object) -> list[str]:
        """The numbers of its jobs."""
        done = launch(self.cluster, "--config", self.config, "--submit", *flags)
        assert done.returncode == 0, done.stderr
        return re.findall(r"^submitted .*: (\d+)$", done.stdout, re.MULTILINE)

    def wait_for_step(self, step: int) -> None:
        def reached() -> bool:
            return (self.output / "metrics.jsonl").is_file() and max(steps(self.output), default=0) >= step

        self.cluster.wait_for(reached, f"step {step} of {self.output}; its log: {self.log}")

    def go_on_from_where_it_stopped(self, save_interval: int = 0) -> int:
        """A little longer, from the step it stopped at, which is returned."""
        stopped_at = steps(self.output)[-1]
        self.train(stopped_at + 5, save_interval)
        return stopped_at

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8") if self.log.is_file() else ""

    def check_losses(self, uninterrupted: dict[int, float]) -> None:
        """Each step once, and those of a run that was not interrupted, as far as that went."""
        found = losses(self.output)
        assert steps(self.output) == list(range(1, max(found) + 1))
        assert {step: loss for step, loss in found.items() if step <= KNOWN_STEPS} == {
            step: loss for step, loss in uninterrupted.items() if step <= max(found)
        }


def launch(cluster: SlurmCluster, *arguments: object) -> Finished:
    words = ["python", ROOT / "tools" / "run_training.py", *arguments]
    return run(words, environment={"SLURM_CONF": cluster.environment["SLURM_CONF"]})


@pytest.fixture
def job(cluster: SlurmCluster, config: Path, tmp_path: Path) -> Job:
    return Job(cluster, config, tmp_path)


@pytest.fixture(scope="module")
def uninterrupted(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The losses of a run on two processes that nothing happened to, SLURM neither."""
    directory = tmp_path_factory.mktemp("uninterrupted")
    flags = ("--config", tiny_config(data, directory), "--training.train_steps", MANY_STEPS)
    pretrain_well(*flags, "--training.exit_step", KNOWN_STEPS, processes=2)
    return losses(directory / "run")


def losses(output: Path) -> dict[int, float]:
    return {record["step"]: record["lm_loss"] for record in records(output, "train")}


def test_a_run_on_two_nodes(job: Job, uninterrupted: dict[int, float]) -> None:
    job.train(LAST_STEP)
    (number,) = job.submit()
    finished = job.cluster.wait_for_job(number, "COMPLETED")
    assert finished["NumNodes"] == "2"
    assert re.search(r"try 0 on n1 n2, ranks meet at 127\.0\.0\.1:\d+", job.said())
    (start,) = records(job.output, "run")
    assert start["layout"] == "DP2"
    assert steps(job.output) == list(range(1, LAST_STEP + 1))
    assert {path.name for path in (job.output / "logs").iterdir()} >= {"rank0.log", "rank1.log"}
    # What a shell would make something of came to SLURM as it stands in the configuration.
    shown = job.cluster.command("scontrol", "show", "job", number)
    assert f"JobName={HOSTILE_NAME}\n" in shown
    assert f"Comment={' '.join(HOSTILE)}" in shown
    assert not list(ROOT.glob("bad*"))
    job.check_losses(uninterrupted)


def test_a_port_that_is_taken_costs_one_try(job: Job) -> None:
    job.train(2)
    with job.cluster.nothing_starts():
        (number,) = job.submit()
        port = 20000 + int(number) % 10000
        holder = socket.create_server(("", port))
    with holder:
        job.cluster.wait_for_job(number, "COMPLETED")
    assert f"try 0 on n1 n2, ranks meet at 127.0.0.1:{port}" in job.said()
    assert re.search(r"try 1 on n1 n2, ranks meet at 127\.0\.0\.1:\d+", job.said())
    assert steps(job.output) == [1, 2]


def test_the_time_limit_saves_and_requeues(job: Job, uninterrupted: dict[int, float]) -> None:
    job.train(None)
    (number,) = job.submit("--distributed.slurm.signal_seconds", 5)
    job.wait_for_step(3)
    with job.cluster.nothing_starts():
        # The end of the minute that it is in: the limit must not hit the start on a slow machine.
        hours, minutes, _ = map(int, job.cluster.job(number)["RunTime"].split(":"))
        job.cluster.command("scontrol", "update", f"JobId={number}", f"TimeLimit={60 * hours + minutes + 1}")
        job.cluster.wait_for_restart(number)
        assert "SIGUSR1 received: saving and stopping" in job.said()
        assert "a checkpoint was saved" in job.said()
        stopped_at = job.go_on_from_where_it_stopped()
        job.cluster.command("scontrol", "update", f"JobId={number}", "TimeLimit=10")
    job.cluster.wait_for_job(number, "COMPLETED")
    assert f"resumed after step {stopped_at}" in job.said()
    assert steps(job.output)[-1] == stopped_at + 5
    job.check_losses(uninterrupted)


def test_a_dead_node_is_survived(job: Job, uninterrupted: dict[int, float]) -> None:
    job.train(None, save_interval=4)
    (number,) = job.submit()
    job.wait_for_step(6)
    with job.cluster.nothing_starts():
        job.cluster.kill_node(NODES[1])
        job.cluster.wait_for_restart(number)
        job.go_on_from_where_it_stopped(save_interval=4)
    job.cluster.start_node(NODES[1])
    job.cluster.wait_for_job(number, "COMPLETED")
    assert "resumed after step" in job.said()
    job.check_losses(uninterrupted)


def test_a_chain_goes_on_where_the_job_before_it_stopped(job: Job, uninterrupted: dict[int, float]) -> None:
    job.train(None)
    first, second, third = job.submit("--chain", 3)
    job.wait_for_step(1)
    with job.cluster.nothing_starts():
        job.cluster.command("scancel", "--signal=USR1", first)
        assert job.cluster.wait_for_job(first, "FAILED")["ExitCode"] == "75:0"
        stopped_at = job.go_on_from_where_it_stopped()
    job.cluster.wait_for_job(second, "COMPLETED")
    job.cluster.wait_for_job(third, "CANCELLED")
    assert f"resumed after step {stopped_at}" in job.said()
    assert steps(job.output)[-1] == stopped_at + 5
    job.check_losses(uninterrupted)


def test_cancelling_saves_leaves_nobody_and_does_not_come_back(job: Job) -> None:
    job.train(None)
    (number,) = job.submit("--data.num_workers", 1)
    job.wait_for_step(3)
    assert job.cluster.processes_of_jobs()
    job.cluster.command("scancel", number)
    job.cluster.wait_for(
        lambda: job.cluster.job(number)["JobState"] == "CANCELLED" and not job.cluster.processes_of_jobs(),
        "the end of all processes",
    )
    assert job.cluster.job(number)["Restarts"] == "0"
    stopped_at = steps(job.output)[-1]
    assert (job.output / "checkpoints" / f"step_{stopped_at:08d}" / "COMMIT.json").is_file()


def test_what_slurm_does_not_have_is_said_before_anything_is_submitted(job: Job) -> None:
    done = launch(job.cluster, "--config", job.config, "--submit", "--distributed.slurm.partition", "debgu")
    assert done.returncode == 2
    assert "no partition 'debgu'; did you mean debug?" in done.stderr
    flags = ("--distributed.slurm.extra_args", '["--constraint=warp-drive"]')
    done = launch(job.cluster, "--config", job.config, "--submit", *flags)
    assert done.returncode == 5
    assert "Invalid feature specification" in done.stderr
    assert job.cluster.command("squeue", "--noheader", "--states=PENDING,RUNNING") == ""


def test_preprocessing_as_an_array_gives_the_files_of_one_process(
    cluster: SlurmCluster, corpus: Path, data: Path, tmp_path: Path
) -> None:
    made = tmp_path / "made"
    of_sbatch = (
        "--partition=debug",
        "--cpus-per-task=1",
        "--mem-per-cpu=0",
        f"--output={tmp_path}/%x-%A-%a.log",
    )
    submitted = run(
        [ROOT / "slurm" / "preprocess_dolma.sbatch", "submit", 3, *of_sbatch, "--", "--input-root", corpus,
         "--output-root", made, "--tokenizer", data / "tokenizer.model"],
        environment={"SLURM_CONF": cluster.environment["SLURM_CONF"]},
    )  # fmt: skip
    assert submitted.returncode == 0, submitted.stderr
    array, check = re.findall(r"\b(\d+)\b", submitted.stdout)[:2]
    cluster.wait_for_job(check, "COMPLETED")
    assert cluster.command("squeue", "--noheader", "--job", array) == ""
    expected = {path.relative_to(data): path.read_bytes() for path in data.rglob("*.bin")}
    assert {path.relative_to(made): path.read_bytes() for path in made.rglob("*.bin")} == expected
    (verified,) = tmp_path.glob(f"*-{check}-*.log")
    assert f"{len(expected)} datasets" in verified.read_text()
    assert "0 problems" in verified.read_text()
    assert tool("verify_dataset.py", made, "--quick").returncode == 0
