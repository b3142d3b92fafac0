"""Our configuration in Megatron-Core's terms: the only place where its names are mapped."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.transformer_config import MLATransformerConfig
from megatron.core.utils import init_method_normal

from megads.config.memory import largest_layer
from megads.config.resolve import Resolved
from megads.config.schema import Config
from megads.mcore.backend import choose_backend
from megads.mcore.fusions import choose_fusions
from megads.mcore.precision import gathers_fp8_parameters, optimizer_precision, transformer_precision

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Steps of a process before its CUDA graphs are captured, so that nothing is set up while they are.
WARM_UP_STEPS = 2
_SHARDED = {2: "optim_grads", 3: "optim_grads_params"}  # by zero_stage, in Megatron-FSDP's words


def pipeline_layout(resolved: Resolved) -> list[list[str]] | None:
    """What each virtual pipeline stage holds, in order of execution; None without pipelining."""
    if resolved.pp == 1:
        return None
    layout = [["decoder"] * count for count in resolved.pipeline_layout]
    layout[0].insert(0, "embedding")
    layout[-1] += ["mtp"] * resolved.shape.mtp_depth + ["loss"]
    return layout


def _recompute(config: Config) -> dict[str, Any]:
    match config.training.gradient_checkpointing:
        case False:
            return {}
        case True | "full":
            return {
                "recompute_granularity": "full",
                "recompute_method": "uniform",
                "recompute_num_layers": 1,
            }
        case _:
            return {
                "recompute_granularity": "selective",
                # Megatron-Core leaves moe_act to the experts, which are ours.
                "recompute_modules": [
                    module for module in config.training.recompute_modules if module != "moe_act"
                ],
            }


def _cuda_graphs(config: Config) -> dict[str, Any]:
    parts = config.training.cuda_graphs
    if not parts:
        return {}
    return {
        "cuda_graph_impl": "transformer_engine",
        "cuda_graph_modules": list(parts),
        "cuda_graph_warmup_steps": WARM_UP_STEPS,
    }


def _experts(config: Config, resolved: Resolved) -> dict[str, Any]:
    moe, shape = config.model.moe, resolved.shape
    if not any(shape.is_moe):
        return {}
    return {
        "num_moe_experts": moe.num_experts,
        "moe_layer_freq": [int(is_moe) for is_moe in shape.is_moe],
        "moe_ffn_hidden_size": moe.expert_intermediate_size,
        "moe_shared_expert_intermediate_size": shape.shared_intermediate_size or None,
        "moe_router_topk": moe.num_experts_per_token,
        # The router is ours (model/router.py); Megatron-Core must add no loss of its own.
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_token_dispatcher_type": "flex" if moe.use_deep_ep else "alltoall",
        "moe_flex_dispatcher_backend": "deepep",
        "moe_expert_capacity_factor": moe.capacity_factor,
        "overlap_moe_expert_parallel_comm": config.distributed.overlap_expert_parallel,
        "moe_shared_expert_overlap": config.distributed.overlap_shared_experts,
        "delay_wgrad_compute": config.distributed.delay_wgrad_compute,
    }


def transformer_config(config: Config, resolved: Resolved) -> MLATransformerConfig:
    """The model's shape, layout and numerics for Megatron-Core's modules and schedules."""
    model, shape = config.model, resolved.shape
    init = init_method_normal(model.init_method_std)
    dtype = DTYPES[resolved.precision]
    transformer_engine = choose_backend(config, resolved).name == "transformer_engine"
    fusions = choose_fusions(config, resolved)
    return MLATransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.mla.d_model,
        num_attention_heads=model.mla.num_heads,
        ffn_hidden_size=shape.intermediate_size,
        q_lora_rank=model.mla.q_lora_rank,
        kv_lora_rank=model.mla.d_latent,
        qk_head_dim=shape.qk_nope_head_dim,
        qk_pos_emb_head_dim=shape.qk_rope_head_dim,
        v_head_dim=shape.v_head_dim,
        rope_type="rope",  # our MLA makes its own tables; this only keeps YaRN's validation away
        normalization="RMSNorm" if model.norm_type == "rmsnorm" else "LayerNorm",
        layernorm_epsilon=model.norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=model.hidden_dropout,
        attention_dropout=model.mla.attn_dropout,
        init_method=init,
        output_layer_init_method=init,  # V3 uses one std for all weights
        embedding_init_method=init,
        # model/init.py fills every weight by name, so that it is the same in every layout.
        perform_initialization=False,
        use_cpu_initialization=resolved.device == "cpu",
        mtp_num_layers=shape.mtp_depth or None,
        mtp_loss_scaling_factor=config.training.mtp_loss_weight,
        tensor_model_parallel_size=resolved.tp,
        sequence_parallel=resolved.sequence_parallel,
        tp_comm_overlap=config.distributed.tp_comm_overlap,
        pipeline_model_parallel_size=resolved.pp,
        virtual_pipeline_model_parallel_size=resolved.vpp,
        pipeline_model_parallel_layout=pipeline_layout(resolved),
        # Interleaving between two ranks sends to and receives from the same peer twice at a time, which
        # batched operations would mix up.
        overlap_p2p_comm=resolved.vpp is not None,
        batch_p2p_comm=resolved.vpp is None,
        context_parallel_size=resolved.cp,
        expert_model_parallel_size=resolved.ep,
        expert_tensor_parallel_size=resolved.etp,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=resolved.precision == "bf16",
        fp16=resolved.precision == "fp16",
        # Losses are sums over tokens; gradients are divided once by the tokens of the global batch,
        # so that masks and layouts do not change the weight of a token.
        calculate_per_token_loss=True,
        # Transformer Engine's linears add weight gradients to the FP32 buffers of data parallelism, which
        # Megatron-FSDP makes anew for every backward pass.
        gradient_accumulation_fusion=transformer_engine and config.distributed.zero_stage < 2,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,  # Megatron-Core's MLA has it for YaRN only; ours see model/rope.py
        bias_activation_fusion=fusions.swiglu,
        moe_permute_fusion=fusions.permutation,
        transformer_impl="transformer_engine" if transformer_engine else "local",
        **transformer_precision(config, resolved),
        **_experts(config, resolved),
        **_recompute(config),
        **_cuda_graphs(config),
    )


def ddp_config(config: Config, resolved: Resolved) -> DistributedDataParallelConfig:
    """Gradient buckets, their reduction and the sharding of the optimizer."""
    distributed, replicas = config.distributed, resolved.dp * resolved.cp
    if distributed.zero_stage >= 2:
        return DistributedDataParallelConfig(
            use_megatron_fsdp=True,
            use_distributed_optimizer=True,
            data_parallel_sharding_strategy=_SHARDED[distributed.zero_stage],
            overlap_grad_reduce=True,  # Megatron-FSDP knows no other way to these two
            overlap_param_gather=distributed.zero_stage == 3 or distributed.overlap_param_gather,
            average_in_collective=False,
            bucket_size=max(40_000_000, 1_000_000 * replicas),  # DistributedDataParallel's own rule
            # Parameters gathered ahead, or reduced behind: by default no less than 10^9.
            suggested_communication_unit_size=2 * largest_layer(config, resolved),
            megatron_fsdp_main_params_dtype=None if resolved.precision == "fp32" else torch.float32,
            megatron_fsdp_main_grads_dtype=torch.float32,
        )
    sharded = distributed.zero_stage == 1
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=distributed.overlap_grad_reduce and replicas > 1,
        overlap_param_gather=sharded
        and distributed.overlap_param_gather
        and distributed.overlap_grad_reduce
        and replicas > 1,
        use_distributed_optimizer=sharded,
        average_in_collective=False,
        fp8_param_gather=gathers_fp8_parameters(config, resolved),
        delay_wgrad_compute=distributed.delay_wgrad_compute,
    )


def optimizer_config(config: Config, resolved: Resolved) -> OptimizerConfig:
    """Optimizer hyperparameters.

    Each step sets its own learning rate. The bounds given here tell parameter groups apart when a checkpoint
    is loaded, so they are the same for every run: a run may resume with another learning rate.
    """
    training = config.training
    return OptimizerConfig(
        optimizer="sgd" if training.optimizer == "sgd" else "adam",
        decoupled_weight_decay=training.optimizer == "adamw",
        lr=1.0,
        min_lr=0.0,
        weight_decay=training.weight_decay,
        adam_beta1=training.adam_beta1,
        adam_beta2=training.adam_beta2,
        adam_eps=training.adam_eps,
        sgd_momentum=training.sgd_momentum,
        clip_grad=training.grad_clip,
        bf16=resolved.precision == "bf16",
        fp16=resolved.precision == "fp16",
        params_dtype=DTYPES[resolved.precision],
        use_distributed_optimizer=config.distributed.zero_stage >= 1,
        overlap_param_gather=ddp_config(config, resolved).overlap_param_gather,
        **optimizer_precision(config, resolved),
    )
