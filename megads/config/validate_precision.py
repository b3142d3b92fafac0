"""Errors of FP8, FP16 and low-precision moments: combinations, shapes, and what each device can do.

What only the GPU itself can tell (its generation) is checked in `mcore.precision`, before the model is built.
"""

from collections.abc import Iterator

from megads.config.resolve import uses_device
from megads.config.schema import FP8, Config
from megads.config.shape import model_shape

# BF16 keeps 8 bits of a number: what changes it by less than half of the last one is rounded away.
_LEAST_BF16_DECAY = 2.0**-8


def precision_problems(config: Config, cuda: bool) -> Iterator[str]:
    """Each problem as one sentence with what to do."""
    training = config.training
    if training.use_fp16 and training.use_bf16:
        yield "training.use_fp16 and training.use_bf16 exclude each other: set use_bf16 to false for FP16"
    fp16 = training.fp16
    if fp16.min_loss_scale > fp16.initial_loss_scale:
        yield (
            f"training.fp16.min_loss_scale = {fp16.min_loss_scale:g} is above initial_loss_scale = "
            f"{fp16.initial_loss_scale:g}: lower it"
        )
    yield from _moments(config)
    if training.use_fp8:
        yield from _fp8(config)
        if uses_device(config, cuda) == "cuda" and config.model.backend != "native":
            yield from _transformer_engine(config)


def _moments(config: Config) -> Iterator[str]:
    training = config.training
    if training.optimizer == "sgd":
        return
    for name, dtype, beta_name, beta in (
        ("adam_exp_avg_dtype", training.adam_exp_avg_dtype, "adam_beta1", training.adam_beta1),
        ("adam_exp_avg_sq_dtype", training.adam_exp_avg_sq_dtype, "adam_beta2", training.adam_beta2),
    ):
        if dtype == "bf16" and 1 - beta < _LEAST_BF16_DECAY:
            yield (
                f"training.{name} = bf16 with {beta_name} = {beta}: a step changes the moment by "
                f"{1 - beta:.2g} of its value, which BF16 rounds away, so it would never fall again: set "
                f"{beta_name} to {1 - _LEAST_BF16_DECAY:.3f} or less (DeepSeek-V3: 0.9 and 0.95), or the "
                "dtype to fp32"
            )


def _fp8(config: Config) -> Iterator[str]:
    """What holds for emulated FP8 too, so that a configuration debugged on a CPU runs on a GPU."""
    training, fp8 = config.training, config.training.fp8
    if training.use_fp16:
        yield "training.use_fp8 works beside BF16, not FP16: set use_bf16 to true and use_fp16 to false"
    kept = fp8.bf16_first_layers + fp8.bf16_last_layers
    layers, pp = config.model.num_layers, config.distributed.pipeline_parallel_size
    if kept >= layers and (fp8.bf16_mtp or not training.use_mtp):
        yield (
            f"training.fp8.bf16_first_layers + bf16_last_layers = {kept} of {layers} layers leave none in "
            "FP8: set use_fp8 to false, or keep fewer in BF16"
        )
    elif max(fp8.bf16_first_layers, fp8.bf16_last_layers) > layers // pp:
        yield (
            f"training.fp8.bf16_first_layers = {fp8.bf16_first_layers}, bf16_last_layers = "
            f"{fp8.bf16_last_layers}: Megatron-Core allows up to num_layers / pipeline_parallel_size = "
            f"{layers // pp} each"
        )
    if fp8.recipe == "delayed":
        yield from _delayed(config, kept)
    if fp8.param_gather:
        yield from _parameter_gather(config, fp8)


def _delayed(config: Config, kept_in_bf16: int) -> Iterator[str]:
    if kept_in_bf16:
        yield (
            'training.fp8.recipe = "delayed" updates its scales over all layers at once, so '
            "bf16_first_layers and bf16_last_layers cannot act: set them to 0, or take another recipe"
        )
    if config.training.gradient_checkpointing == "selective":
        yield (
            'training.fp8.recipe = "delayed" does not work with gradient_checkpointing = "selective" '
            '(Megatron-Core has no scales for what is recomputed): use "full", or another recipe'
        )


