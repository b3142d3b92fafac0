"""Errors between settings: each rule fires on its mistake, alone, and says what to do."""

from typing import Any

import pytest

from megads.config import not_yet
from megads.config.loader import load_config
from megads.config.schema import Config
from megads.config.validate import check, find_problems, notes
from megads.errors import ConfigError

SOUND = {
    "data.sources": [{"name": "a", "path": "a"}],
    "training.train_steps": 5000,
    "logging.tensorboard.enabled": False,
}


def sound(**changes: Any) -> Config:
    """A configuration that can run, but for `changes` (dots written as two underscores)."""
    return load_config(None, SOUND | {path.replace("__", "."): value for path, value in changes.items()})


def problems(world_size: int = 1, cuda: bool = False, **changes: Any) -> list[str]:
    return list(find_problems(sound(**changes), world_size, cuda))


def test_a_sound_configuration_passes() -> None:
    check(sound(), 1, cuda=False)
    check(sound(), 1, cuda=True)


MLA, MOE, D, T = "model__mla__", "model__moe__", "distributed__", "training__"

# (changes, processes, what the only problem says)
CASES: list[tuple[dict[str, Any], int, list[str]]] = [
    # attention
    ({MLA + "num_kv_heads": 4}, 1, ["num_kv_heads = 4", "compresses", "d_latent"]),
    ({MLA + "qk_rope_head_dim": 33}, 1, ["qk_rope_head_dim is 33", "34"]),
    ({MLA + "use_rope": False}, 1, ["use_rope = false", "position"]),
    ({MLA + "d_model": 1032}, 1, ["not divisible by num_heads = 16", "qk_nope_head_dim"]),
    ({MLA + "rope_scaling": {"factor": 2}, MLA + "max_context_length": 9000}, 1, ["YaRN's reach", "8192"]),
    ({MLA + "rope_scaling": {"factor": 2}}, 1, ["set rope_scaling to null"]),
    (
        {
            MLA + "rope_scaling": {"factor": 4, "beta_fast": 1, "beta_slow": 2},
            MLA + "max_context_length": 8192,
        },
        1,
        ["beta_fast = 1 must be above beta_slow = 2"],
    ),
    # layers and experts
    ({"model__dense_layers": [0], "model__dense_layer_interval": 3}, 1, ["excludes dense_layer_interval"]),
    ({"model__dense_layers": [0, 12]}, 1, ["names [12]", "0 to 11"]),
    ({"model__first_k_dense_replace": 13}, 1, ["more than num_layers = 12"]),
    ({MOE + "num_experts": 0}, 1, ["model.intermediate_size"]),
    ({MOE + "num_experts_per_token": 9}, 1, ["more than num_experts = 8"]),
    ({MOE + "n_group": 3}, 1, ["not divisible by n_group = 3"]),
    ({MOE + "n_group": 2, MOE + "topk_group": 3}, 1, ["topk_group = 3 is more than n_group = 2"]),
    ({MOE + "n_group": 4, MOE + "num_experts_per_token": 3}, 1, ["the 2 experts in topk_group = 1"]),
    ({MOE + "n_group": 8, MOE + "topk_group": 2}, 1, ["scored by its two best"]),
    ({MOE + "shared_intermediate_size": 8}, 1, ["cannot act", "num_shared_experts"]),
    # layout
    ({D + "tensor_parallel_size": 2}, 3, ["3 processes are not a multiple of TP 2 x PP 1 x CP 1 = 2"]),
    ({D + "data_parallel_size": 3}, 2, ["data_parallel_size = 3", "= 2: set it to -1"]),
    ({D + "data_parallel_size": 0}, 2, ["data_parallel_size = 0"]),
    ({D + "tensor_parallel_size": 2, "model__vocab_size": 1001}, 2, ["vocab_size = 1001", "use 1002"]),
    (
        {D + "tensor_parallel_size": 2, MLA + "num_heads": 3, MLA + "qk_nope_head_dim": 64},
        2,
        ["num_heads = 3", "use 4"],
    ),
    (
        {D + "tensor_parallel_size": 2, "model__intermediate_size": 4097, "model__first_k_dense_replace": 1},
        2,
        ["intermediate_size = 4097 is not divisible"],
    ),
    (
        {D + "tensor_parallel_size": 2, D + "sequence_parallel": False},
        2,
        ["sequence_parallel = false", "true"],
    ),
    ({D + "tensor_parallel_size": 2, T + "seq_length": 2047}, 2, ["seq_length = 2047", "TP x CP = 2"]),
    ({D + "pipeline_parallel_size": 5}, 5, ["divisible by 5 pipeline stages", "[2, 3, 3, 2, 2]"]),
    ({D + "pipeline_parallel_size": 13}, 13, ["cannot fill 13 pipeline stages"]),
    ({D + "virtual_pipeline_parallel_size": 2}, 1, ["needs pipeline_parallel_size > 1"]),
    ({D + "pipeline_layout": [12]}, 1, ["cannot act with pipeline_parallel_size = 1"]),
    ({D + "pipeline_layout": "balanced"}, 1, ["cannot act with pipeline_parallel_size = 1"]),
    ({D + "pipeline_layout": "balanced", D + "pipeline_parallel_size": 15}, 15, ["cannot fill 15"]),
    ({D + "pipeline_layout": [6, 6], D + "pipeline_parallel_size": 4}, 4, ["2 entries for 4 stages"]),
    ({D + "pipeline_layout": [6, 5], D + "pipeline_parallel_size": 2}, 2, ["places 11 layers"]),
    ({D + "pipeline_layout": [6, 0, 6], D + "pipeline_parallel_size": 3}, 3, ["only the first stage"]),
    (
        {D + "expert_parallel_size": 3, T + "global_batch_size": 66},
        3,
        ["num_experts = 8 is not divisible by expert_parallel_size = 3"],
    ),
    (
        {D + "expert_tensor_parallel_size": 3, T + "global_batch_size": 66},
        3,
        ["expert_intermediate_size = 2048"],
    ),
    ({D + "expert_parallel_size": 4}, 2, ["not a multiple of EP 4 x ETP 1 = 4"]),
    ({D + "expert_parallel_size": 2, "model__dense_layer_interval": 1}, 2, ["no MoE layer to spread"]),
    ({D + "context_parallel_size": 2, T + "seq_length": 2046}, 2, ["2 x context_parallel_size = 4"]),
    # batch and length
    ({T + "global_batch_size": 63}, 1, ["global_batch_size = 63", "use 64"]),
    ({T + "micro_batch_size": 8}, 16, ["global_batch_size = 64", "data parallelism 16 = 128"]),
    (
        {T + "batch_size_rampup_start": 16, T + "batch_size_rampup_tokens": 1000, T + "micro_batch_size": 32},
        1,
        ["batch_size_rampup_start = 16", "use 32"],
    ),
    ({T + "batch_size_rampup_start": 16}, 1, ["both its start", "batch_size_rampup_tokens"]),
    (
        {T + "batch_size_rampup_start": 24, T + "batch_size_rampup_tokens": 1000},
        1,
        ["not a multiple of the ramp's start 24"],
    ),
    (
        {
            D + "pipeline_parallel_size": 4,
            D + "virtual_pipeline_parallel_size": 3,
            T + "global_batch_size": 60,
        },
        4,
        ["30 micro-batches, no multiple of the 4 pipeline stages"],
    ),
    ({T + "lr_warmup_steps": 5001}, 1, ["5001 is more than the 5000 steps"]),
    ({T + "min_learning_rate": 1.0}, 1, ["min_learning_rate = 1 is above"]),
    ({T + "seq_length": 8192}, 1, ["max_context_length = 4096"]),
    ({T + "lr_phases": [{"until_tokens": 10**12, "to": 1e-3}]}, 1, ["lr_decay_style"]),
    ({T + "lr_decay_style": "phases"}, 1, ["lr_phases is empty"]),
    (
        {T + "lr_decay_style": "phases", T + "lr_phases": [{"until_tokens": 1000, "to": 1e-3}]},
        1,
        ["ends at 1,000 tokens but the run has"],
    ),
    (
        {
            T + "lr_decay_style": "phases",
            T + "lr_phases": [{"until_tokens": 10**12, "to": 1e-3}, {"until_tokens": 10**12, "to": 1e-4}],
        },
        1,
        ["increasing numbers of tokens"],
    ),
    (
        {
            T + "lr_decay_style": "phases",
            T + "lr_phases": [{"until_tokens": 10**12, "to": 1e-3}],
            T + "learning_rate": 1.0,
        },
        1,
        ["learning_rate cannot act", "lr_phases"],
    ),
    (
        {T + "lr_decay_style": "phases", T + "lr_phases": [{"until_tokens": 10**12, "to": 0}]},
        1,
        ["never leaves 0"],
    ),
    # data
    ({"data__preprocessing__shuffle": False}, 1, ["shuffle = false is refused"]),
    (
        {"data__cache_dir": "s3://bucket/cache"},
        1,
        ["data.cache_dir = 's3://bucket/cache' is a URL", "mirror"],
    ),
    ({"data__sources": []}, 1, ["data.sources is empty", "--data-path"]),
    ({"data__sources": [{"name": "a"}]}, 1, ["neither path nor subset"]),
    ({"data__sources": [{"name": "a", "path": "x", "weight": 0}]}, 1, ["weights of data.sources are all 0"]),
    (
        {"data__sources": [{"name": "a", "path": "x"}, {"name": "a", "path": "y"}]},
        1,
        ["more than one source"],
    ),
    ({"data__split": "98,1"}, 1, ["three numbers"]),
    ({"data__split": "100,0,0"}, 1, ["nothing for validation", "eval_interval"]),
    # what cannot work here
    ({MLA + "use_fp8_kv": True}, 1, ["use_fp8_kv", "yet"]),
    (
        {D + "zero_stage": 2, D + "pipeline_parallel_size": 2},
        2,
        ["zero_stage = 2", "pipeline_parallel_size to 1", "zero_stage to 1"],
    ),
    ({D + "zero_stage": 2, D + "overlap_grad_reduce": False}, 1, ["overlap_grad_reduce = false"]),
    ({D + "zero_stage": 3, D + "overlap_param_gather": False}, 1, ["overlap_param_gather = false"]),
    ({T + "optimizer": "sgd", D + "zero_stage": 2}, 1, ["sgd", "adamw", "zero_stage = 0"]),
    ({D + "zero_offload": True}, 1, ["zero_offload needs CUDA", "set it to false"]),
    ({T + "use_fp16": True, T + "use_bf16": False}, 1, ["use_fp16 needs CUDA"]),
    ({D + "device": "cuda"}, 1, ["no CUDA device"]),
    ({D + "backend": "nccl"}, 1, ["nccl", "gloo"]),
]


