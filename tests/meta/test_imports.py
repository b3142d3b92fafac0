"""Who may import whom, by walking the imports of every file, those inside functions included.

`errors, log` and other files of `megads` itself < `config` < `mcore | report | plan | launch` <
`model | data | optim` < `checkpoint` < `train` < scripts. A file may import what is below it and its own
package; `model`, `data` and `optim` do not know each other, nor do `mcore`, `report`, `plan` and `launch`.
`config`, `report`, `plan` and `launch` run on a login node: no torch. `megatron` is for the files that are
made to know it.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAYERS = (
    ("errors", "log", "command_line", "ports", "publish", "resident", "tables"), ("config",),
    ("mcore", "report", "plan", "launch"),
    ("model", "data", "optim"), ("checkpoint",), ("train",),
)  # fmt: skip
HEIGHT = {part: height for height, layer in enumerate(LAYERS) for part in layer}
KNOW_MEGATRON = ("mcore", "model", "data", "optim", "checkpoint")
RUNS_A_STEP = "megads/train/step.py"
HEAVY = {"torch", "megatron", "transformers", "numpy", "matplotlib", "tensorboard"}
HEAVY_FOR = {"report": HEAVY - {"numpy"}, "plan": HEAVY - {"matplotlib"}, "launch": HEAVY}


def code() -> list[Path]:
    files = [*(ROOT / "megads").rglob("*.py"), *(ROOT / "tools").glob("*.py"), ROOT / "pretrain_megads.py"]
    return sorted(files)


def imports(source: str, package: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything imported; `from a import b` gives a.b, which may be a name in a."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parent, *([base] if base else [])])
            yield from ((node.lineno, f"{base}.{name.name}") for name in node.names)


def violations(path: str, source: str) -> list[str]:
    """Lines that break a rule, in the file that lies at `path` in the repository."""
    parts = Path(path).with_suffix("").parts
    mine = parts[1] if parts[0] == "megads" and len(parts) > 1 else None
    found = []
    for line, name in imports(source, ".".join(parts[:-1])):
        top, *rest = name.split(".")
        where = f"{path}:{line}: {name}: "
        if top in ("tools", "pretrain_megads", "tests", "benchmarks"):
            found.append(where + "scripts and tests are imported by nobody")
        if mine is None or mine == "__init__":
            continue
        if top == "megads" and rest and rest[0] in HEIGHT and rest[0] != mine:
            higher, same = HEIGHT[rest[0]] > HEIGHT[mine], HEIGHT[rest[0]] == HEIGHT[mine]
            if higher or (same and mine not in LAYERS[0]):
                found.append(where + f"megads/{mine} must not know megads/{rest[0]}")
        too_heavy = HEAVY if HEIGHT[mine] <= HEIGHT["config"] else HEAVY_FOR.get(mine, set())
        if top in too_heavy:
            found.append(where + f"megads/{mine} must answer without importing {top}")
        if top == "megatron" and mine not in KNOW_MEGATRON and path != RUNS_A_STEP:
            found.append(where + "megatron is for " + ", ".join(KNOW_MEGATRON) + f" and {RUNS_A_STEP}")
    return found


def test_layers() -> None:
    broken = [
        problem
        for path in code()
        for problem in violations(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))
    ]
    assert not broken, "\n".join(broken)


def test_every_part_has_a_layer() -> None:
    parts = {path.stem for path in (ROOT / "megads").iterdir() if path.suffix == ".py" or path.is_dir()}
    assert parts - {"__init__", "__pycache__"} == HEIGHT.keys()


@pytest.mark.parametrize(
    ("path", "source", "allowed"),
    [
        ("megads/config/x.py", "import torch", False),
        ("megads/config/x.py", "def f():\n    from torch.nn import Module", False),
        ("megads/config/x.py", "from megads import mcore", False),
        ("megads/config/x.py", "from megads.errors import ConfigError", True),
        ("megads/config/x.py", "from . import schema", True),
        ("megads/config/x.py", "from ..train import loop", False),
        ("megads/report/x.py", "import numpy, megads.config.loader", True),
        ("megads/report/x.py", "import torch", False),
        ("megads/report/x.py", "from megads.train.metrics import Record", False),
        ("megads/errors.py", "import megads.log", True),
        ("megads/errors.py", "import megads.config", False),
        ("megads/model/x.py", "import megads.data.blend", False),
        ("megads/optim/x.py", "from megads.model import build", False),
        ("megads/model/x.py", "from megatron.core import parallel_state", True),
        ("megads/checkpoint/x.py", "from megads.train.state import TrainState", False),
        ("megads/train/x.py", "from megads.checkpoint.store import CheckpointStore", True),
        ("megads/train/x.py", "from megatron.core import parallel_state", False),
        ("megads/train/step.py", "from megatron.core import parallel_state", True),
        ("megads/train/x.py", "import tools.demo", False),
        ("tools/x.py", "import megads.train.loop, torch", True),
        ("tools/x.py", "import pretrain_megads", False),
    ],
)
def test_the_rules_themselves(path: str, source: str, allowed: bool) -> None:
    assert (not violations(path, source)) is allowed
