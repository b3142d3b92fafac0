"""DeepSpeed's settings in Megatron-Core's terms.

What an enabled `distributed.deepspeed` block (and the JSON file it names) says becomes the value of the
setting that acts here, unless that is given too. Then both must agree: a contradiction, an unknown key and
a feature without a counterpart are problems, each with the setting that is nearest. What only tunes
DeepSpeed's own buffers has no meaning under Megatron-Core and is reported as a note. Names:
https://www.deepspeed.ai/docs/config-json/.
"""

import math
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from megads.config.jsonc import parse_jsonc
from megads.config.schema import Config
from megads.config.tree import leaf_by_path
from megads.errors import ConfigError

BLOCK = "distributed.deepspeed"
_FP32_EXPONENTS = 128  # of powers of two that FP32 holds, from 1 on

# DeepSpeed's keys that only tune its buffers and communication.
_TUNING = {
    "zero_optimization.contiguous_gradients", "zero_optimization.reduce_bucket_size",
    "zero_optimization.allgather_bucket_size", "zero_optimization.reduce_scatter",
    "zero_optimization.allgather_partitions", "zero_optimization.round_robin_gradients",
    "zero_optimization.offload_optimizer.pin_memory", "zero_optimization.offload_param.pin_memory",
    "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "prescale_gradients",
    "gradient_predivide_factor", "communication_data_type", "optimizer.params.torch_adam",
    "steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state",
}  # fmt: skip
# Features that are something else here, by the first words of their keys.
_NEAREST = {
    "scheduler": "the schedule is training.lr_decay_style, learning_rate, min_learning_rate, lr_warmup_steps",
    "optimizer": "the optimizer is training.optimizer, with learning_rate, weight_decay and adam_*",
    "amp": "training.use_bf16 = true is mixed precision",
    "zero_optimization.stage3": "distributed.zero_stage = 3 gathers a layer ahead and has nothing to set",
    "zero_optimization.offload": "distributed.zero_offload keeps Adam's moments in host memory",
    "activation_checkpointing": "training.gradient_checkpointing recomputes activations",
    "flops_profiler": "logging.profile traces steps, and metrics.jsonl has FLOPs and MFU",
    "tensorboard": "logging.tensorboard writes event files",
    "wandb": "logging.wandb",
    "csv_monitor": "metrics.jsonl has every metric",
    "curriculum_learning": "training.seq_length_phases is a curriculum of sequence lengths",
    "data_efficiency": "training.seq_length_phases and data.phases change data over the run",
    "elasticity": "a checkpoint loads in any layout: start again with another number of processes",
    "sparse_attention": "model.mla.sliding_window limits attention",
    "checkpoint": "the settings of checkpointing",
    "aio": "nothing is offloaded to disks; distributed.zero_offload keeps Adam's moments in host memory",
}


def translated(block: Any) -> dict[str, tuple[Any, str]]:
    """Dotted setting of ours to (value, where it is from), of a block as it stands in a file.

    Empty where it is not enabled. Mistakes in it are left to `deepspeed_problems`.
    """
    if not isinstance(block, dict) or block.get("enabled") is not True:
        return {}
    try:
        file = block.get("config_file")
        given = _given(file if isinstance(file, str) else None, block)
    except ConfigError:
        return {}
    counterparts = _counterparts(Config(), None)
    found: dict[str, tuple[Any, str]] = {}
    for key, (value, where) in given.items():
        path = counterparts[key][0] if key in counterparts and value != "auto" else ""
        origin = f"{where}.{key}"
        if key == "optimizer.params.betas" and isinstance(value, list) and len(value) == 2:
            found["training.adam_beta1"], found["training.adam_beta2"] = ((v, origin) for v in value)
        elif key == "zero_optimization.offload_optimizer.device":
            found[path] = (value != "none", origin)
        elif key == "fp16.initial_scale_power" and isinstance(value, int) and 0 <= value < _FP32_EXPONENTS:
            found["training.fp16.initial_loss_scale"] = (2.0**value, origin)
        elif key == "fp16.loss_scale" and value == 0:
            found[path] = (None, origin)
        elif path in leaf_by_path():
            found[path] = (_comparable(value), origin)
    if found.get("training.use_fp16", (False, ""))[0] is True:
        found.setdefault("training.use_bf16", (False, found["training.use_fp16"][1]))
    return found


def deepspeed_problems(config: Config, accumulation_steps: int | None) -> tuple[list[str], list[str]]:
    """(problems, notes) of an enabled block; `accumulation_steps`: those of this run, if known."""
    if not config.distributed.deepspeed.enabled:
        return [], []
    try:
        given = _given_by(config)
    except ConfigError as error:
        return [str(error)], []
    counterparts = _counterparts(config, accumulation_steps)
    problems = []
    for key, (value, where) in given.items():
        if key in counterparts:
            name, ours = counterparts[key]
            if ours is not None and value != "auto" and _comparable(value) != ours:
                problems.append(f"{where}.{key} is {value!r}, but {name} is {ours!r}: make them agree")
        elif key not in _TUNING:
            problems.append(
                f"{where}.{key}: not a DeepSpeed setting that can act here; {_hint(key, counterparts)}"
            )
    tuning = [key for key in given if key in _TUNING]
    notes = [f"{BLOCK}: {', '.join(tuning)} tune DeepSpeed's own code; Megatron-Core has its own rules"]
    return problems, notes if tuning else []


