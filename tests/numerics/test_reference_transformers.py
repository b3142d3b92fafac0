"""The oracle against transformers' DeepSeek-V3, V2 and MTP code: logits and every gradient, in fp32.

Weights travel through `hf_names` in both directions on the way, so that the map that exports is the
map that is tested here.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.modeling_layers import MtpLayer
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3DecoderLayer, DeepseekV3RMSNorm

from megads.config.schema import Config
from megads.config.shape import model_shape
from megads.model.hf_names import from_huggingface, to_huggingface
from megads.model.reference import ReferenceModel

SEQUENCES, POSITIONS, VOCABULARY = 2, 48, 96
LOGITS_TOLERANCE = 5e-5
GRADIENT_TOLERANCE = 5e-5

YARN = {"factor": 8.0, "original_max_position_embeddings": 16}
SMALL_MLA = {
    "d_model": 48, "d_latent": 24, "num_heads": 3, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8,
    "v_head_dim": 20, "max_context_length": 128,
}  # fmt: skip
V3_MOE = {
    "num_experts": 16, "num_experts_per_token": 4, "expert_intermediate_size": 20, "num_shared_experts": 1,
    "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "use_aux_loss_free": True,
}  # fmt: skip
V2_MOE = {
    "num_experts": 12, "num_experts_per_token": 3, "expert_intermediate_size": 20, "num_shared_experts": 2,
    "scoring_func": "softmax", "norm_topk_prob": False,
}  # fmt: skip
MOONLIGHT_MOE = V3_MOE | {
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.446,
    "num_shared_experts": 2,
}


def build_config(mla: dict[str, Any], moe: dict[str, Any], **model: Any) -> Config:
    return Config.model_validate(
        {
            "model": {
                "num_layers": 3, "vocab_size": VOCABULARY, "first_k_dense_replace": 1,
                "intermediate_size": 80, "mla": SMALL_MLA | mla, "moe": moe,
            } | model
        }
    )  # fmt: skip


V3_CASES = {
    "v3": build_config({"q_lora_rank": 32}, V3_MOE),
    "v3-yarn": build_config({"q_lora_rank": 32, "rope_scaling": YARN}, V3_MOE),
    "v3-yarn-magnitudes-differ": build_config(
        {"q_lora_rank": 32, "rope_scaling": YARN | {"mscale": 1.3, "mscale_all_dim": 0.6}}, V3_MOE
    ),
    "v3-tied": build_config({"q_lora_rank": 32}, V3_MOE, tie_word_embeddings=True),
    "moonlight": build_config({"rope_theta": 5e4}, MOONLIGHT_MOE, norm_eps=1e-5),
    "unnormalized-gates": build_config({}, MOONLIGHT_MOE | {"norm_topk_prob": False}),
}
V2_CASES = {
    "v2-lite": build_config({}, V2_MOE),
    "v2-lite-yarn": build_config({"rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}}, V2_MOE),
    "v2-yarn-magnitude-on-rope-only": build_config({"rope_scaling": YARN | {"mscale_all_dim": 0.0}}, V2_MOE),
    "v2-groups": build_config(
        {"q_lora_rank": 32}, V2_MOE | {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 16.0}
    ),
}


def transformers_settings(config: Config) -> dict[str, Any]:
    model, mla, moe, shape = config.model, config.model.mla, config.model.moe, model_shape(config)
    rope = {"rope_type": "default", "rope_theta": mla.rope_theta}
    if mla.rope_scaling is not None:
        rope |= mla.rope_scaling.model_dump(exclude={"type"}) | {"rope_type": "yarn"}
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": mla.d_model,
        "intermediate_size": shape.intermediate_size,
        "moe_intermediate_size": moe.expert_intermediate_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": mla.num_heads,
        "num_key_value_heads": mla.num_heads,
        "n_shared_experts": moe.num_shared_experts,
        "n_routed_experts": moe.num_experts,
        "num_experts_per_tok": moe.num_experts_per_token,
        "n_group": moe.n_group,
        "topk_group": moe.topk_group,
        "routed_scaling_factor": moe.routed_scaling_factor,
        "norm_topk_prob": moe.norm_topk_prob,
        "first_k_dense_replace": model.first_k_dense_replace,
        "q_lora_rank": mla.q_lora_rank,
        "kv_lora_rank": mla.d_latent,
        "qk_nope_head_dim": shape.qk_nope_head_dim,
        "qk_rope_head_dim": shape.qk_rope_head_dim,
        "v_head_dim": shape.v_head_dim,
        "rms_norm_eps": model.norm_eps,
        "max_position_embeddings": mla.max_context_length,
        "rope_parameters": rope,
        "tie_word_embeddings": model.tie_word_embeddings,
        "attn_implementation": "eager",
        "experts_implementation": "eager",
    }


def build_transformers(config: Config) -> nn.Module:
    settings = transformers_settings(config)
    if config.model.moe.scoring_func == "sigmoid":
        return DeepseekV3ForCausalLM(DeepseekV3Config(**settings))
    method = "greedy" if config.model.moe.n_group == 1 else "group_limited_greedy"
    return DeepseekV2ForCausalLM(DeepseekV2Config(**settings, topk_method=method))


def stack_experts(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Checkpoint names to the names of transformers' live model, which stacks the experts of a layer."""
    out: dict[str, Tensor] = {}
    stacks: dict[str, dict[int, dict[str, Tensor]]] = {}
    for name, tensor in state.items():
        head, found, tail = name.partition(".experts.")
        if not found:
            out[name] = tensor
            continue
        number, part, _ = tail.split(".")
        stacks.setdefault(head, {}).setdefault(int(number), {})[part] = tensor
    for head, experts in stacks.items():
        ordered = [experts[e] for e in range(len(experts))]
        gate_up = [torch.cat((expert["gate_proj"], expert["up_proj"])) for expert in ordered]
        out[f"{head}.experts.gate_up_proj"] = torch.stack(gate_up)
        out[f"{head}.experts.down_proj"] = torch.stack([expert["down_proj"] for expert in ordered])
    return out


