"""Master weights after a checkpoint has been loaded: FP32, sharded over data parallelism with `zero_stage` 1.

They are more exact than what a checkpoint holds as the model's weights, if those are of another precision.
"""

from typing import Any

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer


def renew_weights(optimizer: MegatronOptimizer, chunks: list[DistributedDataParallel]) -> None:
    """Make the model's weights of the sharded master weights, as a step does at its end; collective.

    Loaded weights may be another precision's: BF16 ones in an FP32 model, or FP8 ones that have been through
    BF16. The first step would be computed with those, on each rank with others.
    """
    if not chunks[0].ddp_config.use_distributed_optimizer:
        return
    for inner in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner._copy_main_params_to_model_params()
    for chunk in chunks:
        chunk.start_param_sync(force_sync=True)


def reload_weights(
    optimizer: MegatronOptimizer, chunks: list[DistributedDataParallel], models: dict[str, dict[str, Any]]
) -> None:
    """Take the model's loaded weights as master weights: where the model keeps FP8 ones, not those."""
    if chunks[0].ddp_config.fp8_param_gather:
        optimizer.reload_model_params(models)
    else:
        optimizer.reload_model_params()
