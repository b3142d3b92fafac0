"""Flash attention and DeepEP: each reason why they cannot work is told alone; what works is let through."""

from typing import Any

import pytest

from megads.config import validate_kernels
from megads.config.loader import load_config
from megads.config.validate_kernels import flash_attention_problem, kernel_problems

MLA, MOE, EP = "model.mla.", "model.moe.", "distributed.expert_parallel_size"
STRICT = {MLA + "use_flash_mla": True, MLA + "fallback_to_dense": False}
FP32 = {"training.use_bf16": False}
DEEP_EP = {MOE + "use_deep_ep": True, EP: 8, MLA + "d_model": 2048}


def problems(settings: dict[str, Any], cuda: bool) -> list[str]:
    return list(kernel_problems(load_config(None, settings), cuda))


@pytest.fixture(autouse=True)
def deep_ep_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validate_kernels, "find_spec", lambda name: name == "deep_ep")


@pytest.mark.parametrize(
    ("settings", "cuda", "said"),
    [
        (
            {MLA + "flash_mla_backend": "sparse"},
            True,
            ["sparse", "indexer", "nearest: auto", "sliding_window"],
        ),
        ({MLA + "flash_mla_backend": "dense"}, True, ["cannot act while use_flash_mla is false"]),
        (STRICT, False, ["on the CPU", "fallback_to_dense"]),
        (STRICT | FP32, True, ["FP32"]),
        (STRICT | {MLA + "attn_dropout": 0.1}, True, ["attn_dropout"]),
        (STRICT | {MLA + "qk_nope_head_dim": 200, MLA + "qk_rope_head_dim": 64}, True, ["wider than 256"]),
        ({MOE + "deep_ep_fp8": True}, True, ["deep_ep_fp8 cannot act while use_deep_ep is false"]),
        ({MOE + "deep_ep_async": True}, True, ["deep_ep_async cannot act"]),
        (DEEP_EP, False, ["use_deep_ep", "needs CUDA", "nearest: false: the all-to-all dispatcher"]),
        (DEEP_EP | {"distributed.device": "cpu"}, True, ["needs CUDA"]),
        (DEEP_EP | FP32, True, ["BF16"]),
        (DEEP_EP | {EP: 1}, True, ["expert_parallel_size = 1"]),
        (DEEP_EP | {EP: 6}, True, ["expert_tensor_parallel_size = 6", "2, 4, 8, 16"]),
        (DEEP_EP | {MLA + "d_model": 2052}, True, ["d_model = 2052", "multiple of 8"]),
        (DEEP_EP | {MOE + "deep_ep_fp8": True, MLA + "d_model": 2056}, True, ["multiple of 128 (FP8)"]),
    ],
    ids=lambda case: str(case)[:60],
)
def test_each_reason_is_told_alone(settings: dict[str, Any], cuda: bool, said: list[str]) -> None:
    (problem,) = problems(settings, cuda)
    for part in said:
        assert part in problem, problem


def test_deep_ep_must_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validate_kernels, "find_spec", lambda name: None)
    (problem,) = problems(DEEP_EP, cuda=True)
    assert "deep_ep package, which is not installed" in problem
    assert problems({}, cuda=True) == []


@pytest.mark.parametrize(
    "settings",
    [
        STRICT,
        STRICT | FP32 | {"training.use_fp16": True},
        {MLA + "use_flash_mla": True, MLA + "attn_dropout": 0.1},
        STRICT | {MLA + "flash_mla_backend": "dense"},
        DEEP_EP | {MOE + "deep_ep_fp8": True, MOE + "deep_ep_async": True},
        DEEP_EP | {EP: 1, "distributed.expert_tensor_parallel_size": 4},
    ],
    ids=str,
)
def test_what_works_is_let_through(settings: dict[str, Any]) -> None:
    assert problems(settings, cuda=True) == []


def test_a_fallback_is_no_mistake_and_has_its_reason() -> None:
    config = load_config(None, {MLA + "use_flash_mla": True})
    assert list(kernel_problems(config, cuda=False)) == []
    assert flash_attention_problem(config, "cpu") == "this run is on the CPU"
    assert flash_attention_problem(config, "cuda") is None
