"""The oracle's routing, capacity and attention masks against rules written out in Python."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megads.config.schema import Config, MoE
from megads.errors import ConfigError
from megads.model.reference import ReferenceModel, capacity_tokens, choose_experts, within_capacity

VOCABULARY = 31


def build_config(
    mla: dict[str, Any] | None = None, moe: dict[str, Any] | None = None, **model: Any
) -> Config:
    sizes = {"d_model": 16, "d_latent": 8, "num_heads": 2, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4}
    experts = {
        "num_experts": 6,
        "num_experts_per_token": 2,
        "expert_intermediate_size": 8,
        "min_expert_capacity": 0,
    }
    outer = {"num_layers": 1, "vocab_size": VOCABULARY, "init_method_std": 0.4}
    return Config.model_validate(
        {"model": outer | {"mla": sizes | (mla or {}), "moe": experts | (moe or {})} | model}
    )


def build_model(config: Config) -> ReferenceModel:
    torch.manual_seed(3)
    return ReferenceModel(config).double()


def random_tokens(sequences: int, positions: int) -> Tensor:
    torch.manual_seed(4)
    return torch.randint(0, VOCABULARY, (sequences, positions))


def choose_by_hand(scores: list[float], moe: MoE) -> set[int]:
    """Best groups by their best scores, then the best experts in them."""
    width, best = len(scores) // moe.n_group, 2 if moe.scoring_func == "sigmoid" else 1
    groups = [scores[g * width : (g + 1) * width] for g in range(moe.n_group)]
    order = sorted(range(moe.n_group), key=lambda g: -sum(sorted(groups[g])[-best:]))
    allowed = [e for e in range(len(scores)) if e // width in order[: moe.topk_group]]
    return set(sorted(allowed, key=lambda e: -scores[e])[: moe.num_experts_per_token])


@pytest.mark.parametrize("scoring_func", ["sigmoid", "softmax"])
@pytest.mark.parametrize(("n_group", "topk_group"), [(1, 1), (4, 2), (3, 1), (12, 5)])
def test_choice_of_experts_by_groups(scoring_func: str, n_group: int, topk_group: int) -> None:
    groups = {"n_group": n_group, "topk_group": topk_group}
    moe = MoE(num_experts=12, num_experts_per_token=3, scoring_func=scoring_func, **groups)
    torch.manual_seed(5)
    scores_BSE, bias_E = torch.rand(2, 40, 12, dtype=torch.float64), torch.randn(12, dtype=torch.float64)
    chosen_BSE = choose_experts(scores_BSE, bias_E, moe)
    for scores_E, chosen_E in zip(scores_BSE.flatten(0, 1), chosen_BSE.flatten(0, 1), strict=True):
        assert set(chosen_E.nonzero().flatten().tolist()) == choose_by_hand((scores_E + bias_E).tolist(), moe)


def test_group_scores_of_v2_and_v3_choose_differently() -> None:
    """One expert of 0.9 beats two of 0.8 by the best one (V2), loses by the sum of two (V3)."""
    scores_BSE = torch.tensor([[[0.9, 0.1, 0.8, 0.8]]])
    common = {"num_experts": 4, "num_experts_per_token": 2, "n_group": 2, "topk_group": 1}
    v3 = choose_experts(scores_BSE, None, MoE(**common, scoring_func="sigmoid"))
    v2 = choose_experts(scores_BSE, None, MoE(**common, scoring_func="softmax"))
    assert v3.tolist() == [[[False, False, True, True]]]
    assert v2.tolist() == [[[True, True, False, False]]]


@pytest.mark.parametrize("scoring_func", ["sigmoid", "softmax"])
@pytest.mark.parametrize("norm_topk_prob", [False, True])
def test_output_of_the_layer_token_by_token(scoring_func: str, norm_topk_prob: bool) -> None:
    """Eq. 12-15 for one token after another, with temperature and scale."""
    moe = {
        "scoring_func": scoring_func, "norm_topk_prob": norm_topk_prob, "routed_scaling_factor": 1.7,
        "router_temperature": 0.5, "num_shared_experts": 1,
    }  # fmt: skip
    layer = build_model(build_config(moe=moe)).model.decoder[0].mlp
    u_BSD = torch.randn(2, 5, 16, dtype=torch.float64)
    out_BSD, _ = layer(u_BSD)
    for u_D, out_D in zip(u_BSD.flatten(0, 1), out_BSD.flatten(0, 1), strict=True):
        logits = [x / 0.5 for x in (layer.gate.weight @ u_D).tolist()]
        scores = [1 / (1 + math.exp(-x)) for x in logits]
        if scoring_func == "softmax":
            scores = [math.exp(x) / sum(math.exp(y) for y in logits) for x in logits]
        best = sorted(range(6), key=lambda e: -scores[e])[:2]
        scale = 1.7 / (sum(scores[e] for e in best) if norm_topk_prob else 1)
        expected_D = layer.shared_experts(u_D) + sum(scores[e] * scale * layer.experts[e](u_D) for e in best)
        torch.testing.assert_close(out_D, expected_D)


def test_a_single_expert_keeps_its_score_as_gate() -> None:
    """K = 1: a normalized gate would be constant and leave the router without gradient."""
    model = build_model(build_config(moe={"num_experts_per_token": 1}))
    routing = model(random_tokens(2, 6)).routings[0]
    assert torch.equal(routing.gates_BSE.sum(-1), routing.scores_BSE.max(-1).values)


# --- capacity ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "factor", "least", "capacity"),
    [(64, None, 4, None), (64, 1.0, 0, 22), (64, 1.25, 0, 27), (3, 1.0, 0, 1), (3, 1.0, 4, 4)],
)
def test_capacity(tokens: int, factor: float | None, least: int, capacity: int | None) -> None:
    """K tokens / E times the factor, rounded up: 64 tokens, K = 2, E = 6 make 21.33 on average."""
    moe = MoE(num_experts=6, num_experts_per_token=2, capacity_factor=factor, min_expert_capacity=least)
    assert capacity_tokens(tokens, moe) == capacity


@pytest.mark.parametrize("capacity_factor", [0.25, 0.6, 1.0, 5.0])
def test_dropping_equals_megatron_core(capacity_factor: float) -> None:
    from megatron.core.transformer.moe.moe_utils import apply_router_token_dropping

    model = build_model(build_config(moe={"capacity_factor": capacity_factor}))
    routing = model(random_tokens(3, 8)).routings[0]
    full = build_model(build_config())(random_tokens(3, 8)).routings[0].gates_BSE
    expected_TE, _ = apply_router_token_dropping(
        full.flatten(0, 1), routing.chosen_BSE.flatten(0, 1), 2, capacity_factor, "probs"
    )
    assert torch.equal(routing.gates_BSE.flatten(0, 1), expected_TE)
    dropped = (routing.chosen_BSE & (routing.gates_BSE == 0)).sum().item()
    assert (dropped > 0) == (capacity_factor < 5)


def test_an_expert_keeps_its_largest_gates_over_all_sequences() -> None:
    gates_BSE = torch.tensor([[[0.9], [0.1]], [[0.5], [0.7]]])
    assert within_capacity(gates_BSE, 2).squeeze(-1).tolist() == [[True, False], [False, True]]


def test_a_token_dropped_by_all_experts_passes_through_the_residual() -> None:
    config = build_config(moe={"capacity_factor": 0.25})
    model = build_model(config)
    layer = model.model.decoder[0].mlp
    u_BSD = torch.randn(1, 12, 16, dtype=torch.float64)
    out_BSD, routing = layer(u_BSD)
    dropped_BS = (routing.gates_BSE == 0).all(-1)
    assert dropped_BS.any()
    assert not dropped_BS.all()
    assert (out_BSD[dropped_BS] == 0).all()
    assert (out_BSD[~dropped_BS] != 0).any(-1).all()
    assert routing.tokens_per_expert_E.sum() == 24


# --- attention masks --------------------------------------------------------------------------


def test_sliding_window_sees_itself_and_the_window_before() -> None:
    model = build_model(build_config({"sliding_window": 3}))
    tokens_BS = random_tokens(1, 9)
    before = model(tokens_BS).logits_BSW
    changed = tokens_BS.clone()
    changed[:, 2] = (changed[:, 2] + 1) % VOCABULARY
    moved = ((model(changed).logits_BSW - before).abs().amax(-1) > 1e-9)[0].tolist()
    assert moved == [False, False, True, True, True, False, False, False, False]


@pytest.mark.parametrize("restart_positions", [False, True])
def test_packed_documents_are_as_if_alone(restart_positions: bool) -> None:
    """RoPE is relative: with the document mask, restarting the positions changes nothing."""
    model = build_model(build_config({"rope_theta": 100.0}))
    tokens_BS = random_tokens(1, 10)
    document_ids_BS = torch.tensor([[0] * 4 + [1] * 6])
    position_ids_BS = torch.tensor([[*range(4), *range(6)]]) if restart_positions else None
    packed = model(tokens_BS, position_ids_BS, document_ids_BS).logits_BSW
    alone = torch.cat((model(tokens_BS[:, :4]).logits_BSW, model(tokens_BS[:, 4:]).logits_BSW), dim=1)
    # Angles are float32, as in every published implementation.
    torch.testing.assert_close(packed, alone, atol=1e-6, rtol=0)
    assert (model(tokens_BS).logits_BSW - alone).abs().max() > 1e-3


# --- the rest ---------------------------------------------------------------------------------


def test_layernorm_and_tied_embeddings_and_dense_model() -> None:
    """The variants that no published DeepSeek model has: right kinds of parameters, all of them trained."""
    config = build_config(moe={"num_experts": 0}, norm_type="layernorm", tie_word_embeddings=True)
    model = build_model(config)
    tokens_BS = random_tokens(2, 6)
    losses = model.loss(tokens_BS, tokens_BS, torch.ones_like(tokens_BS))
    losses.total.backward()
    names = {name for name, parameter in model.named_parameters() if parameter.grad.norm() > 0}
    assert names == {name for name, _ in model.named_parameters()}
    assert "lm_head.weight" not in names
    assert "model.norm.bias" in names
    assert losses.output.routings == ()
    assert losses.balance.item() == 0.0


@pytest.mark.parametrize(
    "config",
    [
        build_config({"attn_dropout": 0.1}),
        build_config(moe={"dropout": 0.1}),
        build_config(moe={"router_noise_std": 0.1}),
        build_config(hidden_dropout=0.1),
    ],
)
def test_random_parts_are_refused(config: Config) -> None:
    with pytest.raises(ConfigError, match="no random parts"):
        ReferenceModel(config)


def test_bias_update_without_biases_is_refused() -> None:
    with pytest.raises(ConfigError, match="use_aux_loss_free"):
        build_model(build_config()).update_biases([torch.ones(6)])
