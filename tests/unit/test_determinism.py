"""Deterministic kernels are chosen once and what the user has set in the environment stays."""

import os
from collections.abc import Iterator

import pytest
import torch

from megads.mcore.determinism import make_deterministic


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    environment = dict(os.environ)
    fill = torch.utils.deterministic.fill_uninitialized_memory
    yield
    os.environ.clear()
    os.environ.update(environment)
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill


def test_kernels_are_deterministic_from_here_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_ALGO", "Ring")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    make_deterministic()
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.is_deterministic_algorithms_warn_only_enabled()
    assert os.environ["NCCL_ALGO"] == "Ring"
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] == "0"
