"""What follows from the configuration and the machine: layout, precision, length of the run.

The configuration itself is never changed. Call `validate.check` first: `resolve` takes it for granted
that everything divides.
"""

import math
import os
from dataclasses import dataclass, replace
from typing import Literal

from megads.config.balance import balanced_layout
from megads.config.flops import count_parameters
from megads.config.schedule import BatchSchedule
from megads.config.schema import Config, Slurm, Training
from megads.config.shape import ModelShape, model_shape

__all__ = [
    "ModelShape", "Resolved", "batch_schedule", "checkpoint_directory", "model_shape", "pipeline_layout",
    "planned_hardware", "resolve", "run_length",
]  # fmt: skip


@dataclass(frozen=True)
class Resolved:
    """Derived values of one run. Parallel sizes are numbers of processes.

    `pipeline_layout` holds the decoder layers of each virtual stage in order of execution (stage 0 of
    every rank, then stage 1, ...). `edp` is the data parallelism of experts: world / (PP x EP x ETP).
    `total_tokens` is the length of the schedules; the last of the `train_steps` may pass it.
    """

    shape: ModelShape
    world_size: int
    tp: int
    pp: int
    vpp: int | None
    ep: int
    etp: int
    cp: int
    dp: int
    edp: int
    pipeline_layout: tuple[int, ...]
    sequence_parallel: bool
    device: Literal["cpu", "cuda"]
    backend: Literal["gloo", "nccl"]
    precision: Literal["fp32", "bf16", "fp16"]
    batch: BatchSchedule
    total_tokens: int
    train_steps: int
    checkpoint_dir: str
    tensorboard_dir: str

    def going_on(self, step: int, tokens: int) -> "Resolved":
        """The same for a run that goes on after `step` with `tokens` consumed.

        It ends at the same number of tokens: at another step, where batches had another size before.
        """
        return replace(self, train_steps=step + self.batch.steps_for(self.total_tokens, tokens))


def resolve(config: Config, world_size: int, cuda: bool) -> Resolved:
    """The derived values for `world_size` processes on a machine with CUDA or without."""
    distributed, training = config.distributed, config.training
    tp, pp = distributed.tensor_parallel_size, distributed.pipeline_parallel_size
    cp, ep, etp = (
        distributed.context_parallel_size,
        distributed.expert_parallel_size,
        distributed.expert_tensor_parallel_size,
    )
    device = uses_device(config, cuda)
    sequence_parallel = distributed.sequence_parallel if distributed.sequence_parallel is not None else True
    total_tokens, train_steps = run_length(config)
    return Resolved(
        shape=model_shape(config),
        world_size=world_size,
        tp=tp,
        pp=pp,
        vpp=distributed.virtual_pipeline_parallel_size,
        ep=ep,
        etp=etp,
        cp=cp,
        dp=world_size // (tp * pp * cp),
        edp=world_size // (pp * ep * etp),
        pipeline_layout=pipeline_layout(config),
        sequence_parallel=sequence_parallel and tp > 1,
        device=device,
        backend="nccl" if device == "cuda" else "gloo",
        precision=_precision(training, device),
        batch=batch_schedule(training),
        total_tokens=total_tokens,
        train_steps=train_steps,
        checkpoint_dir=checkpoint_directory(config),
        tensorboard_dir=config.logging.tensorboard.log_dir or os.path.join(config.output_dir, "tensorboard"),
    )


def checkpoint_directory(config: Config) -> str:
    """Where the run's checkpoints lie."""
    return config.checkpointing.save_dir or os.path.join(config.output_dir, "checkpoints")


def uses_device(config: Config, cuda: bool) -> Literal["cpu", "cuda"]:
    """The device of the run: what is asked for, else CUDA where it is."""
    if config.distributed.device == "auto":
        return "cuda" if cuda else "cpu"
    return config.distributed.device


def _precision(training: Training, device: str) -> Literal["fp32", "bf16", "fp16"]:
    # BF16 products on a CPU without AVX512-BF16 or AMX are two orders of magnitude slower than FP32.
    if device == "cpu":
        return "fp32"
    if training.use_fp16:
        return "fp16"
    return "bf16" if training.use_bf16 else "fp32"


def batch_schedule(training: Training) -> BatchSchedule:
    """The batch size over the run. Raises ValueError for a ramp that cannot be."""
    return BatchSchedule(
        final=training.global_batch_size,
        start=training.batch_size_rampup_start,
        ramp_tokens=training.batch_size_rampup_tokens,
        seq_length=training.seq_length,
    )


def run_length(config: Config) -> tuple[int, int]:
    """(total_tokens, train_steps): from tokens, else from steps, else tokens per active parameter."""
    training = config.training
    batch = batch_schedule(training)
    if training.total_training_tokens is None and training.train_steps is not None:
        return batch.tokens_after(training.train_steps), training.train_steps
    tokens = training.total_training_tokens
    if tokens is None:
        tokens = round(training.tokens_per_parameter_ratio * count_parameters(config).active)
    return tokens, batch.steps_for(tokens)


def pipeline_layout(config: Config) -> tuple[int, ...]:
    """Decoder layers of each virtual stage: as given, balanced by FLOPs, else as even as can be.

    A remainder goes to the stages in the middle, since the first also has the embedding and the last
    the output head and MTP; `validate.check` lets no remainder pass that the user has not written down.
    """
    distributed = config.distributed
    if isinstance(distributed.pipeline_layout, tuple):
        return distributed.pipeline_layout
    stages = distributed.pipeline_parallel_size * (distributed.virtual_pipeline_parallel_size or 1)
    if distributed.pipeline_layout == "balanced":
        balanced = balanced_layout(config, stages, count_parameters(config))
        if balanced is not None:  # else validate.check refuses it
            return balanced
    even, remainder = divmod(config.model.num_layers, stages)
    lighter_last = sorted(range(stages), key=lambda stage: (stage == stages - 1, stage == 0))
    heavier = set(lighter_last[:remainder])
    return tuple(even + (stage in heavier) for stage in range(stages))


def slurm_processes_per_node(slurm: Slurm) -> int:
    """Processes of a SLURM job on each node: one per GPU, without GPUs one per task."""
    return slurm.gpus_per_node or slurm.ntasks_per_node


def planned_hardware(config: Config, world_size: int | None = None) -> tuple[int, bool]:
    """(world_size, cuda) that a run of `config` is meant for, guessed without touching a device.

    For plans and dry runs: the SLURM block where it is enabled, else the smallest number of processes
    that holds the layout; CUDA where a driver is loaded, or where the configuration asks for GPUs.
    """
    distributed, slurm = config.distributed, config.distributed.slurm
    replica = distributed.tensor_parallel_size * distributed.context_parallel_size
    experts = distributed.expert_parallel_size * distributed.expert_tensor_parallel_size
    if world_size is None and slurm.enabled:
        world_size = slurm.nodes * slurm_processes_per_node(slurm)
    if world_size is None and distributed.data_parallel_size > 0:
        world_size = replica * distributed.pipeline_parallel_size * distributed.data_parallel_size
    if world_size is None:
        world_size = distributed.pipeline_parallel_size * math.lcm(replica, experts)
    asks_for_gpus = distributed.device == "cuda" or (slurm.enabled and slurm.gpus_per_node > 0)
    cuda = asks_for_gpus or os.path.exists("/dev/nvidiactl")
    return world_size, cuda and distributed.device != "cpu"
