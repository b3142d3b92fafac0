"""What an enabled DeepSpeed block says holds where ours is silent; a contradiction is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from megads.config.deepspeed import deepspeed_problems
from megads.config.loader import load_config
from megads.errors import ConfigError

BLOCK = "distributed.deepspeed."


# Our defaults, given: what DeepSpeed's settings have to agree with.
OURS = {
    "training.grad_clip": 1.0,
    "training.use_fp16": False,
    "training.use_bf16": True,
    "training.optimizer": "adamw",
    "distributed.zero_stage": 1,
    "distributed.overlap_grad_reduce": True,
    "distributed.zero_offload": False,
    "distributed.zero_offload_fraction": 1.0,
}


def problems(accumulation_steps: int | None = None, **block: Any) -> list[str]:
    overrides = OURS | {f"{BLOCK}{name}": value for name, value in ({"enabled": True} | block).items()}
    return deepspeed_problems(load_config(None, overrides), accumulation_steps)[0]


@pytest.mark.parametrize(
    ("block", "said"),
    [
        ({"gradient_clipping": 0.5}, "training.grad_clip is 1.0"),
        ({"fp16": {"enabled": True}}, "training.use_fp16 is False"),
        ({"bf16": {"enabled": False}}, "training.use_bf16 is True"),
        ({"zero_optimization": {"stage": 2}}, "distributed.zero_stage is 1"),
        ({"zero_optimization": {"overlap_comm": False}}, "distributed.overlap_grad_reduce is True"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "distributed.zero_offload"),
        ({"zero_optimization": {"offload_optimizer": {"ratio": 0.3}}}, "distributed.zero_offload_fraction"),
        ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, "not offered"),
        ({"gradient_accumulation_steps": 3}, "micro_batch_size x data parallelism"),
        ({"zero_optimization": {"stge": 1}}, "did you mean zero_optimization.stage?"),
        ({"bf16": {"qqqqqqqq": 1}}, "nothing like it"),
    ],
)
def test_a_contradiction_or_an_unknown_key_is_a_problem(block: dict[str, Any], said: str) -> None:
    (problem,) = problems(accumulation_steps=4, **block)
    assert said in problem
    assert "distributed.deepspeed." in problem


def test_what_deepspeed_says_holds_where_ours_is_silent(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    optimizer = {
        "type": "Adam",
        "params": {"lr": 1e-4, "betas": [0.8, 0.9], "eps": 1e-6, "weight_decay": 0.2},
    }
    zero = {"stage": 0, "overlap_comm": False, "offload_optimizer": {"device": "none"}}
    content = {
        "fp16": {"enabled": True}, "gradient_clipping": 0.5,
        "optimizer": optimizer, "zero_optimization": zero,
        "train_batch_size": 48, "train_micro_batch_size_per_gpu": "auto",
    }  # fmt: skip
    path.write_text(json.dumps(content))
    given = {f"{BLOCK}enabled": True, f"{BLOCK}config_file": str(path), "training.learning_rate": 1e-4}
    config = load_config(None, given)
    training, distributed = config.training, config.distributed
    assert (training.use_fp16, training.use_bf16, training.grad_clip) == (True, False, 0.5)
    assert (training.optimizer, training.learning_rate, training.weight_decay) == ("adam", 1e-4, 0.2)
    assert (training.adam_beta1, training.adam_beta2, training.adam_eps) == (0.8, 0.9, 1e-6)
    assert (training.global_batch_size, training.micro_batch_size) == (
        48,
        load_config(None).training.micro_batch_size,
    )
    assert (distributed.zero_stage, distributed.overlap_grad_reduce, distributed.zero_offload) == (
        0,
        False,
        False,
    )
    assert deepspeed_problems(config, None)[0] == []


def test_a_bad_value_is_told_with_where_it_is_from() -> None:
    with pytest.raises(
        ConfigError, match=r"training.grad_clip: .*-1.*distributed.deepspeed.gradient_clipping"
    ):
        load_config(None, {f"{BLOCK}enabled": True, f"{BLOCK}gradient_clipping": -1.0})


def test_a_file_that_is_no_name_is_told() -> None:
    with pytest.raises(ConfigError, match=r"distributed.deepspeed.config_file: "):
        load_config(None, {f"{BLOCK}enabled": True, f"{BLOCK}config_file": 5})


def test_agreement_and_auto_pass() -> None:
    zero = {"stage": 1, "overlap_comm": True, "offload_optimizer": {"device": "none"}}
    assert problems(4, gradient_clipping=1.0, gradient_accumulation_steps=4, zero_optimization=zero) == []
    assert problems(4, bf16={"enabled": "auto"}) == []


def test_a_disabled_block_is_inert() -> None:
    assert problems(enabled=False, gradient_clipping=0.5, config_file="gone.json") == []


def test_tuning_of_its_buffers_is_noted() -> None:
    block = {f"{BLOCK}enabled": True, f"{BLOCK}zero_optimization": {"reduce_bucket_size": 5e8}}
    wrong, notes = deepspeed_problems(load_config(None, block), None)
    assert wrong == []
    assert "reduce_bucket_size" in notes[0]


def test_its_file_is_read_and_compared(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{"gradient_clipping": 0.5, "optimizer": {"type": "Adam"}}')
    clipping, optimizer = problems(config_file=str(path))
    assert "training.grad_clip" in clipping
    assert str(path) in clipping
    assert "optimizer.type" in optimizer
    path.write_text('{"gradient_clipping": 0.5}')
    (problem,) = problems(config_file=str(path), gradient_clipping=1.0)
    assert "keep one" in problem
    (problem,) = problems(config_file=str(tmp_path / "gone.json"))
    assert "cannot be read" in problem
    path.write_text("[]")
    (problem,) = problems(config_file=str(path))
    assert "object" in problem
