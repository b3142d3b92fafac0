"""Errors inside the architecture: attention, experts, which layers are dense."""

from collections.abc import Iterator

from megads.config.schema import MLA, Config, Model, MoE
from megads.config.shape import model_shape


def model_problems(config: Config) -> Iterator[str]:
    """Each problem of `config.model` as one sentence with what to do."""
    yield from _attention(config)
    yield from _yarn(config.model.mla)
    yield from _layers(config.model)
    if config.model.moe.num_experts > 0:
        yield from _experts(config.model.moe)
    else:
        yield from _dense_model(config.model)


def _attention(config: Config) -> Iterator[str]:
    mla, shape = config.model.mla, model_shape(config)
    if mla.num_kv_heads is not None and mla.num_kv_heads != mla.num_heads:
        yield (
            f"model.mla.num_kv_heads = {mla.num_kv_heads} differs from num_heads = {mla.num_heads}: MLA does "
            "not "
            "share keys and values between heads, it compresses them for all heads into d_latent numbers; "
            "leave num_kv_heads out and make d_latent smaller instead"
        )
    if mla.qk_nope_head_dim is None and mla.d_model % mla.num_heads:
        yield (
            f"model.mla.d_model = {mla.d_model} is not divisible by num_heads = {mla.num_heads}: give "
            "qk_nope_head_dim (and v_head_dim), or change one of the two"
        )
    if shape.qk_rope_head_dim % 2:
        yield (
            f"model.mla.qk_rope_head_dim is {shape.qk_rope_head_dim}"
            f"{' (half of qk_nope_head_dim)' if mla.qk_rope_head_dim is None else ''}, but RoPE rotates "
            "pairs: "
            f"set it to an even number, for instance {shape.qk_rope_head_dim + 1}"
        )
    if not mla.use_rope:
        yield (
            "model.mla.use_rope = false is refused: the model has no other notion of position (RoPE is the "
            "only one in DeepSeek-V3); set it to true"
        )


def _yarn(mla: MLA) -> Iterator[str]:
    yarn = mla.rope_scaling
    if yarn is None:
        return
    reach = yarn.factor * yarn.original_max_position_embeddings
    if mla.max_context_length > reach:
        yield (
            f"model.mla.max_context_length = {mla.max_context_length} is beyond YaRN's reach, factor x "
            f"original_max_position_embeddings = {reach:g}: raise rope_scaling.factor"
        )
    if mla.max_context_length <= yarn.original_max_position_embeddings:
        yield (
            f"model.mla.rope_scaling extends the context, but max_context_length = {mla.max_context_length} "
            "is not "
            f"above original_max_position_embeddings = {yarn.original_max_position_embeddings}: set "
            "rope_scaling "
            "to null for plain RoPE"
        )
    if yarn.beta_fast <= yarn.beta_slow:
        yield (
            f"model.mla.rope_scaling.beta_fast = {yarn.beta_fast:g} must be above beta_slow = "
            f"{yarn.beta_slow:g} "
            "(DeepSeek: 32 and 1)"
        )


def _layers(model: Model) -> Iterator[str]:
    rules = {
        "first_k_dense_replace": model.first_k_dense_replace,
        "dense_layer_interval": model.dense_layer_interval,
    }
    also = [name for name, value in rules.items() if value is not None]
    if model.dense_layers is not None and also:
        yield f"model.dense_layers excludes {' and '.join(also)}: keep the list, or the rule"
    outside = [layer for layer in model.dense_layers or () if not 0 <= layer < model.num_layers]
    if outside:
        yield (
            f"model.dense_layers names {outside}, but layers run from 0 to {model.num_layers - 1}: remove "
            "what lies "
            "outside"
        )
    if (model.first_k_dense_replace or 0) > model.num_layers:
        yield (
            f"model.first_k_dense_replace = {model.first_k_dense_replace} is more than num_layers = "
            f"{model.num_layers}: lower it"
        )


def _dense_model(model: Model) -> Iterator[str]:
    if model.intermediate_size is None:
        yield "model.moe.num_experts = 0 makes every layer dense: give their width, model.intermediate_size"
    if model.moe.num_shared_experts:
        yield "model.moe.num_shared_experts cannot act in a dense model (num_experts = 0): set it to 0"
    if model.dense_layers is not None or model.first_k_dense_replace or model.dense_layer_interval:
        yield (
            "model.moe.num_experts = 0 makes every layer dense already: leave out dense_layers, "
            "first_k_dense_replace and dense_layer_interval"
        )


def _experts(moe: MoE) -> Iterator[str]:
    if moe.shared_intermediate_size and not moe.num_shared_experts:
        yield (
            f"model.moe.shared_intermediate_size = {moe.shared_intermediate_size} cannot act while "
            "num_shared_experts is 0: set the number of shared experts, or the width to 0"
        )
    if moe.num_experts_per_token > moe.num_experts:
        yield (
            f"model.moe.num_experts_per_token = {moe.num_experts_per_token} is more than num_experts = "
            f"{moe.num_experts}: lower it"
        )
    if moe.num_experts % moe.n_group:
        yield (
            f"model.moe.num_experts = {moe.num_experts} is not divisible by n_group = {moe.n_group}: change "
            "one"
        )
        return
    if moe.topk_group > moe.n_group:
        yield f"model.moe.topk_group = {moe.topk_group} is more than n_group = {moe.n_group}: lower it"
        return
    yield from _groups(moe)


def _groups(moe: MoE) -> Iterator[str]:
    per_group = moe.num_experts // moe.n_group
    reachable = moe.topk_group * per_group
    if moe.num_experts_per_token <= moe.num_experts and moe.num_experts_per_token > reachable:
        yield (
            f"model.moe.num_experts_per_token = {moe.num_experts_per_token} is more than the {reachable} "
            "experts "
            f"in topk_group = {moe.topk_group} groups of {per_group}: raise topk_group or lower the former"
        )
    if moe.n_group > 1 and per_group < 2 and moe.scoring_func == "sigmoid":
        yield (
            f"model.moe.n_group = {moe.n_group} leaves one expert per group, but a group is scored by its "
            "two "
            "best experts (DeepSeek-V3): use fewer groups"
        )
