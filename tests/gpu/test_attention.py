"""Flash kernels on a real GPU against exact attention; skips itself where there is none.

Not yet seen running: no GPU was at hand when this was written.
"""

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megads.config.loader import load_config
from megads.config.resolve import resolve
from megads.model.attention import CoreAttention, dense_attention
from megads.model.flash_attention import KERNELS, Case, Kernel, choose_core_attention, find_kernel

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

BATCH, HEADS, LENGTH, SCALE = 2, 8, 512, 0.08
V3 = Case(
    transformer_engine=True,
    dtype=torch.bfloat16,
    heads=HEADS,
    qk_width=192,
    v_width=128,
    queries=LENGTH,
    keys=LENGTH,
    documents=False,
    window=None,
)
CASES = {
    "whole": V3,
    "fp16": replace(V3, dtype=torch.float16),
    "equal-widths": replace(V3, qk_width=128),
    "moonlight-lite": replace(V3, qk_width=96, v_width=64),
    "part": replace(V3, queries=LENGTH // 4),
    "first-part": replace(V3, queries=LENGTH // 4, keys=LENGTH // 4),
    "window": replace(V3, window=100),
    "window-part": replace(V3, window=100, queries=LENGTH // 4),
    "documents": replace(V3, documents=True),
    "documents-window": replace(V3, documents=True, window=100),
    "documents-part": replace(V3, documents=True, queries=LENGTH // 4),
}
# What must work on Hopper with torch alone, whatever Transformer Engine does.
CUDNN = {"whole", "first-part"}


def documents_of(length: int) -> Tensor:
    """Some short, some long, one that begins with the last quarter; others in each row."""
    generator = torch.Generator().manual_seed(5)
    starts = torch.rand(BATCH, LENGTH, generator=generator) < 0.01
    starts[0, LENGTH * 3 // 4] = True
    return starts.cumsum(1).int()[:, :length].cuda()


def results(attend: CoreAttention, case: Case, dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients of queries, keys and values, as float32; numbers are those of `case.dtype`."""
    generator = torch.Generator("cuda").manual_seed(3)

    def random(tokens: int, width: int) -> Tensor:
        # As MLA writes them: tokens with all their heads.
        x_SBNX = torch.randn(tokens, BATCH, case.heads, width, generator=generator, device="cuda")
        return x_SBNX.to(case.dtype).to(dtype).permute(1, 2, 0, 3).requires_grad_()

    q, k, v = (
        random(tokens, width)
        for tokens, width in (
            (case.queries, case.qk_width), (case.keys, case.qk_width), (case.keys, case.v_width),
        )
    )  # fmt: skip
    out = attend(
        q, k, v, scale=SCALE, first_query=case.keys - case.queries, window=case.window,
        documents_BK=documents_of(case.keys) if case.documents else None,
    )  # fmt: skip
    grad = torch.randn(out.shape, generator=generator, device="cuda").to(case.dtype).to(dtype)
    return [x.float() for x in (out, *torch.autograd.grad(out, (q, k, v), grad))]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_a_kernel_that_says_it_can_is_right(kernel: Kernel, name: str) -> None:
    case = CASES[name]
    if "Transformer" in kernel.name:
        pytest.importorskip("transformer_engine")
    if problem := kernel.problem(case):
        pytest.skip(problem)
    exact = results(dense_attention, case, torch.float32)
    found = results(kernel.attend, case, case.dtype)
    for what, mine, other in zip(("output", "q", "k", "v"), found, exact, strict=True):
        assert mine.isfinite().all(), what
        assert (mine - other).norm() <= 0.01 * other.norm(), what


@pytest.mark.parametrize("name", CASES)
def test_torch_alone_has_a_flash_kernel_for_every_case(name: str) -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("of Hopper and later GPUs")
    kernel, reasons = find_kernel([replace(CASES[name], transformer_engine=False)])
    assert kernel is not None, reasons
    assert ("cuDNN" in kernel.name) or name not in CUDNN, reasons


def chosen(**settings: Any) -> CoreAttention:
    names = {"data.sources": [{"name": "random", "path": "random"}], "model.mla.use_flash_mla": True}
    config = load_config(None, names | settings)
    return choose_core_attention(config, resolve(config, 1, cuda=True), transformer_engine=False)


def test_the_choice_of_a_run_is_a_flash_kernel_and_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "megads"):
        attend = chosen()
    assert attend in [kernel.attend for kernel in KERNELS]
    assert caplog.records[0].message.startswith("attention: torch's")
