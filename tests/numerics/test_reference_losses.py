"""The oracle's own losses against loops written out in Python, published limits, and Megatron-Core."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megads.config.schema import Config
from megads.model.reference import (
    ReferenceModel,
    entropy_loss,
    load_loss,
    sequence_loss,
)

SEQUENCES, POSITIONS, VOCABULARY = 2, 7, 23


def build_config(moe: dict[str, Any] | None = None, **training: Any) -> Config:
    mla = {"d_model": 16, "d_latent": 8, "num_heads": 2, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4}
    experts = {
        "num_experts": 6,
        "num_experts_per_token": 2,
        "expert_intermediate_size": 8,
        "min_expert_capacity": 0,
    }
    model = {"num_layers": 2, "vocab_size": VOCABULARY, "first_k_dense_replace": 1, "init_method_std": 0.4}
    return Config.model_validate(
        {"model": model | {"mla": mla, "moe": experts | (moe or {})}, "training": training}
    )


def build_model(config: Config) -> ReferenceModel:
    torch.manual_seed(7)
    return ReferenceModel(config).double()


def random_batch() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, labels and a mask with holes, one of them at the end of a sequence."""
    torch.manual_seed(8)
    tokens_BS = torch.randint(0, VOCABULARY, (SEQUENCES, POSITIONS + 1))
    mask_BS = torch.ones(SEQUENCES, POSITIONS)
    mask_BS[0, 2] = mask_BS[1, -1] = 0
    return tokens_BS[:, :-1], tokens_BS[:, 1:], mask_BS


def random_shares() -> Tensor:
    torch.manual_seed(9)
    scores_BSE = torch.rand(3, 5, 6, dtype=torch.float64)
    return scores_BSE / scores_BSE.sum(-1, keepdim=True)


def f_times_p(rows: list[list[float]], k: int) -> float:
    """Eq. 17, 18 and 20 for one group of tokens, sum by sum."""
    experts, total = len(rows[0]), 0.0
    for i in range(experts):
        chosen = sum(sorted(range(experts), key=lambda j: -row[j]).index(i) < k for row in rows)
        f = experts / (k * len(rows)) * chosen
        p = sum(row[i] for row in rows) / len(rows)
        total += f * p
    return total


# --- balance losses ---------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 4])
def test_sequence_loss_is_eq_17_to_20_averaged_over_sequences(k: int) -> None:
    shares_BSE = random_shares()
    expected = sum(f_times_p(rows, k) for rows in shares_BSE.tolist()) / len(shares_BSE)
    assert sequence_loss(shares_BSE, k).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_load_loss_takes_the_micro_batch_as_one_sequence(k: int) -> None:
    shares_BSE = random_shares()
    expected = f_times_p(shares_BSE.flatten(0, 1).tolist(), k)
    assert load_loss(shares_BSE, k).item() == pytest.approx(expected, rel=1e-12)


def test_entropy_loss_is_the_gap_to_log_e() -> None:
    shares_BSE = random_shares()
    rows = shares_BSE.flatten(0, 1).tolist()
    means = [sum(row[i] for row in rows) / len(rows) for i in range(6)]
    expected = math.log(6) + sum(p * math.log(p) for p in means)
    assert entropy_loss(shares_BSE, 2).item() == pytest.approx(expected, rel=1e-12)


def one_hot_shares(experts_BS: list[list[int]], experts: int) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(experts_BS), experts).double()


def test_limits_of_the_balance_losses() -> None:
    """Even routing gives 1, 1 and 0; everything on one of E experts gives E, E and log E."""
    even = one_hot_shares([[0, 1, 2, 3], [3, 2, 1, 0]], 4)
    assert [loss(even, 1).item() for loss in (sequence_loss, load_loss, entropy_loss)] == pytest.approx(
        [1, 1, 0]
    )
    collapsed = one_hot_shares([[2, 2, 2, 2], [2, 2, 2, 2]], 4)
    losses = [loss(collapsed, 1).item() for loss in (sequence_loss, load_loss, entropy_loss)]
    assert losses == pytest.approx([4, 4, math.log(4)])


def test_only_the_sequence_loss_sees_imbalance_inside_a_sequence() -> None:
    """Each sequence on an expert of its own: even over the batch, collapsed in each sequence."""
    shares_BSE = one_hot_shares([[0, 0], [1, 1], [2, 2]], 3)
    assert sequence_loss(shares_BSE, 1).item() == pytest.approx(3)
    assert load_loss(shares_BSE, 1).item() == pytest.approx(1)
    assert entropy_loss(shares_BSE, 1).item() == pytest.approx(0)


