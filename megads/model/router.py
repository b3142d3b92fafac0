"""The router: which experts a token visits, with which gates, and how their load is kept even.

Scores and gates: DeepSeek-V3 (arXiv:2412.19437), eq. 12-16; node-limited routing by groups; bias
balancing without auxiliary loss: arXiv:2408.15664; sequence-wise loss: V3 eq. 17-20; load loss:
Switch Transformer (arXiv:2101.03961), eq. 4-6; z-loss: ST-MoE (arXiv:2202.08906), eq. 5.

Shapes: S sequence (local part under sequence and context parallelism), B batch, T = S * B tokens in
sequence-major order, E experts, K experts per token.
"""

import math

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megads.config.schema import MoE


def scores_of(logits_TE: Tensor, scoring_func: str) -> Tensor:
    """Affinity of each token to each expert (V3 eq. 15: sigmoid; V2: softmax)."""
    return logits_TE.sigmoid() if scoring_func == "sigmoid" else logits_TE.softmax(dim=-1)


def choose_experts(scores_TE: Tensor, moe: MoE) -> Tensor:
    """The K experts of each token [T, K], within its best groups.

    A group is as good as the sum of its two best scores (V3), or as its best one where scores are
    a softmax (V2).
    """
    if moe.topk_group < moe.n_group:
        grouped = scores_TE.unflatten(-1, (moe.n_group, -1))
        best = min(2, grouped.shape[-1]) if moe.scoring_func == "sigmoid" else 1
        group_scores = grouped.topk(best, dim=-1).values.sum(dim=-1)
        chosen = group_scores.topk(moe.topk_group, dim=-1).indices
        outside = torch.ones_like(group_scores, dtype=torch.bool).scatter_(-1, chosen, False)
        scores_TE = grouped.masked_fill(outside.unsqueeze(-1), -torch.inf).flatten(-2)
    return scores_TE.topk(moe.num_experts_per_token, dim=-1).indices


def gates_of(scores_TK: Tensor, moe: MoE) -> Tensor:
    """Weights of the chosen experts' outputs, from their unbiased scores (V3 eq. 12-13)."""
    if moe.norm_topk_prob and moe.num_experts_per_token > 1:
        scores_TK = scores_TK / (scores_TK.sum(dim=-1, keepdim=True) + 1e-20)
    return scores_TK * moe.routed_scaling_factor


def expert_capacity(tokens: int, moe: MoE) -> int:
    """Tokens an expert takes at most from `tokens` routed together."""
    assert moe.capacity_factor is not None
    even_share = tokens * moe.num_experts_per_token / moe.num_experts
    return max(moe.min_expert_capacity, math.ceil(even_share * moe.capacity_factor))


def drop_over_capacity(gates_TE: Tensor, routed_TE: Tensor, capacity: int) -> Tensor:
    """Keep, for each expert, the `capacity` tokens with the largest gates: the new map [T, E]."""
    if capacity >= gates_TE.shape[0]:
        return routed_TE
    kept = gates_TE.masked_fill(~routed_TE, -1.0).topk(capacity, dim=0).indices
    return routed_TE & torch.zeros_like(routed_TE).scatter_(0, kept, True)


