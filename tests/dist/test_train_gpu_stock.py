"""The GPU benchmark's opponent, Megatron-Core's own modules, as far as a machine without a GPU shows it.

What is built, in a process that says that there is a GPU, and holds its tensors on the CPU.
"""

import dataclasses
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

ROOT = Path(__file__).parents[2]
SMALL = {
    "model.num_layers": 2, "model.vocab_size": 1024, "model.mla.d_model": 256, "model.intermediate_size": 256,
    "model.moe.expert_intermediate_size": 128,
}  # fmt: skip


def build(shape: str, precision: str) -> dict[str, Any]:
    """In a process that has not imported Megatron-Core yet."""
    hopper = SimpleNamespace(name="H200", major=9, minor=0, multi_processor_count=132, total_memory=141 << 30)
    torch.cuda.get_device_capability = lambda *device: (hopper.major, hopper.minor)
    torch.cuda.get_device_properties = lambda *device: hopper
    import megatron.core.extensions.transformer_engine  # noqa: F401 (later it would be hidden)
    from gpu_training.contenders import extra_stock_parameters, stock_model
    from gpu_training.shapes import SHAPES, resolved_on, slice_config

    from megads.config.flops import count_parameters
    from megads.mcore.groups import initialize_device, initialize_process_groups
    from megads.optim.build import build_optimizer, wrap_data_parallel

    changes = SMALL | {"model.backend": "transformer_engine"}
    config = slice_config(SHAPES[shape], precision, "cuda", hopper.total_memory, 4, changes)
    resolved = resolved_on(config)
    initialize_device("cpu")
    initialize_process_groups(dataclasses.replace(resolved, backend="gloo"), 2, config.seed)
    with mock.patch("torch.cuda.is_available", return_value=True):
        model = stock_model(config, resolved)
        optimizer = build_optimizer(config, resolved, wrap_data_parallel(config, resolved, [model]))
    transformer = model.config
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "expected": count_parameters(config).total + extra_stock_parameters(config),
        "modules": sorted({type(module).__name__ for module in model.modules()}),
        "fp8": [transformer.fp8, transformer.fp8_recipe] if transformer.fp8 else None,
        "recompute": transformer.recompute_modules,
        "fused_gradients": {
            type(module).__name__: module.fuse_wgrad_accumulation
            for module in model.modules()
            if hasattr(module, "fuse_wgrad_accumulation")
        },
        "optimizers": sorted({type(one.optimizer).__name__ for one in optimizer.chained_optimizers}),
    }


if __name__ == "__main__":
    print(json.dumps(build(*sys.argv[1:])))


# --- the tests --------------------------------------------------------------------------------


@pytest.mark.skipif(find_spec("transformer_engine") is None, reason="Transformer Engine is not installed")
@pytest.mark.parametrize(("shape", "precision"), [("v3", "bf16"), ("v3", "fp8"), ("v2-lite", "bf16")])
def test_the_opponent_is_the_same_model_with_all_that_makes_it_fast(shape: str, precision: str) -> None:
    paths = [str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-m", __name__, shape, precision],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["parameters"] == found["expected"]
    of_its_own = {"TEGroupedMLP", "TEDotProductAttention", "TopKRouter", "MLASelfAttention"}
    assert of_its_own <= set(found["modules"])
    assert found["fp8"] == (["e4m3", "blockwise"] if precision == "fp8" else None)
    assert sorted(found["recompute"]) == ["layernorm", "mla_up_proj"]
    assert set(found["fused_gradients"].values()) == {True}
    assert "TEColumnParallelGroupedLinear" in found["fused_gradients"]
    assert found["optimizers"] == ["FusedAdam"]
