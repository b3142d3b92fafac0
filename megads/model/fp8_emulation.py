"""FP8 products without FP8 hardware: operands rounded as a recipe says, products in FP32.

For debugging an FP8 configuration on any machine, and as the reference that a GPU's products are compared
with. All three products of a layer take FP8 operands, as in DeepSeek-V3 (arXiv:2412.19437, section 3.3.1):
output, input gradient, weight gradient. What differs from hardware: sums are FP32, where Tensor Cores keep
fewer bits (Hopper about 14, which the paper mends by promotion); under tensor parallelism activations are
rounded after they are gathered, not before.

`emulated_backend` gives the modules; they stand on the native ones and have the same weights.
"""

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor
from torch.autograd.function import once_differentiable

from megads.config.schema import FP8
from megads.mcore.precision import RecipeName
from megads.model.backends import Backend
from megads.model.experts import GroupedExperts
from megads.model.fp8_history import FORMATS, GRADIENT, INPUT, WEIGHT, AmaxHistory
from megads.model.fp8_rounding import (
    BLOCKS,
    Rows,
    exact_scale,
    largest_of_matrices,
    round_along_columns,
    round_along_rows,
    round_matrices,
    round_tiles,
    to_fp8_and_back,
)
from megads.model.linear import ReplicatedLinear


@dataclasses.dataclass(frozen=True)
class Rounding:
    """What a recipe makes of the operands of one product; `history` for delayed scaling only."""

    recipe: RecipeName
    formats: tuple[torch.dtype, torch.dtype, torch.dtype]
    history: AmaxHistory | None = None

    def activation(self, x_RC: Tensor, rows: Rows, *, sum_over_rows: bool, operand: int = INPUT) -> Tensor:
        """An input, or a gradient of the output, of a product that sums over its columns or its rows."""
        dtype = self.formats[operand]
        if self.recipe in BLOCKS:
            block, scale_of = BLOCKS[self.recipe]
            if sum_over_rows:
                return round_along_rows(x_RC, block, scale_of, dtype, rows)
            return round_along_columns(x_RC, block, scale_of, dtype)
        if self.history is not None:
            matrix_R, _, _ = rows.matrix_of_row(x_RC.device)
            return to_fp8_and_back(x_RC, self.history.scale[operand][matrix_R].unsqueeze(1), dtype)
        return round_matrices(x_RC, exact_scale, dtype, rows)

    def weight(self, w_EOI: Tensor, *, sum_over_rows: bool) -> Tensor:
        """Weights of a product that sums over I, or (`sum_over_rows`) over O."""
        if self.recipe == "blockwise":
            block, scale_of = BLOCKS[self.recipe]
            return round_tiles(w_EOI, block, scale_of, self.formats[WEIGHT])
        stacked = self.activation(
            w_EOI.flatten(0, 1), _rows_of(w_EOI), sum_over_rows=sum_over_rows, operand=WEIGHT
        )
        return stacked.view_as(w_EOI)

    def record(self, operand: int, x_RC: Tensor, rows: Rows) -> None:
        """Note the largest values for the scales of later steps."""
        if self.history is not None:
            self.history.record(operand, largest_of_matrices(x_RC, rows))


def _rows_of(w_EOI: Tensor) -> Rows:
    """The matrices of weights that lie below each other."""
    experts, outputs, _ = w_EOI.shape
    return Rows(experts * outputs, torch.arange(1, experts + 1, device=w_EOI.device) * outputs)


