"""Parameters and floating-point operations of a configuration, in closed form.

Parameters are counted by part; `tests/unit/test_flops.py` compares them with `transformers` and with
the published sizes. Counted are tensors that the optimizer updates; the balancing bias of the router
(DeepSeek-V3, arXiv:2412.19437, eq. 16) is listed apart, since its updates are not gradients.

FLOPs count matrix products only, two per multiply-add, as every published MFU does. Not counted:
norms, softmax, RoPE, the optimizer, recomputed activations, tokens that a capacity limit drops.
"""

from dataclasses import dataclass, fields

from megads.config.schema import Config
from megads.config.shape import ModelShape, model_shape


@dataclass(frozen=True)
class LayerParameters:
    """One transformer layer by part. `router_bias` is no parameter of the optimizer."""

    attention: int
    norms: int
    dense_ffn: int = 0
    router: int = 0
    experts: int = 0
    shared_experts: int = 0
    router_bias: int = 0
    idle_experts: int = 0

    @property
    def total(self) -> int:
        return self.attention + self.norms + self.dense_ffn + self.router + self.experts + self.shared_experts

    @property
    def active(self) -> int:
        """Parameters that one token uses: without the experts that it is not sent to."""
        return self.total - self.idle_experts

    @property
    def matrices(self) -> int:
        """Weights of the matrix products that one token takes part in."""
        return self.active - self.norms


@dataclass(frozen=True)
class ParameterCounts:
    """A whole model. `mtp` leaves out embedding and head, which MTP modules share with the model."""

    embedding: int
    head: int
    final_norm: int
    layers: tuple[LayerParameters, ...]
    mtp_projection: int
    mtp_norms: int
    mtp_layers: tuple[LayerParameters, ...]

    @property
    def total(self) -> int:
        """All parameters without MTP."""
        return self.embedding + self.head + self.final_norm + sum(layer.total for layer in self.layers)

    @property
    def active(self) -> int:
        """Parameters that one token uses, embedding table and head included, without MTP."""
        return self.total - sum(layer.idle_experts for layer in self.layers)

    @property
    def mtp(self) -> int:
        return self.mtp_projection + self.mtp_norms + sum(layer.total for layer in self.mtp_layers)

    @property
    def total_with_mtp(self) -> int:
        return self.total + self.mtp

    @property
    def active_with_mtp(self) -> int:
        return self.active + self.mtp - sum(layer.idle_experts for layer in self.mtp_layers)

    @property
    def active_without_embedding(self) -> int:
        """Active parameters but for the embedding table, which is looked up, and the head."""
        return self.active - self.embedding - self.head

    @property
    def router_bias(self) -> int:
        """Entries of the balancing biases, MTP included."""
        return sum(layer.router_bias for layer in (*self.layers, *self.mtp_layers))

    def by_part(self) -> dict[str, int]:
        """Totals by part, MTP in one; they add up to `total_with_mtp`."""
        parts = {"embedding": self.embedding}
        for part in fields(LayerParameters)[:6]:
            parts[part.name] = sum(getattr(layer, part.name) for layer in self.layers)
        parts["norms"] += self.final_norm
        return parts | {"head": self.head, "mtp": self.mtp}


def count_parameters(config: Config) -> ParameterCounts:
    """Parameters by part, as if on one process."""
    model, shape = config.model, model_shape(config)
    width, table = model.mla.d_model, model.vocab_size * model.mla.d_model
    norm = norm_parameters(config, width)
    return ParameterCounts(
        embedding=table,
        head=0 if model.tie_word_embeddings else table,
        final_norm=norm,
        layers=tuple(layer_parameters(config, shape, is_moe) for is_moe in shape.is_moe),
        mtp_projection=shape.mtp_depth * 2 * width * width,
        mtp_norms=shape.mtp_depth * 3 * norm,
        mtp_layers=tuple([layer_parameters(config, shape, shape.mtp_is_moe)] * shape.mtp_depth),
    )


def norm_parameters(config: Config, width: int) -> int:
    """Parameters of one norm over `width` features: LayerNorm has a bias too."""
    return width if config.model.norm_type == "rmsnorm" else 2 * width