def deepspeed_table(config: Config) -> list[str]:
    """What each setting of an enabled block is here, a line each. Raises ConfigError for a bad file."""
    if not config.distributed.deepspeed.enabled:
        return []
    counterparts = _counterparts(config, None)
    return [
        f"{key} = {value!r}: "
        + (counterparts[key][0] if key in counterparts else "no counterpart, tunes DeepSpeed's own code")
        for key, (value, _) in _given_by(config).items()
    ]


def _hint(key: str, counterparts: dict[str, tuple[str, Any]]) -> str:
    nearest = next((words for start, words in _NEAREST.items() if key.startswith(start)), None)
    if close := get_close_matches(key, sorted(counterparts.keys() | _TUNING), 1, 0.85 if nearest else 0.6):
        return f"did you mean {close[0]}?"
    return f"remove it: {nearest}" if nearest else "remove it, Megatron-Core has nothing like it"


def _comparable(value: Any) -> Any:
    """Names of optimizers are compared without case."""
    return value.lower() if isinstance(value, str) else value


def _counterparts(config: Config, accumulation_steps: int | None) -> dict[str, tuple[str, Any]]:
    """DeepSpeed's key to (the setting of ours that says so, its value; None: not known yet)."""
    training, distributed = config.training, config.distributed
    overlap, fp16 = distributed.overlap_grad_reduce, training.fp16
    betas = [training.adam_beta1, training.adam_beta2]
    return {
        "fp16.enabled": ("training.use_fp16", training.use_fp16),
        "fp16.loss_scale": ("training.fp16.loss_scale", fp16.loss_scale or 0),  # 0: dynamic
        "fp16.initial_scale_power": (
            "the power of two of training.fp16.initial_loss_scale", math.log2(fp16.initial_loss_scale),
        ),
        "fp16.loss_scale_window": ("training.fp16.loss_scale_window", fp16.loss_scale_window),
        "fp16.hysteresis": ("training.fp16.hysteresis", fp16.hysteresis),
        "fp16.min_loss_scale": ("training.fp16.min_loss_scale", fp16.min_loss_scale),
        "bf16.enabled": ("training.use_bf16", training.use_bf16),
        "zero_optimization.stage": ("distributed.zero_stage", distributed.zero_stage),
        "zero_optimization.overlap_comm": ("distributed.overlap_grad_reduce", overlap),
        "zero_optimization.offload_optimizer.device": (
            "distributed.zero_offload", "cpu" if distributed.zero_offload else "none",
        ),
        "zero_optimization.offload_optimizer.ratio": (
            "distributed.zero_offload_fraction", distributed.zero_offload_fraction,
        ),
        "zero_optimization.offload_param.device": ("parameter offload (not offered)", "none"),
        "gradient_clipping": ("training.grad_clip", training.grad_clip),
        "train_batch_size": ("training.global_batch_size", training.global_batch_size),
        "train_micro_batch_size_per_gpu": ("training.micro_batch_size", training.micro_batch_size),
        "gradient_accumulation_steps": (
            "what global_batch_size / (micro_batch_size x data parallelism) gives", accumulation_steps,
        ),
        "optimizer.type": ("training.optimizer", training.optimizer),
        "optimizer.params.lr": ("training.learning_rate", training.learning_rate),
        "optimizer.params.weight_decay": ("training.weight_decay", training.weight_decay),
        "optimizer.params.betas": ("training.adam_beta1 and adam_beta2", betas),
        "optimizer.params.eps": ("training.adam_eps", training.adam_eps),
    }  # fmt: skip


def _given_by(config: Config) -> dict[str, tuple[Any, str]]:
    block = config.distributed.deepspeed
    return _given(block.config_file, block.model_dump())


def _given(file: str | None, block: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    """Dotted DeepSpeed key to (value, where): of the file first, then of the block."""
    given: dict[str, tuple[Any, str]] = {}
    if file is not None:
        given |= _flat(_read(Path(file)), file)
    of_deepspeed = {name: value for name, value in block.items() if name not in ("enabled", "config_file")}
    inline = {name: value for name, value in of_deepspeed.items() if value is not None}
    for key, (value, where) in _flat(inline, BLOCK).items():
        if key in given and given[key][0] != value:
            raise ConfigError(
                f"{where}.{key} is {value!r}, but {given[key][0]!r} in {given[key][1]}: keep one of them"
            )
        given[key] = (value, where)
    return given


def _flat(values: dict[str, Any], where: str, prefix: str = "") -> dict[str, tuple[Any, str]]:
    flat: dict[str, tuple[Any, str]] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        flat |= _flat(value, where, f"{key}.") if isinstance(value, dict) else {key: (value, where)}
    return flat


def _read(path: Path) -> dict[str, Any]:
    try:
        content = parse_jsonc(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{BLOCK}.config_file = {str(path)!r} cannot be read ({error}): correct the path, or set it to "
            "null"
        ) from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold one JSON object {{...}}")
    return content
