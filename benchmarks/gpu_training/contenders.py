"""Who trains a slice: MegaDS, Megatron-Core's own modules, and transformers; one optimizer step of each.

All take the same micro-batches of tokens [B, S + 1] and do what training does: forward, cross-entropy,
backward, clipping, AdamW. They differ in this:

- `megads`: `TrainingStep`, as `pretrain_megads.py` runs it, but for where first weights are drawn.
- `megads-graphs`: the same with parts of its layers as CUDA graphs (`training.cuda_graphs`).
- `stock`: Megatron-Core's `GPTModel` with its own Transformer Engine spec (MLA, grouped products, all-to-all
  dispatcher) and the fusions that Megatron-LM offers for it: router, permutation, RoPE, SwiGLU,
  cross-entropy, weight gradients into FP32 buffers. Schedule, data parallelism, optimizer, precision and
  recomputation are those of MegaDS.
- `transformers`: DeepseekV3 with `grouped_mm` experts and SDPA, all in the precision of its weights: without
  FP32 master weights and gradients it does less and needs less memory than the others. It has no balancing.
"""

import dataclasses
import importlib.metadata
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from gpu_training.stopwatch import Stopwatch
from megads.config.flops import count_parameters
from megads.config.resolve import Resolved
from megads.config.scalars import Schedules
from megads.config.schema import Config
from megads.config.shape import model_shape
from megads.errors import EnvironmentSetupError
from megads.mcore.groups import initialize_device, initialize_process_groups

Step = Callable[[list[Tensor]], float]
"""An optimizer step over micro-batches of tokens [B, S + 1]; gives the loss."""


@dataclasses.dataclass(frozen=True)
class Contender:
    """`about`: what computes it; `model`: its outermost module, called once per micro-batch."""

    about: str
    model: torch.nn.Module
    step: Step


def build_contender(name: str, config: Config, resolved: Resolved, watch: Stopwatch) -> Contender:
    """The contender of this process, with `watch` on its phases.

    Raises:
        EnvironmentSetupError: it cannot train this slice here, with the reason.
    """
    initialize_device(resolved.device)
    torch.manual_seed(config.seed)
    if name != "transformers":
        initialize_process_groups(resolved, 10, config.seed)
    contender = CONTENDERS[name](config, resolved, watch)
    watch.watch_forward(contender.model)
    expected, found = count_parameters(config).total, sum(p.numel() for p in contender.model.parameters())
    if name == "stock":
        expected += extra_stock_parameters(config)
    assert found == expected, f"{name} is another model: {found} parameters against {expected}"
    return contender


# --- MegaDS -----------------------------------------------------------------------------------


def _megads(config: Config, resolved: Resolved, watch: Stopwatch) -> Contender:
    from megads.mcore.backend import choose_backend
    from megads.train.step import TrainingStep

    def draw_on_device(name: str, shape: tuple[int, ...], std: float, seed: int) -> Tensor:
        return torch.empty(shape, device=resolved.device).normal_(0.0, std)

    # A run draws its first weights on the CPU, which takes half a minute for the billions of a slice.
    with mock.patch("megads.model.init.draw_whole", draw_on_device):
        training = TrainingStep(config, resolved)
    training.optimizer.step = watch.watched_optimizer(training.optimizer.step)
    _, scalars = Schedules(config, resolved).at(0)

    def step(micro_batches: list[Tensor]) -> float:
        return training.train(_as_batches(micro_batches), len(micro_batches), scalars).loss

    choice = choose_backend(config, resolved)
    return Contender(f"{choice.name.replace('_', ' ')}, {choice.why}", training.chunks[0], step)


def _as_batches(micro_batches: list[Tensor]) -> Iterator[dict[str, Tensor]]:
    for tokens in micro_batches:
        inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        yield {"tokens": inputs, "labels": labels, "loss_mask": torch.ones_like(inputs, dtype=torch.float32)}


# --- Megatron-Core's own modules --------------------------------------------------------------


