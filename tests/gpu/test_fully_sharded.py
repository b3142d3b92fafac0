"""ZeRO-2 and ZeRO-3 on a real GPU: on one, where nothing is divided, Megatron-FSDP must train as ZeRO-1 does.

Every test skips itself where there is no GPU. Not yet seen running: none was at hand when this was written.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.runs import losses_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

STEPS = 10
FP32: dict[str, Any] = {"training.use_bf16": False}


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize(("precision", "tolerance"), [(FP32, 1e-4), ({}, 0.05)], ids=["fp32", "bf16"])
def test_losses_are_those_of_zero_1(stage: int, precision: dict[str, Any], tolerance: float) -> None:
    found = losses_of("cuda", range(STEPS), precision | {"distributed.zero_stage": stage})
    assert found == pytest.approx(losses_of("cuda", range(STEPS), precision), abs=tolerance)


@pytest.mark.parametrize(("before", "after"), [(3, 1), (1, 3), (3, 3)])
def test_a_checkpoint_goes_over(before: int, after: int, tmp_path: Path) -> None:
    first, half = {"distributed.zero_stage": before}, STEPS // 2
    losses_of("cuda", range(half), FP32 | first, save_to=tmp_path)
    gone_on = losses_of(
        "cuda", range(half, STEPS), FP32 | {"distributed.zero_stage": after}, load_from=tmp_path
    )
    assert gone_on == pytest.approx(losses_of("cuda", range(STEPS), FP32 | first)[half:], abs=1e-4)
