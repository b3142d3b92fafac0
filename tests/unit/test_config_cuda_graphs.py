"""CUDA graphs: each reason why a part cannot be captured is told alone; what works is let through."""

from typing import Any

import pytest

from megads.config.loader import load_config
from megads.config.resolve import resolve
from megads.config.validate_cuda_graphs import cuda_graph_problems
from megads.errors import ConfigError, EnvironmentSetupError
from megads.mcore.backend import Choice
from megads.mcore.translate import transformer_config
from megads.model.cuda_graphs import check_cuda_graphs
from tests.dist import tiny

GRAPHS = "training.cuda_graphs"
CUDA = {"distributed.device": "cuda", "training.use_bf16": True}
ATTENTION, ROUTER = CUDA | {GRAPHS: ["attn"]}, CUDA | {GRAPHS: ["moe_router"]}
ALL = CUDA | {GRAPHS: ["attn", "mlp", "moe_router", "moe_preprocess"]}
SELECTIVE = {"training.gradient_checkpointing": "selective"}
MODULES = "training.recompute_modules"
DENSE = {
    "model.moe.num_experts": 0, "model.moe.num_shared_experts": 0, "model.intermediate_size": 40,
    "model.first_k_dense_replace": None,
}  # fmt: skip


def problems(settings: dict[str, Any]) -> list[str]:
    return list(cuda_graph_problems(load_config(None, tiny.BASE | settings), cuda=True))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"model.hidden_dropout": 0.1, "distributed.zero_stage": 3},  # nothing is captured
        ALL,
        ALL | SELECTIVE,
        ALL | SELECTIVE | {MODULES: ["mla_up_proj", "layernorm", "moe_act"]},
        ATTENTION | SELECTIVE,
        ATTENTION | SELECTIVE | {MODULES: ["moe", "mlp"]},
        ATTENTION | {"model.moe.router_noise_std": 0.1, "model.moe.capacity_factor": 1.0},
        ATTENTION | {"distributed.overlap_shared_experts": True, "distributed.expert_parallel_size": 2},
        ROUTER | {"data.document_mask": True, "model.mla.attn_dropout": 0.1},
        ROUTER | {"model.moe.capacity_factor": 1.0, "model.moe.use_deep_ep": True},
        ALL | {"distributed.expert_parallel_size": 2, "distributed.tensor_parallel_size": 2},
        ALL | {"distributed.pipeline_parallel_size": 2},
        ALL | {"training.batch_size_rampup_start": 4},
    ],
)
def test_what_works(settings: dict[str, Any]) -> None:
    assert not problems(settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (ALL | {"distributed.device": "cpu"}, "needs CUDA"),
        (ALL | {"model.backend": "native"}, "model.backend is native"),
        (ALL | {"training.use_fp8": True}, "does not work with use_fp8"),
        (ALL | {"training.use_bf16": False}, "works in BF16 only"),
        (ALL | {"training.use_bf16": False, "training.use_fp16": True}, "works in BF16 only"),
        (
            ALL | {"distributed.pipeline_parallel_size": 2, "training.batch_size_rampup_start": 4},
            "batch_size_rampup_start changes their number",
        ),
        (
            ALL | {"distributed.tp_comm_overlap": True, "distributed.tensor_parallel_size": 2},
            "does not work with tp_comm_overlap",
        ),
        (ALL | {"distributed.zero_stage": 2}, "zero_stage = 2, whose weights and gradients move"),
        (
            ALL | {"distributed.overlap_expert_parallel": True, "distributed.expert_parallel_size": 2},
            "overlap_expert_parallel",
        ),
        (
            ROUTER | {"distributed.overlap_shared_experts": True, "distributed.expert_parallel_size": 2},
            "computes shared experts in it",
        ),
        (
            ALL | {"training.seq_length_phases": [{"until_tokens": 1000, "to": 8}]},
            "needs one length of sequences",
        ),
        (ATTENTION | {"data.document_mask": True}, "leave out attn"),
        (ATTENTION | {"data.reset_position_ids": True}, "leave out attn"),
        (CUDA | {GRAPHS: ["mlp"], "model.first_k_dense_replace": 0}, "has no dense layers"),
        (ROUTER | DENSE, "has moe_router, but the model has no MoE layers"),
        (CUDA | {GRAPHS: ["moe_preprocess"]}, "add moe_router"),
        (ALL | {"model.moe.use_deep_ep": True}, "not for use_deep_ep"),
        (ALL | {"model.moe.capacity_factor": 1.0}, "capacity_factor drops some"),
        (ALL | {"model.hidden_dropout": 0.1}, "model.hidden_dropout is on"),
        (ATTENTION | {"model.mla.attn_dropout": 0.1}, "model.mla.attn_dropout is on"),
        (ROUTER | {"model.moe.dropout": 0.1}, "model.moe.dropout is on"),
        (ROUTER | {"model.moe.router_noise_std": 0.1}, "model.moe.router_noise_std is on"),
        (
            ROUTER | {"model.moe.router_temperature_phases": [{"until_tokens": 1000, "to": 0.5}]},
            "holds model.moe.router_temperature fast",
        ),
        (ALL | {"training.gradient_checkpointing": "full"}, "recomputed whole"),
        (ROUTER | SELECTIVE, "the norm before the router"),
        (ROUTER | SELECTIVE | {MODULES: ["shared_experts"]}, "keeps shared_experts in its graphs"),
        (CUDA | {GRAPHS: ["mlp"]} | SELECTIVE | {MODULES: ["mlp"]}, "keeps mlp in its graphs"),
    ],
)
def test_each_reason_is_told_alone(settings: dict[str, Any], said: str) -> None:
    (problem,) = problems(settings)
    assert said in problem


