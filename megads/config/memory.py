"""Memory of weights, gradients and optimizer state per process, in closed form.

The heaviest pipeline stage is what counts. Activations and all else that changes during a step come on
top: see `megads.plan.memory`.
"""

from dataclasses import dataclass

from megads.config.flops import LayerParameters, ParameterCounts, attention_matrices, count_parameters
from megads.config.resolve import Resolved
from megads.config.schema import Config


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one process of pipeline rank `stage`; `expert_parameters` are those in experts."""

    stage: int
    parameters: int
    expert_parameters: int
    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.gradients_bytes + self.optimizer_bytes


def heaviest_stage(config: Config, resolved: Resolved) -> StageMemory:
    """The pipeline rank whose processes need most."""
    counts = count_parameters(config)
    stages = [stage_memory(config, resolved, stage, counts) for stage in range(resolved.pp)]
    return max(stages, key=lambda stage: stage.total_bytes)


def stage_memory(
    config: Config, resolved: Resolved, stage: int, counts: ParameterCounts | None = None
) -> StageMemory:
    """Weights in the run's precision, gradients in FP32 (as Megatron-Core accumulates them), and state.

    Adam keeps two moments in the types that are set, SGD one in FP32; below FP32 an FP32 copy of the weights
    is kept with them. The distributed optimizer (`zero_stage` 1) splits state over the ranks that hold the
    same weights. `counts` are the model's parameters, for callers that ask often.
    """
    dense, expert = _parameters(config, resolved, stage, counts or count_parameters(config))
    weight_bytes = 4 if resolved.precision == "fp32" else 2
    state_bytes = _moment_bytes(config) + (4 if weight_bytes == 2 else 0)
    sharded = config.distributed.zero_stage == 1
    dense_ranks, expert_ranks = (resolved.dp * resolved.cp, resolved.edp) if sharded else (1, 1)
    return StageMemory(
        stage=stage,
        parameters=dense + expert,
        expert_parameters=expert,
        weights_bytes=weight_bytes * (dense + expert),
        gradients_bytes=4 * (dense + expert),
        optimizer_bytes=state_bytes * dense // dense_ranks + state_bytes * expert // expert_ranks,
    )


def _moment_bytes(config: Config) -> int:
    """Of one parameter."""
    training, size = config.training, {"fp32": 4, "bf16": 2}
    if training.optimizer == "sgd":
        return size["fp32"]
    return size[training.adam_exp_avg_dtype] + size[training.adam_exp_avg_sq_dtype]


def _parameters(config: Config, resolved: Resolved, stage: int, counts: ParameterCounts) -> tuple[int, int]:
    """(outside the experts, in them) of one process of this pipeline rank."""
    layout = resolved.pipeline_layout
    dense = expert = 0
    for index in range(stage, len(layout), resolved.pp):
        first = sum(layout[:index])
        # Layers of a kind are equal: one of each is looked at.
        kinds = resolved.shape.is_moe[first : first + layout[index]]
        for kind in set(kinds):
            layer, times = counts.layers[first + kinds.index(kind)], kinds.count(kind)
            dense += times * _dense(config, resolved, layer)
            expert += times * (layer.experts // (resolved.ep * resolved.etp))
    is_first, is_last = stage == 0, stage == resolved.pp - 1
    if is_first:
        dense += counts.embedding // resolved.tp
    if is_last:
        dense += counts.head // resolved.tp + counts.final_norm + counts.mtp_projection // resolved.tp
        dense += counts.mtp_norms + sum(_dense(config, resolved, layer) for layer in counts.mtp_layers)
        expert += sum(layer.experts for layer in counts.mtp_layers) // (resolved.ep * resolved.etp)
        # MTP embeds the next token, and a tied head is the embedding: both need a copy of the table.
        if not is_first and (counts.mtp_layers or config.model.tie_word_embeddings):
            dense += counts.embedding // resolved.tp
    return dense, expert


def _dense(config: Config, resolved: Resolved, layer: LayerParameters) -> int:
    """What one process holds of a layer besides experts: TP splits all but latents, norms and router."""
    whole, _ = attention_matrices(config, resolved.shape)
    split = layer.attention - whole + layer.dense_ffn + layer.shared_experts
    return whole + layer.norms + layer.router + split // resolved.tp
