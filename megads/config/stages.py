"""Stages: runs that follow one another, each on the weights of the one before, all from one file.

A stage is the rest of the file with the settings of its entry on top (default < file < stage < flag), and a
whole configuration of its own: schedules, batch, lengths, data and layout. It writes below
`output_dir/NAME`. What it inherits is the file's, not the stage's before it.
"""

import copy
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import pairwise
from math import lcm
from pathlib import Path
from typing import Any

from megads.config.identity import YARN, model_differences
from megads.config.loader import Loading, refuse_settings
from megads.config.resolve import checkpoint_directory, planned_hardware
from megads.config.schema import Config
from megads.config.tree import get, leaf_by_path
from megads.config.validate import find_problems, refuse_run
from megads.errors import ConfigError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
# What a run without stages writes into output_dir.
_TAKEN = ("checkpoints", "logs", "profile", "tensorboard", "wandb")
_OF_THE_FILE = {
    "output_dir": "a stage writes below output_dir, into a directory of its name",
    "checkpointing.save_dir": "its checkpoints lie below the file's save_dir, in a directory of its name",
    "logging.tensorboard.log_dir": "it logs below the file's log_dir, into a directory of its name",
    "checkpointing.load": "every stage resumes from its own latest checkpoint",
}
_OF_THE_JOB = (
    "distributed.device", "distributed.backend", "distributed.launcher", "distributed.slurm",
    "distributed.deepspeed.enabled",
)  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """One run of a sequence; a run without stages is a sequence of one without a name."""

    name: str
    config: Config

    @property
    def log_file(self) -> str:
        """Of this process of the job."""
        return os.path.join(self.config.output_dir, "logs", f"rank{os.environ.get('RANK', '0')}.log")


def load_stages(
    path: str | Path | None, overrides: Mapping[str, Any] = {}, origins: Mapping[str, str] = {}
) -> tuple[Stage, ...]:
    """The stages of a configuration, in order; arguments as for `load_config`.

    Raises one ConfigError that lists everything wrong in the file and in any stage.
    """
    of_file = Loading.of(path, overrides, origins)
    config = of_file.finish()
    listed = of_file.values.get("stages") or []
    entries = (
        [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list | tuple) else []
    )
    problems = [*of_file.problems, *_entry_problems(entries)]
    if config is not None and entries and config.checkpointing.load not in (None, "latest"):
        problems.append(
            f"checkpointing.load = {config.checkpointing.load!r} cannot say which stage it is for: leave it "
            "out, or start the first stage from it with checkpointing.init_from"
        )
    stages: list[Stage] = []
    for number, entry in enumerate(entries, 1):
        name = str(entry.get("name", f"number {number}"))
        settings = {
            key: copy.deepcopy(value) for key, value in entry.items() if key not in ("name", "stages")
        }
        loading = Loading.of(path, overrides, origins, ("stages", settings))
        own = loading.finish()
        problems += [f"stage {name}: {p}" for p in loading.problems if p not in of_file.problems]
        if own is not None:
            stages.append(_stage(name, own, "experiment_name" in settings, stages[-1] if stages else None))
    refuse_settings(problems)
    assert config is not None
    return tuple(stages) or (Stage("", config),)


