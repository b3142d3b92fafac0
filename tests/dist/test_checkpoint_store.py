"""`CheckpointStore` on gloo processes: resharding, background saves, failures, kills, damage."""

import dataclasses
import errno
import logging
import multiprocessing
import os
import pickle
import random
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megads.checkpoint import commit
from megads.checkpoint.commit import CheckpointInfo
from megads.checkpoint.manifest import read_manifest, seal_files, write_manifest
from megads.errors import CheckpointError, TrainingError
from tests.dist.harness import host_store, rank_environment, run_distributed
from tests.waiting import LONGEST_SECONDS

ROWS, COLUMNS = 24, 5


def whole(step: int) -> torch.Tensor:
    """The global tensor of a step, [ROWS, COLUMNS], the same on every rank."""
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(step))


def state_dict(step: int | None) -> dict[str, Any]:
    """Rows split over ranks, a replica, an object, plain values; `step=None`: empty, to load into."""
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    rank, size = dist.get_rank(), dist.get_world_size()
    rows = ROWS // size
    mine = (
        torch.zeros(rows, COLUMNS) if step is None else whole(step)[rank * rows : (rank + 1) * rows].clone()
    )
    bias = (
        torch.zeros(3, dtype=torch.bfloat16)
        if step is None
        else torch.full((3,), 1.5 + step, dtype=torch.bfloat16)
    )
    generators = None
    if step is not None:
        generators = {
            "torch": torch.manual_seed(step).get_state(),
            "numpy": np.random.RandomState(step).get_state(),
        }
        generators["python"] = random.Random(step).getstate()
    state: dict[str, Any] = {
        "weight": ShardedTensor.from_rank_offsets("weight", mine, (0, rank, size)),
        "bias": ShardedTensor.from_rank_offsets("bias", bias, replica_id=rank),
        "rng": ShardedObject("rng", generators, (1,), (0,), replica_id=rank),
    }
    if step is not None:
        state["groups"] = [{"lr": 0.1 * step, "betas": (0.9, 0.95)}]
    return state


def assert_state(state: dict[str, Any], step: int) -> None:
    rank, rows = dist.get_rank(), ROWS // dist.get_world_size()
    assert torch.equal(state["weight"], whole(step)[rank * rows : (rank + 1) * rows])
    assert torch.equal(state["bias"], torch.full((3,), 1.5 + step, dtype=torch.bfloat16))
    assert state["groups"] == [{"lr": 0.1 * step, "betas": (0.9, 0.95)}]
    assert torch.equal(state["rng"]["torch"], torch.manual_seed(step).get_state())
    assert np.array_equal(state["rng"]["numpy"][1], np.random.RandomState(step).get_state()[1])
    assert state["rng"]["python"] == random.Random(step).getstate()


def open_store(directory: Path, **options: Any) -> Any:
    from megads.mcore.cpu import install_cpu_substitutions

    install_cpu_substitutions()
    from megads.checkpoint.store import CheckpointStore

    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return CheckpointStore(directory, **options)


def poll_until_saved(store: Any) -> CheckpointInfo:
    deadline = time.monotonic() + LONGEST_SECONDS
    while time.monotonic() < deadline:
        if info := store.poll():
            return info
        time.sleep(0.005)
    raise AssertionError("the save never ended")


def save_steps(directory: Path, steps: list[int], **options: Any) -> None:
    with open_store(directory, **options) as store:
        for step in steps:
            store.save(
                step, state_dict(step), {"step": step, "best": float("inf")}, {"validation_loss": 1 / step}
            )
            store.wait()
            assert store.last_saved.step == step


def load_latest(directory: Path, step: int) -> None:
    with open_store(directory) as store:
        found = store.find()
        assert commit.read_record(found.path) == {"step": step, "best": float("inf")}
        state, record = store.load(found.path, state_dict(None))
        assert_state(state, step)
        assert record["step"] == step
        again, _ = store.load("latest", state_dict(None))
        assert_state(again, step)


@pytest.fixture(scope="module")
def saved_by_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("two")
    run_distributed(2, save_steps, directory=directory, steps=[1, 2, 3], keep_last_n=2)
    return directory


@pytest.mark.parametrize("size", [1, 2, 4])
def test_reshard_bitwise(saved_by_two: Path, size: int) -> None:
    run_distributed(size, load_latest, directory=saved_by_two, step=3)


