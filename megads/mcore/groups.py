"""Process groups: made at the start of a run, handed to everything that communicates, undone at its end."""

import datetime
import gc
import json
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from megads import errors
from megads.config.resolve import Resolved
from megads.errors import EnvironmentSetupError, MegadsError
from megads.mcore.compat import check_megatron_version, quiet_megatron
from megads.mcore.imports import import_megatron
from megads.ports import free_port

_store: Store | None = None
_groups_made = _decisions_made = 0


def world_size_from_environment() -> int:
    """Processes of this job as torchrun (or srun) announces them; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def initialize_device(device: str, deterministic: bool = False) -> None:
    """Choose this process's GPU, `deterministic` kernels on it, or make Megatron-Core run on the CPU.

    Raises:
        EnvironmentSetupError: Megatron-Core's version, or no such device.
    """
    quiet_megatron()
    check_megatron_version()
    if device == "cpu":
        from megads.mcore.allocator import keep_freed_memory
        from megads.mcore.cpu import install_cpu_substitutions

        keep_freed_memory()
        install_cpu_substitutions()
        return
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= torch.cuda.device_count():
        raise EnvironmentSetupError(
            f"local rank {local_rank} has no GPU: {torch.cuda.device_count()} are visible on this host; "
            "start as many processes per node as it has GPUs"
        )
    torch.cuda.set_device(local_rank)
    if deterministic:
        from megads.mcore.determinism import make_deterministic

        make_deterministic()
    import_megatron()


def initialize_process_groups(resolved: Resolved, timeout_minutes: float, seed: int) -> None:
    """Join the job, build Megatron-Core's parallel groups, seed every generator.

    Can be called again after `destroy_process_groups`, for another layout. Dropout and router noise draw
    from Megatron-Core's RNG tracker; data-parallel ranks get different streams because they see different
    samples.
    """
    global _groups_made
    _groups_made += 1
    timeout = datetime.timedelta(minutes=timeout_minutes)
    dist.init_process_group(
        resolved.backend,
        # A prefix of its own: the store still holds what earlier groups of these processes left in it.
        store=PrefixStore(f"groups-{_groups_made}", _job_store(timeout)),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=timeout,
    )

    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=resolved.tp,
        pipeline_model_parallel_size=resolved.pp,
        virtual_pipeline_model_parallel_size=resolved.vpp,
        context_parallel_size=resolved.cp,
        expert_model_parallel_size=resolved.ep,
        expert_tensor_parallel_size=resolved.etp,
        distributed_timeout_minutes=max(1, round(timeout_minutes)),
    )
    replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    torch.manual_seed(seed + 1000 * replica)
    model_parallel_cuda_manual_seed(seed + 1000 * replica)


def destroy_process_groups() -> None:
    """Undo `initialize_process_groups`, and free what the run leaves on the device; it can be made again."""
    from megatron.core import parallel_state

    from megads.mcore.user_buffers import destroy_user_buffers

    if dist.is_initialized():
        dist.barrier()  # nobody may still be talking to a process that leaves
    destroy_user_buffers()
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()  # modules and their hooks refer to each other in circles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def decided_by_rank_0(decide: Callable[[], Any], timeout_minutes: float) -> Any:
    """What `decide` gives on rank 0 (plain data), or the user's mistake that it finds, on every rank.

    Needs no process groups; all ranks must ask for the same decisions in the same order.
    """
    global _decisions_made
    _decisions_made += 1
    store, key = _job_store(datetime.timedelta(minutes=timeout_minutes)), f"decision-{_decisions_made}"
    if os.environ["RANK"] == "0":
        try:
            outcome = {"decision": decide()}
        except MegadsError as error:
            outcome = {"error": str(error), "type": type(error).__name__}
        store.set(key, json.dumps(outcome))
    outcome = json.loads(store.get(key))
    if "error" in outcome:
        raise getattr(errors, outcome["type"])(outcome["error"])
    return outcome["decision"]


def _job_store(timeout: datetime.timedelta) -> Store:
    """The key-value store of the job, joined once; without a launcher the job is this one process."""
    global _store
    if _store is None:
        for name, value in (("MASTER_ADDR", "127.0.0.1"), ("RANK", "0"), ("WORLD_SIZE", "1")):
            os.environ.setdefault(name, value)
        if "MASTER_PORT" not in os.environ:
            os.environ["MASTER_PORT"] = str(free_port())
        _store, _, _ = next(rendezvous("env://", timeout=timeout))
    return _store