@pytest.mark.parametrize("scoring_func", ["sigmoid", "softmax"])
def test_balance_and_z_losses_equal_megatron_core(scoring_func: str) -> None:
    """Value and gradient in the router's logits, from Megatron-Core's functions for the same losses."""
    from megatron.core.transformer.moe.moe_utils import (
        compute_routing_scores_for_aux_loss,
        switch_load_balancing_loss_func,
        z_loss_func,
    )

    torch.manual_seed(10)
    batch, seq, experts, k = 3, 5, 6, 2
    logits_SBE = torch.randn(seq, batch, experts, requires_grad=True)
    chosen, scores = compute_routing_scores_for_aux_loss(logits_SBE.view(-1, experts), k, scoring_func)
    whole = switch_load_balancing_loss_func(scores, chosen.sum(0), seq * batch, k, experts, 1.0)
    # Megatron-Core's router folds the batch into the experts to get the sum over sequences.
    rows, map_rows = scores.reshape(seq, -1), chosen.reshape(seq, -1)
    each = switch_load_balancing_loss_func(rows, map_rows.sum(0), seq, k, experts, 1.0) / batch
    z = z_loss_func(logits_SBE.view(-1, experts), 1.0)
    theirs = torch.stack((whole, each, z))

    ours_BSE = logits_SBE.transpose(0, 1)
    scores_BSE = ours_BSE.sigmoid() if scoring_func == "sigmoid" else ours_BSE.softmax(-1)
    shares_BSE = scores_BSE / scores_BSE.sum(-1, keepdim=True)
    ours_z = ours_BSE.logsumexp(-1).square().mean()
    ours = torch.stack((load_loss(shares_BSE, k), sequence_loss(shares_BSE, k), ours_z))
    torch.testing.assert_close(ours, theirs)
    for mine, other in zip(ours, theirs, strict=True):
        gradients = [torch.autograd.grad(x, logits_SBE, retain_graph=True)[0] for x in (mine, other)]
        torch.testing.assert_close(*gradients)


# --- losses of the model ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "limit"), [("sequence", 1.0), ("load", 1.0), ("entropy", 0.0), ("none", 0.0)]
)
def test_a_router_without_preference_has_the_uniform_loss_in_every_layer(kind: str, limit: float) -> None:
    """Equal scores: P is uniform, so the loss is alpha per MoE layer, MTP included, whatever is chosen."""
    moe = {"balance_loss_type": kind, "router_aux_loss_weight": 0.25, "router_z_loss_weight": 0.5}
    model = build_model(build_config(moe, use_mtp=True, num_predict_tokens=3, mtp_loss_weight=0.0))
    with torch.no_grad():
        for router in model.routers():
            router.weight.zero_()
    losses = model.loss(*random_batch())
    assert len(losses.output.routings) == 3
    for routing in losses.output.routings:
        assert routing.balance_loss.item() == pytest.approx(limit, abs=1e-12)
        assert routing.z_loss.item() == pytest.approx(math.log(6) ** 2)
    expected = losses.lm.item() + 0.25 * 3 * limit + 0.5 * 3 * math.log(6) ** 2
    assert losses.total.item() == pytest.approx(expected, rel=1e-12)


def test_bias_groups_and_dropping_do_not_enter_the_balance_loss() -> None:
    """Eq. 18 counts unbiased scores: what changes the choice leaves the loss of a layer as it is."""
    plain = build_model(build_config())
    others = [
        build_model(build_config({"use_aux_loss_free": True})),
        build_model(build_config({"n_group": 3, "topk_group": 1})),
        build_model(build_config({"capacity_factor": 0.5})),
    ]
    for router in others[0].routers():
        router.e_score_correction_bias.copy_(torch.linspace(1, -1, 6))
    tokens_BS, _, _ = random_batch()
    expected = plain(tokens_BS).routings[0]
    for model in others:
        routing = model(tokens_BS).routings[0]
        assert torch.equal(routing.scores_BSE, expected.scores_BSE)
        assert not torch.equal(routing.gates_BSE, expected.gates_BSE)
        assert torch.equal(routing.balance_loss, expected.balance_loss)


def cross_entropy(logits: list[float], label: int) -> float:
    top = max(logits)
    return top + math.log(sum(math.exp(x - top) for x in logits)) - logits[label]