def test_keep_last_and_best(tmp_path: Path, saved_by_two: Path) -> None:
    assert [info.step for info in commit.committed(saved_by_two)] == [2, 3]
    run_distributed(1, save_steps, directory=tmp_path, steps=[1, 2, 3], keep_last_n=1, keep_best=False)
    assert [info.step for info in commit.committed(tmp_path)] == [3]


def async_while_training(directory: Path) -> dict[str, str]:
    """The tensors change right after `save` returns; the files must hold what they were."""
    with open_store(directory, keep_last_n=0) as store:
        state = state_dict(5)
        live = [state["weight"].data, state["bias"].data]
        record = {"history": [5]}
        store.save(5, state, record, {})
        for tensor in live:
            tensor.fill_(float("nan"))
        record["history"].append(6)
        info = poll_until_saved(store)
        assert commit.read_record(info.path) == {"history": [5]}
        assert store.poll() is None
        store.save(6, state_dict(5), {}, {})  # a second one right behind, then close: it must be committed
    assert [found.step for found in commit.committed(directory)] == [5, 6]
    return {name: entry.sha256 for name, entry in commit.verify(info.path).files.items()}


def sync_save(directory: Path) -> dict[str, str]:
    with open_store(directory, async_save=False) as store:
        store.save(5, state_dict(5), {}, {})
        return {name: entry.sha256 for name, entry in commit.verify(store.last_saved.path).files.items()}


def test_async_equals_sync(tmp_path: Path) -> None:
    asynchronous = run_distributed(2, async_while_training, directory=tmp_path / "async")[0]
    synchronous = run_distributed(2, sync_save, directory=tmp_path / "sync")[0]
    assert {name for name in asynchronous if name.endswith(".distcp")} == {"__0_0.distcp", "__1_0.distcp"}
    assert asynchronous == synchronous


def fail_on(where: str, rank: int) -> Any:
    """Makes a step of the save raise 'disk full' on one rank, as the operating system would."""
    from megads.checkpoint import sharded, store

    def disk_full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    patch = pytest.MonkeyPatch()
    if dist.get_rank() == rank:
        owner = {"write": sharded.PlannedSave, "write_metadata": sharded.PlannedSave, "seal_files": sharded}
        patch.setattr(owner.get(where, store.commit), where, disk_full)
    return patch


def save_and_wait(store: Any, step: int, state: dict[str, Any]) -> None:
    store.save(step, state, {}, {})
    store.wait()


def survive_full_disk(directory: Path, async_save: bool) -> None:
    with open_store(directory, async_save=async_save, max_failures=2) as store:
        store.save(1, state_dict(1), {}, {})
        store.wait()
        cases = [
            ("write", 1),
            ("seal_files", 1),
            ("write_metadata", 0),
            ("commit", 0),
            ("create_temporary", 0),
        ]
        for number, (where, rank) in enumerate(cases):
            patch = fail_on(where, rank)
            store.save(2 + number, state_dict(2), {}, {})
            store.wait()
            patch.undo()
            assert f"step {2 + number} was not saved: " in store.failure
            assert store.last_saved.step == (1 if number == 0 else 100 + number - 1), where
            assert not list(directory.glob("*.tmp-*"))
            store.save(100 + number, state_dict(3), {}, {})  # there is room again
            store.wait()
            assert store.last_saved.step == 100 + number
            assert store.failure is None
        state, _ = store.load("latest", state_dict(None))
        assert_state(state, 3)

        fail_on("write", 0)
        store.save(201, state_dict(1), {}, {})
        store.wait()
        state = state_dict(1)
        with pytest.raises(TrainingError, match=r"2 saves in a row failed.*No space left on device"):
            save_and_wait(store, 202, state)


@pytest.mark.parametrize("async_save", [True, False])
def test_disk_full_leaves_training_alive(tmp_path: Path, async_save: bool) -> None:
    run_distributed(2, survive_full_disk, directory=tmp_path, async_save=async_save)
    assert [info.step for info in commit.committed(tmp_path)][-1] == 104


