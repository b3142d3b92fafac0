"""Which field of the records is drawn where. A field that no panel names is drawn in the group "Other"."""

from dataclasses import dataclass
from typing import Literal

GIB = 2.0**30
TERA = 1e12


@dataclass(frozen=True)
class Panel:
    """A chart of some fields of training or validation records; without any of them there is no chart."""

    title: str
    fields: tuple[str, ...]
    """Names, and patterns of names as `fnmatch` has them."""
    unit: str = ""
    about: str = ""
    style: Literal["noisy", "exact", "stacked", "points"] = "noisy"
    """noisy: smoothed, values in the background; exact: as they are; stacked: parts of a whole."""
    table: Literal["train", "validation"] = "train"
    per_unit: float = 1.0
    """Values are divided by this, to be in `unit`."""
    percent: bool = False


@dataclass(frozen=True)
class HeatPanel:
    """A map of a field that has a value per MoE layer."""

    title: str
    about: str = ""
    from_zero: bool = True


GROUPS: dict[str, tuple[Panel, ...]] = {
    "Loss": (
        Panel(
            "Validation perplexity", ("perplexity",), about="exp(validation loss)",
            style="points", table="validation",
        ),
        Panel("Multi-token prediction loss", ("mtp_loss", "mtp_loss_[0-9]*"), "nats per token"),
        Panel("Auxiliary loss", ("aux_loss",), about="Of the sequence-wise balance of experts"),
        Panel("Training loss by source", ("loss/*",), "nats per token"),
        Panel("Validation loss by source", ("loss/*",), "nats per token", style="points", table="validation"),
        Panel(
            "Loss of the averaged weights", ("average_loss",), "nats per token",
            style="points", table="validation",
        ),
    ),
    "Schedules": (
        Panel("Learning rate", ("learning_rate",), style="exact"),
        Panel("Batch size", ("batch_size",), "sequences", style="exact"),
        Panel("Sequence length", ("seq_length",), "tokens", style="exact"),
        Panel("MTP loss weight", ("mtp_loss_weight",), style="exact"),
        Panel("Bias update rate", ("bias_update_rate",), style="exact"),
        Panel("Auxiliary loss weight", ("aux_loss_weight",), style="exact"),
        Panel("Router temperature", ("router_temperature",), style="exact"),
        Panel("Router noise", ("router_noise_std",), "standard deviation", style="exact"),
        Panel("Weight decay", ("weight_decay",), style="exact"),
    ),
    "Optimization": (
        Panel("Gradient norm", ("grad_norm",), about="Before clipping; the mean of each log interval"),
        Panel("Parameter norm", ("param_norm",), style="exact"),
        Panel("Skipped steps", ("skipped_steps",), about="So far", style="exact"),
    ),
    "Throughput": (
        Panel("Tokens per second", ("tokens_per_second",), "tokens/s"),
        Panel("Tokens per second and device", ("tokens_per_second_per_device",), "tokens/s"),
        Panel(
            "Model FLOP/s of the job", ("model_flops_per_second",), "TFLOP/s", per_unit=TERA,
            about="Forward and backward, recomputation not counted",
        ),
        Panel("Model FLOP/s per device", ("tflops_per_device",), "TFLOP/s"),
        Panel("Model FLOPs utilization", ("mfu",), "MFU", percent=True),
        Panel("Step time", ("step_seconds",), "s"),
        Panel(
            "Step time by phase", ("seconds/data", "seconds/forward_backward", "seconds/optimizer"), "s",
            about="Means per step", style="stacked",
        ),
        Panel(
            "Time outside of steps", ("seconds/*",), "s", about="Total of each log interval", style="exact",
        ),
        Panel("Peak memory", ("peak_memory_bytes",), "GiB", per_unit=GIB, style="exact"),
        Panel("Share of memory in use", ("memory_share",), percent=True, style="exact"),
        Panel(
            "Time of the jobs", ("job_seconds",), "h", per_unit=3600.0, style="exact",
            about="So far, with start, evaluation and saves",
        ),
        Panel("Cost", ("cost",), about="So far, at the prices of the budget", style="exact"),
    ),
    "Experts": (
        Panel(
            "Load violation (MaxVio)", ("max_vio",),
            about="Largest load of an expert over the mean load, minus 1; mean over layers. 0 is even",
        ),
        Panel("Dead experts", ("dead_experts",), "experts", about="Without a token in the log interval",
              style="exact"),
        Panel("Router entropy", ("router_entropy",), about="Over ln(experts): 1 is even"),
        Panel("Range of the expert bias", ("bias_range",), about="Largest of all layers", style="exact"),
    ),
    "Data": (
        Panel("Mix really seen", ("share/*",), about="Share of sequences since the start", style="stacked",
              percent=True),
        Panel("Tokens per document", ("tokens_per_document",), "tokens"),
        Panel("Fill-in-the-middle rate", ("fim_rate",), "of documents", percent=True),
    ),
}  # fmt: skip

HEAT_GROUP = "Experts"
HEAT: dict[str, HeatPanel] = {
    "max_vio_by_layer": HeatPanel("Load violation (MaxVio) by layer", "0 is even"),
    "dead_experts_by_layer": HeatPanel("Dead experts by layer", "Mean number"),
    "router_entropy_by_layer": HeatPanel(
        "Router entropy by layer", "Over ln(experts): 1 is even", from_zero=False
    ),
    "bias_range_by_layer": HeatPanel("Range of the expert bias by layer"),
}

ALWAYS_DRAWN = {"learning_rate", "batch_size"}
"""Exact values that never change are listed, not drawn, but for these."""

SHOWN_ELSEWHERE = {
    "train": {
        "lm_loss", "step", "tokens", "samples", "interval_steps", "wall_seconds", "total_flops",
        "seconds_left",
    },
    "validation": {"loss", "step", "tokens"},
}  # fmt: skip
"""In the first chart, on an axis, or in the header."""