def _stock(config: Config, resolved: Resolved, watch: Stopwatch) -> Contender:
    from megads.mcore.backend import transformer_engine_problem

    if problem := transformer_engine_problem():
        raise EnvironmentSetupError(
            f"{problem}; without it Megatron-Core's own modules have no MLA (NVIDIA/Megatron-LM issue 1589)"
        )
    if resolved.device == "cpu" or resolved.precision == "fp32":
        raise EnvironmentSetupError("Transformer Engine computes on CUDA, and here in 16 bits or FP8")
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megads.optim.build import build_optimizer, set_learning_rate, wrap_data_parallel

    chunks = wrap_data_parallel(config, resolved, [stock_model(config, resolved)])
    optimizer = build_optimizer(config, resolved, chunks)
    optimizer_step = watch.watched_optimizer(optimizer.step)
    schedule, training = get_forward_backward_func(), config.training
    positions = torch.arange(training.seq_length, device="cuda").unsqueeze(0)

    def loss_sum(losses_BS: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        total = losses_BS.sum()
        tokens = torch.tensor(losses_BS.numel(), dtype=torch.int, device=total.device)
        return total, tokens, {"loss": total.detach() / losses_BS.numel()}

    def forward_step(batches: Iterator[dict[str, Tensor]], model: torch.nn.Module) -> tuple[Tensor, Any]:
        batch = next(batches)
        return model(batch["tokens"], positions, None, labels=batch["labels"]), loss_sum

    def step(micro_batches: list[Tensor]) -> float:
        chunks[0].zero_grad_buffer()
        optimizer.zero_grad()
        reports = schedule(
            forward_step_func=forward_step,
            data_iterator=_as_batches(micro_batches),
            model=chunks,
            num_microbatches=len(micro_batches),
            seq_length=training.seq_length,
            micro_batch_size=training.micro_batch_size,
            forward_only=False,
        )
        set_learning_rate(optimizer, training.learning_rate, training.weight_decay)
        optimizer_step()
        return float(torch.stack([report["loss"] for report in reports]).mean())

    version = importlib.metadata.version("transformer-engine")
    return Contender(f"Megatron-Core's modules, Transformer Engine {version}", chunks[0], step)


def stock_model(config: Config, resolved: Resolved) -> torch.nn.Module:
    """Megatron-Core's GPTModel of the same shape, in its 16-bit wrapper, on the device."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.transformer.module import Float16Module

    transformer = stock_config(config, resolved)
    model = GPTModel(
        transformer,
        get_gpt_decoder_block_spec(transformer, use_transformer_engine=True),
        vocab_size=config.model.vocab_size,
        max_sequence_length=config.training.seq_length,
        position_embedding_type="rope",
    )
    for module in model.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            # Asked for in the configuration, the output head, which is not Transformer Engine's, would want
            # NVIDIA's apex for it. So MegaDS does too.
            module.fuse_wgrad_accumulation = True
    if resolved.device == "cuda":
        model.cuda()
    return Float16Module(transformer, model)  # type: ignore[no-any-return]


def extra_stock_parameters(config: Config) -> int:
    """Megatron-Core's MLA without a query latent normalizes its input once more, with weights of its own."""
    model = config.model
    return 0 if model.mla.q_lora_rank is not None else model.num_layers * model.mla.d_model


def stock_config(config: Config, resolved: Resolved) -> Any:
    """MegaDS's `transformer_config`, with Megatron-Core's own router, initialization and fusions."""
    from megads.mcore.translate import transformer_config

    moe = config.model.moe
    groups = {"moe_router_num_groups": moe.n_group, "moe_router_group_topk": moe.topk_group}
    balancing = {"sequence": "seq_aux_loss", "load": "aux_loss"}.get(moe.balance_loss_type, "none")
    return dataclasses.replace(
        transformer_config(config, resolved),
        perform_initialization=True,
        qk_layernorm=True,
        # YaRN with factor 1 is plain RoPE, and the only one that Megatron-Core has a fused kernel for.
        rope_type="yarn",
        rotary_base=config.model.mla.rope_theta,
        rotary_scaling_factor=1.0,
        mscale=1.0,
        mscale_all_dim=1.0,
        apply_rope_fusion=True,
        bias_activation_fusion=True,
        gradient_accumulation_fusion=False,
        cross_entropy_loss_fusion=True,
        cross_entropy_fusion_impl="te",
        moe_grouped_gemm=True,
        moe_permute_fusion=True,
        moe_router_fusion=True,
        moe_router_dtype="fp32",
        moe_router_score_function=moe.scoring_func,
        moe_router_pre_softmax=moe.scoring_func == "softmax" and not moe.norm_topk_prob,
        moe_router_topk_scaling_factor=moe.routed_scaling_factor,
        moe_router_enable_expert_bias=moe.use_aux_loss_free,
        moe_router_bias_update_rate=moe.bias_update_rate,
        moe_router_load_balancing_type=balancing,
        moe_aux_loss_coeff=moe.router_aux_loss_weight,
        **(groups if moe.n_group > 1 else {}),
    )


# --- transformers -----------------------------------------------------------------------------


def _transformers(config: Config, resolved: Resolved, watch: Stopwatch) -> Contender:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    training, moe = config.training, config.model.moe
    if training.use_fp8:
        raise EnvironmentSetupError("transformers' DeepseekV3 does not train in FP8")
    if moe.scoring_func != "sigmoid":
        raise EnvironmentSetupError(
            "transformers' DeepseekV3 has sigmoid gates, and this model softmax gates"
        )
    dtype = torch.float32 if resolved.precision == "fp32" else torch.bfloat16
    with torch.device(resolved.device):
        model = DeepseekV3ForCausalLM._from_config(
            DeepseekV3Config(**_published_names(config)), dtype=dtype, attn_implementation="sdpa"
        )
    model.set_experts_implementation("grouped_mm")
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=training.learning_rate,
        weight_decay=training.weight_decay,
        betas=(training.adam_beta1, training.adam_beta2),
        eps=training.adam_eps,
        fused=True,
    )

    def clip_and_update() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.grad_clip)
        optimizer.step()

    update = watch.watched_optimizer(clip_and_update)

    def step(micro_batches: list[Tensor]) -> float:
        optimizer.zero_grad()
        losses = []
        for tokens in micro_batches:
            logits = model(input_ids=tokens[:, :-1]).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            watch.mark("forward")  # the others' models have the loss inside
            (loss / len(micro_batches)).backward()
            losses.append(loss.detach())
        update()
        return float(torch.stack(losses).mean())

    about = f"transformers {importlib.metadata.version('transformers')}, grouped_mm, SDPA"
    return Contender(about, model, step)