def reported_while_training(directory: Path) -> str:
    dist.init_process_group("gloo")
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("megads").addHandler(handler)
    with open_store(directory) as store:
        fail_on("write", 0)
        store.save(1, state_dict(1), {}, {})
        deadline = time.monotonic() + LONGEST_SECONDS
        while not records and time.monotonic() < deadline:
            assert store.poll() is None
            time.sleep(0.005)
        return " ".join(records)


def save_where_the_directory_went(directory: Path) -> str:
    dist.init_process_group("gloo")
    with open_store(directory) as store:
        fail_on("write", 0)
        store.save(1, state_dict(1), {}, {})
        if dist.get_rank() == 0:
            # All of it at once: the other rank may be writing into it.
            directory.rename(directory.with_name("elsewhere"))
        dist.barrier()
        store.wait()
        return str(store.failure)


def test_a_directory_that_is_gone_is_told_by_all_ranks(tmp_path: Path) -> None:
    for told in run_distributed(2, save_where_the_directory_went, directory=tmp_path / "checkpoints"):
        assert "is gone" in told


def test_a_failed_writer_is_reported_while_training_goes_on(tmp_path: Path) -> None:
    (text,) = run_distributed(1, reported_while_training, directory=tmp_path)
    assert "rank 0: OSError: [Errno 28] No space left on device" in text
    assert "training goes on" in text
    assert re.search(r"\([\d.]+ [MG]iB free\)", text)


def fill_the_disk(directory: Path) -> None:
    """A real file system of 1 MiB: one checkpoint fits, the next does not."""
    with open_store(directory, keep_last_n=0) as store:
        store.save(1, state_dict(1), {}, {})
        store.wait()
        assert store.last_saved.step == 1
        (directory / "ballast").write_bytes(bytes(2**20 - 200 * 2**10))
        store.save(2, state_dict(2), {"filler": "x" * 2**19}, {})
        store.wait()
        assert store.last_saved.step == 1
        assert not list(directory.glob("*.tmp-*"))
        (directory / "ballast").unlink(missing_ok=True)
        store.save(3, state_dict(3), {}, {})
        store.wait()
        assert store.last_saved.step == 3
        state, _ = store.load("latest", state_dict(None))
        assert_state(state, 3)


def test_a_really_full_disk(tmp_path: Path) -> None:
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], capture_output=True, check=False
    )
    if mount.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        run_distributed(2, fill_the_disk, directory=tmp_path)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def use_one_directory_twice(directory: Path) -> None:
    with open_store(directory), pytest.raises(CheckpointError, match=r"is in use by process \d+ on"):
        open_store(directory)
    open_store(directory).close()


def test_second_job_is_refused_on_every_rank(tmp_path: Path) -> None:
    run_distributed(2, use_one_directory_twice, directory=tmp_path)


def use_two_directories(directory: Path) -> None:
    dist.init_process_group("gloo")
    with pytest.raises(CheckpointError, match=r"rank 1: .*must be on a file system that all nodes share"):
        open_store(directory / str(dist.get_rank()))


def test_directories_that_are_not_shared_are_refused(tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / ".lease").touch()  # of an earlier run on that node
    run_distributed(2, use_two_directories, directory=tmp_path)


def fall_back(directory: Path, name: str) -> None:
    with open_store(directory) as store:
        found = store.find()
        assert found.step == 1
        state, _ = store.load(found.path, state_dict(None))
        assert_state(state, 1)
        bad = directory / "step_00000002.bad"
        with pytest.raises(CheckpointError, match=name):
            store.load(bad, state_dict(None))
        with pytest.raises(CheckpointError, match="no checkpoint there"):
            store.find(directory / "nothing")


@pytest.mark.parametrize("name", ["__0_0.distcp", "__1_0.distcp", ".metadata", "metadata.json"])
def test_flipped_bit_falls_back_on_every_rank(tmp_path: Path, name: str) -> None:
    run_distributed(2, save_steps, directory=tmp_path, steps=[1, 2])
    file = tmp_path / "step_00000002" / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)
    run_distributed(2, fall_back, directory=tmp_path, name=name)


def refuse_crafted(directory: Path, mark: Path) -> None:
    with open_store(directory) as store:
        with pytest.raises(CheckpointError, match=r"\.metadata: refused: it names posix\.system"):
            store.load("latest", state_dict(None))
        os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
        with pytest.raises(CheckpointError, match="TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"):
            store.load("latest", state_dict(None))
    assert not mark.exists()


