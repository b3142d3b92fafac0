"""Run a function on several gloo processes and collect what each returns.

The processes are forked from a server that has already imported Megatron-Core, so that a test pays
for its own work and not for imports. They never see a GPU.
"""

import io
import multiprocessing
import os
import queue
import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.distributed import TCPStore

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.dist.preload"])
# How long the others may take to fail too, once one process has failed.
_GRACE_SECONDS = 3.0


def _to_bytes(value: Any) -> bytes:
    """Any picklable value. A queue would hand over tensors as memory that ends with the process, and plain
    pickle takes a millisecond for each."""
    import torch

    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _from_bytes(data: bytes) -> Any:
    import torch

    return torch.load(io.BytesIO(data), weights_only=False)


def host_store() -> "TCPStore":
    """The key-value store of a job, served by this process until it is dropped.

    On a port that the kernel gives as it is listened on: one that was chosen first, for rank 0 to listen on
    later, could go to another test's job meanwhile.
    """
    from torch.distributed import TCPStore

    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def rank_environment(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun would set, whose ranks join a store that is there already, as these do."""
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip


def _worker(rank: int, size: int, port: int, results: Any, released: Any, job: bytes) -> None:
    os.environ |= rank_environment(rank, size, port)
    import torch

    torch.set_num_threads(1)
    try:
        function, kwargs = _from_bytes(job)
        results.put((rank, _to_bytes(function(**kwargs)), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
    # The others may still be talking to this process: it is the peer of a connection.
    released.wait(timeout=600)


def run_distributed(
    size: int, function: Callable[..., Any], timeout_seconds: float = 300.0, **kwargs: Any
) -> list[Any]:
    """`function(**kwargs)` on `size` processes with torchrun's environment: the results by rank.

    The function, its arguments and results are pickled; it makes its own process group. Raises
    AssertionError with every traceback if a process fails, dies or is not done in time.
    """
    results, released = _context.Queue(), _context.Event()
    store, job = host_store(), _to_bytes((function, kwargs))
    workers = [
        _context.Process(target=_worker, args=(rank, size, store.port, results, released, job), daemon=True)
        for rank in range(size)
    ]
    for worker in workers:
        worker.start()
    values: dict[int, Any] = {}
    try:
        values, failures = _collect(results, workers, timeout_seconds)
    finally:
        released.set()
        for worker in workers:
            worker.join(timeout=0.0 if len(values) < size else 10.0)
            worker.kill()
            worker.join()
    assert not failures, "\n".join(f"rank {rank}:\n{failure}" for rank, failure in failures.items())
    return [values[rank] for rank in range(size)]


def _collect(
    results: Any, workers: list[Any], timeout_seconds: float
) -> tuple[dict[int, Any], dict[int, str]]:
    """Results and failures by rank; after the first failure the rest get a short time only."""
    values: dict[int, Any] = {}
    failures: dict[int, str] = {}
    deadline = time.monotonic() + timeout_seconds
    while len(values) + len(failures) < len(workers) and time.monotonic() < deadline:
        try:
            rank, value, failure = results.get(timeout=0.5)
        except queue.Empty:
            open_ranks = set(range(len(workers))) - values.keys() - failures.keys()
            dead = {rank: workers[rank].exitcode for rank in open_ranks if workers[rank].exitcode}
            failures |= {rank: f"died with exit code {code}" for rank, code in dead.items()}
        else:
            if failure is None:
                values[rank] = _from_bytes(value)
            else:
                failures[rank] = failure
        if failures:
            deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
    reason = "stopped, as another process had failed" if failures else f"not done in {timeout_seconds} s"
    failures |= dict.fromkeys(set(range(len(workers))) - values.keys() - failures.keys(), reason)
    return values, failures
