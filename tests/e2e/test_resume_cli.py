"""Stop and resume by command line: the same run bit by bit, another layout, a signal."""

import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from megads.errors import CheckpointError, RunStopped, TrainingError
from megads.train.phases import PHASES
from tests.e2e.commands import (
    ENVIRONMENT,
    ROOT,
    pretrain,
    pretrain_command,
    pretrain_well,
    records,
    run,
    steps,
)
from tests.waiting import LONGEST_SECONDS

STEPS, STOP_STEP = 8, 4
# More than are done before a signal comes, however late that is.
MANY_STEPS = 100_000
EP2 = ("--expert-model-parallel-size", 2)
TP2 = ("--tensor-model-parallel-size", 2)
# What may differ between two runs of the same steps.
OF_THE_CLOCK = {
    "step_seconds", "tokens_per_second", "tokens_per_second_per_device", "tflops_per_device", "mfu",
    "seconds_left", "wall_seconds", "job_seconds", "peak_memory_bytes", "memory_share",
    *(f"seconds/{phase}" for phase in PHASES),
}  # fmt: skip


def measured(output: Path, kind: str) -> list[dict[str, Any]]:
    """All that a run measured but times, as it stands in the file: JSON numbers keep every bit."""
    return [
        {name: value for name, value in record.items() if name not in OF_THE_CLOCK}
        for record in records(output, kind)
    ]


def test_stop_and_resume_is_the_same_run(config: Path, tmp_path: Path) -> None:
    """In the same layout to the last bit; in another one step for step, and within rounding."""
    # The sources are too small for a validation split each; together they are not.
    validation = ("--eval-interval", 4, "--validation.eval_steps", 1, "--no-validation.per_source")
    flags = ("--config", config, "--train-iters", STEPS, *validation)
    whole, cut, other = (tmp_path / name for name in ("whole", "cut", "other"))
    pretrain_well(*flags, *EP2, "--output_dir", whole, processes=2)
    pretrain_well(*flags, *EP2, "--output_dir", cut, "--training.exit_step", STOP_STEP, processes=2)
    assert steps(cut) == list(range(1, STOP_STEP + 1))
    shutil.copytree(cut, other)

    pretrain_well(*flags, *EP2, "--output_dir", cut, processes=2)
    assert steps(cut) == list(range(1, STEPS + 1))
    assert measured(cut, "train") == measured(whole, "train")
    assert measured(cut, "validation") == measured(whole, "validation")
    assert [record["step"] for record in records(cut, "run")] == [0, STOP_STEP]

    resumed = pretrain_well(*flags, *TP2, "--output_dir", other, processes=2)
    assert f"resumed after step {STOP_STEP}" in resumed.stdout
    assert [record["layout"] for record in records(other, "run")] == ["EP2 DP2", "TP2"]
    mine, expected = measured(other, "train"), measured(whole, "train")
    assert [record["step"] for record in mine] == list(range(1, STEPS + 1))
    for name in ("tokens", "samples", "learning_rate"):
        assert [record[name] for record in mine] == [record[name] for record in expected], name
    for name in ("lm_loss", "mtp_loss", "aux_loss", "grad_norm", "param_norm"):
        found = [record[name] for record in mine]
        assert found == pytest.approx([record[name] for record in expected], rel=1e-4), name