class Router(MegatronModule):
    """Routes [S, B, H] hidden states; the router of Megatron-Core's `MoELayer`.

    Buffers: `expert_bias` [E] float32, saved; `tokens_per_expert` [E] counts choices since
    `reset_statistics` (before capacity), `score_sums` [E] sums the tokens' scores since then, each token's
    normalized to 1, `balance_loss` the unweighted auxiliary loss over micro-batches; all three are this
    rank's part.
    """

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        moe: MoE,
        is_mtp_layer: bool = False,
    ) -> None:
        super().__init__(config)
        self.moe = moe
        self.tp_cp_group = pg_collection.tp_cp
        self.layer_number: int | None = None
        self.is_mtp_layer = is_mtp_layer
        # What schedules change while training.
        self.noise_std = moe.router_noise_std
        self.temperature = moe.router_temperature
        self.aux_loss_weight = moe.router_aux_loss_weight
        self.weight = torch.nn.Parameter(
            torch.empty(moe.num_experts, config.hidden_size, dtype=config.params_dtype)
        )
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        zeros = torch.zeros(moe.num_experts, dtype=torch.float32, device=torch.cuda.current_device())
        self.register_buffer("expert_bias", zeros.clone() if moe.use_aux_loss_free else None)
        self.register_buffer("tokens_per_expert", zeros.clone(), persistent=False)
        self.register_buffer("score_sums", zeros.clone(), persistent=False)
        self.register_buffer("balance_loss", zeros[:1].clone(), persistent=False)

    def set_layer_number(self, layer_number: int) -> None:
        self.layer_number = layer_number

    def index_among(self, is_moe: tuple[bool, ...]) -> int:
        """This router's place among all MoE layers of the model, those of MTP after the decoder's."""
        assert self.layer_number is not None
        if self.is_mtp_layer:
            return sum(is_moe) + self.layer_number - 1
        return sum(is_moe[: self.layer_number - 1])

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        """Keep the balancing state in float32 when the model is cast to 16 bits."""
        super()._apply(fn, recurse)
        for name, buffer in self._buffers.items():
            if buffer is not None and buffer.dtype != torch.float32:
                self._buffers[name] = buffer.float()
        return self

    def reset_statistics(self) -> None:
        """Forget loads and losses: called before each optimizer step's forward passes."""
        self.tokens_per_expert.zero_()
        self.score_sums.zero_()
        self.balance_loss.zero_()

    def forward(self, input: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Gates [T, E] (zero where not routed) and the boolean map [T, E]."""
        moe = self.moe
        logits_SBE = torch.nn.functional.linear(input.float(), self.weight.float())
        logits_TE = logits_SBE.flatten(0, 1) / self.temperature
        scores_TE = scores_of(logits_TE, moe.scoring_func)
        with torch.no_grad():
            choosing_TE = scores_TE
            if self.noise_std > 0 and self.training:
                noisy = logits_TE + torch.randn_like(logits_TE) * self.noise_std
                choosing_TE = scores_of(noisy, moe.scoring_func)
            if self.expert_bias is not None:
                choosing_TE = choosing_TE + self.expert_bias
            experts_TK = choose_experts(choosing_TE, moe)
        gates_TK = gates_of(scores_TE.gather(-1, experts_TK), moe)
        gates_TE = torch.zeros_like(scores_TE).scatter(-1, experts_TK, gates_TK)
        routed_TE = torch.zeros_like(scores_TE, dtype=torch.bool).scatter_(-1, experts_TK, True)

        # Gradients are off in evaluation and in the first pass of recomputation: count once.
        if self.training and torch.is_grad_enabled():
            self.tokens_per_expert += routed_TE.sum(dim=0)
            scores = scores_TE.detach()
            self.score_sums += scores.sum(dim=-1).clamp(min=1e-20).reciprocal() @ scores
            gates_TE = self._attach_losses(gates_TE, logits_TE, scores_TE, input.shape[1])
        if moe.capacity_factor is not None:
            capacity = expert_capacity(gates_TE.shape[0], moe)
            routed_TE = drop_over_capacity(gates_TE, routed_TE, capacity)
            gates_TE = gates_TE * routed_TE
        return gates_TE, routed_TE

    def _attach_losses(self, gates_TE: Tensor, logits_TE: Tensor, scores_TE: Tensor, batch: int) -> Tensor:
        """Gates that carry the weighted auxiliary losses' gradients.

        Each rank adds its part of the loss; gradients of the router are summed over TP and CP. The
        training step divides all gradients by the tokens of the global batch, hence the factor
        tokens: a loss per sequence (or micro-batch) weighs as one per token.
        """
        moe, ranks = self.moe, self.tp_cp_group.size()
        tokens = gates_TE.shape[0] * ranks
        if moe.balance_loss_type != "none" and self.aux_loss_weight > 0:
            loss = self._balance_loss(scores_TE, batch)
            self.balance_loss += loss.detach()
            gates_TE = MoEAuxLossAutoScaler.apply(gates_TE, loss * (self.aux_loss_weight * tokens))
        if moe.router_z_loss_weight > 0:
            z_loss = logits_TE.logsumexp(dim=-1).square().mean() / ranks
            gates_TE = MoEAuxLossAutoScaler.apply(gates_TE, z_loss * (moe.router_z_loss_weight * tokens))
        return gates_TE

    def _balance_loss(self, scores_TE: Tensor, batch: int) -> Tensor:
        """This rank's part of the unweighted loss of a micro-batch; parts add up over TP and CP.

        Loads are those of the K best unbiased scores, as V3's eq. 18 writes them.
        """
        moe, ranks = self.moe, self.tp_cp_group.size()
        probabilities_TE = scores_TE / (scores_TE.sum(dim=-1, keepdim=True) + 1e-20)
        groups = batch if moe.balance_loss_type == "sequence" else 1
        # Sequence-major tokens: [T, E] -> [T / groups, groups, E], a column per sequence.
        columns = probabilities_TE.unflatten(0, (-1, groups))
        mean_GE = columns.mean(dim=0) / ranks
        if moe.balance_loss_type == "entropy":
            # log E - H(P). P is the mean over all ranks, log P enters as a constant: the gradient
            # of sum P log P is that of sum P (log P).detach(), since sum dP = 0.
            everywhere = self._sum_over_ranks(mean_GE.detach().clone())
            return (mean_GE * (everywhere + 1e-20).log()).sum() + math.log(moe.num_experts) / ranks
        best = columns.detach().topk(moe.num_experts_per_token, dim=-1).indices
        counts_GE = self._sum_over_ranks(torch.zeros_like(columns).scatter_(-1, best, 1.0).sum(dim=0))
        slots = columns.shape[0] * ranks * moe.num_experts_per_token
        fraction_GE = counts_GE * (moe.num_experts / slots)
        return (fraction_GE * mean_GE).sum() / groups

    def _sum_over_ranks(self, x: Tensor) -> Tensor:
        if self.tp_cp_group.size() > 1:
            dist.all_reduce(x, group=self.tp_cp_group)
        return x


def routers_of(model_chunks: list[torch.nn.Module]) -> list[Router]:
    """All routers of this rank's model chunks, in order."""
    return [module for chunk in model_chunks for module in chunk.modules() if isinstance(module, Router)]


@torch.no_grad()
def bias_ranges(routers: list[Router]) -> Tensor:
    """Largest minus smallest expert bias of each router [L]; there must be biases."""
    biases_LE = torch.stack([router.expert_bias for router in routers])  # type: ignore[misc]
    return biases_LE.amax(-1) - biases_LE.amin(-1)


@torch.no_grad()
def update_expert_biases(
    routers: list[Router], loads_LE: Tensor, rate: float, *, centered: bool = False
) -> None:
    """Raise the bias of experts below the mean load, lower it above (arXiv:2408.15664, algorithm 1).

    `loads_LE` are the tokens per expert of the whole global batch, a row per router. `centered` takes
    their mean off the updates (Moonlight, arXiv:2502.16982), which keeps the sum of the biases.
    """
    signs = (loads_LE.mean(dim=-1, keepdim=True) - loads_LE).sign()
    if centered:
        signs = signs - signs.mean(dim=-1, keepdim=True)
    offsets = signs * rate
    for router, offset in zip(routers, offsets, strict=True):
        if router.expert_bias is not None:
            router.expert_bias += offset
