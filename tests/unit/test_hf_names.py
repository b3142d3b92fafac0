"""The name map against the published checkpoint's names, its own inverse, and damaged states."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megads.config.schema import Config
from megads.errors import CheckpointError
from megads.model.hf_names import from_huggingface, name_map, to_huggingface
from megads.model.reference import ReferenceModel


def build_config(
    mla: dict[str, Any] | None = None, moe: dict[str, Any] | None = None, **model: Any
) -> Config:
    sizes = {"d_model": 16, "d_latent": 6, "q_lora_rank": 10, "num_heads": 2, "qk_nope_head_dim": 8,
             "qk_rope_head_dim": 4, "v_head_dim": 7}  # fmt: skip
    experts = {"num_experts": 4, "num_experts_per_token": 2, "expert_intermediate_size": 5,
               "num_shared_experts": 2, "use_aux_loss_free": True}  # fmt: skip
    tree = {"num_layers": 3, "vocab_size": 32, "intermediate_size": 24, "first_k_dense_replace": 1}
    model = tree | {"mla": sizes | (mla or {}), "moe": experts | (moe or {})} | model
    return Config.model_validate({"model": model, "training": {"use_mtp": True, "num_predict_tokens": 3}})


CONFIGS = {
    "v3": build_config(),
    "no-query-latent-no-bias": build_config({"q_lora_rank": None}, {"use_aux_loss_free": False}),
    "no-shared-experts": build_config(moe={"num_shared_experts": 0}),
    "tied": build_config(tie_word_embeddings=True),
    "layernorm": build_config(norm_type="layernorm"),
    "dense": build_config(moe={"num_experts": 0}),
}


def random_state(config: Config) -> dict[str, Tensor]:
    """A model state of ours with every entry different from every other."""
    torch.manual_seed(0)
    return {entry.ours: torch.randn(entry.shape) for entry in name_map(config)}


def assert_same_state(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_both_directions_are_exact_inverses(config: Config) -> None:
    state = random_state(config)
    published = to_huggingface(state, config)
    assert_same_state(from_huggingface(published, config), state)
    assert_same_state(to_huggingface(from_huggingface(published, config), config), published)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_the_reference_model_takes_the_published_state_as_it_is(config: Config) -> None:
    published = to_huggingface(random_state(config), config)
    reference = ReferenceModel(config)
    reference.load_state_dict(published, strict=True)
    assert_same_state(reference.state_dict(), published)


def test_names_are_the_published_ones() -> None:
    """Names as in the index of the DeepSeek-V3 checkpoint, layer 3 and the MTP layer after the last."""
    published = to_huggingface(random_state(CONFIGS["v3"]), CONFIGS["v3"])
    attention = {
        "input_layernorm.weight",
        "self_attn.q_a_proj.weight",
        "self_attn.q_a_layernorm.weight",
        "self_attn.q_b_proj.weight",
        "self_attn.kv_a_proj_with_mqa.weight",
        "self_attn.kv_a_layernorm.weight",
        "self_attn.kv_b_proj.weight",
        "self_attn.o_proj.weight",
        "post_attention_layernorm.weight",
    }
    dense = {"mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"}
    moe = {"mlp.gate.weight", "mlp.gate.e_score_correction_bias"}
    for expert in ("shared_experts", "experts.0", "experts.1", "experts.2", "experts.3"):
        moe |= {f"mlp.{expert}.{part}_proj.weight" for part in ("gate", "up", "down")}
    mtp = {"embed_tokens.weight", "enorm.weight", "hnorm.weight", "eh_proj.weight"}
    mtp |= {"shared_head.norm.weight", "shared_head.head.weight"}
    expected = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    for layer, parts in enumerate(
        (attention | dense, *(attention | moe,) * 2, *(attention | moe | mtp,) * 2)
    ):
        expected |= {f"model.layers.{layer}.{part}" for part in parts}
    assert published.keys() == expected


def test_stacked_tensors_land_where_they_belong() -> None:
    """[gate; up] halves and the experts' gate (0) and up (1), by value, in decoder and MTP."""
    config = CONFIGS["v3"]
    state = random_state(config)
    published = to_huggingface(state, config)
    fc1 = state["decoder.layers.0.mlp.linear_fc1.weight"]
    assert torch.equal(published["model.layers.0.mlp.gate_proj.weight"], fc1[:24])
    assert torch.equal(published["model.layers.0.mlp.up_proj.weight"], fc1[24:])
    for ours, theirs in (
        ("decoder.layers.2.", "model.layers.2."),
        ("mtp.layers.1.mtp_model_layer.", "model.layers.4."),
    ):
        for expert in range(4):
            weight1, weight2 = state[f"{ours}mlp.experts.weight1"], state[f"{ours}mlp.experts.weight2"]
            name = f"{theirs}mlp.experts.{expert}."
            assert torch.equal(published[f"{name}gate_proj.weight"], weight1[expert, 0])
            assert torch.equal(published[f"{name}up_proj.weight"], weight1[expert, 1])
            assert torch.equal(published[f"{name}down_proj.weight"], weight2[expert])


