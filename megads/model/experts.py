"""Routed experts; natively as one stacked weight and grouped matrix products: no loop over experts.

That works wherever `torch.nn.functional.grouped_mm` does (CPU, Hopper), without Transformer Engine.

Shapes: T dispatched tokens sorted by expert, E local experts, H hidden, I expert width (its local
part under expert tensor parallelism).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import CheckpointWithoutOutput
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megads.model.functional import swiglu


class Experts(MegatronModule, ABC):
    """The routed experts of a rank, however they are computed.

    In a checkpoint they are `weight1` [E, 2, I, H] (gate, up) and `weight2` [E, H, I] over all ranks;
    `expert_shapes` has this rank's part of one expert of each. With `recompute_activation` SwiGLU's output is
    not kept but computed again in backward (DeepSeek-V3, section 3.3.3).
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        recompute_activation: bool = False,
    ) -> None:
        super().__init__(config)
        self.groups = pg_collection
        self.recompute_activation = recompute_activation
        self.num_local_experts = num_local_experts
        width, hidden = config.moe_ffn_hidden_size // pg_collection.expt_tp.size(), config.hidden_size
        self.expert_shapes = {"weight1": (2, width, hidden), "weight2": (hidden, width)}

    @abstractmethod
    def expert_weights(self, name: str) -> list[Tensor]:
        """`weight1` or `weight2` of each of this rank's experts, in order, to be filled in place."""

    def activate_and_project(
        self, gate_up_TX: Tensor, gates_T: Tensor, project: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """`project` of the gated SwiGLU of [gate | up] [T, 2 I]: expert outputs [T, H]."""
        activate = partial(swiglu, fused=self.config.bias_activation_fusion)
        if not (self.recompute_activation and self.training):
            return project(activate(gate_up_TX, gates_T))
        checkpoint = CheckpointWithoutOutput(fp8=self.config.fp8)
        output_TH = project(checkpoint.checkpoint(activate, gate_up_TX, gates_T))
        checkpoint.discard_output_and_register_recompute(output_TH)
        return output_TH

    def mark_as_experts(self) -> None:
        """Have gradients reduced over the expert data-parallel group, whose size follows from EP and ETP.

        Also without expert parallelism, where expert TP may differ from TP.
        """
        for weight in self.parameters():
            weight.allreduce = False  # type: ignore[attr-defined]
            weight.tensor_model_parallel = self.groups.expt_tp.size() > 1  # type: ignore[attr-defined]


class GroupedExperts(Experts):
    """SwiGLU experts, stacked: `weight1` [E, 2, I, H] (gate, up), `weight2` [E, H, I]."""

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        recompute_activation: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__(num_local_experts, config, pg_collection, recompute_activation)
        for weight, shape in self.expert_shapes.items():
            empty = torch.empty(num_local_experts, *shape, dtype=config.params_dtype)
            self.register_parameter(weight, torch.nn.Parameter(empty))
        self.mark_as_experts()

    def expert_weights(self, name: str) -> list[Tensor]:
        return list(self.get_parameter(name).unbind())

    def forward(self, tokens_TH: Tensor, tokens_per_expert: Tensor, gates_T: Tensor) -> tuple[Tensor, None]:
        """Gated expert outputs [T, H]: gate * down(silu(gate_proj(x)) * up_proj(x))."""
        if tokens_TH.shape[0] == 0:
            # Nothing was routed here, yet every weight must take part in backward, and so must the gates:
            # their gradient travels back through an all-to-all that the other ranks are waiting in.
            return tokens_TH + 0.0 * (self.weight1.sum() + self.weight2.sum() + gates_T.sum()), None
        ends = tokens_per_expert.to(tokens_TH.device).cumsum(0).to(torch.int32)
        gate_up_TX = self.product("weight1", tokens_TH, self.weight1.flatten(1, 2), ends)
        project = partial(self.product, "weight2", weight_EOI=self.weight2, ends_E=ends)
        return self.activate_and_project(gate_up_TX, gates_T, project), None

    def product(self, name: str, x_TI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
        """Each expert's rows of x times its weight, which is (part of) the parameter `name`: [T, O]."""
        return F.grouped_mm(x_TI, weight_EOI.transpose(1, 2), offs=ends_E)

    def backward_dw(self) -> None:
        """Weight gradients are computed with the input gradients: nothing is left to do."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, ShardedTensor]:
        """Experts split over EP along the first axis and over expert TP along their width."""
        groups, axes = self.groups, len(sharded_offsets)
        ep, tp = groups.ep, groups.expt_tp
        width_axis = {"weight1": 2, "weight2": 2}
        return {
            f"{prefix}{name}": ShardedTensor.from_rank_offsets(
                f"{prefix}{name}",
                weight,  # the parameter itself: the optimizer finds its state by identity
                *sharded_offsets,
                (axes, ep.rank(), ep.size()),
                (axes + width_axis[name], tp.rank(), tp.size()),
                replica_id=(0, 0, groups.expt_dp.rank()),
                prepend_axis_num=axes,
            )
            for name, weight in (("weight1", self.weight1), ("weight2", self.weight2))
        }
