"""What is recomputed changes no loss, on a real GPU and in FP8; skips itself where there is none.

Not yet seen running: no GPU was at hand when this was written.
"""

from typing import Any

import pytest
import torch

from megads.mcore.backend import transformer_engine_problem
from tests.gpu.runs import losses_of
from tests.gpu.test_fp8 import SIZES

CAPABILITY = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(transformer_engine_problem() is not None, reason=f"{transformer_engine_problem()}"),
]
FP8 = {"training.use_fp8": True, "training.fp8.recipe": "blockwise"}
STEPS = range(5)


@pytest.mark.parametrize(
    "precision",
    [{}, pytest.param(FP8, marks=pytest.mark.skipif(CAPABILITY < (9, 0), reason="needs Hopper"))],
    ids=["bf16", "fp8"],
)
@pytest.mark.parametrize(
    "modules",
    [["mla_up_proj", "layernorm"], ["moe_act", "mlp", "shared_experts"], ["layernorm", "moe"]],
    ids=str,
)
def test_losses_are_the_same(precision: dict[str, Any], modules: list[str]) -> None:
    """`SIZES` are of deterministic runs."""
    settings = SIZES | precision
    selective = {"training.gradient_checkpointing": "selective", "training.recompute_modules": modules}
    found, expected = losses_of("cuda", STEPS, settings | selective), losses_of("cuda", STEPS, settings)
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) < 1e-4


def test_the_loss_by_chunks_is_the_loss() -> None:
    """The products are rounded to BF16 in both; only sums of the head's gradient differ."""
    chunks = losses_of("cuda", STEPS, SIZES | {"training.loss_chunk_tokens": 24})
    whole = losses_of("cuda", STEPS, SIZES)
    assert max(abs(a - b) for a, b in zip(chunks, whole, strict=True)) < 0.01
