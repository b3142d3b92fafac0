"""What a start imports, and what it must not: each of these costs a tenth of a second or more."""

import gc
import subprocess
import sys

import pytest

from megads.mcore.imports import UNUSED_PACKAGES, without_garbage_collection, without_packages

START = """
import sys
from megads.mcore.groups import initialize_device
initialize_device("cpu")
import megads.train.loop
import torch
for optimizer in (torch.optim.AdamW, torch.optim.SGD):
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    one = optimizer([weight], lr=0.5)
    one.step()
    one.load_state_dict(one.state_dict())
    assert weight.requires_grad and (weight < 1).all()
print(*sys.modules)
"""


def test_a_start_on_the_cpu_imports_no_compiler_and_no_unused_package() -> None:
    imported = subprocess.run(
        [sys.executable, "-c", START], check=True, capture_output=True, text=True
    ).stdout.split()
    assert "megatron.core.datasets.gpt_dataset" in imported
    assert not {"torch._dynamo", "torch._inductor", "matplotlib", *UNUSED_PACKAGES} & set(imported)


def test_a_hidden_package_cannot_be_imported_and_comes_back() -> None:
    sys.modules.pop("colorsys", None)
    with without_packages("colorsys"), pytest.raises(ModuleNotFoundError):
        import colorsys
    import colorsys

    with without_packages("colorsys"):
        assert sys.modules["colorsys"] is colorsys, "what is in use stays"
    assert sys.modules["colorsys"] is colorsys


def test_garbage_is_collected_again_after_a_failed_import() -> None:
    paused = without_garbage_collection()
    paused.__enter__()
    assert not gc.isenabled()
    assert not paused.__exit__(ImportError, ImportError(), None)
    assert gc.isenabled()
    gc.unfreeze()
