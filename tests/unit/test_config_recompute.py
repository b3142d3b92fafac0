"""Which parts of a layer may be recomputed: each mistake is told alone; what works is let through."""

from typing import Any

import pytest

from megads.config.loader import load_config
from megads.config.resolve import resolve
from megads.config.schema import Config
from megads.config.validate import notes
from megads.config.validate_recompute import recompute_problems
from megads.errors import ConfigError
from megads.mcore.translate import transformer_config
from tests.dist import tiny

SELECTIVE = {"training.gradient_checkpointing": "selective"}
MODULES = "training.recompute_modules"
DENSE = {"model.moe.num_experts": 0, "model.moe.num_shared_experts": 0, "model.first_k_dense_replace": None}


def config_of(settings: dict[str, Any]) -> Config:
    return load_config(None, tiny.BASE | settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({MODULES: []}, "is empty"),
        ({MODULES: ["moe_act"]} | DENSE, "moe_act, but the model has no MoE layers"),
        ({MODULES: ["mlp"], "model.first_k_dense_replace": 0}, "mlp, but the model has no dense layers"),
        (
            {MODULES: ["shared_experts"], "model.moe.num_shared_experts": 0},
            "shared_experts, but the model has no shared experts",
        ),
        ({MODULES: ["moe", "moe_act"]}, "moe recomputes whole MoE layers, moe_act included"),
    ],
)
def test_mistakes(settings: dict[str, Any], said: str) -> None:
    (problem,) = recompute_problems(config_of(SELECTIVE | settings))
    assert said in problem


@pytest.mark.parametrize(
    "modules", [["mla_up_proj"], ["mlp", "moe"], ["layernorm", "moe_act", "shared_experts"]]
)
def test_megatron_core_is_told_all_but_what_our_experts_do(modules: list[str]) -> None:
    config = config_of(SELECTIVE | {MODULES: modules})
    assert not list(recompute_problems(config))
    translated = transformer_config(config, resolve(config, 1, cuda=False))
    assert translated.recompute_modules == [module for module in modules if module != "moe_act"]


def test_an_unknown_module_is_told_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"recompute_modules\[1\]: must be 'mla_up_proj', .* or 'moe', got"):
        config_of({MODULES: ["moe_act", "core_attn"]})


def test_modules_without_selective_recomputation_are_noted() -> None:
    (note,) = notes(config_of({MODULES: ["moe_act"]}))
    assert "training.recompute_modules has no effect" in note
