"""Preflight over real processes, each on a host of its own by name, with faults injected into one of them."""

from pathlib import Path
from typing import Any

import pytest

from tests.dist import tiny
from tests.dist.harness import run_distributed

RANKS, BAD = 3, 1


def outcome(fault: str, directory: Path, settings: dict[str, Any]) -> tuple[str, str]:
    """(error, warnings) of a preflight in which rank BAD has the fault."""
    import logging
    import os

    import torch.distributed as dist

    from megads.errors import EnvironmentSetupError
    from megads.mcore.groups import initialize_device, initialize_process_groups
    from megads.train import preflight

    config, resolved = tiny.configure(
        {"output_dir": str(directory / "run"), "data.cache_dir": str(directory)} | settings
    )
    initialize_device(resolved.device)
    initialize_process_groups(resolved, timeout_minutes=4, seed=config.seed)
    rank = dist.get_rank()
    os.environ["LOCAL_RANK"] = "0"
    preflight.host_name = lambda: f"node{rank}"  # type: ignore[assignment]
    # The speeds of processes on shared cores are no host's; what is injected must be the only difference.
    transfer_rate = preflight.transfer_rate
    preflight.measure_matmul_rate = lambda *_, **__: 1e12  # type: ignore[assignment]
    preflight.transfer_rate = lambda *given: 1e9 * (transfer_rate(*given) > 0)  # type: ignore[assignment]
    if rank == BAD:
        inject(fault, preflight, directory)
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("megads").addHandler(handler)
    logging.getLogger("megads").setLevel(logging.INFO)
    try:
        preflight.run_preflight(config, resolved)
        error = ""
    except EnvironmentSetupError as raised:
        error = str(raised)
    left = [path.name for path in (*directory.glob(".preflight*"), *(directory / "run").glob(".preflight*"))]
    dist.barrier()
    assert rank != 0 or not left, left
    return error, "\n".join(messages)


def inject(fault: str, preflight: Any, directory: Path) -> None:
    real_read, real_facts = preflight._read_text, preflight.machine_facts
    real_rate, real_time = preflight.transfer_rate, preflight.time.time
    if fault == "version":
        preflight.machine_facts = lambda *given: real_facts(*given) | {"torch": "2.0.0"}
    elif fault == "matmul":
        preflight.measure_matmul_rate = lambda *_, **__: 0.1e12
    elif fault == "link":
        preflight.transfer_rate = lambda *given: real_rate(*given) / 10
    elif fault == "hidden":
        preflight.SECONDS_TO_APPEAR = 0.5
        hidden = directory / "run"
        preflight._read_text = lambda path: "" if path.parent == hidden else real_read(path)
    elif fault == "clock":
        preflight.time = type(
            "Time", (), vars(preflight.time) | {"time": staticmethod(lambda: real_time() + 3599)}
        )
    else:
        assert fault == "none"


def run(fault: str, directory: Path, **settings: Any) -> list[tuple[str, str]]:
    of_preflight = {f"distributed.preflight.{name}": value for name, value in settings.items()}
    return run_distributed(
        RANKS, outcome, fault=fault, directory=directory,
        settings={"training.global_batch_size": 12} | of_preflight,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("version", "torch is 2.0.0 on node1 (rank 1), but "),
        ("hidden", "not seen on node1 (rank 1)"),
        ("clock", "the clock of node1 is at least 35"),
    ],
)
def test_a_mismatch_ends_the_job_on_every_rank(fault: str, said: str, tmp_path: Path) -> None:
    outcomes = run(fault, tmp_path, slow_factor=1000)
    assert len({error for error, _ in outcomes}) == 1
    error = outcomes[0][0]
    assert said in error
    assert "  1. " in error
    assert "  2. " not in error, error


@pytest.mark.parametrize(
    ("fault", "said"),
    [("matmul", "node1 does 0.1 TFLOP/s"), ("link", "most transfers of node1 (rank 1) are slow")],
)
def test_a_slow_cpu_or_link_is_a_warning_of_rank_0(fault: str, said: str, tmp_path: Path) -> None:
    (error, said_by_0), *others = run(fault, tmp_path, slow_factor=5)
    assert error == ""
    assert said in said_by_0
    assert all(messages == "" for _, messages in others)


def test_sound_machines_pass_and_policies_hold(tmp_path: Path) -> None:
    (error, messages), *_ = run("none", tmp_path, slow_factor=1000)
    assert error == ""
    assert messages.startswith("preflight: 3 ranks on 3 hosts compared in")
    assert messages.count("\n") == 0

    (error, messages), *_ = run("version", tmp_path, policy="warn", slow_factor=1000)
    assert error == ""
    assert "preflight: torch is 2.0.0 on node1" in messages

    assert run("version", tmp_path, policy="off") == [("", "")] * RANKS


def test_without_the_speed_test_nothing_is_timed(tmp_path: Path) -> None:
    (error, messages), *_ = run("link", tmp_path, speed_test=False, slow_factor=5)
    assert error == ""
    assert "slow" not in messages
