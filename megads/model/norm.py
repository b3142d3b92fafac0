"""RMSNorm and LayerNorm as Megatron-Core's layers build them.

Megatron-Core's own torch norm refuses sequence parallelism. These mark their weights as
sequence-parallel instead, so that `finalize_model_grads` sums the partial gradients over TP.
"""

import torch
from megatron.core.transformer import TransformerConfig

from megads.model.functional import rms_norm


class Norm(torch.nn.Module):
    """RMSNorm (arXiv:1910.07467) or LayerNorm over the last dimension, by `config.normalization`."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.bias = None
        if config.normalization == "LayerNorm":
            self.bias = torch.nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize `x` [..., hidden_size]."""
        if self.bias is None:
            return rms_norm(x, self.weight, self.eps)
        return torch.nn.functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
