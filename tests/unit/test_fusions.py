"""Which fused kernels a run takes, and what becomes of the choice in the model's configuration."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from megads.config.loader import load_config
from megads.config.resolve import resolve
from megads.mcore import fusions
from megads.mcore.backend import Choice
from megads.mcore.fusions import Fusions, choose_fusions
from megads.mcore.translate import transformer_config
from megads.train.preflight import machine_facts
from tests.dist import tiny

ROOT = Path(__file__).parents[2]
POWERS_OF_TWO = {"model.mla.v_head_dim": 8}
TRANSFORMER_ENGINE = Fusions(cross_entropy=True, permutation=True, rope=True, swiglu=True)
NATIVE = Fusions(rope=True, swiglu=True)


def chosen(device: str, **settings: Any) -> Fusions:
    """On a machine with CUDA."""
    config = load_config(None, tiny.BASE | POWERS_OF_TWO | {"distributed.device": device} | settings)
    return choose_fusions(config, resolve(config, 1, cuda=True))


@pytest.fixture(autouse=True)
def everything_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("fusions", "translate"):
        monkeypatch.setattr(
            f"megads.mcore.{place}.choose_backend", lambda *unused: Choice("transformer_engine", "")
        )
    monkeypatch.setattr(fusions, "triton_problem", lambda: None)


def test_all_of_them_on_cuda_and_none_on_the_cpu() -> None:
    assert chosen("cuda") == TRANSFORMER_ENGINE
    assert chosen("cpu") == Fusions()
    assert TRANSFORMER_ENGINE.describe() == "cross entropy, permutation, rope, swiglu"
    assert Fusions().describe() == "none"


def test_without_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusions, "choose_backend", lambda *unused: Choice("native", ""))
    assert chosen("cuda") == NATIVE


def test_none_where_triton_cannot_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusions, "triton_problem", lambda: "there is none")
    assert chosen("cuda") == Fusions()


@pytest.mark.parametrize(
    ("settings", "left_out"),
    [
        ({"training.use_fp16": True, "training.use_bf16": False}, {"cross_entropy"}),
        ({"training.deterministic": True}, {"rope", "swiglu"}),
        ({"model.mla.v_head_dim": 12}, {"rope"}),
        ({"model.mla.qk_nope_head_dim": 24}, {"rope"}),
        ({"model.mla.qk_rope_head_dim": 2}, {"rope"}),
    ],
)
def test_what_a_kernel_cannot_do_is_left_to_plain_torch(settings: dict[str, Any], left_out: set[str]) -> None:
    taken = chosen("cuda", **settings)
    assert {name for name, on in vars(taken).items() if not on} == left_out


def test_triton_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(fusions, "find_spec", lambda name: name == "triton")
    monkeypatch.setattr(fusions.shutil, "which", lambda name: name == "gcc")
    assert fusions.triton_problem.__wrapped__() is None
    monkeypatch.setattr(fusions.shutil, "which", lambda name: None)
    assert "C compiler" in (fusions.triton_problem.__wrapped__() or "")
    monkeypatch.setattr(fusions, "find_spec", lambda name: None)
    assert "not installed" in (fusions.triton_problem.__wrapped__() or "")


def test_a_rank_that_takes_other_kernels_is_found_before_the_first_step() -> None:
    """Those of a loss over tensor parallelism exchange other things."""
    config = load_config(None, tiny.BASE)
    assert machine_facts(config, resolve(config, 1, cuda=False))["the fused kernels"] == "none"


@pytest.mark.parametrize("taken", [NATIVE, Fusions()])
def test_modules_are_told_through_megatron_cores_configuration(
    taken: Fusions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megads.mcore.translate.choose_fusions", lambda *unused: taken)
    config = load_config(None, tiny.BASE)
    translated = transformer_config(config, resolve(config, 1, cuda=False))
    assert translated.bias_activation_fusion == taken.swiglu
    assert translated.moe_permute_fusion == taken.permutation


# --- kernels in Triton's interpreter, which must be chosen before a kernel is imported -------------


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("positions_of_each_sample", [False, True])
def test_rotary_kernels_have_the_layout_of_plain_rope(positions_of_each_sample: bool) -> None:
    done = subprocess.run(
        [sys.executable, __file__, *["each"] * positions_of_each_sample],
        env=os.environ | {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr


def _compare_rotary_kernels(positions_of_each_sample: bool) -> None:
    import torch
    from megatron.core.fusions import fused_mla_yarn_rope_apply as kernels

    from megads.config.schema import MLA
    from megads.model.rope import rotary_table, rotate, rotate_and_join

    for kernel in vars(kernels).values():
        if hasattr(kernel, "configs"):  # to choose among several it would time them on a GPU
            kernel.configs = kernel.configs[1:2]
    length, batch, heads, nope, rope, value = 6, 2, 4, 16, 8, 16
    positions = torch.arange(length).unsqueeze(1)
    if positions_of_each_sample:
        positions = torch.cat((positions, positions % 4), dim=1)
    table = rotary_table(MLA(), rope, positions)
    inputs = [
        torch.randn(length, batch, width, requires_grad=True)
        for width in (heads * (nope + rope), heads * (nope + value), rope)
    ]

    def parts() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, kv, key = (2.0 * x for x in inputs)  # what a linear gives, which the kernel may overwrite
        return q.unflatten(-1, (heads, -1)), kv.unflatten(-1, (heads, -1)), key

    q, kv, key = parts()
    rotated = rotate(key.unsqueeze(2), table).expand(-1, -1, heads, -1)
    expected = (
        torch.cat((q[..., :nope], rotate(q[..., nope:], table)), dim=-1),
        torch.cat((kv[..., :nope], rotated), dim=-1),
        kv[..., nope:],
    )
    found = rotate_and_join(*parts(), table, table, value)
    torch.testing.assert_close(found, expected)
    gradients = [torch.randn_like(x) for x in expected]
    wanted = torch.autograd.grad(expected, inputs, gradients)
    torch.testing.assert_close(torch.autograd.grad(found, inputs, gradients), wanted)


if __name__ == "__main__":
    _compare_rotary_kernels("each" in sys.argv)
