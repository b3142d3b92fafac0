"""A configuration for people and for the record: the tree, the dry run, the saved files."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megads.config.flops import count_parameters, training_flops_per_token
from megads.config.memory import heaviest_stage
from megads.config.provenance import provenance
from megads.config.resolve import Resolved, resolve
from megads.config.schema import Config, Section
from megads.config.stages import Stage, check_stages
from megads.config.tree import get, leaves
from megads.config.validate import notes
from megads.errors import EnvironmentSetupError


def non_defaults(config: Config) -> dict[str, Any]:
    """Dotted path to value (as JSON) of every setting that differs from its default."""
    return _differing(config, Config())


def _differing(config: Config, base: Config) -> dict[str, Any]:
    """Dotted path to value (as JSON) of every setting that differs from `base`."""
    changed: dict[str, Any] = {}
    for leaf in leaves():
        value = get(config, leaf.path)
        inside_null = get(config, leaf.path.rpartition(".")[0]) is None if "." in leaf.path else False
        if isinstance(value, Section) or inside_null or value == get(base, leaf.path):
            continue
        changed[leaf.path] = _as_json(value)
    return changed


def render(config: Config) -> str:
    """The whole tree, a setting a line; `*` marks what differs from the default."""
    changed = non_defaults(config)
    lines: list[str] = []
    section = ""
    for leaf in leaves():
        value = get(config, leaf.path)
        parent = leaf.path.rpartition(".")[0]
        if isinstance(value, Section) or (parent and get(config, parent) is None):
            continue
        if parent != section:
            lines.append(f"{parent}:")
            section = parent
        mark = "*" if leaf.path in changed else " "
        unit = f" {leaf.unit}" if leaf.unit and value is not None else ""
        lines.append(f"  {mark} {leaf.name} = {json.dumps(_as_json(value))}{unit}")
    return "\n".join(lines)


def dry_run(config: Config, world_size: int, cuda: bool) -> str:
    """What a run on `world_size` processes would be. Raises ConfigError when it could not run."""
    return dry_run_stages((Stage("", config),), world_size, cuda)


def dry_run_stages(stages: Sequence[Stage], world_size: int, cuda: bool) -> str:
    """What each stage would be, after the first one as it differs from the one before."""
    check_stages(stages, world_size, cuda)
    what = f"{len(stages)} stages" if stages[0].name else stages[0].config.experiment_name
    lines = [f"{what}: nothing is run, this is what would be"]
    before = Stage("", Config())
    for stage in stages:
        lines += ["", f"stage {stage.name}:"] if stage.name else []
        lines += ["", *_plan(stage, before, resolve(stage.config, world_size, cuda))]
        before = stage
    return "\n".join(lines)


def _plan(stage: Stage, before: Stage, resolved: Resolved) -> Iterator[str]:
    yield from (f"{name:<12}{text}" for name, text in _facts(stage.config, resolved))
    changed = _differing(stage.config, before.config)
    than = f"stage {before.name}'s" if before.name else "their default"
    yield from ("", f"{len(changed)} settings differ from {than}:")
    yield from (f"  {path} = {json.dumps(value)}" for path, value in changed.items())
    remarks = notes(stage.config)
    if remarks:
        yield from ("", "notes:", *(f"  {remark}" for remark in remarks))


def _facts(config: Config, resolved: Resolved) -> Iterator[tuple[str, str]]:
    yield "processes", _processes(resolved)
    yield "experts", f"EP {resolved.ep} x ETP {resolved.etp}, expert data parallelism {resolved.edp}"
    if resolved.pp > 1:
        mtp = f" + {resolved.shape.mtp_depth} MTP" if resolved.shape.mtp_depth else ""
        stages = ", ".join(str(count) for count in resolved.pipeline_layout)
        yield "pipeline", f"decoder layers per stage: {stages}{mtp}"
    tokens = resolved.batch.tokens_after(resolved.train_steps)
    yield "length", f"{resolved.train_steps:,} steps, {tokens:,} tokens"
    yield from _batch(config, resolved)
    yield from _size(config, resolved)
    if config.checkpointing.init_from is not None:
        optimizer = ", with the optimizer's state" if config.checkpointing.init_optimizer == "keep" else ""
        yield "start", f"the weights of {config.checkpointing.init_from}{optimizer}"
    yield "output", f"{config.output_dir}; checkpoints in {resolved.checkpoint_dir}"


def _processes(resolved: Resolved) -> str:
    virtual = f" ({resolved.vpp} virtual stages each)" if resolved.vpp else ""
    sequence = " with SP" if resolved.sequence_parallel else ""
    return (
        f"{resolved.world_size} on {resolved.device} ({resolved.backend}), {resolved.precision}: "
        f"TP {resolved.tp}{sequence} x PP {resolved.pp}{virtual} x CP {resolved.cp} x DP {resolved.dp}"
    )


def _batch(config: Config, resolved: Resolved) -> Iterator[tuple[str, str]]:
    training, batch = config.training, resolved.batch
    accumulation = training.global_batch_size // (training.micro_batch_size * resolved.dp)
    yield (
        "batch",
        f"{batch.final:,} sequences x {training.seq_length:,} = {batch.final * training.seq_length:,} tokens "
        f"per step: {accumulation:,} micro-batches of {training.micro_batch_size} per replica",
    )
    if batch.start is not None:
        yield "ramp", f"from {batch.start:,} sequences over the first {batch.ramp_tokens:,} tokens"


def _size(config: Config, resolved: Resolved) -> Iterator[tuple[str, str]]:
    counts = count_parameters(config)
    yield "parameters", f"{_count(counts.total)} in all, {_count(counts.active)} active per token"
    if counts.mtp:
        with_mtp = f"{_count(counts.total_with_mtp)} in all, {_count(counts.active_with_mtp)} active"
        yield "", f"with MTP {with_mtp}"
    parts = {part: count for part, count in counts.by_part().items() if count}
    yield "", ", ".join(f"{part.replace('_', ' ')} {_count(count)}" for part, count in parts.items())
    causal, full = (training_flops_per_token(config, causal=causal) for causal in (True, False))
    yield (
        "FLOPs",
        f"{_count(causal)} per token, forward and backward (attention causal; full square: {_count(full)}), "
        f"{causal * resolved.batch.tokens_after(resolved.train_steps):.3g} for the run",
    )
    memory = heaviest_stage(config, resolved)
    yield (
        "memory",
        f"{_gib(memory.total_bytes)} per process before activations: weights {_gib(memory.weights_bytes)}, "
        f"gradients {_gib(memory.gradients_bytes)}, optimizer {_gib(memory.optimizer_bytes)}"
        + (f" (pipeline rank {memory.stage}, the heaviest)" if resolved.pp > 1 else ""),
    )


def _count(number: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.4g}{letter}"
    return f"{number:g}"


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.2f} GiB"


def _as_json(value: Any) -> Any:
    """The value as `json` writes and reads it back, sections in lists included."""
    return json.loads(json.dumps(value, default=lambda section: section.model_dump(mode="json")))


def record(config: Config, resolved: Resolved) -> dict[str, Any]:
    """Everything that says what a run is, as JSON: for its directory and for each checkpoint."""
    return {
        "config": config.model_dump(mode="json"),
        "non_defaults": non_defaults(config),
        "resolved": _as_json(asdict(resolved)),
        "provenance": provenance(),
    }


def save(config: Config, resolved: Resolved, directory: str | Path) -> None:
    """Writes `config.json`, which `--config` reads back, and `run.json`, the whole `record`.

    Raises EnvironmentSetupError when the directory cannot be written.
    """
    directory = Path(directory)
    whole = record(config, resolved)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in (("config.json", whole["config"]), ("run.json", whole)):
            temporary = directory / f".{name}.tmp-{os.getpid()}"
            temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            temporary.replace(directory / name)
    except OSError as error:
        raise EnvironmentSetupError(
            f"cannot write the configuration to {directory}: {error.strerror or error}; "
            "choose another output_dir"
        ) from None
