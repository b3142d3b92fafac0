"""Errors of `training.cuda_graphs`: parts of a layer that cannot be captured, or whose graphs would go stale.

A graph repeats what was computed while it was captured: with the shapes, the addresses and the Python numbers
of then, and without asking the device anything on the way.
"""

from collections.abc import Iterator

from megads.config.resolve import uses_device
from megads.config.scalars import scheduled_settings
from megads.config.schema import Config
from megads.config.shape import model_shape

# What Megatron-Core keeps nevertheless where it is inside a graph.
_KEPT = {"attn": (), "mlp": ("mlp",), "moe_router": ("shared_experts", "moe"), "moe_preprocess": ()}
_OF_ROUTER = ("router_aux_loss_weight", "router_temperature", "router_noise_std")


def cuda_graph_problems(config: Config, cuda: bool) -> Iterator[str]:
    """Each problem as one sentence with what to do."""
    if not config.training.cuda_graphs:
        return
    problems = [
        *_device_and_precision(config, cuda),
        *_layout(config),
        *_shapes(config),
        *_numbers(config),
        *_recomputation(config),
    ]
    for reason, instead in problems:
        yield f"training.cuda_graphs {reason}: {instead}"


def _device_and_precision(config: Config, cuda: bool) -> Iterator[tuple[str, str]]:
    training = config.training
    if uses_device(config, cuda) == "cpu":
        yield "needs CUDA, and this run is on the CPU", "set it to []"
        return
    if config.model.backend == "native":
        yield "is Transformer Engine's, and model.backend is native", 'set that to "auto", or this to []'
    if training.use_fp8:
        reason = "does not work with use_fp8: weights cast once per step inside graphs have not been tried"
        yield reason, "set one of them off"
    elif not training.use_bf16:
        yield "works in BF16 only", "set use_bf16, or this to []"


def _layout(config: Config) -> Iterator[tuple[str, str]]:
    distributed = config.distributed
    if distributed.pipeline_parallel_size > 1 and config.training.batch_size_rampup_start is not None:
        yield (
            "has graphs for each micro-batch of a step where pipeline_parallel_size > 1, and "
            "batch_size_rampup_start changes their number",
            "begin with the whole batch, or set this to []",
        )
    if distributed.zero_stage >= 2:
        reason = f"does not work with zero_stage = {distributed.zero_stage}, whose weights and gradients move"
        yield reason, "set zero_stage to 1, or this to []"
    if distributed.overlap_expert_parallel:
        yield "does not work with overlap_expert_parallel, which cuts layers elsewhere", "set one of them off"
    if distributed.tp_comm_overlap:
        reason = "does not work with tp_comm_overlap, whose buffers inside graphs have not been tried"
        yield reason, "set one of them off"
    if distributed.overlap_shared_experts and "moe_router" in config.training.cuda_graphs:
        reason = "with moe_router computes shared experts in it, not during the exchange"
        yield reason, "set overlap_shared_experts to false, or leave out moe_router and moe_preprocess"


def _shapes(config: Config) -> Iterator[tuple[str, str]]:
    training, data, moe, shape = config.training, config.data, config.model.moe, model_shape(config)
    parts = training.cuda_graphs
    if training.seq_length_phases:
        yield "needs one length of sequences, and seq_length_phases changes it", "set one of them off"
    if "attn" in parts and (data.document_mask or data.reset_position_ids):
        yield (
            "with attn needs shapes that do not depend on documents, and data.document_mask or "
            "reset_position_ids is on",
            "leave out attn",
        )
    if "mlp" in parts and all(shape.is_moe):
        yield "has mlp, but the model has no dense layers", "leave it out"
    routed = [part for part in parts if part.startswith("moe_")]
    if routed and not any(shape.is_moe):
        yield f"has {' and '.join(routed)}, but the model has no MoE layers", "leave it out"
    if "moe_preprocess" not in parts:
        return
    if "moe_router" not in parts:
        yield "has moe_preprocess, which goes on where moe_router ends", "add moe_router"
    if moe.use_deep_ep:
        yield "with moe_preprocess sorts tokens for the all-to-all, not for use_deep_ep", "leave it out"
    if moe.capacity_factor is not None:
        yield (
            "with moe_preprocess needs as many routed tokens in every micro-batch, and capacity_factor drops "
            "some",
            "leave it out",
        )


def _numbers(config: Config) -> Iterator[tuple[str, str]]:
    """Random numbers, which would have to be continued exactly, and scalars that a graph holds fast."""
    model, parts = config.model, config.training.cuda_graphs
    dropout = {"model.hidden_dropout": model.hidden_dropout}
    if "attn" in parts:
        dropout["model.mla.attn_dropout"] = model.mla.attn_dropout
    if "moe_router" in parts:
        dropout |= {"model.moe.dropout": model.moe.dropout}
        dropout |= {"model.moe.router_noise_std": model.moe.router_noise_std}
        for setting in scheduled_settings(config):
            if setting.path.rpartition(".")[2] in _OF_ROUTER and setting.phases:
                yield f"with moe_router holds {setting.path} fast, which has phases", "leave out moe_router"
    for name, value in dropout.items():
        if value:
            yield f"draws no random numbers, and {name} is on", "set one of them off"


def _recomputation(config: Config) -> Iterator[tuple[str, str]]:
    training = config.training
    if training.gradient_checkpointing in (True, "full"):
        yield (
            "does not work where layers are recomputed whole",
            'take gradient_checkpointing = "selective" or false',
        )
    if training.gradient_checkpointing != "selective":
        return
    inside = {name for part in training.cuda_graphs for name in _KEPT[part]}
    both = [name for name in training.recompute_modules if name in inside]
    if both:
        yield (
            f"keeps {' and '.join(both)} in its graphs, which recompute_modules would recompute",
            "take that out of recompute_modules, or the part out of this",
        )
    alone = "moe_router" in training.cuda_graphs and "moe_preprocess" not in training.cuda_graphs
    if alone and "layernorm" in training.recompute_modules:
        yield (
            "keeps the norm before the router, whose output leaves the graph of moe_router, and "
            "recompute_modules has layernorm",
            "add moe_preprocess, or take layernorm out",
        )
