"""DeepSpeed's settings in Megatron-Core's terms: an enabled block must say the same as the rest.

The values of `distributed.deepspeed` (and of the JSON file it names) are compared with the settings
that act here; a contradiction, an unknown key and a feature without a counterpart are problems. What
only tunes DeepSpeed's own buffers has no meaning under Megatron-Core and is reported as a note.
"""

from difflib import get_close_matches
from pathlib import Path
from typing import Any

from megads.config.jsonc import parse_jsonc
from megads.config.schema import Config
from megads.errors import ConfigError

BLOCK = "distributed.deepspeed"

# DeepSpeed's keys that we compare, and those that only tune its buffers and communication.
_COMPARED = {
    "fp16.enabled", "bf16.enabled", "zero_optimization.stage", "zero_optimization.overlap_comm",
    "zero_optimization.offload_optimizer.device", "zero_optimization.offload_param.device",
    "gradient_accumulation_steps", "gradient_clipping", "train_batch_size",
    "train_micro_batch_size_per_gpu",
}  # fmt: skip
_TUNING = {
    "zero_optimization.contiguous_gradients", "zero_optimization.reduce_bucket_size",
    "zero_optimization.allgather_bucket_size", "zero_optimization.reduce_scatter",
    "zero_optimization.allgather_partitions", "zero_optimization.round_robin_gradients",
    "zero_optimization.offload_optimizer.pin_memory", "zero_optimization.offload_param.pin_memory",
    "fp16.loss_scale", "fp16.loss_scale_window", "fp16.initial_scale_power", "fp16.hysteresis",
    "fp16.min_loss_scale", "steps_per_print", "wall_clock_breakdown",
}  # fmt: skip


def deepspeed_problems(config: Config, accumulation_steps: int | None) -> tuple[list[str], list[str]]:
    """(problems, notes) of an enabled block; `accumulation_steps`: those of this run, if known."""
    if not config.distributed.deepspeed.enabled:
        return [], []
    try:
        given = _given(config)
    except ConfigError as error:
        return [str(error)], []
    expected = _expected(config, accumulation_steps)
    problems = []
    for key, (value, where) in given.items():
        if key in expected and value != "auto" and value != expected[key][0]:
            ours, name = expected[key]
            problems.append(f"{where}.{key} is {value!r}, but {name} is {ours!r}: make them agree")
        elif key not in _COMPARED | _TUNING:
            close = get_close_matches(key, sorted(_COMPARED | _TUNING), 1)
            hint = f"did you mean {close[0]}?" if close else "remove it, Megatron-Core has nothing like it"
            problems.append(f"{where}.{key}: not a DeepSpeed setting that can act here; {hint}")
    tuning = [key for key in given if key in _TUNING]
    notes = [f"{BLOCK}: {', '.join(tuning)} tune DeepSpeed's own code; Megatron-Core has its own rules"]
    return problems, notes if tuning else []


def _expected(config: Config, accumulation_steps: int | None) -> dict[str, tuple[Any, str]]:
    """What each compared key must be: (value, the setting of ours that says so)."""
    training, distributed = config.training, config.distributed
    offload = "cpu" if distributed.zero_offload else "none"
    overlap = distributed.overlap_grad_reduce
    expected = {
        "fp16.enabled": (training.use_fp16, "training.use_fp16"),
        "bf16.enabled": (training.use_bf16, "training.use_bf16"),
        "zero_optimization.stage": (distributed.zero_stage, "distributed.zero_stage"),
        "zero_optimization.overlap_comm": (overlap, "distributed.overlap_grad_reduce"),
        "zero_optimization.offload_optimizer.device": (offload, "distributed.zero_offload"),
        "zero_optimization.offload_param.device": ("none", "parameter offload (not offered)"),
        "gradient_clipping": (training.grad_clip, "training.grad_clip"),
        "train_batch_size": (training.global_batch_size, "training.global_batch_size"),
        "train_micro_batch_size_per_gpu": (training.micro_batch_size, "training.micro_batch_size"),
    }
    if accumulation_steps is not None:
        why = "what global_batch_size / (micro_batch_size x data parallelism) gives"
        expected["gradient_accumulation_steps"] = (accumulation_steps, why)
    return expected


def _given(config: Config) -> dict[str, tuple[Any, str]]:
    """Dotted DeepSpeed key to (value, where): of the file first, then of the block."""
    block = config.distributed.deepspeed
    given: dict[str, tuple[Any, str]] = {}
    if block.config_file is not None:
        given |= _flat(_read(Path(block.config_file)), block.config_file)
    inline = block.model_dump(exclude={"enabled", "config_file"}, exclude_none=True)
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
