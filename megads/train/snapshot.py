"""The tensors of a run as a sharded state dictionary: weights, biases, optimizer, generators, average.

Everything is named and placed independently of the layout (Megatron-Core's `torch_dist`), so a checkpoint
of one layout loads into another. Generator states, and FP8's histories of delayed scaling, belong to a rank
of one layout: they are restored only where the layout is the same, which is what makes a resume bitwise exact
with dropout, router noise, or delayed scaling.
"""

from typing import Any

from megads.config.resolve import Resolved
from megads.mcore.generators import restore_generators, sharded_generators
from megads.model.build import unwrap
from megads.model.fp8_history import restore_histories, sharded_histories
from megads.optim.state import (
    load_optimizer_state,
    load_weights,
    sharded_optimizer_state,
    sharded_weights,
    start_from_weights,
    whole_parameters,
)
from megads.train.average import ParameterAverage
from megads.train.step import TrainingStep


def layout_of(resolved: Resolved) -> dict[str, Any]:
    """The parallel layout as a checkpoint records it."""
    names = ("world_size", "tp", "pp", "vpp", "cp", "ep", "etp", "dp", "pipeline_layout", "device")
    return {name: _plain(getattr(resolved, name)) for name in names}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def metadata_of(step: TrainingStep) -> dict[str, Any]:
    """How Megatron-Core is to name and split tensors: the same in every layout."""
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": True,
        "non_homogeneous_layers": True,
        "dp_cp_group": step.groups.dp_cp,
    }


def sharded_state(
    step: TrainingStep,
    *,
    optimizer: bool,
    generators: bool,
    fp8_histories: bool = False,
    average: ParameterAverage | None = None,
    loading: bool = False,
) -> dict[str, Any]:
    """What to save, or the places to load into (`loading`)."""
    metadata = metadata_of(step)
    entries = []
    for chunk in step.chunks:
        with whole_parameters(chunk):
            entries.append(unwrap(chunk).sharded_state_dict(metadata=metadata))
    state: dict[str, Any] = {
        f"model{index}": sharded_weights(chunk, entries[index]) for index, chunk in enumerate(step.chunks)
    }
    if optimizer:
        state["optimizer"] = sharded_optimizer_state(
            step.optimizer, step.chunks, entries, metadata, loading=loading
        )
    if generators:
        state["generators"] = sharded_generators()
    if fp8_histories:
        state["fp8_histories"] = sharded_histories(step.chunks)
    if average is not None:
        state["average"] = average.sharded_state(metadata)
    return state


def restore_state(
    step: TrainingStep,
    state: dict[str, Any],
    *,
    optimizer: bool,
    generators: bool,
    fp8_histories: bool = False,
    average: ParameterAverage | None = None,
) -> bool:
    """Put loaded tensors in place; whether all products with delayed scaling have got a history."""
    models = [state[f"model{index}"] for index in range(len(step.chunks))]
    for chunk, model in zip(step.chunks, models, strict=True):
        load_weights(chunk, unwrap(chunk), model)
    complete = restore_histories(step.chunks, state["fp8_histories"]) if fp8_histories else False
    if optimizer:
        load_optimizer_state(step.optimizer, step.chunks, state["optimizer"])
    else:
        start_from_weights(step.optimizer, step.chunks, models)
    if generators:
        restore_generators(state["generators"])
    if average is not None:
        average.restore(state["average"])
    return complete
