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
    "model.mla.d_latent": 64,
    "model.mla.q_lora_rank": 64,
    "model.mla.qk_nope_head_dim": 32,
    "model.mla.qk_rope_head_dim": 16,
    "model.mla.v_head_dim": 32,
    "model.moe.expert_intermediate_size": 1024,
    "model.init_method_std": 0.02,
}
EP = WIDE | {"distributed.expert_parallel_size": 2}
COMBINED = {"distributed.overlap_expert_parallel": True}
DELAYED = COMBINED | {"distributed.delay_wgrad_compute": True}
SHARED = {"distributed.overlap_shared_experts": True}
TP = WIDE | {"distributed.tensor_parallel_size": 2}
IN_PIECES = {"distributed.tp_comm_overlap": True}
BUFFERS = re.compile("userbuffers", re.IGNORECASE)
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


def without_multicast() -> dict[str, str]:
    """The environment of GPUs that have none."""
    from transformer_engine_torch import device_supports_multicast

    return {} if device_supports_multicast() else {"UB_SKIPMC": "1"}


def fp8(recipe: str) -> dict[str, Any]:
    return {"training.use_fp8": True, "training.fp8.recipe": recipe}


@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        ({}, 2e-3),
        ({"model.mla.q_lora_rank": None}, 2e-3),
        ({"distributed.expert_parallel_size": 2} | SHARED, 2e-3),
        (
            {
                "training.gradient_checkpointing": "selective",
                "training.recompute_modules": ["mla_up_proj", "mlp", "shared_experts"],
            },
            2e-3,
        ),
        (fp8("tensorwise"), 1e-2),
        (fp8("tensorwise") | {"training.fp8.bf16_first_layers": 1}, 1e-2),
        (fp8("delayed"), 1e-2),
    ],
)
def test_tensor_parallelism_in_pieces(settings: dict[str, Any], tolerance: float) -> None:
    """Sums of two ranks are rounded to BF16 in both, in other places."""
    expected, _ = run_on_gpus(2, STEPS, TP | settings)
    found, kernels = run_on_gpus(2, STEPS, TP | settings | IN_PIECES, without_multicast())
    assert found == pytest.approx(expected, rel=tolerance)
    assert beside(kernels, BUFFERS)


def test_without_the_setting_there_are_no_user_buffers() -> None:
    _, kernels = run_on_gpus(2, 2, TP)
    assert not [kernel.name for kernel in kernels if BUFFERS.search(kernel.name)]