def test_mtp_repeats_embedding_and_head_and_may_leave_them_out() -> None:
    config = CONFIGS["v3"]
    state = random_state(config)
    published = to_huggingface(state, config)
    for layer in (3, 4):
        embedding = published.pop(f"model.layers.{layer}.embed_tokens.weight")
        head = published.pop(f"model.layers.{layer}.shared_head.head.weight")
        assert torch.equal(embedding, state["embedding.word_embeddings.weight"])
        assert torch.equal(head, state["output_layer.weight"])
    assert_same_state(from_huggingface(published, config), state)


def test_tied_checkpoint_has_no_head_but_may_repeat_it() -> None:
    config = CONFIGS["tied"]
    state = random_state(config)
    published = to_huggingface(state, config)
    assert not [name for name in published if name.endswith("head.weight")]
    repeated = published | {"lm_head.weight": published["model.embed_tokens.weight"].clone()}
    assert_same_state(from_huggingface(repeated, config), state)
    with pytest.raises(
        CheckpointError, match=r"lm_head\.weight, which must be a copy of model\.embed_tokens"
    ):
        from_huggingface(published | {"lm_head.weight": torch.zeros(32, 16)}, config)


def test_repeated_embedding_with_other_values_is_refused() -> None:
    config = CONFIGS["v3"]
    published = to_huggingface(random_state(config), config)
    published["model.layers.3.embed_tokens.weight"] = torch.zeros(32, 16)
    with pytest.raises(CheckpointError, match=r"model\.layers\.3\.embed_tokens\.weight"):
        from_huggingface(published, config)


def test_types_and_extra_states() -> None:
    """bf16 stays bf16; Megatron-Core's `_extra_state` entries are passed over."""
    config = CONFIGS["v3"]
    state = {name: tensor.bfloat16() for name, tensor in random_state(config).items()}
    published = to_huggingface(state | {"decoder.layers.0.mlp._extra_state": torch.empty(0)}, config)
    assert {tensor.dtype for tensor in published.values()} == {torch.bfloat16}
    assert_same_state(from_huggingface(published, config), state)


def test_every_kind_of_fault_is_listed_at_once() -> None:
    config = CONFIGS["v3"]
    published = to_huggingface(random_state(config), config)
    del published["model.layers.1.self_attn.o_proj.weight"]
    published["model.layers.9.self_attn.o_proj.weight"] = torch.zeros(1)
    published["model.norm.weight"] = torch.zeros(17)
    with pytest.raises(CheckpointError) as error:
        from_huggingface(published, config)
    message = str(error.value)
    assert "1 missing:\n  model.layers.1.self_attn.o_proj.weight" in message
    assert "1 unknown:\n  model.layers.9.self_attn.o_proj.weight" in message
    assert "model.norm.weight: (17,), the configuration gives (16,)" in message


def test_a_state_of_another_model_gives_one_screen() -> None:
    config = CONFIGS["v3"]
    other = build_config(moe={"num_experts": 64})
    for convert, state in (
        (from_huggingface, to_huggingface(random_state(other), other)),
        (to_huggingface, random_state(other)),
    ):
        with pytest.raises(CheckpointError) as error:
            convert(state, config)
        assert len(str(error.value).splitlines()) < 30
