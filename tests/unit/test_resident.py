"""The peak of a process is its own, and not that of who started it."""

import subprocess
import sys

# In MiB: at the start, and with 100 more for a moment.
MEASURES = """
from megads.resident import peak_resident_bytes
before = peak_resident_bytes()
taken = b"x" * (100 * 2**20)
del taken
print(before >> 20, peak_resident_bytes() >> 20)
"""
# Has 400 MiB when it starts the other.
STARTS = """
import subprocess, sys
taken = b"x" * (400 * 2**20)
sys.exit(subprocess.run([sys.executable, "-c", sys.argv[1]]).returncode)
"""


def test_the_peak_is_that_of_the_process_itself() -> None:
    words = [sys.executable, "-c", STARTS, MEASURES]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert 1 <= before < 100
    assert 90 <= after - before <= 110
