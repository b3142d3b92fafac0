"""A linear layer that tensor parallelism does not split."""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class ReplicatedLinear(torch.nn.Linear):
    """A linear layer without bias that every tensor-parallel rank holds whole.

    Under sequence parallelism each rank sees its own tokens, so `finalize_model_grads` sums the gradients.
    """

    def __init__(self, in_features: int, out_features: int, config: TransformerConfig) -> None:
        super().__init__(in_features, out_features, bias=False, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        """`x` [..., in_features] -> ([..., out_features], None), as Megatron-Core's linears return it."""
        return super().forward(x), None
