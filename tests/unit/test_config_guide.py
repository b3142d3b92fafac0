"""Every fragment that the configuration guide shows loads unchanged, comments and aliases included."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megads.config.jsonc import parse_jsonc
from megads.config.loader import load_config
from megads.config.schema import Config
from megads.config.tree import MOVED, get, leaf_by_path
from megads.config.validate import find_problems

MLA = """"mla": {
  "d_model": 1024,            // hidden dimension
  "d_latent": 256,            // latent dimension
  "num_heads": 16, "num_kv_heads": 16, "use_fp8_kv": false, "max_context_length": 4096,
  "use_flash_mla": false, "flash_mla_backend": "auto", "fallback_to_dense": true,
  "use_rope": true, "rope_theta": 10000.0,
  "sliding_window": null,     // none
  "attn_dropout": 0.1
}"""
MOE = """"moe": {
  "num_experts": 8, "num_experts_per_token": 2, "expert_intermediate_size": 2048,
  "expert_dim": 2048,         // the same again
  "dropout": 0.1, "num_shared_experts": 0, "shared_intermediate_size": 0,
  "router_aux_loss_weight": 0.001, "router_temperature": 1.0, "router_noise_std": 0.1,
  "capacity_factor": 1.0, "use_aux_loss_free": false, "balance_loss_type": "entropy",
  "min_expert_capacity": 4, "use_deep_ep": false, "deep_ep_fp8": false, "deep_ep_async": false
}"""
MODEL = """"model": {
  "num_layers": 12, "vocab_size": 128000, "norm_type": "rmsnorm", "norm_eps": 1e-6,
  "tie_word_embeddings": false, "init_method_std": 0.006, "dense_layer_interval": 3%s
}"""
TRAINING = """"training": {
  "global_batch_size": 64, "micro_batch_size": 2, "seq_length": 2048, "tokens_per_parameter_ratio": 20.0,
  "total_training_tokens": null, "learning_rate": 3e-4, "min_learning_rate": 3e-5, "lr_warmup_steps": 2000,
  "lr_decay_style": "cosine", "weight_decay": 0.1, "grad_clip": 1.0, "use_fp16": false, "use_bf16": true,
  "use_fp8": false, "use_mtp": true, "num_predict_tokens": 2,
  "mtp_tokens": 2, /* the same again */
  "train_steps": 100000, "eval_interval": 1000, "save_interval": 5000, "log_interval": 10,
  "optimizer": "adamw", "adam_beta1": 0.9, "adam_beta2": 0.95, "adam_eps": 1e-8
}"""
DATA = """"data": {
  "dataset_name": "allenai/dolma", "dataset_version": "v1_6", "cache_dir": "./data/cache",
  "preprocessing": {"num_workers": 4, "shuffle": true, "shuffle_seed": 42},
  "sources": [
    {"name": "common_crawl", "subset": "dolma_v1_6_cc", "weight": 0.35, "description": "Common Crawl"},
    {"name": "starcoder", "subset": "dolma_v1_6_starcoder", "weight": 0.08, "description": "GitHub code"}
  ]
}"""
DEEPSPEED = """"deepspeed": {
  "enabled": true, "config_file": "configs/deepspeed_zero1.json",
  "fp16": {"enabled": false}, "bf16": {"enabled": true},
  "zero_optimization": {
    "stage": 1, "offload_optimizer": {"device": "none"}, "offload_param": {"device": "none"},
    "overlap_comm": true, "contiguous_gradients": true, "reduce_bucket_size": 5e8
  },
  "gradient_accumulation_steps": 1, "gradient_clipping": 1.0
}"""
SLURM = """"slurm": {
  "enabled": false, "partition": "gpu", "nodes": 1, "ntasks_per_node": 1, "gpus_per_node": 1,
  "cpus_per_task": 8, "time": "24:00:00", "mem": "64G", "job_name": "deepseek_v3_train",
  "output": "logs/slurm-%j.out", "error": "logs/slurm-%j.err", "account": null, "qos": null,
  "extra_args": []
}"""
DISTRIBUTED = """"distributed": {
  "backend": "deepspeed", "launcher": "torchrun", "tensor_parallel_size": 1, "pipeline_parallel_size": 1,
  "expert_parallel_size": 1, "data_parallel_size": -1, "zero_stage": 1, "zero_offload": false,
  "overlap_grad_reduce": true, "overlap_param_gather": true%s
}"""
LOGGING = """"logging": {
  "wandb": {"enabled": false, "project": "deepseek-v3", "entity": "my_team", "name": "experiment_1",
            "tags": ["15b", "distributed"]},
  "tensorboard": {"enabled": true, "log_dir": "./logs/tensorboard"}
}"""
WHOLE = [
    '"experiment_name": "string", "output_dir": "string", "seed": 42',
    MODEL % f", {MLA}, {MOE}",
    TRAINING,
    DATA,
    DISTRIBUTED % f", {SLURM}, {DEEPSPEED}",
    '"checkpointing": {}',
    LOGGING,
    '"validation": {}',
]
MEMORY = """"training": {"micro_batch_size": 1, "use_bf16": true, "gradient_checkpointing": true},
"distributed": {"zero_stage": 2, "zero_offload": true}"""
SPEED = """"training": {"micro_batch_size": 4, "use_fp8": true},
"model": {"mla": {"use_flash_mla": true}, "moe": {"use_deep_ep": true}}"""


def load_text(directory: Path, text: str) -> Config:
    path = directory / "config.json"
    path.write_text("{" + text + "}", encoding="utf-8")
    return load_config(path)


@pytest.mark.parametrize(
    "text",
    [
        f'"model": {{{MLA}}}',
        f'"model": {{{MOE}}}',
        MODEL % "",
        TRAINING,
        DATA,
        DISTRIBUTED % "",
        f'"distributed": {{{DEEPSPEED}}}',
        f'"distributed": {{{SLURM}}}',
        LOGGING,
        MEMORY,
        SPEED,
        '"experiment_name": "my_custom_experiment", "model": {"num_layers": 24, "mla": {"d_model": 2048}}',
        '"model": {"gradient_checkpointing": true}',
        ", ".join(WHOLE),
    ],
)
def test_a_fragment_loads(tmp_path: Path, text: str) -> None:
    config = load_text(tmp_path, text)
    given = parse_jsonc("{" + text + "}", "fragment")
    compared = list(_compare(config, given))
    assert compared
    assert all(same for _, same in compared), compared


def _compare(config: Config, given: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, bool]]:
    """Each setting of the fragment, and whether its value arrived."""
    for name, value in given.items():
        path = MOVED.get(prefix + name, prefix + name)
        path = path.replace("expert_dim", "expert_intermediate_size").replace(
            "mtp_tokens", "num_predict_tokens"
        )
        if path in leaf_by_path():
            found = get(config, path)
            if path == "data.sources":
                found = [source.model_dump(include=set(value[0])) for source in found]
            yield path, found == (tuple(value) if isinstance(found, tuple) else value)
        else:
            yield from _compare(config, value, f"{path}.")


def test_the_values_arrive(tmp_path: Path) -> None:
    config = load_text(tmp_path, ", ".join(WHOLE))
    assert config.model.moe.capacity_factor == 1.0
    assert config.model.dense_layer_interval == 3
    assert config.training.train_steps == 100_000
    assert config.data.sources[1].subset == "dolma_v1_6_starcoder"
    assert config.distributed.deepspeed.zero_optimization["reduce_bucket_size"] == 5e8
    assert config.logging.wandb.tags == ("15b", "distributed")


def test_the_whole_example_runs_on_the_processes_it_implies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 64 sequences in micro-batches of 2 without accumulation: 32 replicas.
    monkeypatch.chdir(Path(__file__).parents[2])
    config = load_text(tmp_path, ", ".join(WHOLE))
    assert list(find_problems(config, 32, cuda=True)) == []
    (problem,) = find_problems(config, 16, cuda=True)
    assert "gradient_accumulation_steps is 1" in problem
    assert "2" in problem


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        (MEMORY, []),
        (SPEED, ["model.moe.use_deep_ep with", "model.moe.use_deep_ep needs"]),
    ],
)
def test_what_does_not_work_yet_is_refused_and_not_ignored(
    tmp_path: Path, text: str, refused: list[str]
) -> None:
    config = load_text(tmp_path, f"{text}, {DATA}")
    problems = list(find_problems(config, 1, cuda=True))
    assert len(problems) == len(refused)
    for problem, setting in zip(sorted(problems), sorted(refused), strict=True):
        assert problem.startswith(setting) or any(problem.startswith(name) for name in refused)
        assert "nearest:" in problem or "set it to" in problem


def test_the_data_written_here_is_what_json_reads() -> None:
    # Guards against a fragment that only our own parser takes.
    for text in (DATA, DEEPSPEED, SLURM, LOGGING):
        json.loads("{" + text + "}")