class _Product(torch.autograd.Function):
    """x_RI w_EOI^T, matrix by matrix: [R, O]."""

    @staticmethod
    def forward(ctx: Any, x_RI: Tensor, w_EOI: Tensor, ends: Tensor | None, rounding: Rounding) -> Tensor:
        rows = Rows(len(x_RI), ends)
        ctx.save_for_backward(x_RI, w_EOI, ends)
        ctx.rounding = rounding
        x = rounding.activation(x_RI, rows, sum_over_rows=False)
        w = rounding.weight(w_EOI, sum_over_rows=False)
        return _multiply(x, w.transpose(1, 2), ends).to(x_RI.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RO: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x_RI, w_EOI, ends = ctx.saved_tensors
        rounding, rows = ctx.rounding, Rows(len(x_RI), ends)
        rounding.record(GRADIENT, grad_RO, rows)
        grad = rounding.activation(grad_RO, rows, sum_over_rows=False, operand=GRADIENT)
        grad_x = _multiply(grad, rounding.weight(w_EOI, sum_over_rows=True), ends).to(x_RI.dtype)
        grad = rounding.activation(grad_RO, rows, sum_over_rows=True, operand=GRADIENT)
        x = rounding.activation(x_RI, rows, sum_over_rows=True)
        grad_w = (grad.t() @ x).unsqueeze(0) if ends is None else F.grouped_mm(grad.t(), x, offs=ends)
        return grad_x, grad_w.to(w_EOI.dtype), None, None


def _multiply(x_RK: Tensor, w_EKN: Tensor, ends: Tensor | None) -> Tensor:
    return x_RK @ w_EKN[0] if ends is None else F.grouped_mm(x_RK, w_EKN, offs=ends)


def emulated_product(x_RI: Tensor, w_EOI: Tensor, ends_E: Tensor | None, rounding: Rounding) -> Tensor:
    """`F.grouped_mm(x, w^T, offs=ends_E)` in emulated FP8, `x w[0]^T` where that is None: [R, O].

    R must not be 0.
    """
    if torch.is_grad_enabled():  # neither in evaluation nor in the pass that will be recomputed
        rounding.record(INPUT, x_RI, Rows(len(x_RI), ends_E))
        rounding.record(WEIGHT, w_EOI.flatten(0, 1), _rows_of(w_EOI))
    return _Product.apply(x_RI, w_EOI, ends_E, rounding)


def emulated_linear(x: Tensor, w_OI: Tensor, rounding: Rounding) -> Tensor:
    """`F.linear(x, w_OI)` in emulated FP8: [..., I] -> [..., O]."""
    product_RO = emulated_product(x.flatten(0, -2), w_OI.unsqueeze(0), None, rounding)
    return product_RO.unflatten(0, x.shape[:-1])


class _Emulated:
    """What the modules below share; `emulated_backend` sets a run's settings on a subclass of each."""

    fp8: FP8
    recipe: RecipeName

    def prepare_products(self, matrices: int, *products: str) -> None:
        """The rounding of each product of the module, all of them with so many matrices."""
        delayed = self.recipe == "delayed"
        self.amax_histories = {name: AmaxHistory(self.fp8, matrices) for name in products if delayed}
        self.roundings = {
            name: Rounding(self.recipe, FORMATS[self.fp8.format], self.amax_histories.get(name))
            for name in products
        }


class _EmulatedSplitLinear(_Emulated):
    """Megatron-Core's linears, whose `_forward_impl` is the product and what tensor parallelism adds."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.prepare_products(1, "weight")

    def _forward_impl(
        self,
        input: Tensor,
        weight: Tensor,
        *,
        sequence_parallel: bool,
        allreduce_dgrad: bool,
        tp_group: dist.ProcessGroup | None,
        **unused: Any,
    ) -> Tensor:
        if sequence_parallel:
            input = gather_from_sequence_parallel_region(input, group=tp_group)
        elif allreduce_dgrad:
            input = copy_to_tensor_model_parallel_region(input, group=tp_group)
        return emulated_linear(input, weight, self.roundings["weight"])


class EmulatedColumnLinear(_EmulatedSplitLinear, ColumnParallelLinear):  # type: ignore[misc]
    """`ColumnParallelLinear` in emulated FP8."""


class EmulatedRowLinear(_EmulatedSplitLinear, RowParallelLinear):  # type: ignore[misc]
    """`RowParallelLinear` in emulated FP8."""


class EmulatedReplicatedLinear(_Emulated, ReplicatedLinear):
    """`ReplicatedLinear` in emulated FP8."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.prepare_products(1, "weight")

    def forward(self, x: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return emulated_linear(x, self.weight, self.roundings["weight"]), None


class EmulatedExperts(_Emulated, GroupedExperts):
    """`GroupedExperts` in emulated FP8: scales are of single experts."""

    def __init__(self, num_local_experts: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(num_local_experts, *args, **kwargs)
        self.prepare_products(num_local_experts, "weight1", "weight2")

    def product(self, name: str, x_TI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
        return emulated_product(x_TI, weight_EOI, ends_E, self.roundings[name])


def emulated_backend(native: Backend, fp8: FP8, recipe: RecipeName) -> Backend:
    """The native modules with their products in emulated FP8."""

    def with_settings(module: type) -> type:
        return type(module.__name__, (module,), {"fp8": fp8, "recipe": recipe})

    return dataclasses.replace(
        native,
        column_linear=with_settings(EmulatedColumnLinear),
        row_linear=with_settings(EmulatedRowLinear),
        replicated_linear=with_settings(EmulatedReplicatedLinear),
        experts=with_settings(EmulatedExperts),
        without_fp8=native,
    )