def select(stages: Sequence[Stage], name: str) -> Stage:
    """The stage of that name; ConfigError with the names that there are."""
    names = [stage.name for stage in stages if stage.name]
    for stage in stages:
        if name and stage.name == name:
            return stage
    if not names:
        raise ConfigError(f"--stage {name}: the configuration names no stages; leave the flag out")
    near = get_close_matches(name, names, 1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
    raise ConfigError(f"--stage {name}: no stage has this name; {hint}")


def check_stages(stages: Sequence[Stage], world_size: int, cuda: bool) -> None:
    """Raises one ConfigError that lists every reason why any stage cannot run on this many processes."""
    found: dict[str, list[str]] = {}
    for stage in stages:
        for problem in find_problems(stage.config, world_size, cuda):
            found.setdefault(problem, []).append(stage.name)
    problems = [_told(names, problem) for problem, names in found.items()]
    for before, stage in pairwise(stages):
        problems += [f"stage {stage.name}: {p}" for p in _succession_problems(before, stage)]
    problems += _yarn_problems(stages)
    refuse_run(problems, world_size)


def planned_processes(stages: Sequence[Stage], world_size: int | None = None) -> tuple[int, bool]:
    """(world_size, cuda) that all stages are meant for: see `resolve.planned_hardware`."""
    planned = [planned_hardware(stage.config, world_size) for stage in stages]
    return lcm(*(processes for processes, _ in planned)), planned[0][1]


def _told(names: list[str], problem: str) -> str:
    if not any(names):
        return problem
    return f"{'stage' if len(names) == 1 else 'stages'} {', '.join(names)}: {problem}"


def _stage(name: str, config: Config, has_own_title: bool, before: Stage | None) -> Stage:
    """The configuration of one stage: its own places, its start from the stage before it."""
    places: dict[str, object] = {"save_dir": _below(config.checkpointing.save_dir, name)}
    mirror = config.checkpointing.mirror
    places["mirror"] = mirror.model_copy(update={"url": _below(mirror.url, name)})
    if before is not None:
        places["init_from"] = checkpoint_directory(before.config)
    tensorboard = config.logging.tensorboard
    tensorboard = tensorboard.model_copy(update={"log_dir": _below(tensorboard.log_dir, name)})
    update = {
        "stages": (),
        "output_dir": os.path.join(config.output_dir, name),
        "experiment_name": config.experiment_name if has_own_title else f"{config.experiment_name}/{name}",
        "checkpointing": config.checkpointing.model_copy(update=places),
        "logging": config.logging.model_copy(update={"tensorboard": tensorboard}),
    }
    return Stage(name, config.model_copy(update=update))


def _below(directory: str | None, name: str) -> str | None:
    return None if directory is None else os.path.join(directory, name)


def _entry_problems(entries: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Names that cannot be directories, and settings that are not a stage's to choose."""
    earlier: list[str] = []
    for number, entry in enumerate(entries, 1):
        where, name = f"stages, number {number}", entry.get("name")
        if name is None:
            yield f"{where}: has no name; its files go into a directory of that name"
        elif not isinstance(name, str) or not _NAME.fullmatch(name) or name.lower() in _TAKEN:
            yield (
                f"{where}: {name!r} cannot be its name, which is a directory below output_dir: use letters, "
                f"digits, '_', '-' and '.', a letter or digit first, and none of {', '.join(_TAKEN)}"
            )
        elif name.lower() in earlier:
            yield f"{where}: there is a stage {name!r} already; give each its own name"
        earlier.append(str(name).lower())
        told = f"stage {name}" if name is not None else where
        if "stages" in entry:
            yield f"{told}: stages inside a stage are refused; list them one after the other"
        for path, reason in _OF_THE_FILE.items():
            if _gives(entry, path):
                yield f"{told}: {path} is not a stage's to set: {reason}"
        if number > 1 and _gives(entry, "checkpointing.init_from"):
            yield (
                f"{told}: checkpointing.init_from is for the first stage; this one starts from stage "
                f"{earlier[-2]}"
            )


def _gives(entry: dict[str, Any], path: str) -> bool:
    """Whether a stage's entry has this setting, by its name or an alias."""
    *sections, _ = path.split(".")
    inside: Any = entry
    for section in sections:
        inside = inside.get(section) if isinstance(inside, dict) else None
    leaf = leaf_by_path()[path]
    return isinstance(inside, dict) and any(name in inside for name in (leaf.name, *leaf.aliases))


def _succession_problems(before: Stage, stage: Stage) -> Iterator[str]:
    """Why a stage cannot start from the last checkpoint of the one before it."""
    earlier, later = before.config, stage.config
    differences = model_differences(
        earlier.model_dump(mode="json"),
        later.model_dump(mode="json"),
        later.checkpointing.allow_changed,
        new_run=True,
    )
    for path, then, now in differences:
        if path == YARN:
            yield (
                f"{YARN} is null, but stage {before.name} has YaRN: a stage inherits from the file, not from "
                "the stage before it; repeat the setting here"
            )
        else:
            yield (
                f"{path} is {now!r}, but {then!r} in stage {before.name}, whose weights it starts from: give "
                "both the same"
            )
    for path in _OF_THE_JOB:
        if get(earlier, path) != get(later, path):
            yield f"{path} differs from stage {before.name}'s, but all stages run in the same processes"
    if later.checkpointing.init_optimizer == "keep":
        yield from _optimizer_problems(before, later)


def _optimizer_problems(before: Stage, later: Config) -> Iterator[str]:
    earlier = before.config
    keep = 'checkpointing.init_optimizer = "keep"'
    if not earlier.checkpointing.save_optimizer:
        yield (
            f"{keep}, but stage {before.name} does not save its optimizer: set its "
            "checkpointing.save_optimizer to true, or start with a fresh one"
        )
    elif earlier.training.optimizer != later.training.optimizer:
        yield (
            f"{keep}, but stage {before.name} has {earlier.training.optimizer} and this one "
            f'{later.training.optimizer}: use the same optimizer, or "fresh"'
        )


def _yarn_problems(stages: Sequence[Stage]) -> Iterator[str]:
    """YaRN stretches the positions that were trained with plain RoPE, no more and no fewer."""
    plain: Stage | None = None
    for stage in stages:
        yarn = stage.config.model.mla.rope_scaling
        if yarn is None:
            plain = stage
            continue
        if plain is None:
            continue
        trained = plain.config.training.seq_length
        if yarn.original_max_position_embeddings != trained:
            yield (
                f"stage {stage.name}: {YARN}.original_max_position_embeddings = "
                f"{yarn.original_max_position_embeddings}, but stage {plain.name} trains plain RoPE on "
                f"sequences of {trained} tokens: set it to {trained}"
            )
