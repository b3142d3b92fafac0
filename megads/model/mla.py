"""Multi-head Latent Attention (DeepSeek-V2, arXiv:2405.04434, section 2.1) on Megatron-Core's linears.

Queries and keys/values pass through low-rank latents; the down-projections are replicated over tensor
parallelism (they are small, and what is gathered over the sequence is then the latent, not the hidden
state), the up-projections are split over heads. One rotary key is shared by all heads.

Not here: decoding over the latent cache.

Shapes: S sequence (its local part under sequence and context parallelism), B batch, H hidden,
N local heads, C latent, R rope width, D query/key width, V value width.
"""

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import CheckpointWithoutOutput
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import MLATransformerConfig
from torch import Tensor

from megads.config.schema import MLA
from megads.model.backends import Backend
from megads.model.context_parallel import gather_sequence, in_sequence_order, local_chunks, local_positions
from megads.model.rope import rotate, rotate_and_join, softmax_scale

# DeepSeek's code leaves the norms on the latents at this epsilon whatever the model's own is.
LATENT_NORM_EPS = 1e-6


def _heads_first(x_SBNX: Tensor) -> Tensor:
    """[S, B, N, *] -> [B, N, S, *], as attention wants it."""
    return x_SBNX.permute(1, 2, 0, 3)


def _join(nope_SBNX: Tensor, rope_SBNX: Tensor) -> Tensor:
    """Both parts of queries or keys, [B, N, S, D], written in the order in which kernels read them.

    On the CPU the rows of a head one after the other; flash kernels read tokens with all their heads.
    """
    if nope_SBNX.device.type == "cpu":
        return torch.cat((_heads_first(nope_SBNX), _heads_first(rope_SBNX)), dim=-1)
    return _heads_first(torch.cat((nope_SBNX, rope_SBNX), dim=-1))


