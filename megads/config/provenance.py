"""Which code made a run: git revision and package versions, without importing any of them."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import megads

_PACKAGES = (
    "torch",
    "megatron-core",
    "transformer-engine",
    "nvidia-modelopt",
    "numpy",
    "pydantic",
    "sentencepiece",
    "tokenizers",
    "transformers",
)


def provenance() -> dict[str, Any]:
    """Versions as JSON: megads, python, platform, packages (null: not installed), git (null: none)."""
    return {
        "megads": megads.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "git": git_revision(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def git_revision() -> dict[str, Any] | None:
    """{"revision", "modified"} of the checkout that MegaDS runs from; None when it is installed."""
    root = Path(megads.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    revision = _git(root, "rev-parse", "HEAD")
    if revision is None:
        return None
    return {"revision": revision, "modified": bool(_git(root, "status", "--porcelain", "-uno"))}


def _git(root: Path, *words: str) -> str | None:
    command = ["git", "-C", str(root), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
