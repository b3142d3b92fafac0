"""Fused kernels on a real GPU against the plain formulas they replace; skips itself where there is none.

Not yet seen running: no GPU was at hand when this was written.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megads.config.schema import MLA
from megads.mcore.backend import transformer_engine_problem
from megads.mcore.fusions import triton_problem
from megads.model.functional import swiglu
from megads.model.rope import rotary_table, rotate, rotate_and_join
from tests.gpu.runs import losses_of

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(triton_problem() is not None, reason=f"{triton_problem()}"),
]
needs_transformer_engine = pytest.mark.skipif(
    transformer_engine_problem() is not None, reason=f"{transformer_engine_problem()}"
)
DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype).requires_grad_()


def assert_same(found: Any, expected: Any, inputs: list[Tensor], dtype: torch.dtype) -> None:
    """Outputs, and gradients of random weights on them."""
    tolerance = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype], "check_dtype": False}
    torch.testing.assert_close(found, expected, **tolerance)
    gradients = [torch.randn_like(output) for output in expected]
    mine = torch.autograd.grad(found, inputs, [g.to(f.dtype) for g, f in zip(gradients, found, strict=True)])
    torch.testing.assert_close(mine, torch.autograd.grad(expected, inputs, gradients), **tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, 37, 1000])
@pytest.mark.parametrize("gated", [False, True])
def test_swiglu(dtype: torch.dtype, tokens: int, gated: bool) -> None:
    inputs = [random(tokens, 512, dtype=dtype)]
    if gated:
        inputs.append(random(tokens, dtype=torch.float32))
    gate, up = inputs[0].float().chunk(2, dim=-1)
    expected = F.silu(gate) * up * (inputs[1].unsqueeze(-1) if gated else 1.0)
    assert_same([swiglu(*inputs, fused=True)], [expected], inputs, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("positions_of_each_sample", [False, True])
def test_rope(dtype: torch.dtype, positions_of_each_sample: bool) -> None:
    length, batch, heads, nope, rope, value = 70, 2, 16, 128, 64, 128
    positions = torch.arange(length, device="cuda").unsqueeze(1)
    if positions_of_each_sample:
        positions = torch.cat((positions, positions % 13), dim=1)
    table = rotary_table(MLA(), rope, positions)
    inputs = [
        random(length, batch, width, dtype=dtype)
        for width in (heads * (nope + rope), heads * (nope + value), rope)
    ]

    def parts(x: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        return (1.0 * x[0]).unflatten(-1, (heads, -1)), x[1].unflatten(-1, (heads, -1)), x[2]

    q, kv, key = parts([x.float() for x in inputs])
    rotated = rotate(key.unsqueeze(2), table).expand(-1, -1, heads, -1)
    expected = [
        torch.cat((q[..., :nope], rotate(q[..., nope:], table)), dim=-1),
        torch.cat((kv[..., :nope], rotated), dim=-1),
        kv[..., nope:],
    ]
    assert_same(list(rotate_and_join(*parts(inputs), table, table, value)), expected, inputs, dtype)


@needs_transformer_engine
@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_entropy(dtype: torch.dtype) -> None:
    from megads.model.output_head import _fused_cross_entropy

    logits, labels = random(50, 2, 5000, dtype=dtype), torch.randint(5000, (50, 2), device="cuda")
    expected = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none").view(50, 2)
    assert_same([_fused_cross_entropy(1.0 * logits, labels, None)], [expected], [logits], dtype)


@needs_transformer_engine
@pytest.mark.parametrize("dtype", DTYPES)
def test_permutation(dtype: torch.dtype) -> None:
    from megatron.core.transformer.moe.moe_utils import permute, unpermute

    tokens, experts, chosen, hidden = 64, 16, 4, 256
    routed = torch.zeros(tokens, experts, dtype=torch.bool, device="cuda")
    routed.scatter_(1, torch.rand(tokens, experts, device="cuda").topk(chosen).indices, True)
    inputs = [random(tokens, hidden, dtype=dtype), random(tokens, experts, dtype=torch.float32)]

    def there_and_back(fused: bool) -> list[Tensor]:
        states, gates = inputs[0], inputs[1] * routed
        sorted_states, sorted_gates, places, *_ = permute(
            states, routed, probs=gates, num_out_tokens=tokens * chosen, fused=fused
        )
        gated = (sorted_states * sorted_gates.unsqueeze(-1)).to(dtype)
        return [sorted_states, unpermute(gated, places, states.shape, routing_map=routed, fused=fused)]

    assert_same(there_and_back(True), there_and_back(False), inputs, dtype)


def test_a_run_with_them_is_the_run_without() -> None:
    """In FP32 with native layers: rotary part and SwiGLU."""
    settings: dict[str, Any] = {
        "training.use_bf16": False, "model.backend": "native", "model.mla.v_head_dim": 8,
    }  # fmt: skip
    fused = losses_of("cuda", range(10), settings)
    plain = losses_of("cuda", range(10), settings | {"training.deterministic": True})
    assert max(abs(a - b) for a, b in zip(fused, plain, strict=True)) < 1e-4
