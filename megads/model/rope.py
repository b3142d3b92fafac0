"""Rotary position embedding of MLA's decoupled part: plain RoPE, and YaRN for context extension.

RoPE: arXiv:2104.09864. YaRN: arXiv:2309.00071, with DeepSeek's two magnitude coefficients: `mscale`
scales cos and sin, `mscale_all_dim` the softmax (DeepSeek-V2, section 3.1.4).

Shapes: S sequence, B batch (1 where all samples share positions), R rope width.
"""

import math

import torch
from torch import Tensor

from megads.config.schema import MLA, RopeScaling


def _yarn_magnitude(factor: float, coefficient: float) -> float:
    """sqrt(1/t) of YaRN's eq. 22 with DeepSeek's coefficient: 0.1 m ln(s) + 1."""
    return 0.1 * coefficient * math.log(factor) + 1.0 if factor > 1 else 1.0


def softmax_scale(mla: MLA, qk_head_dim: int) -> float:
    """Factor on the attention logits: 1/sqrt(head width), and YaRN's squared magnitude."""
    scale = qk_head_dim**-0.5
    if mla.rope_scaling is None:
        return scale
    return scale * _yarn_magnitude(mla.rope_scaling.factor, mla.rope_scaling.mscale_all_dim) ** 2


def _yarn_ramp(scaling: RopeScaling, theta: float, rope_dim: int, device: torch.device | None) -> Tensor:
    """1 where a frequency is interpolated, 0 where it is kept [R/2] (YaRN, eq. 18-23)."""

    def dimension_of(rotations: float) -> float:
        length = scaling.original_max_position_embeddings
        return rope_dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(dimension_of(scaling.beta_fast)), 0)
    high = min(math.ceil(dimension_of(scaling.beta_slow)), rope_dim - 1)
    index = torch.arange(rope_dim // 2, dtype=torch.float32, device=device)
    return ((index - low) / max(high - low, 0.001)).clamp(0, 1)


def inverse_frequencies(mla: MLA, rope_dim: int, device: torch.device | None = None) -> Tensor:
    """Angle per position of each pair of dimensions [R/2], float32."""
    exponent = torch.arange(0, rope_dim, 2, dtype=torch.float32, device=device) / rope_dim
    frequencies = 1.0 / mla.rope_theta**exponent
    if mla.rope_scaling is None:
        return frequencies
    ramp = _yarn_ramp(mla.rope_scaling, mla.rope_theta, rope_dim, device)
    return frequencies / mla.rope_scaling.factor * ramp + frequencies * (1 - ramp)


def rotary_table(mla: MLA, rope_dim: int, positions_SB: Tensor) -> Tensor:
    """Cosines and sines for the given positions [2, S, B, R/2], float32."""
    angles = positions_SB.float().unsqueeze(-1) * inverse_frequencies(mla, rope_dim, positions_SB.device)
    table = torch.stack((angles.cos(), angles.sin()))
    if mla.rope_scaling is not None:
        factor = mla.rope_scaling.factor
        magnitude = _yarn_magnitude(factor, mla.rope_scaling.mscale) / _yarn_magnitude(
            factor, mla.rope_scaling.mscale_all_dim
        )
        table = table * magnitude
    return table


def rotate_and_join(
    q_SBND: Tensor, kv_SBNX: Tensor, rope_key_SBR: Tensor, q_table: Tensor, k_table: Tensor, value_width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [S, B, N, *] by Megatron-Core's Triton kernels; overwrites the queries.

    The same layout as `rotate`, whose products are in the run's precision: here they are in float32. A table
    with positions of each sample is given as that of one long sequence, which is how the kernels count.
    """
    from megatron.core.fusions.fused_mla_yarn_rope_apply import (
        fused_apply_mla_rope_for_kv,
        fused_apply_mla_rope_for_q,
    )

    def kernel_table(table: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = torch.cat((table, table), dim=-1).flatten(1, 2).unbind(0)
        return cos, sin

    width = rope_key_SBR.shape[-1]
    shape, kv_shape = q_SBND.shape[:2], kv_SBNX.shape[:2]
    if q_table.shape[2] > 1:
        q_SBND, kv_SBNX = q_SBND.flatten(0, 1).unsqueeze(1), kv_SBNX.flatten(0, 1).unsqueeze(1)
        rope_key_SBR = rope_key_SBR.flatten(0, 1).unsqueeze(1)
    q = fused_apply_mla_rope_for_q(
        q_SBND.contiguous(), *kernel_table(q_table), q_SBND.shape[-1] - width, width
    )
    k, v = fused_apply_mla_rope_for_kv(
        kv_SBNX.contiguous(),
        rope_key_SBR.contiguous().unsqueeze(2),
        *kernel_table(k_table),
        width,
        kv_SBNX.shape[-1] - value_width,
        value_width,
    )
    return q.view(*shape, *q.shape[2:]), k.view(*kv_shape, *k.shape[2:]), v.view(*kv_shape, *v.shape[2:])


def rotate(x_SBNR: Tensor, table: Tensor) -> Tensor:
    """Rotate the interleaved pairs (0,1), (2,3), ... of each head [S, B, N, R].

    The result holds all first elements, then all second ones. Queries and keys are permuted alike,
    so their products are those of the published (interleaved) weights.
    """
    cos, sin = table.unsqueeze(-2).to(x_SBNR.dtype).unbind(0)
    first, second = x_SBNR.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
