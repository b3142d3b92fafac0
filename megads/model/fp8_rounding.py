"""Rounding to FP8 and back: the operands of FP8 products as numbers that one can compute with anywhere.

Recipes, after DeepSeek-V3 (arXiv:2412.19437, section 3.3.2) and Transformer Engine 2.20's defaults:

- blockwise: activations and gradients in blocks of 1 x 128 along the summed dimension, weights in blocks of
  128 x 128; scales are powers of two.
- mxfp8 (OCP Microscaling 1.0): every operand in blocks of 1 x 32 along the summed dimension; the scale's
  exponent is rounded up, so that nothing is clipped.
- tensorwise: one scale per tensor, from its own largest value.
- delayed: one scale per tensor, from the largest values of earlier steps (`fp8_history.py`); values beyond it
  are clipped.

Values are rounded to nearest-even and clipped to FP8's range. A tensor may hold several matrices below each
other (the tokens of several experts): blocks never reach over their borders, and "per tensor" is per matrix.

Shapes: R rows, C columns, E matrices. Rows are what a matrix's blocks are counted along.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megads.mcore.precision import RecipeName

Scale = Callable[[Tensor, float], Tensor]


def exact_scale(amax: Tensor, largest: float) -> Tensor:
    """Factors that take `amax` to `largest`; 1 where there is nothing to scale, or no finite number."""
    scale = (largest / amax).clamp(max=torch.finfo(torch.float32).max)
    return torch.where((amax > 0) & amax.isfinite(), scale, 1.0)


def power_of_two_scale(amax: Tensor, largest: float) -> Tensor:
    """`exact_scale` rounded down to a power of two, as Transformer Engine does for blocks."""
    # frexp gives a mantissa in [0.5, 1).
    exponent = torch.frexp(exact_scale(amax, largest)).exponent
    return torch.ldexp(torch.ones_like(amax), exponent - 1)


def e8m0_scale(amax: Tensor, largest: float) -> Tensor:
    """2^-ceil(log2(amax / largest)), its exponent in E8M0's range [-127, 127]; 1 where amax is 0."""
    mantissa, exponent = torch.frexp(amax * (1.0 / largest))
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent).clamp(-127, 127)
    return torch.where((amax > 0) & amax.isfinite(), torch.ldexp(torch.ones_like(amax), -exponent), 1.0)


def to_fp8_and_back(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`x * scale` rounded to `dtype`, divided by `scale`, as float32. NaN stays NaN."""
    largest = torch.finfo(dtype).max
    return (x.float() * scale).clamp_(-largest, largest).to(dtype).float().div_(scale)


@dataclass(frozen=True)
class Rows:
    """How the rows of a tensor divide into matrices: `ends` [E] int32, or None for one matrix."""

    count: int
    ends: Tensor | None = None

    def matrix_of_row(self, device: torch.device) -> tuple[Tensor, Tensor, int]:
        """Matrix of each row [R], first row of each matrix [E], and E."""
        if self.ends is None:
            zeros = torch.zeros(self.count, dtype=torch.long, device=device)
            return zeros, zeros[:1], 1
        ends = self.ends.long()
        matrix = torch.searchsorted(ends, torch.arange(self.count, device=device), right=True)
        return matrix, F.pad(ends[:-1], (1, 0)), len(ends)


def _largest_of_groups(amax_RC: Tensor, group_R: Tensor, groups: int) -> Tensor:
    zeros = amax_RC.new_zeros(groups, amax_RC.shape[1])
    return zeros.scatter_reduce_(0, group_R.unsqueeze(1).expand_as(amax_RC), amax_RC, "amax")


def _round_groups(
    x_RC: Tensor, group_R: Tensor, groups: int, scale_of: Scale, dtype: torch.dtype, *, whole: bool
) -> Tensor:
    """One scale for each group of rows: of the whole rows, or of each of their columns."""
    amax = x_RC.detach().abs().float()
    if whole:
        amax = amax.amax(dim=1, keepdim=True)
    of_groups = _largest_of_groups(amax, group_R, groups)
    return to_fp8_and_back(x_RC, scale_of(of_groups, torch.finfo(dtype).max)[group_R], dtype)


def round_along_columns(x_RC: Tensor, block: int, scale_of: Scale, dtype: torch.dtype) -> Tensor:
    """Blocks of 1 x `block`: within a row. The last block of a row may be shorter."""
    columns = x_RC.shape[1]
    blocks = F.pad(x_RC, (0, -columns % block)).unflatten(1, (-1, block)).float()
    scale = scale_of(blocks.abs().amax(dim=2, keepdim=True), torch.finfo(dtype).max)
    return to_fp8_and_back(blocks, scale, dtype).flatten(1)[:, :columns]


def round_along_rows(x_RC: Tensor, block: int, scale_of: Scale, dtype: torch.dtype, rows: Rows) -> Tensor:
    """Blocks of `block` x 1: within a column, starting anew with each matrix."""
    matrix_R, first_E, matrices = rows.matrix_of_row(x_RC.device)
    place_R = torch.arange(rows.count, device=x_RC.device) - first_E[matrix_R]
    # Blocks are numbered by their last possible row, so that no two matrices share one.
    group_R = first_E[matrix_R] // block + matrix_R + place_R // block
    return _round_groups(x_RC, group_R, rows.count // block + matrices + 1, scale_of, dtype, whole=False)


def round_tiles(w: Tensor, block: int, scale_of: Scale, dtype: torch.dtype) -> Tensor:
    """Blocks of `block` x `block` of the last two dimensions [..., R, C]; at the edges they are smaller."""
    rows, columns = w.shape[-2:]
    padded = F.pad(w, (0, -columns % block, 0, -rows % block)).float()
    tiles = padded.unflatten(-1, (-1, block)).unflatten(-3, (-1, block))  # [..., tiles, block, tiles, block]
    scale = scale_of(tiles.abs().amax(dim=(-3, -1), keepdim=True), torch.finfo(dtype).max)
    rounded = to_fp8_and_back(tiles, scale, dtype).flatten(-2).flatten(-3, -2)
    return rounded[..., :rows, :columns]


def round_matrices(x_RC: Tensor, scale_of: Scale, dtype: torch.dtype, rows: Rows) -> Tensor:
    """One scale per matrix."""
    matrix_R, _, matrices = rows.matrix_of_row(x_RC.device)
    return _round_groups(x_RC, matrix_R, matrices, scale_of, dtype, whole=True)


def largest_of_matrices(x_RC: Tensor, rows: Rows) -> Tensor:
    """The largest magnitude in each matrix [E]."""
    matrix_R, _, matrices = rows.matrix_of_row(x_RC.device)
    amax = x_RC.detach().abs().float().amax(dim=1, keepdim=True)
    return _largest_of_groups(amax, matrix_R, matrices)[:, 0]


BLOCKS: dict[RecipeName, tuple[int, Scale]] = {
    "blockwise": (128, power_of_two_scale),
    "mxfp8": (32, e8m0_scale),
}
