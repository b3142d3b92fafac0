"""Communication beside computation on two real GPUs: the losses of a run without, and a look at the trace.

Skips itself without two of them and Transformer Engine. Not yet seen running: none were at hand when this was
written.
"""

import re
from typing import Any

import pytest
import torch

from megads.mcore.backend import transformer_engine_problem
from tests.gpu.runs import Kernel, run_on_gpus

pytestmark = [
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
    pytest.mark.skipif(transformer_engine_problem() is not None, reason=f"{transformer_engine_problem()}"),
]
STEPS = 5
WIDE: dict[str, Any] = {
    "training.use_bf16": True,
    "training.num_predict_tokens": 2,
    "training.micro_batch_size": 2,
    "training.seq_length": 2048,
    "model.mla.max_context_length": 2048,
    "model.mla.d_model": 1024,
    "model.moe.expert_intermediate_size": 1024,
    "model.init_method_std": 0.02,
}
EP = WIDE | {"distributed.expert_parallel_size": 2}
COMBINED = {"distributed.overlap_expert_parallel": True}
DELAYED = COMBINED | {"distributed.delay_wgrad_compute": True}
SHARED = {"distributed.overlap_shared_experts": True}
EXCHANGE = re.compile("SendRecv|AllToAll", re.IGNORECASE)
PRODUCT = re.compile("gemm|nvjet|cutlass|xmma", re.IGNORECASE)


def beside(kernels: list[Kernel], communication: re.Pattern[str]) -> int:
    """Kernels of communication that ran while a matrix product did."""
    products = [kernel for kernel in kernels if PRODUCT.search(kernel.name)]
    assert products
    sent = [kernel for kernel in kernels if communication.search(kernel.name)]
    assert sent, sorted({kernel.name for kernel in kernels})
    return sum(any(kernel.runs_beside(product) for product in products) for kernel in sent)


@pytest.mark.parametrize("overlap", [COMBINED, DELAYED, SHARED], ids=["combined", "delayed", "shared"])
def test_the_exchange_of_tokens(overlap: dict[str, Any]) -> None:
    expected, _ = run_on_gpus(2, STEPS, EP)
    found, kernels = run_on_gpus(2, STEPS, EP | overlap, {"CUDA_DEVICE_MAX_CONNECTIONS": "32"})
    assert found == pytest.approx(expected, rel=2e-3)
    assert beside(kernels, EXCHANGE)