def randomize(model: ReferenceModel) -> None:
    """Weights large enough, and norms and biases far enough from 1 and 0, that every term shows."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
            else:
                parameter.normal_(std=1.0 if "embed" in name or "gate.weight" in name else 0.15)
        for router in model.routers():
            if router.e_score_correction_bias is not None:
                router.e_score_correction_bias.normal_(std=0.3)


def build_pair(config: Config) -> tuple[ReferenceModel, nn.Module]:
    torch.manual_seed(1234)
    reference = ReferenceModel(config)
    randomize(reference)
    published = to_huggingface(from_huggingface(reference.state_dict(), config), config)
    for name, tensor in reference.state_dict().items():
        assert torch.equal(tensor, published[name]), name
    other = build_transformers(config).eval()
    live = stack_experts(published)
    if config.model.tie_word_embeddings:
        live["lm_head.weight"] = live["model.embed_tokens.weight"]
    other.load_state_dict(live, strict=True)
    return reference, other


def random_tokens() -> tuple[Tensor, Tensor]:
    tokens_BS = torch.randint(0, VOCABULARY, (SEQUENCES, POSITIONS + 1))
    return tokens_BS[:, :-1], tokens_BS[:, 1:]


def assert_same_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert gradient.norm() > 0, f"the test does not reach {name}"
        error = ((ours[name] - gradient).norm() / gradient.norm()).item()
        assert error < GRADIENT_TOLERANCE, f"{name}: relative error {error:.1e}"


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("case", (V3_CASES | V2_CASES).items(), ids=lambda case: case[0])
def test_logits_and_gradients_equal_transformers(case: tuple[str, Config]) -> None:
    reference, other = build_pair(case[1])
    tokens_BS, labels_BS = random_tokens()
    logits_BSW = reference(tokens_BS).logits_BSW
    other_logits_BSW = other(input_ids=tokens_BS, use_cache=False).logits
    assert other_logits_BSW.std() > 0.1
    torch.testing.assert_close(logits_BSW, other_logits_BSW, atol=LOGITS_TOLERANCE, rtol=0)
    for logits in (logits_BSW, other_logits_BSW):
        F.cross_entropy(logits.flatten(0, 1), labels_BS.flatten()).backward()
    assert_same_gradients(stack_experts(gradients(reference)), gradients(other))


def test_bias_and_groups_change_the_choice_but_not_the_gate() -> None:
    """The V3 case really exercises eq. 16 and node limits: each moves the choice of some tokens."""
    config = V3_CASES["v3"]
    reference, _ = build_pair(config)
    tokens_BS, _ = random_tokens()
    for routing, router in zip(reference(tokens_BS).routings, reference.routers(), strict=True):
        scores_BSE = routing.scores_BSE
        plain_BSE = torch.zeros_like(routing.chosen_BSE).scatter(-1, scores_BSE.topk(4).indices, True)
        biased = (scores_BSE + router.e_score_correction_bias).topk(4).indices
        ungrouped_BSE = torch.zeros_like(routing.chosen_BSE).scatter(-1, biased, True)
        assert (routing.chosen_BSE != plain_BSE).any()
        assert (routing.chosen_BSE != ungrouped_BSE).any()
        groups_used = routing.chosen_BSE.unflatten(-1, (4, 4)).any(-1).sum(-1)
        assert groups_used.max() <= 2
        expected_BSE = scores_BSE * routing.chosen_BSE
        expected_BSE = 2.5 * expected_BSE / expected_BSE.sum(-1, keepdim=True)
        torch.testing.assert_close(routing.gates_BSE, expected_BSE)


def test_yarn_is_not_plain_rope() -> None:
    tokens_BS, _ = random_tokens()
    plain, yarn = (build_pair(V3_CASES[name])[0](tokens_BS).logits_BSW for name in ("v3", "v3-yarn"))
    assert (plain - yarn).abs().max() > 100 * LOGITS_TOLERANCE


MTP_NAMES = ("model.layers.3.", "model.layers.4.")


def build_mtp_config(depth: int) -> Config:
    config = build_config({"q_lora_rank": 32}, V3_MOE).model_dump()
    return Config.model_validate(config | {"training": {"use_mtp": True, "num_predict_tokens": depth + 1}})


def mtp_layer(reference: ReferenceModel, depth: int) -> MtpLayer:
    """transformers' MTP module of one depth, with the reference's weights."""
    settings = DeepseekV3Config(**transformers_settings(reference.config))
    settings._attn_implementation = settings._experts_implementation = "eager"
    index = len(reference.shape.is_moe)
    layer = MtpLayer(settings, DeepseekV3DecoderLayer, DeepseekV3RMSNorm, index + depth)
    renamed: dict[str, Tensor] = {}
    for name, tensor in stack_experts(reference.model.layers[index + depth].state_dict()).items():
        if name in ("embed_tokens.weight", "shared_head.head.weight"):
            continue
        own = name.startswith(("enorm", "hnorm", "eh_proj", "shared_head"))
        renamed[name.replace("shared_head.norm", "post_norm") if own else f"mtp_block.{name}"] = tensor
    layer.load_state_dict(renamed, strict=True)
    return layer


def test_mtp_equals_transformers() -> None:
    """Two depths: the chain of hidden states, norms, order in eh_proj, shared head; logits and gradients."""
    config = build_mtp_config(depth=2)
    torch.manual_seed(99)
    reference = ReferenceModel(config)
    randomize(reference)
    tokens_BS, labels_BS = random_tokens()
    plain = Config.model_validate(config.model_dump() | {"training": {}})
    other = build_transformers(plain)
    main = {name: t for name, t in reference.state_dict().items() if not name.startswith(MTP_NAMES)}
    other.load_state_dict(stack_experts(main), strict=True)
    mask = torch.full((POSITIONS, POSITIONS), float("-inf")).triu(1)[None, None]
    rotary = other.model.rotary_emb(torch.zeros(1), torch.arange(POSITIONS)[None])
    hidden = other.model(input_ids=tokens_BS, use_cache=False).last_hidden_state

    output = reference(tokens_BS)
    losses, other_losses = [], []
    layers = [mtp_layer(reference, depth) for depth in range(2)]
    for depth, layer in enumerate(layers):
        tokens_BS, labels_BS = (F.pad(x[:, 1:], (0, 1)) for x in (tokens_BS, labels_BS))
        embedded = other.model.embed_tokens(tokens_BS)
        hidden = layer(embedded, hidden, rotary, mask, position_ids=None, past_key_values=None)
        logits = other.lm_head(hidden)
        torch.testing.assert_close(output.mtp_logits_BSW[depth], logits, atol=LOGITS_TOLERANCE, rtol=0)
        other_losses.append(F.cross_entropy(logits.flatten(0, 1), labels_BS.flatten()))
        losses.append(F.cross_entropy(output.mtp_logits_BSW[depth].flatten(0, 1), labels_BS.flatten()))
    sum(losses).backward()
    sum(other_losses).backward()
    expected = gradients(other)
    for depth, layer in enumerate(layers):
        for name, gradient in gradients(layer).items():
            name = name.removeprefix("mtp_block.").replace("post_norm", "shared_head.norm")
            expected[f"model.layers.{3 + depth}.{name}"] = gradient
    assert_same_gradients(stack_experts(gradients(reference)), expected)