@pytest.mark.parametrize(("changes", "world_size", "said"), CASES, ids=lambda case: str(case)[:60])
def test_each_rule_fires_alone(changes: dict[str, Any], world_size: int, said: list[str]) -> None:
    (problem,) = problems(world_size, **changes)
    for part in said:
        assert part in problem, problem


@pytest.mark.parametrize(
    ("changes", "world_size"),
    [
        ({D + "tensor_parallel_size": 2, D + "pipeline_parallel_size": 2}, 8),
        ({D + "pipeline_parallel_size": 5, D + "pipeline_layout": [3, 3, 3, 3, 0]}, 5),
        ({D + "pipeline_parallel_size": 2, D + "virtual_pipeline_parallel_size": 3}, 2),
        ({D + "expert_parallel_size": 4, D + "expert_tensor_parallel_size": 2}, 8),
        ({D + "tensor_parallel_size": 2, D + "expert_parallel_size": 2}, 2),
        ({D + "context_parallel_size": 2}, 2),
        ({D + "zero_stage": 2, D + "overlap_param_gather": False, D + "tensor_parallel_size": 2}, 4),
        ({D + "zero_stage": 3, D + "expert_parallel_size": 2}, 2),
        ({MLA + "num_kv_heads": 16, D + "data_parallel_size": 2, D + "backend": "deepspeed"}, 2),
        ({MOE + "num_experts": 0, "model__intermediate_size": 64}, 1),
        ({"model__first_k_dense_replace": 1, "model__dense_layer_interval": 3}, 1),
        ({"data__split": "1,0,0", T + "eval_interval": 0}, 1),
        ({MLA + "rope_scaling": {"factor": 2}, MLA + "max_context_length": 8192}, 1),
    ],
)
def test_what_is_legal_is_not_refused(changes: dict[str, Any], world_size: int) -> None:
    assert problems(world_size, **changes) == []


