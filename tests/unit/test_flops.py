"""Parameter counts against transformers and the published sizes; FLOPs against sums written out."""

from pathlib import Path
from typing import Any

import pytest

from megads.config.flops import (
    attention_flops_per_token,
    count_parameters,
    forward_flops_per_token,
    training_flops_per_token,
)
from megads.config.loader import load_config
from megads.config.schema import Config

CONFIGS = Path(__file__).parents[2] / "configs"


def shipped(name: str) -> Config:
    return load_config(CONFIGS / f"{name}.json")


def small(**changes: Any) -> Config:
    """A model whose numbers can be added by hand."""
    base = {
        "model": {
            "num_layers": 2,
            "vocab_size": 100,
            "intermediate_size": 30,
            "first_k_dense_replace": 1,
            "mla": {
                "d_model": 10,
                "d_latent": 6,
                "q_lora_rank": 7,
                "num_heads": 2,
                "qk_nope_head_dim": 4,
                "qk_rope_head_dim": 2,
                "v_head_dim": 3,
            },
            "moe": {
                "num_experts": 5,
                "num_experts_per_token": 2,
                "expert_intermediate_size": 8,
                "num_shared_experts": 1,
                "use_aux_loss_free": True,
            },
        },
        "training": {"seq_length": 16, "use_mtp": True, "num_predict_tokens": 2},
    }
    return load_config(None, base | {path.replace("__", "."): value for path, value in changes.items()})


ATTENTION = 10 * 7 + 7 * 2 * (4 + 2) + 10 * (6 + 2) + 6 * 2 * (4 + 3) + 2 * 3 * 10
NORMS = 10 + 10 + 7 + 6
EXPERT = 3 * 10 * 8


def test_parts_of_a_small_model() -> None:
    counts = count_parameters(small())
    dense, moe = counts.layers
    assert (dense.attention, dense.norms, dense.dense_ffn, dense.experts) == (
        ATTENTION,
        NORMS,
        3 * 10 * 30,
        0,
    )
    assert (moe.router, moe.experts, moe.shared_experts) == (5 * 10, 5 * EXPERT, EXPERT)
    assert moe.router_bias == 5
    assert counts.router_bias == 10
    layers = 2 * (ATTENTION + NORMS) + 900 + 50 + 6 * EXPERT
    assert counts.total == 1000 + 1000 + 10 + layers
    assert counts.active == counts.total - 3 * EXPERT
    assert counts.mtp == 2 * 10 * 10 + 3 * 10 + ATTENTION + NORMS + 50 + 6 * EXPERT
    assert counts.total_with_mtp == counts.total + counts.mtp
    assert counts.active_with_mtp == counts.active + counts.mtp - 3 * EXPERT
    assert sum(counts.by_part().values()) == counts.total_with_mtp


def test_variants_of_the_small_model() -> None:
    base = count_parameters(small())
    assert base.total - count_parameters(small(model__tie_word_embeddings=True)).total == 1000
    full_rank = count_parameters(small(model__mla__q_lora_rank=None)).layers[0]
    assert full_rank.attention == ATTENTION - 70 - 84 + 10 * 2 * 6
    assert full_rank.norms == NORMS - 7
    layernorm = count_parameters(small(model__norm_type="layernorm"))
    assert layernorm.layers[0].norms == 2 * NORMS
    assert layernorm.final_norm == 20
    assert count_parameters(small(training__use_mtp=False)).mtp == 0
    assert count_parameters(small(model__moe__use_aux_loss_free=False)).router_bias == 0


def test_flops_of_the_small_model() -> None:
    moe = ATTENTION + 50 + 3 * EXPERT
    matrices = (ATTENTION + 900) + 2 * moe + 200 + 2 * 1000
    scores = 2 * 2 * (4 + 2 + 3)
    assert forward_flops_per_token(small(), causal=False) == 2 * matrices + 3 * scores * 16
    # Position i of 16 sees i keys: 8.5 on average.
    assert forward_flops_per_token(small()) == 2 * matrices + 3 * scores * 8.5
    assert training_flops_per_token(small()) == 3 * forward_flops_per_token(small())


