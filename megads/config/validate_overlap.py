"""Errors of overlapping communication with computation: where that cannot work or hides nothing."""

from collections.abc import Iterator

from megads.config.resolve import pipeline_layout, slurm_processes_per_node, uses_device
from megads.config.schema import Config
from megads.config.shape import model_shape

_ONE_SCALE_PER_TENSOR = ("tensorwise", "delayed")
# Transformer Engine has no kernels for others, and says nothing where one would be launched.
_USER_BUFFER_RANKS = (2, 4, 8, 16, 32)
# Of Transformer Engine's scatters: a product in four parts, and 16 numbers at a time.
_HIDDEN_MULTIPLE = 64


def overlap_problems(config: Config, cuda: bool) -> Iterator[str]:
    """Each problem as one sentence with what to do."""
    distributed = config.distributed
    if distributed.tp_comm_overlap:
        for reason, instead in _tensor_parallel(config, uses_device(config, cuda)):
            yield f"distributed.tp_comm_overlap {reason}: {instead}"
    if distributed.overlap_expert_parallel:
        for reason, instead in _expert_parallel(config, uses_device(config, cuda)):
            yield f"distributed.overlap_expert_parallel {reason}: {instead}"
    if distributed.overlap_shared_experts:
        for reason, instead in _shared_experts(config):
            yield f"distributed.overlap_shared_experts {reason}: {instead}"
    if distributed.delay_wgrad_compute:
        for reason, instead in _delayed_weight_gradients(config):
            yield f"distributed.delay_wgrad_compute {reason}: {instead}"


def _tensor_parallel(config: Config, device: str) -> Iterator[tuple[str, str]]:
    """What Transformer Engine's user buffers ask for, and where nobody has seen them work."""
    distributed, training = config.distributed, config.training
    tp, hidden, off = distributed.tensor_parallel_size, config.model.mla.d_model, "set it to false"
    if device == "cpu":
        yield "needs CUDA, and this run is on the CPU", off
    elif training.use_fp16 or not training.use_bf16:
        precision = "FP16" if training.use_fp16 else "FP32"
        yield f"adds up in BF16, and this run is in {precision}", f"set use_bf16, or {off}"
    if config.model.backend == "native":
        yield "needs Transformer Engine", f'set model.backend to "auto", or {off}'
    elif training.use_fp8 and training.fp8.recipe not in _ONE_SCALE_PER_TENSOR:
        recipes = " or ".join(f'"{recipe}"' for recipe in _ONE_SCALE_PER_TENSOR)
        yield (
            f'cannot cut up tensors with a scale per block (recipe = "{training.fp8.recipe}")',
            f"set training.fp8.recipe to {recipes}, or {off}",
        )
    if tp == 1:
        yield "has nothing to overlap with tensor_parallel_size = 1", off
    elif tp not in _USER_BUFFER_RANKS:
        yield (
            f"adds up over {', '.join(map(str, _USER_BUFFER_RANKS))} ranks only",
            f"change tensor_parallel_size ({tp}), or {off}",
        )
    elif distributed.sequence_parallel is False:
        yield "overlaps what sequence parallelism exchanges", f"set sequence_parallel to null, or {off}"
    if distributed.slurm.enabled and slurm_processes_per_node(distributed.slurm) % tp:
        processes = slurm_processes_per_node(distributed.slurm)
        yield (
            f"works inside a node, whose {processes} processes do not divide into groups of {tp}",
            f"change tensor_parallel_size, or {off}",
        )
    if hidden % _HIDDEN_MULTIPLE:
        yield (
            f"cuts hidden states into parts and needs a multiple of {_HIDDEN_MULTIPLE} in model.mla.d_model",
            f"change that ({hidden}), or {off}",
        )
    if distributed.zero_stage >= 2:
        yield "is known to work with zero_stage 0 and 1 only", f"set that to 1, or {off}"
    if training.cuda_graphs:
        yield "has not been tried inside CUDA graphs", f"set training.cuda_graphs to [], or {off}"
    if training.deterministic:
        yield "is not deterministic", f"set training.deterministic to false, or {off}"
    if distributed.overlap_expert_parallel:
        yield (
            "and overlap_expert_parallel exclude each other: one wants kernels to start in the order of "
            "calls, the other wants them not to",
            "set one of them to false",
        )


def _expert_parallel(config: Config, device: str) -> Iterator[tuple[str, str]]:
    """What Megatron-Core's combined schedule asks for."""
    distributed, training, shape = config.distributed, config.training, model_shape(config)
    pp, off = distributed.pipeline_parallel_size, "set it to false"
    if device == "cpu":
        yield "needs CUDA, whose streams run side by side, and this run is on the CPU", off
    elif not training.use_bf16 and not training.use_fp16:
        yield "works in 16 bits only, and this run is in FP32", f"set use_bf16, or {off}"
    if distributed.expert_parallel_size == 1:
        yield "has no exchange to hide with expert_parallel_size = 1", f"raise it, or {off}"
    if pp > 1 and distributed.virtual_pipeline_parallel_size is None:
        needs = "set virtual_pipeline_parallel_size, whose neighbouring chunks run beside each other"
        yield "does not work with pipeline_parallel_size > 1 without virtual stages", f"{needs}, or {off}"
    if pp > 1 and 0 in pipeline_layout(config):
        yield "does not work with a stage without decoder layers", f"change pipeline_layout, or {off}"
    if distributed.zero_stage >= 2:
        stage = f"does not work with zero_stage = {distributed.zero_stage}, whose gradients of a micro-batch"
        yield f"{stage} must be complete before the next one's", f"set zero_stage to 1, or {off}"
    recompute = training.gradient_checkpointing
    if recompute in (True, "full") or (recompute == "selective" and "moe" in training.recompute_modules):
        nearest = 'gradient_checkpointing = "selective" without "moe" in recompute_modules'
        yield "does not work where MoE layers are recomputed whole", f"take {nearest}, or {off}"
    if shape.mtp_depth > 1:
        yield (
            f"takes at most one MTP module, and there are {shape.mtp_depth}",
            f"set num_predict_tokens to 2, or {off}",
        )
    if shape.mtp_depth and not shape.mtp_is_moe:
        yield "needs MoE layers in MTP, and the last layer is dense", f"make it a MoE layer, or {off}"
    if config.model.moe.dropout:
        yield "leaves out model.moe.dropout, which is on", f"set that to 0, or {off}"
    if distributed.overlap_shared_experts:
        yield "and overlap_shared_experts exclude each other", "set one of them to false"


def _shared_experts(config: Config) -> Iterator[tuple[str, str]]:
    distributed, training, shape = config.distributed, config.training, model_shape(config)
    if not any(shape.is_moe) or not shape.shared_intermediate_size:
        yield "has no shared experts to compute", "set it to false"
    if distributed.expert_parallel_size == 1 and distributed.tensor_parallel_size == 1:
        yield "has no exchange to hide without expert or tensor parallelism", "set it to false"
    if training.gradient_checkpointing == "selective" and "shared_experts" in training.recompute_modules:
        yield "does not work with shared_experts in recompute_modules", "leave out one of them"


def _delayed_weight_gradients(config: Config) -> Iterator[tuple[str, str]]:
    """What it needs besides `overlap_expert_parallel`, which has reasons of its own."""
    off = "set it to false"
    if not config.distributed.overlap_expert_parallel:
        yield "needs the combined schedule, which calls for them", f"set overlap_expert_parallel, or {off}"
    if config.model.backend == "native":
        yield (
            "needs Transformer Engine, whose linears alone can put them off",
            f'set model.backend to "auto", or {off}',
        )
