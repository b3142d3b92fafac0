"""Kernels of Megatron-Core and Transformer Engine that do at once what plain torch does in several passes.

Chosen here, once for a run: on CUDA, where a kernel can be imported and computes exactly what our plain code
does up to rounding, which is the reference in tests/gpu/test_fusions.py. Always plain is the router:
Transformer Engine's fused one scores a group by its `topk / topk_group` best experts (DeepSeek-V3 by its two
best, V2 by its best one), takes no noise, and keeps to itself the scores that statistics and losses need.
Adam and gradients that linears add to their buffers are not here: they come with the backend.
"""

import functools
import os
import shutil
from dataclasses import dataclass, fields
from importlib.util import find_spec

from megads.config.resolve import Resolved
from megads.config.schema import Config
from megads.config.validate_kernels import fused_rope_fits
from megads.mcore.backend import choose_backend


@dataclass(frozen=True)
class Fusions:
    """Which of them a run takes.

    `cross_entropy`: whole logits stay in 16 bits and become their own gradient (Transformer Engine).
    `permutation`: tokens are sorted by expert without sorting all (token, expert) pairs (Transformer Engine).
    `rope`: queries and keys are rotated and put together in one pass (Megatron-Core).
    `swiglu`: SwiGLU and gates in one pass, and so its gradient (Megatron-Core).
    """

    cross_entropy: bool = False
    permutation: bool = False
    rope: bool = False
    swiglu: bool = False

    def describe(self) -> str:
        """One line for the log."""
        names = [field.name.replace("_", " ") for field in fields(self) if getattr(self, field.name)]
        return ", ".join(names) or "none"


def choose_fusions(config: Config, resolved: Resolved) -> Fusions:
    """Those of a run; none on the CPU, nor where Triton cannot compile."""
    if resolved.device == "cpu" or triton_problem() is not None:
        return Fusions()
    transformer_engine = choose_backend(config, resolved).name == "transformer_engine"
    return Fusions(
        cross_entropy=transformer_engine and resolved.precision != "fp16",
        permutation=transformer_engine,
        rope=fused_rope_fits(config),
        # Compiled by torch, which may choose another order of sums in another run.
        swiglu=not config.training.deterministic,
    )


@functools.cache
def triton_problem() -> str | None:
    """Why Triton, which all of them are written in or compiled to, cannot be used; None: it can."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    compilers = filter(None, (os.environ.get("CC"), "cc", "gcc", "clang"))
    if not any(shutil.which(compiler) for compiler in compilers):
        return "Triton needs a C compiler, and there is none"
    return None
