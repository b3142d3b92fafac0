"""The memory that a process of the CPU has used."""

import re
import resource
import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")


def peak_resident_bytes() -> int:
    """The most memory that this process, and no program before it, has had resident.

    Linux's `ru_maxrss` begins with the peak of the process that started this one; VmHWM of proc(5) does not.
    """
    if _STATUS.exists() and (found := re.search(r"^VmHWM:\s*(\d+) kB$", _STATUS.read_text(), re.MULTILINE)):
        return int(found[1]) * 1024
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident if sys.platform == "darwin" else resident * 1024
