"""The papers in plain torch: the oracle that the Megatron-Core model is tested against.

One process, no kernels, no Megatron: algebra in the order of the equations. Equation numbers are
DeepSeek-V3's (arXiv:2412.19437, section 2) unless they say V2 (arXiv:2405.04434). Parameters carry
the names and layouts of the published Hugging Face checkpoints, so state dicts move unchanged; the
MTP modules are the layers after the last decoder layer, as in `model.layers.61` of DeepSeek-V3.

Where the papers leave a choice, or published code departs from them:
- The norms on the latents always use epsilon 1e-6, as DeepSeek's, Moonlight's and transformers' code
  does; `norm_eps` is for the norms over the hidden size.
- Gates are normalized (eq. 13) for K > 1 only, as in DeepSeek's code and Megatron-Core: with one
  expert they would be constant, and the router would get no gradient.
- A group is scored by the sum of its two best biased scores with sigmoid scores (V3), by its best
  one with softmax scores (V2, section 2.2.2). `routed_scaling_factor` applies in every case.
- All balance losses take the unbiased scores normalized over the experts (eq. 19) and count the top
  K of them over all groups, which is what eq. 18 writes and Megatron-Core does; neither bias, nor
  groups, nor dropping enter. They include every token: `loss_mask` is for token losses.
- Over capacity, an expert keeps the tokens with the largest gates of the micro-batch (Megatron-Core's
  policy "probs"); gates are not normalized again.
- MTP reads the hidden state after the final norm (eq. 21 leaves it open) and concatenates [embedding;
  hidden] (the paper writes [hidden; embedding]): Megatron-Core and the published weights do so.
- Each depth's loss is the sum over the positions that have a label, divided by the tokens of the main
  loss, T = sum(loss_mask), which is eq. 24 to the letter; Megatron-Core averages over the labels.

Not here: dropout and router noise (random, refused), FP8, decoding caches, speed. Scores, norms and
losses are in float32 at least, so that the model can also run in float64. One file, however long: it
is read from top to bottom with the papers beside it.

Shape suffixes: B sequences, S positions, T = B*S tokens, D hidden, N heads, C key-value latent,
P query/key width without RoPE, R with RoPE, V value width, E experts, G groups, W vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megads.config.schema import MLA, Config, MoE
from megads.config.shape import ModelShape, model_shape
from megads.errors import ConfigError

LATENT_NORM_EPS = 1e-6


@dataclass(frozen=True)
class Routing:
    """What one router did with one micro-batch; `layer` counts decoder layers from 0, then MTP."""

    layer: int
    scores_BSE: Tensor
    """Affinities s, without bias (eq. 15)."""
    chosen_BSE: Tensor
    """The K experts of each token, before any are dropped (bool)."""
    gates_BSE: Tensor
    """Factors g on the outputs of the experts (eq. 13), 0 where not chosen or dropped."""
    tokens_per_expert_E: Tensor
    """Tokens that chose each expert, before any are dropped: the load that balancing evens."""
    balance_loss: Tensor
    """Auxiliary loss of `balance_loss_type`, without its weight."""
    z_loss: Tensor
    """Router z-loss, without its weight."""


@dataclass(frozen=True)
class Output:
    """Logits [B, S, W] of the next token, of the k-th token after it, and the routers' work."""

    logits_BSW: Tensor
    mtp_logits_BSW: tuple[Tensor, ...]
    routings: tuple[Routing, ...]


@dataclass(frozen=True)
class Losses:
    """The objective and its parts; `total` alone has the weights in it."""

    total: Tensor
    lm: Tensor
    """Mean cross-entropy of the next token over `loss_mask`."""
    mtp: tuple[Tensor, ...]
    """Each depth's summed cross-entropy over the tokens T of the main loss (eq. 24)."""
    balance: Tensor
    """Sum over the MoE layers, MTP included."""
    z: Tensor
    """Sum over the MoE layers, MTP included."""
    lm_BS: Tensor
    """Cross-entropy of each token, 0 where masked."""
    mtp_BS: tuple[Tensor, ...]
    """The same at each depth, 0 where masked or where the label lies after the sequence."""
    output: Output