def _parameter_gather(config: Config, fp8: FP8) -> Iterator[str]:
    if config.distributed.zero_stage != 1:
        yield (
            "training.fp8.param_gather is of the sharded optimizer, which keeps the FP32 weights: set "
            f"distributed.zero_stage to 1 (it is {config.distributed.zero_stage}), or param_gather to false"
        )
    if fp8.recipe == "mxfp8":
        yield (
            'training.fp8.param_gather does not work with recipe = "mxfp8": set it to false, or the recipe '
            'to "blockwise" or "tensorwise"'
        )
    if config.training.average_decay is not None:
        yield (
            "training.average_decay averages the weights as the model has them, and with "
            "training.fp8.param_gather those are rounded to FP8: set one of them off"
        )


def _transformer_engine(config: Config) -> Iterator[str]:
    """Products of Transformer Engine: their operands' types and sizes."""
    training, distributed = config.training, config.distributed
    if not (training.use_bf16 or training.use_fp16):
        yield (
            "training.use_fp8 on CUDA works beside BF16: set use_bf16 to true, or model.backend to "
            '"native", which emulates FP8 in FP32'
        )
    multiple = 32 if training.fp8.recipe == "mxfp8" else 16
    for name, size in _product_sizes(config).items():
        if size % multiple:
            yield (
                f"{name} = {size} on each rank is no multiple of {multiple}, which FP8 products need: change "
                "the size or the layout, or set training.use_fp8 to false"
            )
    split = distributed.context_parallel_size
    if distributed.sequence_parallel is not False:
        split *= distributed.tensor_parallel_size
    tokens = training.micro_batch_size * training.seq_length // split
    if tokens % multiple:
        yield (
            f"micro_batch_size x seq_length = {tokens} tokens on each rank are no multiple of {multiple}, "
            "which FP8 products need: change one of them or the layout"
        )


def _product_sizes(config: Config) -> dict[str, int]:
    """Widths of the operands on a rank."""
    mla, moe, shape = config.model.mla, config.model.moe, model_shape(config)
    tp, etp = config.distributed.tensor_parallel_size, config.distributed.expert_tensor_parallel_size
    heads = mla.num_heads // tp
    sizes = {
        "model.mla.d_model": mla.d_model,
        "model.mla.d_latent": mla.d_latent,
        "model.mla.d_latent + qk_rope_head_dim": mla.d_latent + shape.qk_rope_head_dim,
        "num_heads x (qk_nope_head_dim + qk_rope_head_dim)": heads
        * (shape.qk_nope_head_dim + shape.qk_rope_head_dim),
        "num_heads x (qk_nope_head_dim + v_head_dim)": heads * (shape.qk_nope_head_dim + shape.v_head_dim),
        "num_heads x v_head_dim": heads * shape.v_head_dim,
    }
    if mla.q_lora_rank is not None:
        sizes["model.mla.q_lora_rank"] = mla.q_lora_rank
    if not all(shape.is_moe):
        sizes["model.intermediate_size"] = shape.intermediate_size // tp
    if any(shape.is_moe):
        sizes["model.moe.expert_intermediate_size"] = moe.expert_intermediate_size // etp
        if shape.shared_intermediate_size:
            sizes["the width of the shared experts"] = shape.shared_intermediate_size // tp
    return sizes


def inert_precision(config: Config) -> Iterator[tuple[list[str], str]]:
    """Settings of what is switched off, and why they do nothing."""
    training, fp8 = config.training, config.training.fp8
    if training.optimizer == "sgd":
        yield ["training.adam_exp_avg_dtype", "training.adam_exp_avg_sq_dtype"], "the optimizer is sgd"
    dynamic = ("initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis")
    if not training.use_fp16:
        yield [f"training.fp16.{name}" for name in ("loss_scale", *dynamic)], "training.use_fp16 is false"
    elif training.fp16.loss_scale is not None:
        yield [f"training.fp16.{name}" for name in dynamic], "training.fp16.loss_scale fixes the scale"
    if not training.use_fp8:
        yield [f"training.fp8.{name}" for name in type(fp8).model_fields], "training.use_fp8 is false"
        return
    if fp8.recipe != "delayed":
        yield (
            ["training.fp8.amax_history_len", "training.fp8.amax_compute_algo"],
            f"training.fp8.recipe is {fp8.recipe}",
        )
    if not training.use_mtp:
        yield ["training.fp8.bf16_mtp"], "training.use_mtp is false"
