"""Rules of the linter about the architecture. Each is a function of a `Run` that yields findings."""

import math
from collections.abc import Callable, Iterator

from megads.config.schema import SchedulePhase
from megads.plan.findings import Finding, Run

V3 = "DeepSeek-V3, arXiv:2412.19437"
# Tensor cores want multiples of 8 (16 bytes of BF16); full tiles of a product are multiples of 64.
LEAST_MULTIPLE, FULL_TILE = 8, 64


def ever_positive(value: float, phases: tuple[SchedulePhase, ...]) -> bool:
    """Whether a scheduled setting is above 0 at some time of the run."""
    return any(phase.to > 0 for phase in phases) if phases else value > 0


def _balancing(run: Run) -> Iterator[Finding]:
    moe = run.config.model.moe
    if not any(run.resolved.shape.is_moe):
        return
    loss_on = moe.balance_loss_type != "none" and ever_positive(
        moe.router_aux_loss_weight, moe.router_aux_loss_weight_phases
    )
    bias_on = moe.use_aux_loss_free and ever_positive(moe.bias_update_rate, moe.bias_update_rate_phases)
    if not loss_on and not bias_on:
        yield Finding(
            "router-unbalanced",
            "error",
            "nothing balances the experts: use_aux_loss_free is off (or its rate 0) and the auxiliary loss "
            "weighs 0; routing collapses onto a few experts. Set model.moe.use_aux_loss_free, or "
            "router_aux_loss_weight = 1e-3",
            "Switch Transformer, arXiv:2101.03961, section 2.2",
        )
    elif bias_on and not loss_on:
        yield Finding(
            "router-no-sequence-loss",
            "note",
            "balancing by bias alone: V3 adds a sequence-wise loss of 1e-4 against extremes in a sequence",
            f"{V3}, section 2.1.2, eq. 17",
        )
    if loss_on and bias_on and moe.router_aux_loss_weight > 0.01:
        yield Finding(
            "router-aux-loss-large",
            "warning",
            f"router_aux_loss_weight = {moe.router_aux_loss_weight:g} beside the balancing bias: V3 has "
            "1e-4, a large one costs quality",
            f"{V3}, sections 2.1.2 and 4.2",
        )
    if moe.scoring_func == "sigmoid" and not moe.norm_topk_prob:
        yield Finding(
            "router-gates-not-normalized",
            "warning",
            "scores are sigmoids and norm_topk_prob is off: gates of a token have no common scale; set it",
            f"{V3}, eq. 13",
        )