def layer_parameters(config: Config, shape: ModelShape, is_moe: bool) -> LayerParameters:
    """One layer of MLA and a dense or MoE feed-forward network."""
    mla, moe = config.model.mla, config.model.moe
    width = mla.d_model
    latents = norm_parameters(config, mla.d_latent)
    if mla.q_lora_rank is not None:
        latents += norm_parameters(config, mla.q_lora_rank)
    shared, split = attention_matrices(config, shape)
    common = {"attention": shared + split, "norms": 2 * norm_parameters(config, width) + latents}
    if not is_moe:
        return LayerParameters(**common, dense_ffn=3 * width * shape.intermediate_size)
    expert = 3 * width * moe.expert_intermediate_size
    return LayerParameters(
        **common,
        router=moe.num_experts * width,
        experts=moe.num_experts * expert,
        shared_experts=3 * width * shape.shared_intermediate_size,
        router_bias=moe.num_experts if moe.use_aux_loss_free else 0,
        idle_experts=(moe.num_experts - moe.num_experts_per_token) * expert,
    )


def attention_matrices(config: Config, shape: ModelShape) -> tuple[int, int]:
    """Weights of one MLA: (down-projections, whole on every TP rank; the rest, split over heads)."""
    mla = config.model.mla
    query = mla.num_heads * (shape.qk_nope_head_dim + shape.qk_rope_head_dim)
    down = mla.d_model * (mla.d_latent + shape.qk_rope_head_dim)
    split = mla.d_latent * mla.num_heads * (shape.qk_nope_head_dim + shape.v_head_dim)
    split += mla.num_heads * shape.v_head_dim * mla.d_model
    if mla.q_lora_rank is None:
        return down, split + mla.d_model * query
    return down + mla.d_model * mla.q_lora_rank, split + mla.q_lora_rank * query


def attention_flops_per_token(config: Config, causal: bool = True, seq_length: int | None = None) -> float:
    """Forward FLOPs of the scores and their product with the values in one layer, per token.

    `causal`: only the keys that a token may see count (on average (s + 1) / 2 of s), what FlashAttention
    computes. False: the full square, as Megatron-LM's and PaLM's MFU formulas count it. `seq_length`
    None: the config's.
    """
    shape, heads = model_shape(config), config.model.mla.num_heads
    per_key = 2 * heads * (shape.qk_nope_head_dim + shape.qk_rope_head_dim + shape.v_head_dim)
    length = seq_length or config.training.seq_length
    window = min(config.model.mla.sliding_window or length, length)
    if not causal:
        return float(per_key * window)
    # Position i sees min(i, window) keys; the sum over the sequence, divided by its length.
    keys = window * (window + 1) / 2 + (length - window) * window
    return per_key * keys / length


def forward_flops_per_token(config: Config, causal: bool = True, seq_length: int | None = None) -> float:
    """Forward FLOPs per token, MTP and output head included; see the module for what counts."""
    counts = count_parameters(config)
    layers = (*counts.layers, *counts.mtp_layers)
    head = config.model.vocab_size * config.model.mla.d_model
    heads = head * (1 + len(counts.mtp_layers))
    matrices = sum(layer.matrices for layer in layers) + counts.mtp_projection + heads
    return 2 * matrices + len(layers) * attention_flops_per_token(config, causal, seq_length)


def training_flops_per_token(config: Config, causal: bool = True, seq_length: int | None = None) -> float:
    """FLOPs of forward and backward per token: three times the forward ones."""
    return 3 * forward_flops_per_token(config, causal, seq_length)


def scaling_flops_per_token(config: Config) -> float:
    """DeepSeek LLM's model scale M (arXiv:2401.02954, eq. 2): training FLOPs per token without embeddings.

    For a dense model with full-rank attention it is the paper's 72 L d^2 + 12 L d s: no head, no MTP, and
    attention counted as the full square.
    """
    counts = count_parameters(config)
    matrices = sum(layer.matrices for layer in counts.layers)
    return 3 * (2 * matrices + len(counts.layers) * attention_flops_per_token(config, causal=False))
