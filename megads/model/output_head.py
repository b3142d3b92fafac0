"""The output head: hidden states to logits, or straight to the loss of each token.

The vocabulary is split over tensor parallelism. MTP modules share the head with the model (DeepSeek-V3,
section 2.2), so it sees the hidden states of all prediction depths.

Shapes: K prediction depths, S sequence (S' its local part under sequence parallelism), B batch, H hidden,
V this rank's part of the vocabulary.
"""

import copy

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import ColumnParallelLinear, vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megads.model.functional import cross_entropy
from megads.model.linear_cross_entropy import linear_cross_entropy


def _without_fused_gradients(config: TransformerConfig) -> TransformerConfig:
    """For a linear of Megatron-Core's own, which would need NVIDIA's apex to fuse them on CUDA."""
    config = copy.copy(config)
    config.gradient_accumulation_fusion = False
    return config


def _fused_cross_entropy(logits: Tensor, labels: Tensor, tp_group: dist.ProcessGroup | None) -> Tensor:
    """Transformer Engine's: in FP32 inside, and backward puts the gradient where the logits are."""
    from transformer_engine.pytorch.cross_entropy import parallel_cross_entropy

    return parallel_cross_entropy(  # type: ignore[no-any-return]
        logits, labels, dist_process_group=tp_group, overwrite_input=True
    )


class OutputHead(ColumnParallelLinear):  # type: ignore[misc]
    """Megatron-Core's linear, and the cross-entropy of what it predicts.

    `tied`: it has no weight of its own. `chunk_tokens`: tokens whose logits exist at a time when losses are
    asked for, see `linear_cross_entropy`; None: all, and they are kept for backward: in the run's precision
    with `fused_loss` (Transformer Engine's kernel, which makes their gradient in their place), else in FP32.
    """

    def __init__(
        self,
        config: TransformerConfig,
        vocabulary: int,
        tp_group: dist.ProcessGroup,
        *,
        tied: bool,
        chunk_tokens: int | None,
        fused_loss: bool,
    ) -> None:
        super().__init__(
            config.hidden_size,
            vocabulary,
            config=_without_fused_gradients(config),
            init_method=config.init_method,
            bias=False,
            gather_output=False,
            skip_weight_param_allocation=tied,
            tp_group=tp_group,
        )
        self.chunk_tokens, self.fused_loss = chunk_tokens, fused_loss

    def forward(
        self, hidden: Tensor, weight: Tensor | None = None, labels_KBS: Tensor | None = None
    ) -> Tensor:
        """Cross-entropies [K, B, S] in float32 of `hidden` [K S', B, H], or without labels its logits.

        `weight` is the one that a tied head takes.
        """
        if labels_KBS is None:
            return super().forward(hidden, weight)[0]
        if self.chunk_tokens is not None:
            return self._losses_by_chunks(hidden, weight, labels_KBS, self.chunk_tokens)
        depths = zip(hidden.chunk(len(labels_KBS)), labels_KBS, strict=True)
        return torch.stack([self._losses(hidden_SBH, weight, labels_BS) for hidden_SBH, labels_BS in depths])

    def _losses(self, hidden_SBH: Tensor, weight: Tensor | None, labels_BS: Tensor) -> Tensor:
        """By the whole logits of one prediction depth: [B, S]."""
        logits_SBV, labels_SB = super().forward(hidden_SBH, weight)[0], labels_BS.transpose(0, 1)
        group = self.tp_group if self.tp_group.size() > 1 else None
        if self.fused_loss:
            losses_SB = _fused_cross_entropy(logits_SBV, labels_SB, group)
        elif group is not None:
            losses_SB = vocab_parallel_cross_entropy(
                logits_SBV.float(), labels_SB.contiguous(), tp_group=group
            )
        else:
            losses_SB = cross_entropy(logits_SBV.float(), labels_SB)
        return losses_SB.transpose(0, 1)

    def _losses_by_chunks(
        self, hidden: Tensor, weight: Tensor | None, labels_KBS: Tensor, chunk_tokens: int
    ) -> Tensor:
        """Of all prediction depths at once, so that the weight's gradient is summed up in one place."""
        weight, ranks = self.weight if weight is None else weight, 1
        group = self.tp_group if self.tp_group.size() > 1 else None
        if group is not None and self.sequence_parallel:
            hidden, ranks = gather_from_sequence_parallel_region(hidden, group=group), group.size()
        elif group is not None:
            hidden = copy_to_tensor_model_parallel_region(hidden, group=group)
        # Gathered hidden states lie rank after rank, each with all depths: [R, K, S', B].
        labels_RKSB = labels_KBS.transpose(1, 2).unflatten(1, (ranks, -1)).transpose(0, 1)
        losses_T = linear_cross_entropy(
            hidden.flatten(0, 1), weight, labels_RKSB.flatten(), chunk_tokens, group
        )
        losses_KRSB = losses_T.view(labels_RKSB.shape).transpose(0, 1)
        return losses_KRSB.flatten(1, 2).transpose(1, 2)
