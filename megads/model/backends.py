"""The modules that layers are built from, one set for each library that can compute them.

All sets have the same constructors (those of Megatron-Core's linears and norms), the same weights under the
same names in a checkpoint, and the same results up to rounding. Embedding, router and output head are the
same for all. The choice is `megads.mcore.backend.choose_backend`.
"""

from dataclasses import dataclass, field
from typing import Any

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

from megads.mcore.backend import Name
from megads.mcore.fusions import Fusions
from megads.model.attention import CoreAttention, dense_attention
from megads.model.experts import GroupedExperts
from megads.model.linear import ReplicatedLinear
from megads.model.norm import Norm


@dataclass(frozen=True)
class Backend:
    """Constructors.

    Linears give (output, None), a bias that is never there. `replicated_linear(inputs, outputs, config)` is
    whole on every tensor-parallel rank; `norm(config, hidden_size, eps)`; `experts(num_local_experts, config,
    pg_collection)` are the routed experts of a rank. `core_attention` is a function. `without_fp8` are the
    modules of layers that are kept out of FP8, where that is a matter of modules and not of a context.
    `fusions` are the kernels that modules of every backend may take.
    """

    column_linear: Any
    row_linear: Any
    replicated_linear: Any
    norm: Any
    experts: Any
    core_attention: CoreAttention = dense_attention
    without_fp8: "Backend | None" = None
    fusions: Fusions = field(default_factory=Fusions)


def backend_modules(name: Name) -> Backend:
    """The modules of a backend."""
    if name == "native":
        return Backend(ColumnParallelLinear, RowParallelLinear, ReplicatedLinear, Norm, GroupedExperts)
    from megads.model import transformer_engine as te

    return Backend(
        te.ColumnTELinear,
        te.TERowParallelLinear,
        te.ReplicatedTELinear,
        te.TENorm,
        te.GroupedTEExperts,
    )