def _groups(run: Run) -> Iterator[Finding]:
    moe, ep = run.config.model.moe, run.resolved.ep
    if moe.n_group == 1 or not any(run.resolved.shape.is_moe):
        return
    if moe.topk_group == moe.n_group:
        yield Finding(
            "router-groups-idle",
            "note",
            f"topk_group = n_group = {moe.n_group}: a token may use every group, groups limit nothing",
            f"{V3}, section 2.1.2",
        )
    reachable = moe.topk_group * (moe.num_experts // moe.n_group)
    if reachable < 2 * moe.num_experts_per_token:
        yield Finding(
            "router-groups-narrow",
            "warning",
            f"a token chooses {moe.num_experts_per_token} of only {reachable} experts in its groups (V3: 8 "
            "of 128): use fewer groups, or raise topk_group",
            f"{V3}, section 4.2",
        )
    if ep > 1 and moe.n_group % ep and ep % moe.n_group:
        yield Finding(
            "router-groups-and-ranks",
            "warning",
            f"n_group = {moe.n_group} and expert_parallel_size = {ep} do not divide one another: a group is "
            "no whole number of ranks, and limits no traffic between nodes",
            f"{V3}, section 2.1.2",
        )


def _layers(run: Run) -> Iterator[Finding]:
    is_moe = run.resolved.shape.is_moe
    if all(is_moe) and len(is_moe) > 2:
        yield Finding(
            "first-layer-moe",
            "note",
            "the first layer is a MoE layer: its load balances slowly; DeepSeek's models begin with 1 to 3 "
            "dense ones (model.first_k_dense_replace)",
            "DeepSeekMoE, arXiv:2401.06066, section 5.1.2",
        )


def _initial_weights(run: Run) -> Iterator[Finding]:
    model = run.config.model
    usual = math.sqrt(2 / (5 * model.mla.d_model))
    ratio = model.init_method_std / usual
    if not 0.15 <= ratio <= 2:
        yield Finding(
            "init-std",
            "warning",
            f"init_method_std = {model.init_method_std:g} is {ratio:.2g} times sqrt(2 / (5 d_model)) = "
            f"{usual:.3g}: {'the first steps may blow up' if ratio > 1 else 'signals start out very small'}; "
            "V3 has 0.006 at d_model 7168, 0.8 times it",
            f"arXiv:1910.05895, section 2.2; {V3}, section 4.2",
        )


def _context(run: Run) -> Iterator[Finding]:
    mla, training = run.config.model.mla, run.config.training
    yarn = mla.rope_scaling
    if yarn is not None and training.seq_length <= yarn.original_max_position_embeddings:
        yield Finding(
            "yarn-at-short-length",
            "warning",
            f"YaRN is on while sequences have {training.seq_length} tokens, no more than the plain phase's "
            f"{yarn.original_max_position_embeddings}: V3 pre-trains with plain RoPE and scales only when it "
            "extends the context; set model.mla.rope_scaling to null",
            f"{V3}, section 4.3",
        )


def _mtp(run: Run) -> Iterator[Finding]:
    training = run.config.training
    if not training.use_mtp:
        return
    weight, phases = training.mtp_loss_weight, training.mtp_loss_weight_phases
    largest = max([weight, *(phase.to for phase in phases)]) if phases else weight
    if not ever_positive(weight, phases):
        yield Finding(
            "mtp-weight-zero",
            "warning",
            "use_mtp is on and its loss weighs 0: it costs time and learns nothing; V3 has 0.3, then 0.1",
            f"{V3}, section 4.2",
        )
    elif largest > 0.5:
        yield Finding(
            "mtp-weight-large",
            "warning",
            f"the MTP loss weighs {largest:g}: V3 has 0.3, then 0.1; more takes from the next token's loss",
            f"{V3}, section 4.2",
        )


def _dropout(run: Run) -> Iterator[Finding]:
    model = run.config.model
    on = {
        "model.hidden_dropout": model.hidden_dropout,
        "model.mla.attn_dropout": model.mla.attn_dropout,
        "model.moe.dropout": model.moe.dropout,
    }
    for name, value in on.items():
        if value > 0:
            yield Finding(
                "dropout",
                "note",
                f"{name} = {value:g}: pre-training on data that is hardly repeated needs none",
                "PaLM, arXiv:2204.02311, section 5",
            )
    if model.moe.capacity_factor is not None and any(run.resolved.shape.is_moe):
        yield Finding(
            "capacity-drops-tokens",
            "note",
            f"capacity_factor = {model.moe.capacity_factor:g} drops tokens of crowded experts: V3 drops none",
            f"{V3}, section 2.1.2",
        )


def _efficient_sizes(run: Run) -> Iterator[Finding]:
    model, shape, resolved = run.config.model, run.resolved.shape, run.resolved
    if resolved.device == "cpu":
        return
    sizes = {
        "model.vocab_size / TP": model.vocab_size / resolved.tp,
        "model.mla.d_model": model.mla.d_model,
        "model.mla.d_latent": model.mla.d_latent,
    }
    if any(shape.is_moe):
        sizes["model.moe.expert_intermediate_size / ETP"] = model.moe.expert_intermediate_size / resolved.etp
    if not all(shape.is_moe):
        sizes["model.intermediate_size / TP"] = shape.intermediate_size / resolved.tp
    odd = {name: size for name, size in sizes.items() if size % FULL_TILE}
    if odd:
        slow = any(size % LEAST_MULTIPLE for size in odd.values())
        yield Finding(
            "inefficient-size",
            "warning" if slow else "note",
            f"{', '.join(f'{name} = {size:g}' for name, size in odd.items())}: no multiple of {FULL_TILE}, "
            f"so that matrix products {'do without tensor cores' if slow else 'compute partly empty tiles'}",
            "NVIDIA, Matrix Multiplication Background User's Guide, section 4",
        )


RULES: tuple[Callable[[Run], Iterator[Finding]], ...] = (
    _balancing, _groups, _layers, _initial_weights, _context, _mtp, _dropout, _efficient_sizes,
)  # fmt: skip
