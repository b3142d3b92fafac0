"""Every test file is one that a plain `pytest`, and so CI, looks into."""

from fnmatch import fnmatch
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


def test_no_directory_of_tests_is_passed_over(pytestconfig: pytest.Config) -> None:
    """pytest's default of `norecursedirs` leaves out directories of certain names without a word."""
    files = [file.relative_to(TESTS.parent) for file in TESTS.rglob("test_*.py")]
    passed_over = [
        str(file)
        for file in files
        if any(fnmatch(part, name) for part in file.parts for name in pytestconfig.getini("norecursedirs"))
    ]
    assert passed_over == []
    assert {file.parts[0] for file in files} <= set(pytestconfig.getini("testpaths"))