def test_fp16_works_on_cuda_alone_but_not_with_bf16() -> None:
    assert problems(cuda=True, training__use_fp16=True, training__use_bf16=False) == []
    (problem,) = problems(cuda=True, training__use_fp16=True)
    assert "exclude each other" in problem


def test_gloo_is_refused_on_cuda_but_not_where_the_cpu_is_asked_for() -> None:
    (problem,) = problems(cuda=True, distributed__backend="gloo")
    assert "cannot carry" in problem
    assert problems(cuda=True, distributed__backend="gloo", distributed__device="cpu") == []


def test_offload_is_of_moments_that_are_divided() -> None:
    assert problems(cuda=True, distributed__zero_offload=True) == []
    changes = {"distributed__zero_offload": True, "distributed__zero_stage": 0, "training__optimizer": "sgd"}
    undivided, other_optimizer = problems(cuda=True, **changes)
    assert "zero_stage to 1" in undivided
    assert "is for Adam" in other_optimizer


def test_all_problems_come_in_one_numbered_error() -> None:
    config = sound(
        model__mla__use_fp8_kv=True,
        distributed__zero_offload=True,
        model__mla__use_rope=False,
        data__sources=[],
    )
    with pytest.raises(ConfigError) as caught:
        check(config, 4, cuda=False)
    lines = str(caught.value).splitlines()
    assert lines[0] == "the configuration has 4 problems (for 4 processes):"
    assert [line.split(".")[0].strip() for line in lines[1:]] == ["1", "2", "3", "4"]