def test_another_batch_size_ends_at_the_same_tokens(config: Path, tmp_path: Path) -> None:
    """Sizes may change on resume; the schedules, and so the end of a run, go by tokens."""
    output, tokens = tmp_path / "run", 8 * 4 * 32
    validation = ("--eval-interval", 4, "--validation.eval_steps", 1, "--no-validation.per_source")
    flags = ("--config", config, "--training.total_training_tokens", tokens, *validation)
    pretrain_well(*flags, "--training.exit_step", 4)
    larger = pretrain_well(*flags, "--global-batch-size", 8, "--training.exit_step", 5)
    assert "end with step 6, not with step 4" in larger.stdout
    changes = larger.stdout.partition("settings that differ from the checkpoint's:\n")[2].splitlines()
    assert changes[0] == "  training.global_batch_size: 4, now 8"
    assert not changes[1].startswith("  ")
    assert "validation reads 8 sequences now and has read 4 before" in larger.stdout
    assert "step 5 of 6, stopped" in larger.stdout
    smaller = pretrain_well(*flags, "--global-batch-size", 2)
    assert "end with step 9, not with step 16" in smaller.stdout
    assert "step 9 of 9, finished" in smaller.stdout
    consumed = [(record["step"], record["tokens"], record["samples"]) for record in records(output, "train")]
    assert consumed == [
        (step, samples * 32, samples) for step, samples in enumerate((4, 8, 12, 16, 24, 26, 28, 30, 32), 1)
    ]
    assert records(output, "train")[-1]["learning_rate"] == pytest.approx(2e-4)

    shorter = pretrain_well("--config", config, "--train-iters", 2)
    assert "beyond the end of this run, 256 tokens" in shorter.stdout
    assert steps(output) == list(range(1, 10))
    refused = pretrain("--config", config, "--seq-length", 16)
    assert refused.returncode == CheckpointError.exit_code
    assert "sequences of 32 tokens (training.seq_length), and this one's have 16" in refused.stderr


def test_without_its_last_checkpoint_no_run_is_finished(config: Path, tmp_path: Path) -> None:
    """A single failed save is no more than a warning, but for the last one."""
    flags = ("--config", config, "--train-iters", 4)
    pretrain_well(*flags, "--training.exit_step", 2)
    # A limit on the size of files is to the writer what a full disk is.
    done = run(["bash", "-c", 'ulimit -f 40; exec "$@"', "bash", *pretrain_command(*flags)])
    assert done.returncode == TrainingError.exit_code, done.stdout
    assert "TrainingError: the checkpoint of step 4 was not saved: rank 0: " in done.stderr
    assert "finished" not in done.stdout
    assert "resumed after step 2" in pretrain_well(*flags).stdout


def test_sigterm_saves_and_a_rerun_finishes(config: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    command = pretrain_command("--config", config, "--train-iters", MANY_STEPS)
    with subprocess.Popen(
        command, cwd=ROOT, env={**ENVIRONMENT, "HOME": str(tmp_path)}, stdout=subprocess.PIPE, text=True
    ) as process:
        wait_for_a_step(output, process)
        process.send_signal(signal.SIGTERM)
        text, _ = process.communicate(timeout=LONGEST_SECONDS)
    assert process.returncode == RunStopped.exit_code, text
    assert "SIGTERM received" in text
    stopped_at = steps(output)[-1]
    assert stopped_at > 0
    assert (output / "checkpoints" / f"step_{stopped_at:08d}" / "COMMIT.json").is_file()

    done = pretrain_well("--config", config, "--train-iters", stopped_at + 10)
    assert f"resumed after step {stopped_at}" in done.stdout
    assert "finished" in done.stdout
    assert steps(output) == list(range(1, stopped_at + 11))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_before_the_first_step_has_the_same_exit_code(
    config: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """Schedulers go by it, and would count another one as a crash."""
    command = pretrain_command("--config", config, "--nproc-per-node", 1, "--train-iters", MANY_STEPS)
    with subprocess.Popen(
        command, cwd=ROOT, env={**ENVIRONMENT, "HOME": str(tmp_path)}, stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + LONGEST_SECONDS
        while not (tmp_path / "run" / "logs" / "rank0.log").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(number)
        _, text = process.communicate(timeout=LONGEST_SECONDS)
    assert process.returncode == RunStopped.exit_code, text
    assert f"RunStopped: {number.name}: " in text


def wait_for_a_step(output: Path, process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + LONGEST_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        if (output / "metrics.jsonl").is_file() and steps(output):
            return
        time.sleep(0.02)
    raise AssertionError(f"no step was logged; exit code {process.poll()}")
