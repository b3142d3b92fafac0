"""Runs on GPUs that repeat to the last bit, for the price of some speed (a CPU run always does).

Source: https://docs.pytorch.org/docs/stable/notes/randomness.html; likewise for Transformer Engine and NCCL.
"""

import os

import torch

_ENVIRONMENT = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
    "NCCL_ALGO": "^NVLS",  # sums in the switch are not in a fixed order
}


def make_deterministic() -> None:
    """Choose deterministic kernels from here on, in torch, cuBLAS, Transformer Engine and NCCL.

    To be called before anything is computed or communicated. Variables that the user has set stay.
    torch warns of an operation that has no deterministic form, once, with its name.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Otherwise torch fills whatever is allocated, which only hides reads of memory that nobody wrote.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
