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
    is kept with them. The ranks that would hold the same split state with `zero_stage` 1, gradients too with
    2, weights too with 3. With 3 what is no layer (embedding, head, MTP's projections, norms) stays gathered
    beside its parts. Moments in a GPU's host memory do not count. `counts` are the model's parameters, for
    callers that ask often.
    """
    counts = counts or count_parameters(config)
    dense, expert = _parameters(config, resolved, stage, counts)
    weight_bytes = 4 if resolved.precision == "fp32" else 2
    moment_bytes = _moment_bytes(config) * (1 - offloaded_fraction(config, resolved))
    state_bytes = moment_bytes + (4 if weight_bytes == 2 else 0)
    zero = config.distributed.zero_stage
    whole, part = dense + expert, dense // (resolved.dp * resolved.cp) + expert // resolved.edp
    gathered = _outside_layers(resolved, stage, counts, tied=config.model.tie_word_embeddings)
    return StageMemory(
        stage=stage,
        parameters=whole,
        expert_parameters=expert,
        weights_bytes=weight_bytes * (part + gathered if zero == 3 else whole),
        gradients_bytes=4 * (part if zero >= 2 else whole),
        optimizer_bytes=round(state_bytes * (part if zero >= 1 else whole)),
    )


def largest_layer(config: Config, resolved: Resolved) -> int:
    """Parameters of one process in its largest transformer layer, whole over data parallelism."""
    counts = count_parameters(config)
    return max(
        _dense(config, resolved, layer) + layer.experts // (resolved.ep * resolved.etp)
        for layer in {*counts.layers, *counts.mtp_layers}
    )


def offloaded_fraction(config: Config, resolved: Resolved) -> float:
    """The share of Adam's moments that lies in host memory instead of a GPU's."""
    distributed = config.distributed
    offloads = distributed.zero_offload and resolved.device == "cuda"
    return distributed.zero_offload_fraction if offloads else 0.0


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
    if stage == resolved.pp - 1:
        dense += sum(_dense(config, resolved, layer) for layer in counts.mtp_layers)
        expert += sum(layer.experts for layer in counts.mtp_layers) // (resolved.ep * resolved.etp)
    return dense + _outside_layers(resolved, stage, counts, tied=config.model.tie_word_embeddings), expert


def _outside_layers(resolved: Resolved, stage: int, counts: ParameterCounts, *, tied: bool) -> int:
    """Parameters of one process of this pipeline rank in no transformer layer."""
    is_first, parameters = stage == 0, 0
    if is_first:
        parameters += counts.embedding // resolved.tp
    if stage == resolved.pp - 1:
        parameters += counts.head // resolved.tp + counts.final_norm
        parameters += counts.mtp_projection // resolved.tp + counts.mtp_norms
        # MTP embeds the next token, and a tied head is the embedding: both need a copy of the table.
        if not is_first and (counts.mtp_layers or tied):
            parameters += counts.embedding // resolved.tp
    return parameters


def _dense(config: Config, resolved: Resolved, layer: LayerParameters) -> int:
    """What one process holds of a layer besides experts: TP splits all but latents, norms and router."""
    whole, _ = attention_matrices(config, resolved.shape)
    split = layer.attention - whole + layer.dense_ffn + layer.shared_experts
    return whole + layer.norms + layer.router + split // resolved.tp


def keeps_layers_in_bf16(config: Config) -> bool:
    """Whether some of the layers of a run in FP8 have none."""
    training, fp8 = config.training, config.training.fp8
    return fp8.bf16_first_layers + fp8.bf16_last_layers > 0 or (fp8.bf16_mtp and training.use_mtp)


def user_buffer_bytes(config: Config, resolved: Resolved) -> int:
    """Transformer Engine's buffers for `distributed.tp_comm_overlap`, each of a micro-batch's hidden states.

    There are 12 whether products use them or not: 8 for gathers, in FP8 where the product is, and 4 for
    scatters. Layers with and without FP8 have their own.
    """
    if not config.distributed.tp_comm_overlap:
        return 0
    training = config.training
    in_fp8 = 8 * 1 + 4 * 2 if training.use_fp8 else 0
    in_bf16 = 12 * 2 if not training.use_fp8 or keeps_layers_in_bf16(config) else 0
    tokens = training.micro_batch_size * training.seq_length // resolved.cp
    return tokens * config.model.mla.d_model * (in_fp8 + in_bf16)
