"""DeepEP on real GPUs against the all-to-all dispatcher; skips itself without two of them and DeepEP.

Not yet seen running: no GPU was at hand when this was written.
"""

from importlib.util import find_spec

import pytest
import torch

from tests.gpu.runs import run_on_gpus

pytestmark = [
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
    pytest.mark.skipif(find_spec("deep_ep") is None, reason="needs the deep_ep package"),
]

STEPS = 10
MOE = "model.moe."
SETTINGS = {
    "distributed.expert_parallel_size": 2,
    "training.use_bf16": True,
    "model.mla.d_model": 128,
}


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(("fp8", "tolerance"), [(False, 2e-3), (True, 2e-2)])
def test_losses_are_those_of_the_all_to_all_dispatcher(
    asynchronous: bool, fp8: bool, tolerance: float
) -> None:
    deep_ep = {MOE + "use_deep_ep": True, MOE + "deep_ep_async": asynchronous, MOE + "deep_ep_fp8": fp8}
    expected, _ = run_on_gpus(2, STEPS, SETTINGS)
    found, _ = run_on_gpus(2, STEPS, SETTINGS | deep_ep)
    assert found == pytest.approx(expected, rel=tolerance)
