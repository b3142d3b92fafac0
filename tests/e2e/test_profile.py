"""A window of steps is profiled by flag, and by signal while the run goes on."""

import gzip
import os
import signal
import subprocess
import time
from pathlib import Path

import orjson

from tests.e2e.commands import ENVIRONMENT, ROOT, pretrain_command, pretrain_well, records
from tests.waiting import LONGEST_SECONDS


def operations(trace: Path) -> set[str]:
    return {event.get("name") for event in orjson.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]}


def test_a_window_by_flag(config: Path) -> None:
    done = pretrain_well(
        "--config", config, "--logging.profile.start_step", 3, "--logging.profile.steps", 2,
        "--logging.profile.memory", "true",
    )  # fmt: skip
    directory = config.parent / "run" / "profile"
    trace = directory / "rank0_steps3-4.trace.json.gz"
    assert sorted(path.name for path in directory.iterdir()) == [
        "rank0_steps3-4.trace.json.gz", "rank0_steps3-4.txt",
    ]  # fmt: skip
    assert {"aten::mm", "[memory]"} <= operations(trace)
    assert "aten::mm" in (directory / "rank0_steps3-4.txt").read_text()
    assert trace.name in done.stdout + done.stderr


def test_a_window_by_signal(config: Path) -> None:
    output = config.parent / "run"
    command = pretrain_command("--config", config, "--train-iters", 100_000, "--logging.profile.steps", 1)
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        end = time.monotonic() + LONGEST_SECONDS
        asked = False
        while not list((output / "profile").glob("rank0_*.trace.json.gz")):  # while it is written: .rank0_*
            assert process.poll() is None, "the run ended"
            assert time.monotonic() < end, "no trace appeared"
            if not asked and (output / "metrics.jsonl").exists() and len(records(output, "train")) > 0:
                process.send_signal(signal.SIGUSR2)
                asked = True
            time.sleep(0.1)
        steps_before = len(records(output, "train"))
        while len(records(output, "train")) <= steps_before:  # it goes on
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.1)
    finally:
        process.kill()
        process.wait()
    [trace] = (output / "profile").glob("rank0_*.trace.json.gz")
    assert "aten::mm" in operations(trace)