def test_mtp_and_lm_losses_token_by_token() -> None:
    """Depth k at position i is scored on token i + 1 + k; every depth's sum is divided by T (eq. 24)."""
    depths = 2
    model = build_model(build_config(use_mtp=True, num_predict_tokens=depths + 1, mtp_loss_weight=0.7))
    tokens_BS, labels_BS, mask_BS = random_batch()
    losses = model.loss(tokens_BS, labels_BS, mask_BS)
    labels, mask = labels_BS.tolist(), mask_BS.tolist()
    losses_by_depth = []
    all_logits = (losses.output.logits_BSW, *losses.output.mtp_logits_BSW)
    for k, (logits_BSW, loss_BS) in enumerate(zip(all_logits, (losses.lm_BS, *losses.mtp_BS), strict=True)):
        total = 0.0
        for b in range(SEQUENCES):
            for i in range(POSITIONS):
                expected = 0.0
                if i + k < POSITIONS and mask[b][i + k]:
                    expected = cross_entropy(logits_BSW[b, i].tolist(), labels[b][i + k])
                assert loss_BS[b, i].item() == pytest.approx(expected, rel=1e-10, abs=1e-12)
                total += expected
        losses_by_depth.append(total / (SEQUENCES * POSITIONS - 2))
    assert losses.lm.item() == pytest.approx(losses_by_depth[0])
    assert [loss.item() for loss in losses.mtp] == pytest.approx(losses_by_depth[1:])
    weighted = 0.7 / depths * sum(losses_by_depth[1:]) + 0.0001 * losses.balance.item()
    assert losses.total.item() == pytest.approx(losses_by_depth[0] + weighted, rel=1e-12)


def test_mtp_sees_exactly_the_tokens_up_to_its_own() -> None:
    """Depth k at position i depends on token i + k and on none after it."""
    model = build_model(build_config(use_mtp=True, num_predict_tokens=3))
    tokens_BS, _, _ = random_batch()
    before = model(tokens_BS)
    changed_at = 4
    tokens_BS = tokens_BS.clone()
    tokens_BS[:, changed_at] = (tokens_BS[:, changed_at] + 1) % VOCABULARY
    after = model(tokens_BS)
    pairs = zip(
        (before.logits_BSW, *before.mtp_logits_BSW), (after.logits_BSW, *after.mtp_logits_BSW), strict=True
    )
    for k, (old, new) in enumerate(pairs):
        # Not exactly equal: an expert's matrix product has other rows.
        moved_BS = (old - new).abs().amax(-1) > 1e-9
        first = changed_at - k
        assert not moved_BS[:, :first].any()
        assert moved_BS[:, first].all()


def test_a_mask_without_tokens_gives_zero_not_nan() -> None:
    model = build_model(build_config({"balance_loss_type": "none"}, use_mtp=True))
    tokens_BS, labels_BS, mask_BS = random_batch()
    losses = model.loss(tokens_BS, labels_BS, torch.zeros_like(mask_BS))
    assert losses.total.item() == 0.0


# --- balancing biases -------------------------------------------------------------------------


def test_bias_update_moves_by_the_sign_of_the_gap_to_the_mean() -> None:
    moe = {"use_aux_loss_free": True, "bias_update_rate": 0.01}
    model = build_model(build_config(moe, use_mtp=True))
    loads = ([9, 3, 6, 6, 12, 0], [1, 1, 1, 1, 1, 1])
    for _ in range(2):
        model.update_biases([torch.tensor(load) for load in loads])
    for router, load in zip(model.routers(), loads, strict=True):
        mean = sum(load) / len(load)
        expected = [0.02 * ((mean > x) - (mean < x)) for x in load]
        assert router.e_score_correction_bias.tolist() == pytest.approx(expected)


def test_bias_updates_even_out_the_load() -> None:
    """On a fixed batch the busiest expert's load comes close to the mean, and no gate sees the bias."""
    config = build_config({"use_aux_loss_free": True, "bias_update_rate": 0.01})
    model = build_model(config)
    torch.manual_seed(11)
    tokens_BS = torch.randint(0, VOCABULARY, (8, 32))
    mean = tokens_BS.numel() * 2 / 6
    excess = []
    for _ in range(60):
        routings = model(tokens_BS).routings
        excess.append(routings[0].tokens_per_expert_E.max().item() / mean - 1)
        model.update_biases([routing.tokens_per_expert_E for routing in routings])
    assert excess[0] > 0.4
    assert excess[-1] < 0.15
    routing = model(tokens_BS).routings[0]
    unbiased_BSE = routing.scores_BSE * routing.chosen_BSE
    torch.testing.assert_close(routing.gates_BSE, unbiased_BSE / unbiased_BSE.sum(-1, keepdim=True))
