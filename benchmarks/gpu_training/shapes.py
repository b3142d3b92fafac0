"""What is trained: slices of published models that one GPU holds with gradients and optimizer.

A slice keeps every width of its model: hidden size, heads, MLA's ranks and head widths, expert width, experts
per token, router and balancing. What is cut:
- layers, to as many as the planner (`megads/plan`) says will fit;
- the vocabulary, in proportion to the layers, so that output head and loss weigh what they weigh in the whole
  model: a large matrix product less diluted than there would flatter the utilization;
- in V3 the experts, 256 to 32 (four to a group, so that group-limited routing still chooses), and its three
  dense layers: 58 of its 61 layers are MoE, and so are all of the slice.
MTP is off for all contenders. Adam's moments are BF16, as in DeepSeek-V3 (section 3.3.3).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megads.config.flops import count_parameters
from megads.config.loader import load_config
from megads.config.resolve import Resolved, resolve
from megads.config.schema import Config
from megads.config.validate import check
from megads.errors import ConfigError
from megads.plan.memory import StageBytes, memory_by_stage

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
# Of a device's memory: the rest is for what the planner does not know, another library's workspaces first.
USABLE_SHARE = 0.93
VOCABULARY_MULTIPLE = 1024
# Transformer Engine keeps a weight of an FP8 product in FP8 too, and once more transposed.
FP8_COPIES_BYTES = 2

Overrides = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """A model and how it is cut. `layers` None: as many as fit; `changes` are further settings."""

    config: str
    about: str
    layers: int | None
    micro_batch_size: int
    seq_length: int
    changes: Overrides


SHAPES = {
    "v3": Shape(
        "deepseek_v3_671b.json",
        "DeepSeek-V3 at its widths: MoE layers of 32 of the 256 experts",
        None,
        2,
        4096,
        {"model.moe.num_experts": 32, "model.first_k_dense_replace": 0},
    ),
    "v2-lite": Shape(
        "deepseek_v2_lite.json", "DeepSeek-V2-Lite with fewer layers, all 64 experts", None, 2, 4096, {}
    ),
    "moonlight": Shape(
        "moonlight_16b_a3b.json", "Moonlight-16B-A3B with fewer layers, all 64 experts", None, 1, 8192, {}
    ),
    "tiny": Shape(
        "debug.json",
        "configs/debug.json, to try the benchmark itself",
        4,
        2,
        128,
        {"model.vocab_size": 1024, "model.moe.use_aux_loss_free": True},
    ),
}

PRECISIONS: dict[str, Overrides] = {
    "fp32": {"training.use_bf16": False},
    "bf16": {},
    "fp8": {"training.use_fp8": True},
}

ONE_PROCESS: Overrides = {
    "distributed.launcher": "torchrun",
    "distributed.slurm.enabled": False,
    "distributed.pipeline_parallel_size": 1,
    "distributed.pipeline_layout": None,
    "distributed.expert_parallel_size": 1,
    "distributed.zero_stage": 1,
    "data.sources": [{"name": "random", "path": "random"}],
}
TRAINING: Overrides = {
    "model.mla.use_flash_mla": True,
    "training.use_mtp": False,
    "training.gradient_checkpointing": "selective",
    "training.adam_exp_avg_dtype": "bf16",
    "training.adam_exp_avg_sq_dtype": "bf16",
    "training.adam_beta2": 0.95,
    "training.batch_size_rampup_start": None,
    "training.batch_size_rampup_tokens": 0,
    "training.total_training_tokens": None,
    "training.train_steps": 100,
    "training.learning_rate": 2e-4,
    "training.lr_decay_style": "constant",
    "training.lr_warmup_steps": 0,
    "training.lr_phases": [],
    "training.mtp_loss_weight_phases": [],
    "model.moe.bias_update_rate_phases": [],
}


def slice_config(
    shape: Shape, precision: str, device: str, memory_bytes: int, micro_batches: int, changes: Overrides
) -> Config:
    """The configuration of a slice; the same layers in every precision, so that precisions can be compared.

    `micro_batches` are those of an optimizer step; `changes` are the user's, and win.

    Raises:
        ConfigError: not even one layer fits, or the settings cannot run.
    """
    given = changes.get("model.num_layers", shape.layers)
    if given is not None:
        return _checked(_config(shape, given, precision, device, micro_batches, changes))
    whole, fitting = load_config(CONFIGS / shape.config).model.num_layers, 0
    for layers in range(1, whole + 1):
        config = _config(shape, layers, "bf16", device, micro_batches, changes)
        if planned_bytes(config).total + fp8_copies_bytes(config) > USABLE_SHARE * memory_bytes:
            break
        fitting = layers
    if not fitting:
        raise ConfigError(
            f"not even one layer of {shape.config} fits into {memory_bytes / 2**30:.0f} GiB: choose another "
            "--shape, or make it smaller (--model.moe.num_experts 16)"
        )
    return _checked(_config(shape, fitting, precision, device, micro_batches, changes))


def _checked(config: Config) -> Config:
    check(config, 1, config.distributed.device == "cuda")
    return config


def _config(
    shape: Shape, layers: int, precision: str, device: str, micro_batches: int, changes: Overrides
) -> Config:
    whole = load_config(CONFIGS / shape.config).model
    rows = whole.vocab_size * layers // whole.num_layers // VOCABULARY_MULTIPLE * VOCABULARY_MULTIPLE
    return load_config(
        CONFIGS / shape.config,
        ONE_PROCESS
        | TRAINING
        | {
            "model.num_layers": layers,
            "model.vocab_size": max(rows, VOCABULARY_MULTIPLE),
            "model.mla.max_context_length": shape.seq_length,
            "distributed.device": device,
            "training.seq_length": shape.seq_length,
            "training.micro_batch_size": shape.micro_batch_size,
            "training.global_batch_size": shape.micro_batch_size * micro_batches,
        }
        | shape.changes
        | PRECISIONS[precision]
        | changes,
    )


def resolved_on(config: Config) -> Resolved:
    """One process on the configuration's device."""
    return resolve(config, 1, config.distributed.device == "cuda")


def planned_bytes(config: Config) -> StageBytes:
    """What the planner says that the one process needs."""
    return memory_by_stage(config, resolved_on(config))[0]


def fp8_copies_bytes(config: Config) -> int:
    """Of the weights, which the planner leaves out; a little too much, since not every weight has them."""
    return FP8_COPIES_BYTES * count_parameters(config).total


def planned_tensor_bytes(config: Config) -> int:
    """What CUDA's allocator should hand out: without the runtime's own memory and without margins."""
    planned = planned_bytes(config)
    copies = fp8_copies_bytes(config) if config.training.use_fp8 else 0
    return planned.total - planned.runtime - planned.margin + copies