def _published_names(config: Config) -> dict[str, Any]:
    """The model in the names of DeepSeek's published configurations."""
    model, mla, moe, shape = config.model, config.model.mla, config.model.moe, model_shape(config)
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": mla.d_model,
        "intermediate_size": shape.intermediate_size,
        "moe_intermediate_size": moe.expert_intermediate_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": mla.num_heads,
        "num_key_value_heads": mla.num_heads,
        "n_shared_experts": moe.num_shared_experts,
        "n_routed_experts": moe.num_experts,
        "num_experts_per_tok": moe.num_experts_per_token,
        "routed_scaling_factor": moe.routed_scaling_factor,
        "norm_topk_prob": moe.norm_topk_prob,
        "n_group": moe.n_group,
        "topk_group": moe.topk_group,
        "first_k_dense_replace": sum(not is_moe for is_moe in shape.is_moe),
        "kv_lora_rank": mla.d_latent,
        "q_lora_rank": mla.q_lora_rank,
        "qk_rope_head_dim": shape.qk_rope_head_dim,
        "qk_nope_head_dim": shape.qk_nope_head_dim,
        "v_head_dim": shape.v_head_dim,
        "rms_norm_eps": model.norm_eps,
        "initializer_range": model.init_method_std,
        "max_position_embeddings": config.training.seq_length,
        "use_cache": False,
    }


CONTENDERS: dict[str, Callable[[Config, Resolved, Stopwatch], Contender]] = {
    "megads": _megads,
    "megads-graphs": _megads,
    "stock": _stock,
    "transformers": _transformers,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "megads-graphs": {"training.cuda_graphs": ["attn", "moe_router", "moe_preprocess"]},
}
"""By which a contender differs from the slice that all train."""
