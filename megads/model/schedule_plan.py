"""The model in pieces, so that one micro-batch's exchange of tokens runs beside another's computation.

Megatron-Core's combined 1F1B schedule takes the forward pass of a micro-batch and the backward pass of
another layer by layer: experts of one compute while tokens of the other travel, as in DeepSeek-V3's DualPipe
(arXiv:2412.19437, section 3.2.1). Layers, MoE and MTP are taken apart by Megatron-Core; here is what comes
before and after them in `LanguageModel`.
"""

from typing import Any

from megatron.core.models.common.model_chunk_schedule_plan import TransformerModelChunkSchedulePlan
from megatron.core.models.common.utils import PostProcessNode, PreProcessNode
from torch import Tensor


class _BeforeLayers(PreProcessNode):  # type: ignore[misc]
    """The embedding, or what the previous stage sent."""

    def forward_impl(self) -> Tensor:
        state, model = self.chunk_state, self.model
        state.rotary_pos_emb = state.extra_block_kwargs["rotary_pos_emb"]
        state.rotary_pos_cos = state.rotary_pos_sin = state.sequence_len_offset = None
        if model.pre_process:
            state.decoder_input = model.embedding(input_ids=state.input_ids, position_ids=None)
        else:
            state.decoder_input = model.decoder.input_tensor
        return state.decoder_input


class _AfterLayers(PostProcessNode):  # type: ignore[misc]
    """Losses of all prediction depths."""

    def forward_impl(self, hidden_states: Tensor) -> Tensor:
        return self.model.predict(hidden_states, self.chunk_state.labels)


class SchedulePlan(TransformerModelChunkSchedulePlan):  # type: ignore[misc]
    """One micro-batch's pass through a model chunk, as pieces that the schedule calls."""

    PRE_PROCESS_NODE_CLASS, POST_PROCESS_NODE_CLASS = _BeforeLayers, _AfterLayers

    def __init__(
        self,
        model: Any,
        tokens_BS: Tensor | None,
        labels_BS: Tensor | None,
        documents_BS: Tensor | None,
        rotary_table: Tensor,
    ) -> None:
        super().__init__(
            model,
            input_ids=tokens_BS,
            position_ids=None,
            attention_mask=documents_BS,
            labels=labels_BS,
            extra_block_kwargs={"rotary_pos_emb": rotary_table},
        )
