"""The configurations of a directory, each in a line: size, processes, length."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megads.config.flops import count_parameters
from megads.config.jsonc import parse_jsonc
from megads.config.resolve import run_length
from megads.config.stages import Stage, load_stages, planned_processes
from megads.errors import ConfigError


@dataclass(frozen=True)
class Entry:
    """A configuration: `devices` are the fewest, or those of its SLURM block; `tokens` of all stages."""

    path: Path
    stages: tuple[Stage, ...]
    parameters: int
    """With MTP, as the active ones."""
    active_parameters: int
    devices: int
    needs_gpus: bool
    tokens: int


def load_entry(path: Path) -> Entry:
    """Raises ConfigError for a file that cannot be loaded."""
    stages = load_stages(path)
    first = stages[0].config
    counts = count_parameters(first)
    devices, _ = planned_processes(stages)
    slurm = first.distributed.slurm
    return Entry(
        path=path,
        stages=stages,
        parameters=counts.total_with_mtp,
        active_parameters=counts.active_with_mtp,
        devices=devices,
        needs_gpus=first.distributed.device == "cuda" or (slurm.enabled and slurm.gpus_per_node > 0),
        tokens=sum(run_length(stage.config)[0] for stage in stages),
    )


def load_catalog(directory: Path) -> list[Entry]:
    """The runnable configurations of `directory`, the smallest first; raises ConfigError for a broken one."""
    entries = [load_entry(path) for path in sorted(directory.glob("*.json")) if _is_runnable(path)]
    if not entries:
        raise ConfigError(f"{directory} holds no configuration: run this from a whole checkout")
    return sorted(entries, key=lambda entry: (entry.parameters, entry.path.name))


def _is_runnable(path: Path) -> bool:
    """Not a schema or another program's settings, nor data alone for others to extend."""
    content = parse_jsonc(path.read_text(encoding="utf-8"), str(path))
    return isinstance(content, dict) and any(name in content for name in ("extends", "model"))


def count_text(number: float) -> str:
    """1234567 as 1.23M."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:g}"


def describe(entry: Entry) -> Iterator[str]:
    """The cells of a row: see `COLUMNS`."""
    yield entry.path.name
    yield count_text(entry.parameters)
    yield count_text(entry.active_parameters)
    yield f"{entry.devices:,} GPUs" if entry.needs_gpus else f"{entry.devices} or more"
    yield count_text(entry.tokens)
    yield str(len(entry.stages))


COLUMNS = ("configuration", "parameters", "active", "devices", "tokens", "stages")
