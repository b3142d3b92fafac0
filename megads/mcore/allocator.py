"""Keep the memory that a CPU training step frees, for the next step.

Every step allocates and frees the same large tensors. By default glibc gives them back to the system and
asks for them again, and each page of 4 KB then costs a page fault on first use. PyTorch's CUDA allocator
keeps freed blocks for the same reason. `benchmarks/train_cpu.py` shows what it saves.
"""

import ctypes
import os

# mallopt(3)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST = 2**31 - 1
_OWN_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Have glibc keep what is freed; whether it does.

    It does not where the C library is another one, and where the user set its allocator by environment.
    """
    if any(name in os.environ for name in _OWN_SETTINGS):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    # 1 is success; tensors of 2 GiB and more are mapped and given back as before.
    return mallopt(_M_MMAP_THRESHOLD, _LARGEST) == 1 and mallopt(_M_TRIM_THRESHOLD, _LARGEST) == 1
