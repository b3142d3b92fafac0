"""FP16 with loss scaling and BF16 moments on a real GPU: they train near BF16, and resume exactly.

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
NOISE = 0.05  # nats per token; a token may now and then go to another expert
# A scale that fits from the first step on, and doubles on the way; what overflows is tested on the CPU.
FP16: dict[str, Any] = {
    "training.use_bf16": False,
    "training.use_fp16": True,
    "training.fp16.initial_loss_scale": 2.0**6,
    "training.fp16.loss_scale_window": 8,
}
MOMENTS: dict[str, Any] = {"training.adam_exp_avg_dtype": "bf16", "training.adam_exp_avg_sq_dtype": "bf16"}
BACKENDS = [
    "native",
    pytest.param(
        "transformer_engine",
        marks=pytest.mark.skipif(
            transformer_engine_problem() is not None, reason=f"{transformer_engine_problem()}"
        ),
    ),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("changed", [FP16, MOMENTS], ids=["fp16", "bf16-moments"])
def test_it_trains_near_bf16_and_resumes_bit_by_bit(
    changed: dict[str, Any], backend: str, tmp_path: Path
) -> None:
    common = {"model.backend": backend, "training.deterministic": True}
    bf16, half = losses_of("cuda", range(STEPS), common), STEPS // 2
    whole = losses_of("cuda", range(STEPS), common | changed)
    assert whole != bf16
    assert max(abs(a - b) for a, b in zip(whole, bf16, strict=True)) < NOISE
    first = losses_of("cuda", range(half), common | changed, save_to=tmp_path)
    assert first + losses_of("cuda", range(half, STEPS), common | changed, load_from=tmp_path) == whole


def test_bf16_goes_on_in_fp16_and_back(tmp_path: Path) -> None:
    there, back = tmp_path / "there", tmp_path / "back"
    losses = losses_of("cuda", range(5), {}, save_to=there)
    losses += losses_of("cuda", range(5, 10), FP16, load_from=there, save_to=back)
    losses += losses_of("cuda", range(10, STEPS), {}, load_from=back)
    bf16 = losses_of("cuda", range(STEPS), {})
    assert max(abs(a - b) for a, b in zip(losses, bf16, strict=True)) < NOISE
