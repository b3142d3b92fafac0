"""Adam's moments in host memory on a real GPU: where they lie, and that they change no number.

Every test skips itself where there is no GPU. Not yet seen running: none was at hand when this was written.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from megads.optim.adam import Adam
from tests.gpu.runs import losses_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

STEPS = 8
OFFLOAD: dict[str, Any] = {"distributed.zero_offload": True, "training.deterministic": True}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_on_the_host_give_the_same_weights(dtype: torch.dtype) -> None:
    sizes = [1000, 1 << 26, 7]  # the second is more than one batch
    weights: list[list[torch.Tensor]] = []
    for fraction in (0.0, 1.0):
        generator = torch.Generator("cuda").manual_seed(0)
        ours = [torch.nn.Parameter(torch.randn(size, device="cuda", generator=generator)) for size in sizes]
        adam = Adam(ours, exp_avg_dtype=dtype, exp_avg_sq_dtype=dtype, host_fraction=fraction)
        for _ in range(3):
            for parameter in ours:
                parameter.grad = torch.randn(parameter.shape, device="cuda", generator=generator)
            adam.step()
        weights.append([parameter.detach() for parameter in ours])
        moments = [state[name] for state in adam.state.values() for name in ("exp_avg", "exp_avg_sq")]
        assert {moment.is_cuda for moment in moments} == {fraction == 0.0}
        assert all(moment.is_pinned() for moment in moments) or fraction == 0.0
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_an_offloaded_run_resumes_exactly(stage: int, fraction: float, tmp_path: Path) -> None:
    settings = OFFLOAD | {"distributed.zero_stage": stage, "distributed.zero_offload_fraction": fraction}
    losses_of("cuda", range(STEPS // 2), settings, save_to=tmp_path)
    resumed = losses_of("cuda", range(STEPS // 2, STEPS), settings, load_from=tmp_path)
    assert resumed == losses_of("cuda", range(STEPS), settings)[STEPS // 2 :]
