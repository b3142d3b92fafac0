"""Weights & Biases for real, without its service: what a run leaves in offline mode, and a resume of it."""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from tests.e2e.commands import pretrain_command, records, run

WANDB = ("--logging.wandb.enabled", "--logging.wandb.project", "tests")
STEPS, STOP_STEP = 4, 2
BLOCK_BYTES = 32 * 1024


def test_offline_run_and_its_resume(config: Path, tmp_path: Path) -> None:
    """The files of both parts hold every number of `metrics.jsonl`, under one run id."""
    pytest.importorskip("wandb")
    output = tmp_path / "run"
    offline = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "HOME": str(tmp_path)}
    for flags in (("--training.exit_step", STOP_STEP), ()):
        command = pretrain_command("--config", config, "--train-iters", STEPS, *WANDB, *flags)
        done = run(command, environment=offline)
        assert done.returncode == 0, done.stdout + done.stderr
    run_id = (output / "wandb_run_id").read_text()
    directories = sorted((output / "wandb").glob("offline-run-*"))
    assert len(directories) == 2
    assert all(directory.name.endswith(f"-{run_id}") for directory in directories)
    history = [row for directory in directories for row in history_of(directory)]
    expected = records(output, "train")
    assert [row["_step"] for row in history] == [record["step"] for record in expected]
    for row, record in zip(history, expected, strict=True):
        for name in ("lm_loss", "mtp_loss_1", "loss/code", "param_norm", "seconds/data"):
            assert row.get(f"train/{name}") == record[name], name


def history_of(directory: Path) -> list[dict[str, Any]]:
    """What was logged, read back from the file that `wandb sync` uploads."""
    from wandb.proto.wandb_internal_pb2 import Record

    [file] = directory.glob("*.wandb")
    rows = []
    for message in messages(file.read_bytes()):
        record = Record.FromString(message)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append(
                {item.key or "/".join(item.nested_key): orjson.loads(item.value_json) for item in items}
            )
    return rows


def messages(content: bytes) -> Iterator[bytes]:
    """The messages of a `.wandb` file: a header of 7 bytes, then LevelDB's log format.

    Blocks of 32 KiB hold chunks of checksum (4 bytes), length (2) and type (1: whole, 2: first, 3: middle,
    4: last); a block's last bytes are empty where no chunk's header fits.
    """
    assert content[:4] == b":W&B"
    place, message = 7, b""
    while place < len(content):
        if (left := BLOCK_BYTES - place % BLOCK_BYTES) < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        message += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield message
            message = b""


def test_a_missing_package_is_told_before_training(config: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "wandb.py").write_text("raise ImportError\n", encoding="utf-8")
    command = pretrain_command("--config", config, *WANDB)
    done = run(command, environment={"PYTHONPATH": str(blocked)})
    assert done.returncode == 5
    assert "pip install megads[wandb]" in done.stderr + done.stdout
    assert "Traceback" not in done.stderr + done.stdout
    assert not (tmp_path / "run" / "metrics.jsonl").exists() or not records(tmp_path / "run", "train")
