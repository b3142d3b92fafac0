"""The modules of the Transformer Engine backend; importing this needs Transformer Engine.

Linears and norms are Megatron-Core's wrappers. The experts are ours, so that their weights have the names and
places of the native ones in a checkpoint. FP8 is Transformer Engine's and Megatron-Core's: the modules
quantize where a layer runs under an FP8 context (`config.fp8`).

Shapes: T dispatched tokens sorted by expert, E local experts, H hidden, I expert width (its local part under
expert tensor parallelism).
"""

import copy
from functools import partial
from typing import Any

from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.extensions.transformer_engine import (
    Fp8Padding,
    Fp8Unpadding,
    TEColumnParallelGroupedLinear,
    TEColumnParallelLinear,
    TELinear,
    TENorm,
    TERowParallelGroupedLinear,
    TERowParallelLinear,
    set_save_original_input,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from transformer_engine.pytorch.tensor import QuantizedTensor

from megads.mcore.user_buffers import NAMES
from megads.model.experts import Experts

__all__ = [
    "ColumnTELinear",
    "GroupedTEExperts",
    "ReplicatedTELinear",
    "TENorm",
    "TERowParallelLinear",
]


class ColumnTELinear(TEColumnParallelLinear):  # type: ignore[misc]
    """Megatron-Core's, but that only those with a user buffer overlap their gather (`tp_comm_overlap`).

    Where a linear's name is none of Transformer Engine's, Megatron-Core turns the overlap off in the
    configuration, which is that of all layers after it too. The gathers of MLA's latents and of MTP's
    projection are not as wide as a buffer.
    """

    def __init__(
        self, *args: Any, config: TransformerConfig, tp_comm_buffer_name: str | None = None, **kwargs: Any
    ) -> None:
        if config.tp_comm_overlap and tp_comm_buffer_name not in NAMES:
            config = copy.copy(config)
            config.tp_comm_overlap = False
        super().__init__(*args, config=config, tp_comm_buffer_name=tp_comm_buffer_name, **kwargs)


class ReplicatedTELinear(TELinear):  # type: ignore[misc]
    """A linear layer without bias that every tensor-parallel rank holds whole."""

    def __init__(self, in_features: int, out_features: int, config: TransformerConfig) -> None:
        super().__init__(
            in_features,
            out_features,
            parallel_mode="duplicated",
            config=config,
            init_method=config.init_method,
            bias=False,
            skip_bias_add=False,
            skip_weight_param_allocation=False,
        )


class GroupedTEExperts(Experts):
    """SwiGLU experts as Transformer Engine's grouped linears: a weight per expert, [2 I, H] and [H, I]."""

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        recompute_activation: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__(num_local_experts, config, pg_collection, recompute_activation)
        common = {
            "config": config,
            "init_method": config.init_method,
            "bias": False,
            "skip_bias_add": False,
            "is_expert": True,
            "pg_collection": pg_collection,
        }
        hidden, width = config.hidden_size, config.moe_ffn_hidden_size
        self.linear_fc1 = TEColumnParallelGroupedLinear(num_local_experts, hidden, 2 * width, **common)
        self.linear_fc2 = TERowParallelGroupedLinear(num_local_experts, width, hidden, **common)
        self.mark_as_experts()
        if config.fp8 and recompute_activation:
            set_save_original_input(self.linear_fc2)  # else it would keep its own, in FP8
        # FP8 products want a multiple of 16 or 32 rows for each expert.
        self.pad = Fp8Padding(num_local_experts) if config.fp8 else None
        self.unpad = Fp8Unpadding(num_local_experts) if config.fp8 else None

    def expert_weights(self, name: str) -> list[Tensor]:
        linear = {"weight1": self.linear_fc1, "weight2": self.linear_fc2}[name]
        return [getattr(linear, f"weight{index}") for index in range(self.num_local_experts)]

    def forward(self, tokens_TH: Tensor, tokens_per_expert: Tensor, gates_T: Tensor) -> tuple[Tensor, None]:
        """Gated expert outputs [T, H]: gate * down(silu(gate_proj(x)) * up_proj(x))."""
        counts = rows = tokens_per_expert.tolist()
        if self.pad is not None:
            tokens_TH, rows = self.pad(tokens_TH, counts)
            gates_T = self.pad(gates_T.unsqueeze(-1), counts)[0].squeeze(-1)
        gate_up_TX = self.linear_fc1(tokens_TH, rows)[0]
        output_TH = self.activate_and_project(
            gate_up_TX, gates_T, lambda hidden_TI: self.linear_fc2(hidden_TI, rows)[0]
        )
        return output_TH if self.unpad is None else self.unpad(output_TH, counts), None

    def backward_dw(self) -> None:
        """Weight gradients that Megatron-Core's overlapped schedule has put off."""
        self.linear_fc2.backward_dw()
        self.linear_fc1.backward_dw()

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, ShardedTensorFactory]:
        """The parts of the native experts' `weight1` [E, 2, I, H] and `weight2` [E, H, I]."""
        groups, state = self.groups, {}
        first = groups.ep.rank() * self.num_local_experts
        for stacked, linear in (("weight1", "linear_fc1"), ("weight2", "linear_fc2")):
            for index, weight in enumerate(self.expert_weights(stacked)):
                state[f"{prefix}{linear}.weight{index}"] = ShardedTensorFactory(
                    f"{prefix}{stacked}",
                    weight,  # the parameter itself: the optimizer finds its state by identity
                    partial(
                        _as_part_of_stack,
                        shape=self.expert_shapes[stacked],
                        expert=(first + index, groups.ep.size() * self.num_local_experts),
                        part=(groups.expt_tp.rank(), groups.expt_tp.size()),
                        offsets=sharded_offsets,
                    ),
                    partial(_from_part_of_stack, shape=tuple(weight.shape)),
                    replica_id=(0, 0, groups.expt_dp.rank()),
                )
        return state


def _as_part_of_stack(
    key: str,
    weight: Tensor,
    replica_id: Any,
    flattened_range: Any,
    *,
    shape: tuple[int, ...],
    expert: tuple[int, int],
    part: tuple[int, int],
    offsets: tuple[Any, ...],
) -> dict[str, ShardedTensor]:
    """One expert's weight, or what belongs to it, as a slice of the stack of all experts'."""
    assert flattened_range is None, "parameters are saved whole"
    axes = len(offsets)
    if isinstance(weight, QuantizedTensor):
        weight = weight.dequantize()
    return {
        "part": ShardedTensor.from_rank_offsets(
            key,
            weight.reshape(1, *shape),
            *offsets,
            (axes, *expert),
            (axes + 2, *part),  # the expert's width, in both weights
            replica_id=replica_id,
            prepend_axis_num=axes,
        )
    }


def _from_part_of_stack(parts: dict[str, Tensor], *, shape: tuple[int, ...]) -> Tensor:
    return parts["part"].reshape(shape)
