"""The Megatron-Core model on one process against transformers' DeepSeek-V3 and V2, in fp32.

Logits within 1e-4, each parameter's gradient within 1e-4 of its norm. Weights travel through `hf_names`,
the map that exports. The cases are those that the oracle is tested on, and one longer than a block of
the CPU's attention kernel.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megads.config.schema import Config
from megads.model.functional import _CausalAttention
from megads.model.hf_names import from_huggingface, to_huggingface
from tests.dist import tiny
from tests.dist.harness import run_distributed
from tests.numerics.test_reference_transformers import (
    SEQUENCES,
    V2_CASES,
    V3_CASES,
    VOCABULARY,
    build_pair,
    gradients,
    stack_experts,
)

TOLERANCE = 1e-4
POSITIONS = 48
LONG = 150
CASES = V3_CASES | V2_CASES | {"v3-long": V3_CASES["v3-yarn"]}


def random_batch(name: str) -> tuple[Tensor, Tensor]:
    """Tokens and labels [B, S]."""
    generator = torch.Generator().manual_seed(77)
    length = LONG if name == "v3-long" else POSITIONS
    text_BS = torch.randint(0, VOCABULARY, (SEQUENCES, length + 1), generator=generator)
    return text_BS[:, :-1], text_BS[:, 1:]


# --- in a worker ------------------------------------------------------------------------------


def logits_and_gradients(cases: dict[str, tuple[Config, dict[str, Tensor]]]) -> dict[str, dict[str, Any]]:
    """For each case logits [B, S, W] and gradients of the mean cross-entropy, by published names."""
    from megads.config.resolve import resolve
    from megads.mcore.groups import initialize_device, initialize_process_groups
    from megads.model.build import build_model

    initialize_device("cpu")
    initialize_process_groups(tiny.configure({})[1], timeout_minutes=4, seed=0)
    found = {}
    for name, (config, published) in cases.items():
        (model,) = build_model(config, resolve(config, 1, cuda=False))
        model.load_state_dict(from_huggingface(published, config), strict=True)
        tokens_BS, labels_BS = random_batch(name)
        logits_BSW = model(tokens_BS, None, torch.arange(tokens_BS.shape[1])[None])[0]
        F.cross_entropy(logits_BSW.flatten(0, 1), labels_BS.flatten()).backward()
        state = model.state_dict()
        for ours, parameter in model.named_parameters():
            state[ours] = parameter.grad
        published_gradients = to_huggingface(state, config)
        found[name] = {
            "logits": logits_BSW.detach(),
            "gradients": {k: v for k, v in published_gradients.items() if "e_score_correction_bias" not in k},
        }
    return found


# --- with the workers' results ----------------------------------------------------------------


def without_balance_loss(config: Config) -> Config:
    """transformers has no auxiliary losses."""
    tree = config.model_dump()
    tree["model"]["moe"] |= {"balance_loss_type": "none"}
    tree["distributed"] |= {"device": "cpu"}
    return Config.model_validate(tree)


@pytest.fixture(scope="module")
def pairs() -> dict[str, tuple[Config, dict[str, Tensor], torch.nn.Module]]:
    """Per case the configuration, the published weights and transformers' model with them."""
    out = {}
    for name, config in CASES.items():
        config = without_balance_loss(config)
        reference, other = build_pair(config)
        out[name] = (config, reference.state_dict(), other)
    return out


@pytest.fixture(scope="module")
def ours(pairs: dict[str, tuple[Config, dict[str, Tensor], torch.nn.Module]]) -> dict[str, Any]:
    cases = {name: (config, published) for name, (config, published, _) in pairs.items()}
    (found,) = run_distributed(1, logits_and_gradients, cases=cases)
    return found


@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients_equal_transformers(name: str, pairs: Any, ours: Any) -> None:
    other = pairs[name][2]
    tokens_BS, labels_BS = random_batch(name)
    logits_BSW = other(input_ids=tokens_BS, use_cache=False).logits
    assert logits_BSW.std() > 0.1
    torch.testing.assert_close(ours[name]["logits"], logits_BSW, atol=TOLERANCE, rtol=0)
    F.cross_entropy(logits_BSW.flatten(0, 1), labels_BS.flatten()).backward()
    expected, found = gradients(other), stack_experts(ours[name]["gradients"])
    assert found.keys() == expected.keys()
    for parameter, gradient in expected.items():
        assert gradient.norm() > 0, f"the test does not reach {parameter}"
        error = ((found[parameter] - gradient).norm() / gradient.norm()).item()
        assert error < TOLERANCE, f"{parameter}: relative error {error:.1e}"


def test_the_long_case_needs_two_blocks_of_attention() -> None:
    assert POSITIONS < _CausalAttention.BLOCK < LONG
