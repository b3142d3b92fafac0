"""Disk space of a checkpoint, in closed form."""

from megads.config.flops import count_parameters
from megads.config.schema import Config


def size_text(size_bytes: float) -> str:
    """For people: in GiB, what is less than one in MiB."""
    return f"{size_bytes / 2**30:.1f} GiB" if size_bytes >= 2**30 else f"{size_bytes / 2**20:.1f} MiB"


def checkpoint_bytes(config: Config, precision: str) -> int:
    """About what a checkpoint of a run in `precision` takes: weights, and with the optimizer its moments.

    With them goes an FP32 copy of the weights; the sharded optimizer (`zero_stage` 1 to 3) saves one
    also where the weights are FP32 themselves. Not counted: metadata, about 100 bytes per tensor and rank.
    """
    per_parameter = 4 if precision == "fp32" else 2
    if config.checkpointing.save_optimizer:
        per_parameter += 4 if config.training.optimizer == "sgd" else 8
        per_parameter += 4 if precision != "fp32" or config.distributed.zero_stage > 0 else 0
    if config.training.average_decay is not None:
        per_parameter += 4
    return count_parameters(config).total_with_mtp * per_parameter
