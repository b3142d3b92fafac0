"""The language model: embedding, Megatron-Core's `TransformerBlock` with our layers, MTP, output head.

It stands on Megatron-Core's `LanguageModule`, as `GPTModel` does, but leaves the losses explicit:
one per token and prediction depth. `GPTModel` adds the MTP loss behind the caller's back, normalized by
the rank's own tokens, which is not the same number under context parallelism.

Shapes: B batch, S this rank's part of the sequence (under context parallelism), H hidden,
K = 1 + MTP depth predictions per position.
"""

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlock, roll_tensor
from megatron.core.transformer.transformer_block import TransformerBlock, get_num_layers_to_build
from megatron.core.transformer.transformer_config import MLATransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from megads.config.resolve import Resolved
from megads.config.schema import Config
from megads.mcore.precision import mtp_config
from megads.model.backends import Backend
from megads.model.layers import block_submodules, mtp_spec
from megads.model.output_head import OutputHead
from megads.model.rope import rotary_table
from megads.model.schedule_plan import SchedulePlan


class LanguageModel(LanguageModule):
    """One (virtual) pipeline stage of the model.

    `vp_stage` is the model chunk under interleaved pipelining. The first stage holds the embedding, the
    last one MTP, the output head and, for MTP, a copy of the embedding that Megatron-Core keeps equal.
    """

    def __init__(
        self,
        config: Config,
        resolved: Resolved,
        transformer_config: MLATransformerConfig,
        groups: ProcessGroupCollection,
        backend: Backend,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None = None,
    ) -> None:
        super().__init__(config=transformer_config, pg_collection=groups)
        shape, model = resolved.shape, config.model
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = model.tie_word_embeddings
        self.position_embedding_type = "rope"  # read by Megatron-Core where it captures CUDA graphs
        self.mla = model.mla
        self.rope_dim = shape.qk_rope_head_dim
        self.mtp_depth = shape.mtp_depth
        self.mtp_process = post_process and self.mtp_depth > 0
        if pre_process or self.mtp_process:
            self.embedding = LanguageModelEmbedding(
                transformer_config,
                model.vocab_size,
                model.mla.max_context_length,
                position_embedding_type="rope",
                tp_group=groups.tp,
            )
        pp_rank = groups.pp.rank()
        self.decoder = TransformerBlock(
            transformer_config,
            block_submodules(
                config,
                backend,
                shape.is_moe,
                get_transformer_layer_offset(transformer_config, vp_stage, pp_rank),
                get_num_layers_to_build(transformer_config, vp_stage, pp_rank),
            ),
            pre_process=pre_process,
            post_process=post_process,
            pg_collection=groups,
            vp_stage=vp_stage,
        )
        if self.mtp_process:
            self.mtp = MultiTokenPredictionBlock(
                mtp_config(config, transformer_config),
                mtp_spec(config, backend, shape.is_moe[-1], self.mtp_depth),
                vp_stage=vp_stage,
                pg_collection=groups,
            )
        if post_process:
            self.output_layer = OutputHead(
                transformer_config,
                model.vocab_size,
                groups.tp,
                tied=self.share_embeddings_and_output_weights and (pre_process or self.mtp_process),
                chunk_tokens=config.training.loss_chunk_tokens,
                fused_loss=backend.fusions.cross_entropy,
            )
        if pre_process or post_process:
            # Marks the copies of the embedding, so that their gradients are summed over the stages.
            self.setup_embeddings_and_output_layer()
        if self.share_embeddings_and_output_weights and self.mtp_process:
            # MTP looks tokens up in the last stage's copy, so the table has a gradient besides the one that
            # a fused linear adds to the buffer. Megatron-Core knows this of single-stage models only.
            self.embedding.word_embeddings.weight.zero_out_wgrad = True

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Weights and balancing biases; the same names and places whatever library computes the layers.

        Without the extra states of linears: the native ones have none, and what Transformer Engine keeps
        there belongs to the quantization of one run, not to the model.
        """
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return {name: shard for name, shard in state.items() if "_extra_state" not in name}

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """torch's, but that extra states may always be missing."""
        given = dict(state_dict)
        result = super().load_state_dict(given, strict=False, assign=assign)
        missing = [name for name in result.missing_keys if "_extra_state" not in name]
        if strict and (missing or result.unexpected_keys):
            raise RuntimeError(f"missing: {missing}, unexpected: {result.unexpected_keys}")
        return result

    def set_input_tensor(self, input_tensor: list[Tensor] | Tensor | None) -> None:
        """Activations from the previous stage, given by the pipeline schedule."""
        self.decoder.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    def forward(
        self,
        tokens_BS: Tensor | None,
        labels_BS: Tensor | None,
        positions_BS: Tensor,
        documents_BS: Tensor | None = None,
    ) -> Tensor:
        """Losses per token, or activations for the next stage.

        Args:
            tokens_BS: this rank's tokens; None on stages without embedding.
            labels_BS: the next tokens; None: logits instead of losses.
            positions_BS: positions of the whole sequence, [1, S_whole] where all samples share them.
            documents_BS: document number of each token of the whole sequence, to mask attention
                across documents; None: no mask.

        Returns:
            On the last stage cross-entropies [K, B, S] in float32, or logits [K, B, S, V] of this
            rank's vocabulary part; prediction k is of the token k + 1 ahead, and its last k positions
            of a sequence have no label (their loss is meaningless). Else activations [S, B, H].
        """
        table = rotary_table(self.mla, self.rope_dim, positions_BS.transpose(0, 1))
        hidden = None
        if self.pre_process:
            hidden = self.embedding(input_ids=tokens_BS, position_ids=None)
        hidden = self.decoder(hidden_states=hidden, attention_mask=documents_BS, rotary_pos_emb=table)
        if not self.post_process:
            return hidden
        if self.mtp_process:
            hidden = self.mtp(
                input_ids=tokens_BS,
                position_ids=None,
                hidden_states=hidden,
                attention_mask=documents_BS,
                rotary_pos_emb=table,
                embedding=self.embedding,
            )
        return self.predict(hidden, labels_BS)

    def build_schedule_plan(
        self,
        tokens_BS: Tensor | None,
        labels_BS: Tensor | None,
        positions_BS: Tensor,
        documents_BS: Tensor | None = None,
    ) -> SchedulePlan:
        """`forward` in pieces, for `distributed.overlap_expert_parallel`."""
        table = rotary_table(self.mla, self.rope_dim, positions_BS.transpose(0, 1))
        return SchedulePlan(self, tokens_BS, labels_BS, documents_BS, table)

    def predict(self, hidden: Tensor, labels_BS: Tensor | None) -> Tensor:
        """Losses, or without labels logits, of the hidden states of all depths: see `forward`."""
        tied = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        depths = 1 + self.mtp_depth
        if labels_BS is None:
            logits = [self.output_layer(hidden_SBH, tied) for hidden_SBH in hidden.chunk(depths)]
            return torch.stack([logits_SBV.transpose(0, 1) for logits_SBV in logits])
        labels = [labels_BS]
        for _ in range(self.mtp_depth):
            labels.append(roll_tensor(labels[-1], shifts=-1, dims=-1, cp_group=self.cp_group)[0])
        return self.output_layer(hidden, tied, torch.stack(labels))
