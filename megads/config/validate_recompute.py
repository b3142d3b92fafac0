"""Errors of `training.recompute_modules`: parts that the model lacks, or that another part contains."""

from collections.abc import Iterator

from megads.config.schema import Config
from megads.config.shape import model_shape

_OF_MOE_LAYERS = ("moe_act", "shared_experts", "moe")


def recompute_problems(config: Config) -> Iterator[str]:
    """Each problem as one sentence with what to do."""
    training, shape = config.training, model_shape(config)
    if training.gradient_checkpointing != "selective":
        return
    modules = training.recompute_modules
    if not modules:
        yield (
            'training.recompute_modules is empty while gradient_checkpointing = "selective": name what to '
            "recompute, or set gradient_checkpointing to false"
        )
    missing = dict.fromkeys(_OF_MOE_LAYERS, "MoE layers") if not any(shape.is_moe) else {}
    if all(shape.is_moe):
        missing["mlp"] = "dense layers"
    if any(shape.is_moe) and not shape.shared_intermediate_size:
        missing["shared_experts"] = "shared experts"
    for module in modules:
        if module in missing:
            lacks = missing[module]
            yield f"training.recompute_modules: {module}, but the model has no {lacks}: leave it out"
    inside = [module for module in modules if module in _OF_MOE_LAYERS and module != "moe"]
    if "moe" in modules and inside:
        yield (
            f"training.recompute_modules: moe recomputes whole MoE layers, {' and '.join(inside)} included: "
            "leave out one or the other"
        )
