"""Rounding to FP8: against loops over blocks, exact where it must be, within FP8's error where it cannot."""

import math

import pytest
import torch

from megads.model.fp8_rounding import (
    BLOCKS,
    Rows,
    e8m0_scale,
    exact_scale,
    largest_of_matrices,
    power_of_two_scale,
    round_along_columns,
    round_along_rows,
    round_matrices,
    round_tiles,
)

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
MATRICES = Rows(300, torch.tensor([0, 130, 131, 300], dtype=torch.int32))  # the first one is empty


def spread(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Numbers whose magnitudes differ by orders between rows and columns."""
    generator = torch.Generator().manual_seed(seed)
    factors = torch.logspace(-6, 3, rows).unsqueeze(1) * torch.logspace(2, -2, columns)
    return torch.randn(rows, columns, generator=generator) * factors


def one_block(block: torch.Tensor, kind: str, dtype: torch.dtype) -> torch.Tensor:
    """A block scaled, rounded and scaled back, in Python's floats."""
    largest, amax = torch.finfo(dtype).max, float(block.abs().max())
    if amax == 0:
        return torch.zeros_like(block)
    if kind == "blockwise":
        scale = 2.0 ** math.floor(math.log2(largest / amax))
    elif kind == "mxfp8":
        scale = 2.0 ** -math.ceil(math.log2(amax / largest))
    else:
        scale = largest / amax
    scaled = (block.double() * scale).clamp(-largest, largest).float().to(dtype).double()
    return (scaled / scale).float()


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("kind", ["blockwise", "mxfp8"])
def test_blocks_of_columns_as_in_a_loop(kind: str, dtype: torch.dtype) -> None:
    x = spread(5, 300)
    block, scale_of = BLOCKS[kind]
    expected = torch.cat([one_block(x[r : r + 1, c : c + block], kind, dtype)
                          for r in range(5) for c in range(0, 300, block)], dim=1).view(5, 300)  # fmt: skip
    assert torch.equal(round_along_columns(x, block, scale_of, dtype), expected)


@pytest.mark.parametrize("kind", ["blockwise", "mxfp8"])
def test_blocks_of_rows_as_in_a_loop_and_never_over_the_border_of_a_matrix(kind: str) -> None:
    x = spread(300, 7)
    block, scale_of = BLOCKS[kind]
    expected = torch.empty_like(x)
    for start, end in ((0, 130), (130, 131), (131, 300)):
        for row in range(start, end, block):
            for column in range(7):
                part = (slice(row, min(row + block, end)), slice(column, column + 1))
                expected[part] = one_block(x[part], kind, E4M3)
    assert torch.equal(round_along_rows(x, block, scale_of, E4M3, MATRICES), expected)


def test_tiles_as_in_a_loop() -> None:
    w = torch.stack((spread(200, 150), spread(200, 150, seed=1)))
    expected = torch.empty_like(w)
    for matrix in range(2):
        for row in range(0, 200, 128):
            for column in range(0, 150, 128):
                part = (matrix, slice(row, row + 128), slice(column, column + 128))
                expected[part] = one_block(w[part], "blockwise", E4M3)
    assert torch.equal(round_tiles(w, 128, power_of_two_scale, E4M3), expected)


def test_matrices_have_a_scale_each() -> None:
    x = spread(300, 7)
    expected = torch.cat(
        [one_block(x[a:b], "tensorwise", E4M3) for a, b in ((0, 130), (130, 131), (131, 300))]
    )
    torch.testing.assert_close(round_matrices(x, exact_scale, E4M3, MATRICES), expected, rtol=1e-6, atol=0)
    assert torch.equal(
        largest_of_matrices(x, MATRICES),
        torch.stack([torch.zeros(()), *(x[a:b].abs().max() for a, b in ((0, 130), (130, 131), (131, 300)))]),
    )


@pytest.mark.parametrize("scale_of", [power_of_two_scale, e8m0_scale, exact_scale])
def test_what_fp8_can_represent_is_kept_exactly(scale_of) -> None:  # type: ignore[no-untyped-def]
    x = torch.arange(-8, 8).float().unsqueeze(1) * torch.tensor([1.0, 2.0, 0.25, 1.75])
    x[:, 3] = 448.0  # so that a scale from the largest value is 1
    assert torch.equal(round_along_columns(x, 128, scale_of, E4M3), x)


@pytest.mark.parametrize(("dtype", "relative"), [(E4M3, 2**-4), (E5M2, 2**-3)])
def test_the_error_of_a_number_is_half_a_unit_in_its_last_place(dtype: torch.dtype, relative: float) -> None:
    x = spread(64, 256)
    rounded = round_along_columns(x, 128, power_of_two_scale, dtype)
    block_max = x.view(64, 2, 128).abs().amax(dim=2, keepdim=True).expand(64, 2, 128).reshape(64, 256)
    smallest = torch.finfo(dtype).smallest_normal / torch.finfo(dtype).max * 2  # the scale is rounded down
    error = (rounded - x).abs()
    assert (error <= relative * torch.maximum(x.abs(), block_max * smallest)).all()
    assert error.max() > 0


def test_scales_at_the_ends() -> None:
    amax = torch.tensor([0.0, float("inf"), float("nan"), 1e-42, 448.0, 449.0])
    assert exact_scale(amax, 448.0)[:3].tolist() == [1.0, 1.0, 1.0]
    assert exact_scale(amax, 448.0)[3].item() == torch.finfo(torch.float32).max
    assert power_of_two_scale(amax, 448.0)[4:].tolist() == [1.0, 0.5]
    assert e8m0_scale(amax, 448.0)[[0, 1, 4, 5]].tolist() == [1.0, 1.0, 1.0, 0.5]
    assert power_of_two_scale(torch.tensor([3.0]), 448.0).item() == 128.0


def test_nan_stays_and_infinity_is_clipped() -> None:
    x = torch.tensor([[1.0, float("nan")], [1.0, float("inf")]])
    rounded = round_along_columns(x, 128, power_of_two_scale, E4M3)
    assert rounded[0].isnan().tolist() == [False, True]
    assert rounded[1].tolist() == [1.0, 448.0]