def test_other_parts_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"cuda_graphs\[0\]: must be 'attn', .* or 'moe_preprocess', got"):
        load_config(None, tiny.BASE | {GRAPHS: ["moe"]})


@pytest.mark.parametrize("settings", [ALL, ATTENTION, ROUTER])
def test_megatron_core_accepts_what_we_do(settings: dict[str, Any]) -> None:
    """Its own checks run when its configuration is made."""
    config = load_config(None, tiny.BASE | settings | {"model.backend": "native"})
    translated = transformer_config(config, resolve(config, 1, cuda=True))
    assert translated.cuda_graph_impl == "transformer_engine"
    assert [part.name for part in translated.cuda_graph_modules] == settings[GRAPHS]


def test_nothing_is_captured_unless_asked_for() -> None:
    config = load_config(None, tiny.BASE)
    assert transformer_config(config, resolve(config, 1, cuda=False)).cuda_graph_impl == "none"


class TestMachine:
    ENGINE = Choice("transformer_engine", "version 2.20")

    def test_what_works(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
        check_cuda_graphs(load_config(None, tiny.BASE | ALL), self.ENGINE)
        check_cuda_graphs(load_config(None, tiny.BASE | ROUTER), self.ENGINE)
        check_cuda_graphs(load_config(None, tiny.BASE), Choice("native", "on the CPU"))

    def test_native_layers(self) -> None:
        with pytest.raises(EnvironmentSetupError, match=r"native here \(not installed"):
            check_cuda_graphs(load_config(None, tiny.BASE | ALL), Choice("native", "not installed"))

    @pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
    def test_expandable_segments(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(name, "expandable_segments:True")
        config = load_config(None, tiny.BASE | ALL)
        with pytest.raises(EnvironmentSetupError, match="NCCL_GRAPH_REGISTER=0"):
            check_cuda_graphs(config, self.ENGINE)
        monkeypatch.setenv("NCCL_GRAPH_REGISTER", "0")
        check_cuda_graphs(config, self.ENGINE)