def assemble_heads(
    q_SBND: Tensor, kv_SBNX: Tensor, rope_key_SBR: Tensor, q_table: Tensor, k_table: Tensor, value_width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries and keys, and values, of the up-projections' outputs: [B, N, S, *] each.

    `rope.rotate_and_join` in plain torch.
    """
    rope_width, nope_width = rope_key_SBR.shape[-1], kv_SBNX.shape[-1] - value_width
    k_nope, v_SBNV = kv_SBNX.split((nope_width, value_width), dim=-1)
    q_nope, q_rope = q_SBND.split((nope_width, rope_width), dim=-1)
    k_rope = rotate(rope_key_SBR.unsqueeze(2), k_table).expand(-1, -1, kv_SBNX.shape[2], -1)
    return _join(q_nope, rotate(q_rope, q_table)), _join(k_nope, k_rope), _heads_first(v_SBNV)


class MultiLatentAttention(MegatronModule):
    """Self-attention of a `TransformerLayer`: [S, B, H] -> [S, B, H].

    `rotary_pos_emb` is the table of `rope.rotary_table` for the whole sequence, `attention_mask` the
    document number of each token of the whole sequence [B, S] or None.
    """

    def __init__(
        self,
        config: MLATransformerConfig,
        layer_number: int,
        mla: MLA,
        backend: Backend,
        pg_collection: ProcessGroupCollection,
        attn_mask_type: AttnMaskType = AttnMaskType.causal,
        cp_comm_type: str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(config)
        assert attn_mask_type == AttnMaskType.causal, "MTP and the decoder are causal"
        self.layer_number = layer_number
        self.tp_group, self.cp_group = pg_collection.tp, pg_collection.cp
        self.local_heads = config.num_attention_heads // self.tp_group.size()
        self.qk_head_dim = config.qk_head_dim + config.qk_pos_emb_head_dim
        self.scale = softmax_scale(mla, self.qk_head_dim)
        self.window = mla.sliding_window
        self.dropout = mla.attn_dropout
        self.core_attention = backend.core_attention
        self.fused_rope = backend.fusions.rope
        self.recompute_up_projection = (
            config.recompute_granularity == "selective" and "mla_up_proj" in config.recompute_modules
        )
        heads = config.num_attention_heads
        if config.q_lora_rank is None:
            self.linear_q_proj = self._split_over_heads(
                backend, config.hidden_size, heads * self.qk_head_dim, buffer="qkv"
            )
        else:
            self.linear_q_down_proj = backend.replicated_linear(
                config.hidden_size, config.q_lora_rank, config
            )
            self.q_layernorm = backend.norm(config, config.q_lora_rank, LATENT_NORM_EPS)
            self.linear_q_up_proj = self._split_over_heads(
                backend, config.q_lora_rank, heads * self.qk_head_dim
            )
        latent_and_rope = config.kv_lora_rank + config.qk_pos_emb_head_dim
        self.linear_kv_down_proj = backend.replicated_linear(config.hidden_size, latent_and_rope, config)
        self.kv_layernorm = backend.norm(config, config.kv_lora_rank, LATENT_NORM_EPS)
        self.linear_kv_up_proj = self._split_over_heads(
            backend, config.kv_lora_rank, heads * (config.qk_head_dim + config.v_head_dim)
        )
        self.linear_proj = backend.row_linear(
            heads * config.v_head_dim,
            config.hidden_size,
            config=config,
            init_method=config.output_layer_init_method,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=True,
            is_expert=False,
            tp_comm_buffer_name="proj",
            tp_group=self.tp_group,
        )

    def _split_over_heads(
        self, backend: Backend, in_features: int, out_features: int, buffer: str | None = None
    ) -> Any:
        return backend.column_linear(
            in_features,
            out_features,
            config=self.config,
            init_method=self.config.init_method,
            bias=False,
            gather_output=False,
            skip_bias_add=False,
            is_expert=False,
            tp_comm_buffer_name=buffer,
            tp_group=self.tp_group,
        )

    def backward_dw(self) -> None:
        """Weight gradients that the combined schedule has put off (`distributed.delay_wgrad_compute`)."""
        if self.config.q_lora_rank is None:
            queries = [self.linear_q_proj]
        else:
            queries = [self.linear_q_up_proj, self.linear_q_down_proj]
        for linear in (self.linear_proj, self.linear_kv_up_proj, self.linear_kv_down_proj, *queries):
            linear.backward_dw()

    def set_for_recompute_input_layernorm(self) -> None:
        """Called where the norm before attention is recomputed in FP8: what is kept of it must be its output.

        Else the linears would keep their own copies in FP8, beside which recomputation saves nothing.
        """
        from megatron.core.extensions.transformer_engine import set_save_original_input

        if self.config.q_lora_rank is None:
            set_save_original_input(self.linear_q_proj)
        else:
            set_save_original_input(self.linear_q_down_proj)
        set_save_original_input(self.linear_kv_down_proj)

    def _gather_rope_key(self, key_SBR: Tensor) -> Tensor:
        """The shared rotary key of the whole sequence; all heads' gradients are summed into it."""
        key_SBR = gather_sequence(key_SBR, self.cp_group)
        if self.config.sequence_parallel:
            return gather_from_sequence_parallel_region(key_SBR, group=self.tp_group)
        return copy_to_tensor_model_parallel_region(key_SBR, group=self.tp_group)

    def _project_up(
        self, q_latent_SBC: Tensor, kv_latent_SBC: Tensor, rope_key_SBR: Tensor, table: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of this rank's tokens, keys and values of the whole sequence: [B, N, S, *] each.

        Under context parallelism this is where the ranks exchange latents.
        """
        config, heads = self.config, self.local_heads
        up = self.linear_q_proj if config.q_lora_rank is None else self.linear_q_up_proj
        q_SBND = up(q_latent_SBC)[0].unflatten(-1, (heads, self.qk_head_dim))
        kv_latent_SBC = gather_sequence(kv_latent_SBC, self.cp_group)
        rope_key_SBR = self._gather_rope_key(rope_key_SBR)
        q_table, cp = table, self.cp_group.size()
        tp = self.tp_group.size() if config.sequence_parallel else 1
        if cp > 1:
            q_table = table[:, local_positions(table.shape[1], self.cp_group, table.device)]
            rope_key_SBR = in_sequence_order(rope_key_SBR, tp, cp)
            if tp == 1:  # else the latent is whole only inside the linear
                kv_latent_SBC = in_sequence_order(kv_latent_SBC, tp, cp)
        kv_SBX = self.linear_kv_up_proj(kv_latent_SBC)[0]
        if cp > 1 and tp > 1:
            kv_SBX = in_sequence_order(kv_SBX, tp, cp)
        kv_SBNX = kv_SBX.unflatten(-1, (heads, config.qk_head_dim + config.v_head_dim))
        if self.fused_rope:
            q, k, v = rotate_and_join(q_SBND, kv_SBNX, rope_key_SBR, q_table, table, config.v_head_dim)
            return _heads_first(q), _heads_first(k), _heads_first(v)
        return assemble_heads(q_SBND, kv_SBNX, rope_key_SBR, q_table, table, config.v_head_dim)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, documents_BS: Tensor | None) -> Tensor:
        """Attention of each contiguous chunk of this rank's queries: [S, B, N * V]."""
        chunks = local_chunks(self.cp_group.size(), self.cp_group.rank())
        parts = [
            self.core_attention(
                queries,
                k,
                v,
                scale=self.scale,
                first_query=chunk * queries.shape[2],
                window=self.window,
                documents_BK=documents_BS,
                dropout=self.dropout if self.training else 0.0,
            )
            for chunk, queries in zip(chunks, q.chunk(len(chunks), dim=2), strict=True)
        ]
        context_BNSV = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
        return context_BNSV.permute(2, 0, 1, 3).flatten(2)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotary_pos_emb: Tensor | None = None,
        **unused: Any,
    ) -> tuple[Tensor, None]:
        """Attention output [S, B, H] and no bias, as `TransformerLayer` expects."""
        assert rotary_pos_emb is not None, "the model passes the rotary table"
        config = self.config
        if config.q_lora_rank is None:
            q_latent = hidden_states
        else:
            q_latent = self.q_layernorm(self.linear_q_down_proj(hidden_states)[0])
        kv_latent, rope_key = self.linear_kv_down_proj(hidden_states)[0].split(
            (config.kv_lora_rank, config.qk_pos_emb_head_dim), dim=-1
        )
        kv_latent = self.kv_layernorm(kv_latent)

        # None without Transformer Engine's FP8: Megatron-Core takes any other value for it.
        recompute = self.recompute_up_projection and self.training
        checkpoint = CheckpointWithoutOutput(fp8=config.fp8) if recompute else None
        project_up = self._project_up
        if checkpoint is not None:
            q, k, v = checkpoint.checkpoint(project_up, q_latent, kv_latent, rope_key, rotary_pos_emb)
        else:
            q, k, v = project_up(q_latent, kv_latent, rope_key, rotary_pos_emb)
        if self.dropout and self.training and not config.sequence_parallel:
            with get_cuda_rng_tracker().fork():  # heads are split: each rank drops its own
                context = self._attend(q, k, v, attention_mask)
        else:
            context = self._attend(q, k, v, attention_mask)
        if checkpoint is not None:
            checkpoint.discard_output_and_register_recompute(context)
        return self.linear_proj(context)
