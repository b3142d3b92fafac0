"""Scaling laws against the papers' own numbers, and where they stop being valid."""

from pathlib import Path

import pytest

from megads.config.flops import scaling_flops_per_token
from megads.config.loader import load_config
from megads.plan import scaling

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize(
    ("layers", "width", "learning_rate", "sequences", "published_rate", "published_sequences"),
    [(30, 4096, 4.24e-4, 2255, 4.2e-4, 2304), (95, 8192, 3.1e-4, 5040, 3.2e-4, 4608)],
    ids=["7B", "67B"],
)
def test_deepseek_llm(
    layers: int,
    width: int,
    learning_rate: float,
    sequences: float,
    published_rate: float,
    published_sequences: float,
) -> None:
    """Table 2 of DeepSeek LLM: both models saw 2T tokens in sequences of 4096."""
    compute = scaling.dense_model_scale(layers, width, 4096) * 2e12
    assert scaling.learning_rate_at(compute) == pytest.approx(learning_rate, rel=0.01)
    assert scaling.batch_tokens_at(compute) / 4096 == pytest.approx(sequences, rel=0.01)
    assert scaling.learning_rate_at(compute) == pytest.approx(published_rate, rel=0.05)
    assert scaling.batch_tokens_at(compute) / 4096 == pytest.approx(published_sequences, rel=0.1)


def test_model_and_data_share_the_compute() -> None:
    for compute in (1e17, 1e20, 1e24):
        product = scaling.optimal_model_scale(compute) * scaling.optimal_tokens(compute)
        assert product == pytest.approx(compute, rel=0.001)
        assert scaling.compute_of_optimal_model(scaling.optimal_model_scale(compute)) == pytest.approx(
            compute
        )


def test_the_scale_of_a_configuration_counts_as_the_paper_does() -> None:
    """6 per matrix weight, without embedding and head, and 12 L d s where heads are d wide in all."""
    width, heads, latent, length = 64, 4, 20, 128
    config = load_config(
        None,
        {
            "model.num_layers": 3,
            "model.mla.d_model": width,
            "model.mla.num_heads": heads,
            "model.mla.d_latent": latent,
            "model.mla.qk_nope_head_dim": 14,
            "model.mla.qk_rope_head_dim": 2,
            "model.mla.v_head_dim": 16,
            "model.moe.num_experts": 0,
            "model.intermediate_size": 170,
            "training.seq_length": length,
        },
    )
    attention = 2 * width * width + width * (latent + 2) + latent * heads * (14 + 16)
    matrices = 3 * (attention + 3 * width * 170)
    assert scaling_flops_per_token(config) == 6 * matrices + 12 * 3 * width * length
    assert scaling.dense_model_scale(3, width, length) == 6 * 3 * 12 * width**2 + 12 * 3 * width * length


def test_chinchilla() -> None:
    """Its own model, 70B parameters on 1.4T tokens, has 1.94 by eq. 10; the optimum is the least."""
    assert scaling.chinchilla_loss(70e9, 1.4e12) == pytest.approx(1.937, abs=0.005)
    compute = 5.76e23
    parameters, tokens = scaling.chinchilla_optimum(compute)
    assert 6 * parameters * tokens == pytest.approx(compute)
    least = scaling.chinchilla_loss(parameters, tokens)
    for factor in (0.8, 1.25):
        assert scaling.chinchilla_loss(parameters * factor, tokens / factor) > least


def test_equal_parameters_and_tokens_are_far_from_optimal() -> None:
    compute = 1e23
    equal = (compute / 6) ** 0.5
    assert scaling.chinchilla_loss(equal, equal) > scaling.chinchilla_loss(
        *scaling.chinchilla_optimum(compute)
    )


def test_what_is_an_extrapolation_is_said() -> None:
    tiny = scaling.advise(load_config(CONFIGS / "debug.json"))
    assert any("do not rely" in remark for remark in tiny.remarks)
    lite = scaling.advise(load_config(CONFIGS / "deepseek_v2_lite.json"))
    assert any("beyond the fit" in remark for remark in lite.remarks)
    assert any("mixture of experts" in remark for remark in lite.remarks)
    # V2-Lite trained at 4.2e-4; the law for the FLOPs of its active parameters is not far.
    assert lite.learning_rate == pytest.approx(4.2e-4, rel=0.05)


def test_recommendations_grow_with_size() -> None:
    small, large = scaling.recommend(1e9), scaling.recommend(7e9)
    assert small.learning_rate > large.learning_rate
    assert small.batch_tokens < large.batch_tokens
    assert 6 * large.parameters * large.tokens == pytest.approx(large.compute_flops)