def test_missing_optional_packages_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(not_yet, "find_spec", lambda name: None)
    both = problems(logging__wandb__enabled=True, logging__tensorboard__enabled=True)
    assert len(both) == 2
    assert "megads[wandb]" in both[0]
    assert "pip install tensorboard" in both[1]
    monkeypatch.setattr(not_yet, "find_spec", lambda name: object())
    assert problems(logging__wandb__enabled=True, logging__tensorboard__enabled=True) == []


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({T + "sgd_momentum": 0.5}, "training.sgd_momentum"),
        ({T + "optimizer": "sgd", T + "adam_beta2": 0.5, D + "zero_stage": 0}, "training.adam_beta2"),
        ({T + "mtp_loss_weight": 0.5}, "training.mtp_loss_weight"),
        ({T + "lr_wsd_decay_style": "cosine"}, "training.lr_wsd_decay_style"),
        ({T + "lr_decay_style": "constant", T + "min_learning_rate": 0}, "training.min_learning_rate"),
        ({T + "tokens_per_parameter_ratio": 5}, "training.tokens_per_parameter_ratio"),
        ({MOE + "bias_update_rate": 0.5}, "model.moe.bias_update_rate"),
        ({MOE + "balance_loss_type": "none", MOE + "router_aux_loss_weight": 0.5}, "router_aux_loss_weight"),
        ({MOE + "min_expert_capacity": 5}, "model.moe.min_expert_capacity"),
        ({MLA + "fallback_to_dense": False}, "model.mla.fallback_to_dense"),
    ],
)
def test_parameters_of_what_is_off_are_noted(changes: dict[str, Any], path: str) -> None:
    (note,) = notes(sound(**changes))
    assert path in note
    assert "no effect" in note
    assert problems(**changes) == []


def test_a_default_needs_no_note() -> None:
    assert notes(sound()) == []
