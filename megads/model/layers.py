"""Which module stands where in each transformer layer: MLA everywhere, a dense FFN or experts after it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import random
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from megads.config.schema import Config, MoE
from megads.model.backends import Backend
from megads.model.deep_ep import configure_deep_ep
from megads.model.functional import swiglu
from megads.model.mla import MultiLatentAttention
from megads.model.router import Router


class Layer(TransformerLayer):
    """Megatron-Core's layer, also for `gradient_checkpointing` "selective" without Transformer Engine.

    Its recomputation of norms asks Transformer Engine whether FP8 is on; where there is none, the norms'
    outputs are kept and only MLA's up-projections are recomputed.

    For `training.cuda_graphs` it says what a graph of attention takes besides hidden states: rotary tables.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not random.HAVE_TE:
            self.recompute_input_layernorm = self.recompute_pre_mlp_layernorm = False

    def get_layer_static_inputs(self, seq_length: int, micro_batch_size: int) -> dict[str, Tensor]:
        """What graphs are captured with, by name: inputs are copied there before a replay."""
        inputs: dict[str, Tensor] = super().get_layer_static_inputs(seq_length, micro_batch_size)
        if inputs.pop("attention_mask", None) is not None:  # attention is captured; the mask is of documents
            width, device = self.config.qk_pos_emb_head_dim, inputs["hidden_states"].device
            inputs["rotary_pos_emb"] = torch.zeros(2, seq_length, 1, width // 2, device=device)
        return inputs

    def _get_te_cuda_graph_replay_args(self, *args: Any, **kwargs: Any) -> Any:
        # Not `TransformerLayer`'s, which makes a mask of zeros for every call that has none.
        kwargs.pop("attention_mask", None)
        return super(TransformerLayer, self)._get_te_cuda_graph_replay_args(*args, **kwargs)


class DropoutMoELayer(MoELayer):
    """Megatron-Core's MoE layer with dropout on its output (`model.moe.dropout`)."""

    dropout: float = 0.0

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        outputs = super().forward(*args, **kwargs)
        if not self.dropout:
            return outputs  # type: ignore[no-any-return]  # of the router alone while its graph is captured
        output, bias = outputs
        return torch.nn.functional.dropout(output, self.dropout, self.training), bias


class FeedForward(MLP):
    """Megatron-Core's SwiGLU FFN with our activation."""

    def forward(self, hidden_states: Tensor, **unused: Any) -> tuple[Tensor, None]:
        gate_up = self.linear_fc1(hidden_states)[0]
        return self.linear_fc2(swiglu(gate_up, fused=self.config.bias_activation_fusion))


class SharedExperts(SharedExpertMLP):
    """Megatron-Core's shared experts, all of them as one FFN, with our activation."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        gate_up = self.linear_fc1(hidden_states)[0]
        return self.linear_fc2(swiglu(gate_up, fused=self.config.bias_activation_fusion))[0]


def _build_moe_layer(moe: MoE, backend: Backend, recompute_activation: bool, **kwargs: Any) -> MoELayer:
    submodules = MoESubmodules(
        experts=partial(backend.experts, recompute_activation=recompute_activation),
        router=partial(Router, moe=moe),
        shared_experts=partial(
            SharedExperts,
            submodules=MLPSubmodules(linear_fc1=backend.column_linear, linear_fc2=backend.row_linear),
        ),
    )
    layer = DropoutMoELayer(submodules=submodules, **kwargs)
    layer.dropout = moe.dropout
    if moe.use_deep_ep:
        configure_deep_ep(layer.token_dispatcher, moe)
    return layer


def layer_spec(config: Config, backend: Backend, is_moe: bool) -> ModuleSpec:
    """One pre-norm layer: norm, MLA, residual; norm, FFN or experts, residual."""
    mlp: Callable[..., torch.nn.Module]
    if is_moe:
        training = config.training
        mlp = partial(
            _build_moe_layer,
            moe=config.model.moe,
            backend=backend,
            recompute_activation=training.gradient_checkpointing == "selective"
            and "moe_act" in training.recompute_modules,
        )
    else:
        mlp = partial(
            FeedForward.as_mlp_submodule,
            submodules=MLPSubmodules(linear_fc1=backend.column_linear, linear_fc2=backend.row_linear),
        )
    # Megatron-Core's MTP layer looks for the mask type among the parameters.
    attention = {"mla": config.model.mla, "backend": backend, "attn_mask_type": AttnMaskType.causal}
    return ModuleSpec(
        module=Layer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=backend.norm,
            self_attention=ModuleSpec(module=MultiLatentAttention, params=attention),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=backend.norm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _backend_of_layer(config: Config, backend: Backend, layer: int | None) -> Backend:
    """The modules of a decoder layer, counted from 0, or of MTP (None): it may be kept without FP8."""
    fp8, layers = config.training.fp8, config.model.num_layers
    if layer is None:
        kept = fp8.bf16_mtp
    else:
        kept = layer < fp8.bf16_first_layers or layer >= layers - fp8.bf16_last_layers
    return backend.without_fp8 if kept and backend.without_fp8 is not None else backend


def block_submodules(
    config: Config, backend: Backend, is_moe: tuple[bool, ...], first_layer: int, layers: int
) -> TransformerBlockSubmodules:
    """The layers `first_layer` on of the decoder, counted from 0."""
    return TransformerBlockSubmodules(
        layer_specs=[
            layer_spec(config, _backend_of_layer(config, backend, layer), is_moe[layer])
            for layer in range(first_layer, first_layer + layers)
        ],
        layer_norm=backend.norm,
    )


def mtp_spec(config: Config, backend: Backend, is_moe: bool, depth: int) -> ModuleSpec:
    """`depth` MTP modules (DeepSeek-V3, section 2.2), each with one layer like the decoder's last."""
    backend = _backend_of_layer(config, backend, None)
    layer = ModuleSpec(
        module=MultiTokenPredictionLayer,
        submodules=MultiTokenPredictionLayerSubmodules(
            enorm=backend.norm,
            hnorm=backend.norm,
            eh_proj=backend.column_linear,
            mtp_model_layer=layer_spec(config, backend, is_moe),
            layer_norm=backend.norm,
        ),
    )
    return ModuleSpec(
        module=MultiTokenPredictionBlock,
        submodules=MultiTokenPredictionBlockSubmodules(layer_specs=[layer] * depth),
    )
