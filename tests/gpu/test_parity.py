"""The same run on the CPU and on a real GPU, and with each library that can compute the layers.

Every test skips itself where there is no GPU. Not yet seen running: none was at hand when this was written.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from megads.mcore.backend import transformer_engine_problem
from tests.gpu.runs import losses_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

STEPS = 20
FP32: dict[str, Any] = {"training.use_bf16": False}
NATIVE: dict[str, Any] = {"model.backend": "native"}
TRANSFORMER_ENGINE: dict[str, Any] = {"model.backend": "transformer_engine"}
# In FP32 the order of sums is all that differs. In BF16 weights and activations have eight bits; at this size
# and with these large weights a token may now and then go to another expert.
FP32_DIFFERENCE, BF16_NOISE = 1e-4, 0.05

needs_transformer_engine = pytest.mark.skipif(
    transformer_engine_problem() is not None, reason=f"{transformer_engine_problem()}"
)


def largest_difference(losses: list[float], others: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(losses, others, strict=True))


@pytest.fixture(scope="module")
def cpu() -> list[float]:
    return losses_of("cpu", range(STEPS), {})


def test_fp32_losses_are_those_of_the_cpu(cpu: list[float]) -> None:
    gpu = losses_of("cuda", range(STEPS), FP32)
    assert largest_difference(gpu, cpu) < FP32_DIFFERENCE


@pytest.mark.parametrize(
    "settings", [NATIVE, pytest.param(TRANSFORMER_ENGINE, marks=needs_transformer_engine)], ids=str
)
def test_bf16_losses_are_near_those_of_the_cpu(cpu: list[float], settings: dict[str, Any]) -> None:
    assert largest_difference(losses_of("cuda", range(STEPS), settings), cpu) < BF16_NOISE


@pytest.mark.parametrize(
    "settings", [NATIVE, pytest.param(TRANSFORMER_ENGINE, marks=needs_transformer_engine)], ids=str
)
def test_a_resumed_run_is_the_same_run(settings: dict[str, Any], tmp_path: Path) -> None:
    """Bit by bit."""
    settings = settings | {"training.deterministic": True}
    whole = losses_of("cuda", range(STEPS), settings)
    half = STEPS // 2
    first = losses_of("cuda", range(half), settings, save_to=tmp_path)
    assert first + losses_of("cuda", range(half, STEPS), settings, load_from=tmp_path) == whole


def test_a_run_goes_from_the_cpu_to_the_gpu_and_back(cpu: list[float], tmp_path: Path) -> None:
    there, back = tmp_path / "there", tmp_path / "back"
    losses = losses_of("cpu", range(5), {}, save_to=there)
    losses += losses_of("cuda", range(5, 10), FP32, load_from=there, save_to=back)
    losses += losses_of("cpu", range(10, STEPS), {}, load_from=back)
    assert largest_difference(losses, cpu) < FP32_DIFFERENCE


@needs_transformer_engine
@pytest.mark.parametrize("first", [NATIVE, TRANSFORMER_ENGINE], ids=str)
def test_a_run_goes_on_with_the_other_library(
    cpu: list[float], first: dict[str, Any], tmp_path: Path
) -> None:
    second = TRANSFORMER_ENGINE if first is NATIVE else NATIVE
    losses = losses_of("cuda", range(10), first, save_to=tmp_path)
    losses += losses_of("cuda", range(10, STEPS), second, load_from=tmp_path)
    assert largest_difference(losses, cpu) < BF16_NOISE
