"""Process groups: made once at start, handed to everything that communicates."""

import datetime
import os

import torch
import torch.distributed as dist

from megads.config.resolve import Resolved
from megads.errors import EnvironmentSetupError
from megads.mcore.compat import check_megatron_version, quiet_megatron


def world_size_from_environment() -> int:
    """Processes of this job as torchrun (or srun) announces them; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def initialize_device(device: str) -> None:
    """Choose this process's GPU, or make Megatron-Core run on the CPU.

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


def initialize_process_groups(resolved: Resolved, timeout_minutes: float, seed: int) -> None:
    """Join the job, build Megatron-Core's parallel groups, seed every generator.

    Without a launcher the job is this one process. Dropout and router noise draw from Megatron-Core's
    RNG tracker; data-parallel ranks get different streams because they see different samples.
    """
    for name, value in (("MASTER_ADDR", "127.0.0.1"), ("RANK", "0"), ("WORLD_SIZE", "1")):
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(_free_port())
    timeout = datetime.timedelta(minutes=timeout_minutes)
    dist.init_process_group(resolved.backend, timeout=timeout)

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
    """Leave the job: the end of a run or of a test."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
