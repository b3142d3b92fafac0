"""The slices as the planner sees them: what fits, how fast it should be, what bounds that. Needs no GPU."""

from collections.abc import Iterator

from gpu_training.shapes import SHAPES, Overrides, planned_tensor_bytes, resolved_on, slice_config
from megads.config.flops import count_parameters
from megads.plan.activations import SavedActivations
from megads.plan.hardware import Gpu
from megads.plan.speed import ModelFlops, SpeedModel

LEAST_SHARE = 0.005


def plan_rows(
    shapes: list[str], precisions: list[str], gpu: Gpu, micro_batches: int, changes: Overrides
) -> Iterator[list[str]]:
    """Headings, then a row per slice and precision. FP8 is taken to double the rate of all products."""
    yield [
        "slice", "precision", "layers", "experts", "vocabulary", "parameters", "micro-batch",
        "GiB of tensors", "tokens/s", "MFU", "shares of a step",
    ]  # fmt: skip
    for shape in shapes:
        for precision in precisions:
            config = slice_config(SHAPES[shape], precision, "cuda", gpu.memory_bytes, micro_batches, changes)
            saved = SavedActivations(config, resolved_on(config))
            step = SpeedModel(saved, gpu, ModelFlops.of(config)).step()
            shares = {cause: seconds / step.seconds for cause, seconds in step.by_cause().items()}
            training = config.training
            yield [
                shape,
                precision,
                str(config.model.num_layers),
                str(config.model.moe.num_experts),
                f"{config.model.vocab_size:,}",
                f"{count_parameters(config).total / 1e9:.2f}B",
                f"{training.micro_batch_size} x {training.seq_length}",
                f"{planned_tensor_bytes(config) / 2**30:.1f}",
                f"{step.tokens_per_second_per_gpu:,.0f}",
                f"{step.mfu:.0%}",
                ", ".join(f"{cause} {share:.0%}" for cause, share in shares.items() if share > LEAST_SHARE),
            ]
