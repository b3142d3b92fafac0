"""The model's shape with every open dimension filled in; what `null` means is decided only here."""

from dataclasses import dataclass

from megads.config.schema import Config, Model


@dataclass(frozen=True)
class ModelShape:
    """Dimensions that the configuration may leave open.

    `shared_intermediate_size` is the width of all shared experts together (0: none), `is_moe` says
    it for each decoder layer, `mtp_depth` is the number of multi-token prediction modules (0: off).
    A module's own layer is of the kind of the last decoder layer, as in DeepSeek-V3.
    """

    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    intermediate_size: int
    shared_intermediate_size: int
    is_moe: tuple[bool, ...]
    mtp_depth: int

    @property
    def mtp_is_moe(self) -> bool:
        return self.is_moe[-1]


def model_shape(config: Config) -> ModelShape:
    """The shape of `config.model`; `config.validate` says whether it can be built."""
    model, mla, moe = config.model, config.model.mla, config.model.moe
    nope = mla.qk_nope_head_dim or max(mla.d_model // mla.num_heads, 1)
    shared = moe.num_shared_experts * (moe.shared_intermediate_size or moe.expert_intermediate_size)
    active = moe.num_experts_per_token * moe.expert_intermediate_size + shared
    return ModelShape(
        qk_nope_head_dim=nope,
        qk_rope_head_dim=mla.qk_rope_head_dim or max(nope // 2, 1),
        v_head_dim=mla.v_head_dim or nope,
        intermediate_size=model.intermediate_size or active,
        shared_intermediate_size=shared,
        is_moe=tuple(not dense for dense in _is_dense(model)),
        mtp_depth=config.training.num_predict_tokens - 1 if config.training.use_mtp else 0,
    )


def _is_dense(model: Model) -> list[bool]:
    if model.moe.num_experts == 0:
        return [True] * model.num_layers
    if model.dense_layers is not None:
        return [layer in model.dense_layers for layer in range(model.num_layers)]
    first, interval = model.first_k_dense_replace or 0, model.dense_layer_interval
    return [
        layer < first or (interval is not None and layer % interval == 0) for layer in range(model.num_layers)
    ]
