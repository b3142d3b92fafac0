"""Days, GPU hours and money of a run from its predicted or given efficiency.

On spot machines an interruption costs the work since the last checkpoint, half an interval on average, and
the time to start again; the run is longer by that share.
"""

from dataclasses import dataclass

from megads.plan.hardware import Gpu

SPOT_HOURS_BETWEEN_INTERRUPTIONS = 12.0
RESTART_MINUTES = 15.0


@dataclass(frozen=True)
class Budget:
    """What a run takes, interruptions included; `lost_share` of its time is work done twice or waiting."""

    tokens_per_second_per_gpu: float
    gpu_hours: float
    days: float
    dollars_per_gpu_hour: float
    dollars: float
    gpu_hours_per_trillion_tokens: float
    lost_share: float


@dataclass(frozen=True)
class Interruptions:
    """How often a run is stopped, and what one costs: `lost_hours` of work and waiting."""

    hours_between: float
    lost_hours: float

    @property
    def lost_share(self) -> float:
        """Share of the time on machines; 1: no progress at all."""
        return min(self.lost_hours / self.hours_between, 1.0)

    @classmethod
    def on_spot(cls, step_seconds: float, save_interval_steps: int, hours_between: float) -> "Interruptions":
        """Half a checkpoint interval and a restart for each; without checkpoints half of all work."""
        interval_hours = step_seconds * save_interval_steps / 3600 or hours_between
        return cls(hours_between, interval_hours / 2 + RESTART_MINUTES / 60)


def budget(
    tokens: int,
    gpus: int,
    tokens_per_second_per_gpu: float,
    dollars_per_gpu_hour: float,
    interruptions: Interruptions | None = None,
) -> Budget:
    """The whole run on `gpus` GPUs; infinite where interruptions leave no progress."""
    lost = interruptions.lost_share if interruptions else 0.0
    useful = tokens_per_second_per_gpu * (1 - lost)
    hours = tokens / useful / 3600 if useful else float("inf")
    return Budget(
        tokens_per_second_per_gpu=tokens_per_second_per_gpu,
        gpu_hours=hours,
        days=hours / gpus / 24,
        dollars_per_gpu_hour=dollars_per_gpu_hour,
        dollars=hours * dollars_per_gpu_hour,
        gpu_hours_per_trillion_tokens=hours / tokens * 1e12,
        lost_share=lost,
    )


def tokens_per_second_at(mfu: float, gpu: Gpu, training_flops_per_token: float) -> float:
    """Tokens per second of one GPU at an efficiency: a share of its dense BF16 peak."""
    return mfu * gpu.bf16_flops_per_second / training_flops_per_token