# --- small parts ------------------------------------------------------------------------------


def at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = at_least_fp32(x)
        unit = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * unit.to(x.dtype)


def build_norm(config: Config, width: int, eps: float | None = None) -> nn.Module:
    eps = config.model.norm_eps if eps is None else eps
    return nn.LayerNorm(width, eps) if config.model.norm_type == "layernorm" else RMSNorm(width, eps)


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x); a dense layer, a routed expert or all shared experts together."""

    def __init__(self, d_model: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(d_model, width, bias=False)
        self.up_proj = nn.Linear(d_model, width, bias=False)
        self.down_proj = nn.Linear(width, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


# --- rotary position embedding ----------------------------------------------------------------


def yarn_magnitude(factor: float, coefficient: float) -> float:
    """0.1 m ln(factor) + 1 (V2, section 3.1.4): the paper's sqrt(t) for m = 1."""
    return 0.1 * coefficient * math.log(factor) + 1.0 if factor > 1 else 1.0


def rope_frequencies(mla: MLA, width: int) -> Tensor:
    """Angle per position of each pair of `width` dimensions [width / 2]; with YaRN, slow ones are slowed.

    YaRN (arXiv:2309.00071, section 3.2): pairs that turn more than `beta_fast` times over the original
    context keep their frequency, those that turn less than `beta_slow` times have it divided by `factor`,
    with a linear ramp over the pairs between.
    """
    frequency = 1.0 / mla.rope_theta ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    if mla.rope_scaling is None:
        return frequency
    yarn = mla.rope_scaling

    def pair_that_turns(times: float) -> float:
        wavelength_ratio = yarn.original_max_position_embeddings / (times * 2 * math.pi)
        return width * math.log(wavelength_ratio) / (2 * math.log(mla.rope_theta))

    low = max(math.floor(pair_that_turns(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(yarn.beta_slow)), width - 1)
    # 0.001 is the published code's guard against a ramp of no length.
    ramp = (torch.arange(width // 2, dtype=torch.float32) - low) / (high - low if high != low else 0.001)
    slowed = ramp.clamp(0, 1)
    return frequency * (1 - slowed) + frequency / yarn.factor * slowed


def rotation(mla: MLA, width: int, position_ids_BS: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [B, S, 1, width / 2], times YaRN's magnitude correction mscale / mscale_all_dim."""
    angle = position_ids_BS[..., None, None].float() * rope_frequencies(mla, width).to(position_ids_BS.device)
    magnitude = 1.0
    if mla.rope_scaling is not None:
        yarn = mla.rope_scaling
        magnitude = yarn_magnitude(yarn.factor, yarn.mscale)
        magnitude /= yarn_magnitude(yarn.factor, yarn.mscale_all_dim)
    return angle.cos() * magnitude, angle.sin() * magnitude


def rotate(x_BSNR: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each pair (2j, 2j + 1) of the last dimension: the layout of DeepSeek's weights."""
    even, odd = x_BSNR[..., 0::2], x_BSNR[..., 1::2]
    turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
    return turned.flatten(-2).to(x_BSNR.dtype)


def visible(seq: int, window: int | None, document_ids_BS: Tensor | None, device: torch.device) -> Tensor:
    """Which key each query sees, [B or 1, S, S]: itself and the past, within window and document."""
    position = torch.arange(seq, device=device)
    distance = position[:, None] - position[None, :]
    seen = (distance >= 0)[None]
    if window is not None:
        seen = seen & (distance < window)
    if document_ids_BS is not None:
        seen = seen & (document_ids_BS[:, :, None] == document_ids_BS[:, None, :])
    return seen


# --- Multi-head Latent Attention, eq. 1-11 ----------------------------------------------------


class LatentAttention(nn.Module):
    """Eq. 1-11 (V2 eq. 9-19); `kv_a_proj_with_mqa` holds W^DKV and W^KR, `kv_b_proj` W^UK and W^UV."""

    def __init__(self, config: Config, shape: ModelShape) -> None:
        super().__init__()
        mla = config.model.mla
        self.mla, self.heads = mla, mla.num_heads
        self.nope, self.rope, self.value = shape.qk_nope_head_dim, shape.qk_rope_head_dim, shape.v_head_dim
        query_width = self.heads * (self.nope + self.rope)
        if mla.q_lora_rank is None:
            self.q_proj = nn.Linear(mla.d_model, query_width, bias=False)
        else:
            self.q_a_proj = nn.Linear(mla.d_model, mla.q_lora_rank, bias=False)
            self.q_a_layernorm = build_norm(config, mla.q_lora_rank, LATENT_NORM_EPS)
            self.q_b_proj = nn.Linear(mla.q_lora_rank, query_width, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(mla.d_model, mla.d_latent + self.rope, bias=False)
        self.kv_a_layernorm = build_norm(config, mla.d_latent, LATENT_NORM_EPS)
        self.kv_b_proj = nn.Linear(mla.d_latent, self.heads * (self.nope + self.value), bias=False)
        self.o_proj = nn.Linear(self.heads * self.value, mla.d_model, bias=False)
        self.scale = (self.nope + self.rope) ** -0.5
        if mla.rope_scaling is not None:
            self.scale *= yarn_magnitude(mla.rope_scaling.factor, mla.rope_scaling.mscale_all_dim) ** 2

    def forward(self, h_BSD: Tensor, cos: Tensor, sin: Tensor, visible_BSS: Tensor) -> Tensor:
        heads = (*h_BSD.shape[:2], self.heads, -1)
        if self.mla.q_lora_rank is None:
            q_BSND = self.q_proj(h_BSD).view(heads)
        else:
            q_BSND = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(h_BSD))).view(heads)  # eq. 6-8
        q_BSNP, q_BSNR = q_BSND.split((self.nope, self.rope), dim=-1)
        latent_BSD = self.kv_a_proj_with_mqa(h_BSD)  # eq. 1, 3
        c_BSC, k_BSR = latent_BSD.split((self.mla.d_latent, self.rope), dim=-1)
        kv_BSND = self.kv_b_proj(self.kv_a_layernorm(c_BSC)).view(heads)  # eq. 2, 5
        k_BSNP, v_BSNV = kv_BSND.split((self.nope, self.value), dim=-1)
        k_BSNR = rotate(k_BSR[:, :, None], cos, sin).expand(-1, -1, self.heads, -1)  # one key for all heads
        q = torch.cat((q_BSNP, rotate(q_BSNR, cos, sin)), dim=-1)  # eq. 9
        k = torch.cat((k_BSNP, k_BSNR), dim=-1)  # eq. 4
        logits_BNSS = torch.einsum("bqnd,bknd->bnqk", q, k) * self.scale
        logits_BNSS = logits_BNSS.masked_fill(~visible_BSS[:, None], float("-inf"))
        p_BNSS = at_least_fp32(logits_BNSS).softmax(-1).to(v_BSNV.dtype)
        o_BSNV = torch.einsum("bnqk,bknv->bqnv", p_BNSS, v_BSNV)  # eq. 10
        u_BSD: Tensor = self.o_proj(o_BSNV.flatten(-2))  # eq. 11
        return u_BSD


# --- DeepSeekMoE with balancing, eq. 12-20 ----------------------------------------------------


def top_k_mask(x: Tensor, k: int) -> Tensor:
    """True at the k largest entries of the last dimension."""
    return torch.zeros_like(x, dtype=torch.bool).scatter(-1, x.topk(k, dim=-1).indices, True)


def choose_experts(scores_BSE: Tensor, bias_E: Tensor | None, moe: MoE) -> Tensor:
    """The K experts of each token (bool), by s + b (eq. 16), within its best groups."""
    biased_BSE = scores_BSE if bias_E is None else scores_BSE + bias_E
    grouped_BSGE = biased_BSE.view(*biased_BSE.shape[:-1], moe.n_group, -1)
    best = min(2, grouped_BSGE.shape[-1]) if moe.scoring_func == "sigmoid" else 1
    groups_BSG = top_k_mask(grouped_BSGE.topk(best, dim=-1).values.sum(-1), moe.topk_group)
    allowed_BSGE = grouped_BSGE.masked_fill(~groups_BSG[..., None], float("-inf"))
    return top_k_mask(allowed_BSGE.flatten(-2), moe.num_experts_per_token)


def capacity_tokens(tokens: int, moe: MoE) -> int | None:
    """Tokens of a micro-batch that one expert takes at most; None: all."""
    if moe.capacity_factor is None:
        return None
    mean_load = tokens * moe.num_experts_per_token / moe.num_experts
    return max(math.ceil(mean_load * moe.capacity_factor), moe.min_expert_capacity)


def within_capacity(gates_BSE: Tensor, capacity: int) -> Tensor:
    """True at the `capacity` largest gates of each expert over the micro-batch."""
    gates_ET = gates_BSE.flatten(0, 1).T
    return top_k_mask(gates_ET, min(capacity, gates_ET.shape[-1])).T.view_as(gates_BSE)


def sequence_loss(shares_BSE: Tensor, k: int) -> Tensor:
    """Eq. 17-20 without alpha, averaged over the sequences: 1 when f or P is uniform."""
    f_BE = top_k_mask(shares_BSE, k).to(shares_BSE.dtype).mean(1) * shares_BSE.shape[-1] / k  # eq. 18
    return (f_BE * shares_BSE.mean(1)).sum(-1).mean()  # eq. 17, 20


def load_loss(shares_BSE: Tensor, k: int) -> Tensor:
    """Switch Transformer (arXiv:2101.03961), eq. 4, for K slots: E sum_i f_i P_i over the micro-batch."""
    return sequence_loss(shares_BSE.flatten(0, 1)[None], k)


def no_loss(shares_BSE: Tensor, k: int) -> Tensor:
    return shares_BSE.new_zeros(())


def entropy_loss(shares_BSE: Tensor, k: int) -> Tensor:
    """log E - H(mean shares over the micro-batch): 0 when the mean is uniform. `k` has no part in it."""
    mean_E = shares_BSE.mean((0, 1))
    return math.log(mean_E.numel()) + torch.xlogy(mean_E, mean_E).sum()


BALANCE_LOSSES = {"sequence": sequence_loss, "load": load_loss, "entropy": entropy_loss, "none": no_loss}


class Router(nn.Module):
    """Scores, choice, gates (eq. 13-16) and balance losses (eq. 17-20) of one layer."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.moe, self.layer = config.model.moe, layer
        self.weight = nn.Parameter(torch.empty(self.moe.num_experts, config.model.mla.d_model))
        self.e_score_correction_bias: Tensor | None
        bias = torch.zeros(self.moe.num_experts) if self.moe.use_aux_loss_free else None
        self.register_buffer("e_score_correction_bias", bias)

    def forward(self, u_BSD: Tensor) -> Routing:
        moe = self.moe
        logits_BSE = F.linear(at_least_fp32(u_BSD), at_least_fp32(self.weight)) / moe.router_temperature
        # Eq. 15; softmax is V2's eq. 22.
        scores_BSE = logits_BSE.sigmoid() if moe.scoring_func == "sigmoid" else logits_BSE.softmax(-1)
        chosen_BSE = choose_experts(scores_BSE.detach(), self.e_score_correction_bias, moe)
        gates_BSE = scores_BSE * chosen_BSE  # eq. 14: the bias is no part of the gate
        if moe.norm_topk_prob and moe.num_experts_per_token > 1:
            gates_BSE = gates_BSE / (gates_BSE.sum(-1, keepdim=True) + 1e-20)  # eq. 13
        gates_BSE = gates_BSE * moe.routed_scaling_factor
        kept_BSE = chosen_BSE
        capacity = capacity_tokens(chosen_BSE[..., 0].numel(), moe)
        if capacity is not None:
            kept_BSE = chosen_BSE & within_capacity(gates_BSE.detach(), capacity)
        shares_BSE = scores_BSE / (scores_BSE.sum(-1, keepdim=True) + 1e-20)  # eq. 19
        balance = BALANCE_LOSSES[moe.balance_loss_type]
        return Routing(
            layer=self.layer,
            scores_BSE=scores_BSE,
            chosen_BSE=chosen_BSE,
            gates_BSE=gates_BSE * kept_BSE,
            tokens_per_expert_E=chosen_BSE.sum((0, 1)),
            balance_loss=balance(shares_BSE, moe.num_experts_per_token),
            z_loss=logits_BSE.logsumexp(-1).square().mean(),  # ST-MoE (arXiv:2202.08906), eq. 5
        )


class MixtureOfExperts(nn.Module):
    """Shared experts plus gated routed experts (eq. 12, without the residual)."""

    def __init__(self, config: Config, shape: ModelShape, layer: int) -> None:
        super().__init__()
        moe, d_model = config.model.moe, config.model.mla.d_model
        self.gate = Router(config, layer)
        width = moe.expert_intermediate_size
        self.experts = nn.ModuleList(SwiGLU(d_model, width) for _ in range(moe.num_experts))
        self.shared_experts: SwiGLU | None = None
        if shape.shared_intermediate_size:
            self.shared_experts = SwiGLU(d_model, shape.shared_intermediate_size)

    def forward(self, u_BSD: Tensor) -> tuple[Tensor, Routing]:
        routing = self.gate(u_BSD)
        u_TD, gates_TE = u_BSD.flatten(0, 1), routing.gates_BSE.flatten(0, 1).to(u_BSD.dtype)
        out_TD = torch.zeros_like(u_TD)
        for e, expert in enumerate(self.experts):
            tokens = gates_TE[:, e].nonzero().squeeze(-1)
            out_TD = out_TD.index_add(0, tokens, expert(u_TD[tokens]) * gates_TE[tokens, e, None])
        out_BSD = out_TD.view_as(u_BSD)
        return (out_BSD if self.shared_experts is None else out_BSD + self.shared_experts(u_BSD)), routing


# --- layers, MTP, model -----------------------------------------------------------------------


class DecoderLayer(nn.Module):
    """Pre-norm residual layer: attention, then a dense or a MoE feed-forward network."""

    def __init__(self, config: Config, shape: ModelShape, layer: int, is_moe: bool) -> None:
        super().__init__()
        d_model = config.model.mla.d_model
        self.input_layernorm = build_norm(config, d_model)
        self.self_attn = LatentAttention(config, shape)
        self.post_attention_layernorm = build_norm(config, d_model)
        self.mlp: nn.Module = SwiGLU(d_model, shape.intermediate_size)
        if is_moe:
            self.mlp = MixtureOfExperts(config, shape, layer)

    def transform(
        self, h_BSD: Tensor, cos: Tensor, sin: Tensor, visible_BSS: Tensor
    ) -> tuple[Tensor, Routing | None]:
        """The layer itself; a subclass may have another `forward`."""
        u_BSD = h_BSD + self.self_attn(self.input_layernorm(h_BSD), cos, sin, visible_BSS)
        out = self.mlp(self.post_attention_layernorm(u_BSD))
        out_BSD, routing = out if isinstance(out, tuple) else (out, None)
        return u_BSD + out_BSD, routing


class SharedHead(nn.Module):
    """A norm of the module's own before the output head; `head` is the main model's (none when tied)."""

    def __init__(self, norm: nn.Module, head: nn.Linear | None) -> None:
        super().__init__()
        self.norm, self.head = norm, head


class MTPLayer(DecoderLayer):
    """One module of multi-token prediction (eq. 21-23); embedding and head are the main model's."""

    def __init__(
        self, config: Config, shape: ModelShape, layer: int, embedding: nn.Embedding, head: nn.Linear | None
    ) -> None:
        super().__init__(config, shape, layer, shape.mtp_is_moe)
        d_model = config.model.mla.d_model
        self.embed_tokens = embedding
        self.enorm = build_norm(config, d_model)
        self.hnorm = build_norm(config, d_model)
        self.eh_proj = nn.Linear(2 * d_model, d_model, bias=False)
        self.shared_head = SharedHead(build_norm(config, d_model), head)

    def combine(self, h_BSD: Tensor, tokens_BS: Tensor) -> Tensor:
        """Eq. 21: the hidden state of position i with the embedding of token i + k."""
        embedded_BSD = self.enorm(self.embed_tokens(tokens_BS))
        combined_BSD: Tensor = self.eh_proj(torch.cat((embedded_BSD, self.hnorm(h_BSD)), dim=-1))
        return combined_BSD


class Backbone(nn.Module):
    """The part of the checkpoint under `model.`: decoder layers first, then the MTP modules."""

    def __init__(self, config: Config, shape: ModelShape, head: nn.Linear | None) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.model.vocab_size, config.model.mla.d_model)
        self.decoder = [DecoderLayer(config, shape, i, is_moe) for i, is_moe in enumerate(shape.is_moe)]
        self.mtp = [
            MTPLayer(config, shape, len(self.decoder) + depth, self.embed_tokens, head)
            for depth in range(shape.mtp_depth)
        ]
        self.layers = nn.ModuleList((*self.decoder, *self.mtp))
        self.norm = build_norm(config, config.model.mla.d_model)


def shift_left(x_BS: Tensor) -> Tensor:
    """x[:, i + 1] at i, 0 at the end."""
    return F.pad(x_BS[:, 1:], (0, 1))


def token_losses(logits_BSW: Tensor, labels_BS: Tensor, mask_BS: Tensor) -> Tensor:
    """Cross-entropy of each token [B, S], 0 where masked."""
    loss_T = F.cross_entropy(at_least_fp32(logits_BSW).flatten(0, 1), labels_BS.flatten(), reduction="none")
    return loss_T.view_as(labels_BS) * mask_BS


class ReferenceModel(nn.Module):
    """The model a `Config` describes, with the published checkpoints' parameter names.

    Weights are drawn from N(0, init_method_std) by torch's global generator; norms start at 1.

    Raises:
        ConfigError: dropout or router noise is on; an oracle has to be deterministic.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        check_deterministic(config)
        self.config, self.shape = config, model_shape(config)
        head = None
        if not config.model.tie_word_embeddings:
            head = nn.Linear(config.model.mla.d_model, config.model.vocab_size, bias=False)
        # Before the backbone: the first name of a shared parameter is the one `named_parameters` gives.
        self.lm_head = head
        self.model = Backbone(config, self.shape, head)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=config.model.init_method_std)

    def head(self, h_BSD: Tensor) -> Tensor:
        return F.linear(h_BSD, (self.lm_head or self.model.embed_tokens).weight)

    def routers(self) -> list[Router]:
        """The routers in order of their layers."""
        return [module for module in self.modules() if isinstance(module, Router)]

    def forward(
        self, tokens_BS: Tensor, position_ids_BS: Tensor | None = None, document_ids_BS: Tensor | None = None
    ) -> Output:
        """Logits at every position; without `document_ids_BS` a token sees the whole sequence before it."""
        mla, seq_length = self.config.model.mla, tokens_BS.shape[1]
        if position_ids_BS is None:
            position_ids_BS = torch.arange(seq_length, device=tokens_BS.device)[None]
        cos, sin = rotation(mla, self.shape.qk_rope_head_dim, position_ids_BS)
        seen_BSS = visible(seq_length, mla.sliding_window, document_ids_BS, tokens_BS.device)
        h_BSD = self.model.embed_tokens(tokens_BS)
        routings, mtp_logits = [], []
        for layer in self.model.decoder:
            h_BSD, routing = layer.transform(h_BSD, cos, sin, seen_BSS)
            routings.append(routing)
        h_BSD = self.model.norm(h_BSD)
        logits_BSW = self.head(h_BSD)
        for module in self.model.mtp:
            tokens_BS = shift_left(tokens_BS)
            combined_BSD = module.combine(h_BSD, tokens_BS)  # eq. 21
            h_BSD, routing = module.transform(combined_BSD, cos, sin, seen_BSS)  # eq. 22
            routings.append(routing)
            h_BSD = module.shared_head.norm(h_BSD)
            mtp_logits.append(self.head(h_BSD))  # eq. 23
        return Output(logits_BSW, tuple(mtp_logits), tuple(r for r in routings if r is not None))

    def loss(
        self,
        tokens_BS: Tensor,
        labels_BS: Tensor,
        loss_mask_BS: Tensor,
        position_ids_BS: Tensor | None = None,
        document_ids_BS: Tensor | None = None,
    ) -> Losses:
        """The objective of one micro-batch: lm + lambda/D sum_k mtp_k + alpha balance + z (eq. 17, 25).

        `labels_BS` holds the next token of each position. Depth k takes the label k places further on;
        label and mask shift together, and the last k positions of each sequence have none.
        """
        moe, training = self.config.model.moe, self.config.training
        output = self(tokens_BS, position_ids_BS, document_ids_BS)
        tokens = loss_mask_BS.sum().clamp(min=1)  # T; a mask without tokens gives 0
        lm_BS = token_losses(output.logits_BSW, labels_BS, loss_mask_BS)
        lm = lm_BS.sum() / tokens
        mtp_BS = []
        for logits_BSW in output.mtp_logits_BSW:
            labels_BS, loss_mask_BS = shift_left(labels_BS), shift_left(loss_mask_BS)
            mtp_BS.append(token_losses(logits_BSW, labels_BS, loss_mask_BS))
        mtp = tuple(loss_BS.sum() / tokens for loss_BS in mtp_BS)  # eq. 24
        zero = torch.zeros_like(lm)
        balance = sum((routing.balance_loss for routing in output.routings), zero)
        z = sum((routing.z_loss for routing in output.routings), zero)
        total = lm + moe.router_aux_loss_weight * balance + moe.router_z_loss_weight * z
        if mtp:
            total = total + training.mtp_loss_weight * torch.stack(mtp).mean()  # eq. 25
        return Losses(
            total=total,
            lm=lm,
            mtp=mtp,
            balance=balance,
            z=z,
            lm_BS=lm_BS,
            mtp_BS=tuple(mtp_BS),
            output=output,
        )

    @torch.no_grad()
    def update_biases(self, tokens_per_expert: Sequence[Tensor]) -> None:
        """Moves each balancing bias by +-gamma towards an even load (section 2.1.2, arXiv:2408.15664).

        `tokens_per_expert` has the load [E] of each MoE layer over the whole batch, in order of the
        layers: the sum of `Routing.tokens_per_expert_E` over the micro-batches.
        """
        for router, load_E in zip(self.routers(), tokens_per_expert, strict=True):
            if router.e_score_correction_bias is None:
                raise ConfigError("model.moe.use_aux_loss_free is off: there are no biases to update")
            gap_E = load_E.float().mean() - load_E
            router.e_score_correction_bias += self.config.model.moe.bias_update_rate * gap_E.sign()


def check_deterministic(config: Config) -> None:
    """Refuses settings that draw random numbers in the forward pass."""
    model = config.model
    random = {
        "model.mla.attn_dropout": model.mla.attn_dropout,
        "model.moe.dropout": model.moe.dropout,
        "model.hidden_dropout": model.hidden_dropout,
        "model.moe.router_noise_std": model.moe.router_noise_std,
    }
    on = [f"{name} = {value}" for name, value in random.items() if value]
    if on:
        raise ConfigError(f"the reference model has no random parts: set {', '.join(on)} to 0")