class Attack:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


def test_crafted_pickle_with_a_valid_manifest_is_refused(tmp_path: Path) -> None:
    """The attacker rewrites the manifest too, so only the pickle check stands in the way."""
    run_distributed(1, save_steps, directory=tmp_path, steps=[1])
    path = commit.latest(tmp_path).path
    (path / ".metadata").write_bytes(pickle.dumps(Attack(tmp_path / "executed")))
    manifest = read_manifest(path)
    files = manifest.files | seal_files(path, [".metadata"])
    write_manifest(path, dataclasses.replace(manifest, files=files))
    commit.verify(path)
    run_distributed(2, refuse_crafted, directory=tmp_path, mark=tmp_path / "executed")


def mismatch(directory: Path) -> None:
    from megatron.core.dist_checkpointing import ShardedTensor

    with open_store(directory) as store:
        rank, size = dist.get_rank(), dist.get_world_size()
        wrong = ShardedTensor.from_rank_offsets(
            "weight", torch.zeros(ROWS // size, COLUMNS + 1), (0, rank, size)
        )
        with pytest.raises(CheckpointError, match=r"does not fit this model.*weight"):
            store.load("latest", {"weight": wrong})
        state = state_dict(None)
        if rank == 1:  # as a pipeline stage that has a layer more than the checkpoint
            state["moment"] = ShardedTensor.from_rank_offsets("moment", torch.zeros(2))
        with pytest.raises(CheckpointError, match=r"rank 1: .* does not fit this model.*moment"):
            store.load("latest", state)


def test_a_checkpoint_that_does_not_fit_is_one_error(saved_by_two: Path) -> None:
    run_distributed(2, mismatch, directory=saved_by_two)


def refuse_unloadable(directory: Path) -> None:
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    with open_store(directory) as store:
        state = state_dict(1) | {
            "odd": ShardedObject("odd", Path("x"), (1,), (0,), replica_id=dist.get_rank())
        }
        with pytest.raises(CheckpointError, match=r"'odd.*cannot be saved.*pathlib"):
            store.save(1, state, {}, {})


def test_state_that_could_not_be_loaded_is_refused_at_the_first_save(tmp_path: Path) -> None:
    run_distributed(2, refuse_unloadable, directory=tmp_path)


def save_and_die(rank: int, size: int, port: int, directory: Path, phase: str, victim: int) -> None:
    os.environ |= rank_environment(rank, size, port)
    torch.set_num_threads(1)
    store = open_store(directory)

    def kill(name: str) -> None:
        if name == phase:
            os.kill(os.getpid(), signal.SIGKILL)

    if rank == victim:
        commit.phase = kill
    store.save(2, state_dict(2), {"step": 2, "best": float("inf")}, {})
    poll_until_saved(store)


KILLS = [
    ("staged", 0), ("staged", 1), ("writing", 0), ("rank_written", 1), ("shards_written", 0),
    ("metadata_written", 0), ("manifest_written", 0), ("renamed", 0),
]  # fmt: skip


@pytest.mark.parametrize(("phase", "victim"), KILLS)
def test_kill_a_rank_in_every_phase(tmp_path: Path, phase: str, victim: int) -> None:
    """The earlier checkpoint stays whole, a partial one is never selected, and the save can be repeated."""
    run_distributed(1, save_steps, directory=tmp_path, steps=[1])
    context = multiprocessing.get_context("forkserver")
    job_store = host_store()
    workers = [
        context.Process(
            target=save_and_die, args=(rank, 2, job_store.port, tmp_path, phase, victim), daemon=True
        )
        for rank in range(2)
    ]
    for worker in workers:
        worker.start()
    workers[victim].join(LONGEST_SECONDS)
    assert workers[victim].exitcode == -signal.SIGKILL
    for worker in workers:  # what the launcher does with the survivors
        worker.kill()
        worker.join()
    expected = 2 if phase == "renamed" else 1
    run_distributed(2, load_latest, directory=tmp_path, step=expected)
    run_distributed(2, save_steps, directory=tmp_path, steps=[2])
    run_distributed(1, load_latest, directory=tmp_path, step=2)
    assert not list(tmp_path.glob("*.tmp-*"))
