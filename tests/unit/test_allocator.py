"""Freed memory is kept on request, and left alone where the user chose otherwise."""

import os
import subprocess
import sys

import pytest

# Page faults of ten allocations of 64 MB, after some that make room: 16,384 pages each if given back. There
# are far fewer where the machine gives every program huge pages, so this one has none.
FAULTS = """
import ctypes, resource
PR_SET_THP_DISABLE = 41  # linux/prctl.h
assert ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0) == 0
from megads.mcore.allocator import keep_freed_memory
kept = {ask} and keep_freed_memory()
import torch
def faults(allocations):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(allocations):
        torch.ones(16 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults(40)
print(int(kept), faults(10))
"""


def page_faults(ask: bool, **environment: str) -> tuple[bool, int]:
    out = subprocess.run(
        [sys.executable, "-c", FAULTS.format(ask=ask)],
        env=os.environ | environment, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    kept, faults = out.split()
    return kept == "1", int(faults)


@pytest.mark.skipif(sys.platform != "linux", reason="the setting is glibc's")
def test_freed_memory_is_kept() -> None:
    assert page_faults(ask=False)[1] > 100_000
    kept, faults = page_faults(ask=True)
    assert kept
    assert faults < 1_000


def test_the_users_own_setting_wins() -> None:
    kept, _ = page_faults(ask=True, MALLOC_TRIM_THRESHOLD_="131072")
    assert not kept