def test_a_window_limits_the_keys() -> None:
    windowed = small(model__mla__sliding_window=4)
    keys = sum(min(position, 4) for position in range(1, 17)) / 16
    assert attention_flops_per_token(windowed) == pytest.approx(36 * keys)
    assert attention_flops_per_token(windowed, causal=False) == 36 * 4
    assert attention_flops_per_token(small(model__mla__sliding_window=99)) == 36 * 8.5


@pytest.mark.parametrize(
    ("name", "total", "active_without_table"),
    [
        # Published: 671B / 37B, 15.7B / 2.4B, 16B (15.96B); active without the embedding table, which is
        # looked up and not multiplied.
        ("deepseek_v3_671b", 671_026_404_352, 36.6e9),
        ("deepseek_v2_lite", 15_706_484_224, 2.45e9),
        ("moonlight_16b_a3b", 15_960_108_544, 2.58e9),
    ],
)
def test_published_sizes(name: str, total: int, active_without_table: float) -> None:
    counts = count_parameters(shipped(name))
    assert counts.total == total
    assert counts.active - counts.embedding == pytest.approx(active_without_table, rel=0.003)


def test_published_activation_without_embedding_and_head() -> None:
    # Moonlight's paper (arXiv:2502.16982) gives 2.24B activated and 15.29B in all without embeddings.
    counts = count_parameters(shipped("moonlight_16b_a3b"))
    assert counts.active_without_embedding == pytest.approx(2.24e9, rel=0.003)
    assert counts.total - counts.embedding - counts.head == pytest.approx(15.29e9, rel=0.001)


def test_published_mtp_module() -> None:
    # DeepSeek-V3's weights: 11.5B of its own for the MTP module; the checkpoint repeats the 0.9B embedding
    # and the 0.9B head in it, which makes about 685B in all.
    counts = count_parameters(shipped("deepseek_v3_671b"))
    assert counts.mtp == pytest.approx(11.5e9, rel=0.01)
    assert counts.total_with_mtp + counts.embedding + counts.head == pytest.approx(685e9, rel=0.001)


def test_published_training_speed() -> None:
    # 180K H800 hours per trillion tokens at 385 causal TFLOP/s per GPU: the FLOPs of one token.
    published = 385e12 * 180e3 * 3600 / 1e12
    assert training_flops_per_token(shipped("deepseek_v3_671b")) == pytest.approx(published, rel=0.06)


@pytest.mark.parametrize("name", ["deepseek_v3_671b", "deepseek_v2_lite", "moonlight_16b_a3b"])
def test_transformers_counts_the_same(name: str) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = shipped(name)
    family = "DeepseekV2" if config.model.moe.scoring_func == "softmax" else "DeepseekV3"
    settings = getattr(transformers, f"{family}Config")(**_for_transformers(config))
    with torch.device("meta"):
        model = getattr(transformers, f"{family}ForCausalLM")(settings)
    counts = count_parameters(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == counts.total
    biases = [tensor for name, tensor in model.named_buffers() if name.endswith("e_score_correction_bias")]
    in_mtp = sum(layer.router_bias for layer in counts.mtp_layers)
    assert sum(bias.numel() for bias in biases) == counts.router_bias - in_mtp
    layer, ours = model.model.layers[-1], counts.layers[-1]
    assert sum(parameter.numel() for parameter in layer.mlp.experts.parameters()) == ours.experts
    assert (
        sum(parameter.numel() for parameter in layer.mlp.shared_experts.parameters()) == ours.shared_experts
    )


def _for_transformers(config: Config) -> dict[str, Any]:
    model, mla, moe = config.model, config.model.mla, config.model.moe
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": mla.d_model,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_layers,
        "first_k_dense_replace": model.first_k_dense_replace,
        "num_attention_heads": mla.num_heads,
        "num_key_value_heads": mla.num_heads,
        "q_lora_rank": mla.q_lora_rank,
        "kv_lora_rank": mla.d_latent,
        "qk_nope_head_dim": mla.qk_nope_head_dim,
        "qk_rope_head_dim": mla.qk_rope_head_dim,
        "v_head_dim": mla.v_head_dim,
        "n_routed_experts": moe.num_experts,
        "n_shared_experts": moe.num_shared_experts,
        "num_experts_per_tok": moe.num_experts_per_token,
        "moe_intermediate_size": moe.expert_intermediate_size,
        "n_group": moe.n_group,
        "topk_group": moe.topk_group,
        "tie_word_embeddings": model.tie_word_embeddings,
    }
