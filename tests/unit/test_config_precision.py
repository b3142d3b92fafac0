"""FP8, FP16 and BF16 moments: each impossible combination has its sentence, each possible one none."""

from typing import Any

import pytest

from megads.config.deepspeed import deepspeed_problems, translated
from megads.config.loader import load_config
from megads.config.schema import Config
from megads.config.validate import notes
from megads.config.validate_precision import precision_problems

FP8 = {"training.use_fp8": True}


def config(settings: dict[str, Any]) -> Config:
    shape = {"model.mla.d_model": 256, "model.mla.num_heads": 4, "model.num_layers": 4}
    return load_config(None, shape | settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"training.use_fp16": True}, ["exclude each other"]),
        ({"training.fp16.min_loss_scale": 1e6}, ["min_loss_scale", "initial_loss_scale"]),
        ({"training.adam_exp_avg_sq_dtype": "bf16", "training.adam_beta2": 0.999}, ["adam_beta2", "0.996"]),
        ({"training.adam_exp_avg_dtype": "bf16", "training.adam_beta1": 0.999}, ["adam_beta1", "fp32"]),
        (FP8 | {"training.use_fp16": True, "training.use_bf16": False}, ["not FP16"]),
        (
            FP8 | {"training.fp8.bf16_first_layers": 2, "training.fp8.bf16_last_layers": 2},
            ["leave none in FP8"],
        ),
        (
            FP8 | {"distributed.pipeline_parallel_size": 2, "training.fp8.bf16_first_layers": 3},
            ["num_layers / pipeline_parallel_size = 2"],
        ),
        (FP8 | {"training.fp8.recipe": "delayed", "training.fp8.bf16_last_layers": 1}, ["bf16_last_layers"]),
        (
            FP8 | {"training.fp8.recipe": "delayed", "training.gradient_checkpointing": "selective"},
            ["selective", "another recipe"],
        ),
        (FP8 | {"training.fp8.param_gather": True, "distributed.zero_stage": 0}, ["zero_stage to 1"]),
        (FP8 | {"training.fp8.param_gather": True, "training.fp8.recipe": "mxfp8"}, ["mxfp8"]),
        (FP8 | {"training.fp8.param_gather": True, "training.average_decay": 0.9}, ["average_decay"]),
    ],
)
@pytest.mark.parametrize("cuda", [False, True])
def test_each_rule_fires_alone(settings: dict[str, Any], said: list[str], cuda: bool) -> None:
    (problem,) = precision_problems(config(settings), cuda)
    assert all(words in problem for words in said), problem


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"training.use_bf16": False}, ["use_bf16", "native"]),
        ({"model.mla.d_latent": 264}, ["d_latent = 264", "16"]),
        ({"model.mla.d_latent": 240, "training.fp8.recipe": "mxfp8"}, ["d_latent = 240", "32"]),
        ({"model.moe.expert_intermediate_size": 24, "model.intermediate_size": 64}, ["= 24", "16"]),
        ({"training.seq_length": 36, "training.micro_batch_size": 1}, ["36 tokens"]),
    ],
)
def test_what_transformer_engine_cannot_multiply_is_refused_on_cuda_only(
    settings: dict[str, Any], said: list[str]
) -> None:
    asked = config(FP8 | settings)
    problems = list(precision_problems(asked, cuda=True))
    assert problems
    assert any(all(words in problem for words in said) for problem in problems), problems
    assert not list(precision_problems(asked, cuda=False))
    emulated = config(FP8 | settings | {"model.backend": "native"})
    assert not list(precision_problems(emulated, cuda=True))


@pytest.mark.parametrize("recipe", ["auto", "blockwise", "tensorwise", "delayed", "mxfp8"])
@pytest.mark.parametrize("cuda", [False, True])
def test_each_recipe_is_sound(recipe: str, cuda: bool) -> None:
    assert not list(precision_problems(config(FP8 | {"training.fp8.recipe": recipe}), cuda))


def test_the_paper_is_sound_and_moments_of_sgd_are_not_looked_at() -> None:
    paper = {"training.adam_exp_avg_dtype": "bf16", "training.adam_exp_avg_sq_dtype": "bf16"}
    assert not list(precision_problems(config(FP8 | paper), cuda=True))
    sgd = paper | {"training.optimizer": "sgd", "training.adam_beta2": 0.999}
    assert not list(precision_problems(config(sgd), cuda=True))
    assert sum("adam_exp_avg" in note for note in notes(config(sgd))) == 2


@pytest.mark.parametrize(
    ("settings", "path"),
    [
        ({"training.fp8.recipe": "tensorwise"}, "training.fp8.recipe"),
        (FP8 | {"training.fp8.amax_history_len": 4}, "training.fp8.amax_history_len"),
        (FP8 | {"training.fp8.bf16_mtp": True}, "training.fp8.bf16_mtp"),
        ({"training.fp16.hysteresis": 4}, "training.fp16.hysteresis"),
        (
            {"training.use_fp16": True, "training.use_bf16": False, "training.fp16.loss_scale": 8.0,
             "training.fp16.loss_scale_window": 4},
            "training.fp16.loss_scale_window",
        ),
    ],
)  # fmt: skip
def test_what_cannot_act_is_noted(settings: dict[str, Any], path: str) -> None:
    assert any(note.startswith(f"{path} has no effect") for note in notes(config(settings)))


def test_deepspeeds_loss_scaling_is_ours() -> None:
    scaling = {"enabled": True, "loss_scale": 0, "initial_scale_power": 12, "loss_scale_window": 500,
               "hysteresis": 4, "min_loss_scale": 2}  # fmt: skip
    found = {path: value for path, (value, _) in translated({"enabled": True, "fp16": scaling}).items()}
    assert found == {
        "training.use_fp16": True, "training.use_bf16": False, "training.fp16.loss_scale": None,
        "training.fp16.initial_loss_scale": 4096.0, "training.fp16.loss_scale_window": 500,
        "training.fp16.hysteresis": 4, "training.fp16.min_loss_scale": 2,
    }  # fmt: skip


@pytest.mark.parametrize("power", [5000, -1, 12.5, "many"])
def test_a_power_that_no_scale_has_is_a_mistake_and_not_a_crash(power: object) -> None:
    block = {"enabled": True, "fp16": {"enabled": True, "initial_scale_power": power}}
    assert "training.fp16.initial_loss_scale" not in translated(block)
    asked = config({"distributed.deepspeed.enabled": True, "distributed.deepspeed.fp16": block["fp16"]})
    problems, _ = deepspeed_problems(asked, None)
    assert any("initial_scale_power" in problem for problem in problems)
