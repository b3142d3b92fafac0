"""The sbatch script of a configuration: its SLURM block, then the job of `slurm/pretrain.sbatch`.

One process per GPU is one task of `srun`, without torchrun in between: SLURM's signals reach the training
processes themselves, and their exit codes come back.
"""

import os
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from megads.config.resolve import slurm_processes_per_node
from megads.config.schema import Config, Slurm
from megads.errors import ConfigError, EnvironmentSetupError
from megads.launch.commands import REPOSITORY

TEMPLATE = REPOSITORY / "slurm" / "pretrain.sbatch"
MARK = "# ---- the job ----\n"

_BLOCK = "distributed.slurm"
_MEMORY = re.compile(r"\d+[KMGTkmgt]?")
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<parts>\d+(?::\d+){0,2})")
# What has a setting of its own, with it.
_SETTINGS = {
    "--partition": "partition", "-p": "partition", "--nodes": "nodes", "-N": "nodes",
    "--ntasks-per-node": "ntasks_per_node", "--ntasks": "ntasks_per_node", "-n": "ntasks_per_node",
    "--gpus-per-node": "gpus_per_node", "--gpus": "gpus_per_node", "-G": "gpus_per_node",
    "--cpus-per-task": "cpus_per_task", "-c": "cpus_per_task", "--time": "time", "-t": "time", "--mem": "mem",
    "--job-name": "job_name", "-J": "job_name", "--output": "output", "-o": "output", "--error": "error",
    "-e": "error", "--account": "account", "-A": "account", "--qos": "qos", "-q": "qos",
    "--signal": "signal_seconds", "--requeue": "requeue", "--no-requeue": "requeue",
}  # fmt: skip


def create_slurm_script(config: Config, arguments: Sequence[str], path: Path) -> str:
    """Write the job script that runs `pretrain_megads.py ARGUMENTS` by the SLURM block of `config`; its text.

    Raises ConfigError for a block that cannot be a job, EnvironmentSetupError where `path` cannot be written.
    """
    text = slurm_script(config, arguments)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        path.chmod(0o755)
    except OSError as error:
        raise EnvironmentSetupError(
            f"cannot write the job script {path}: {error.strerror or error}; choose another place for it"
        ) from None
    return text


def check_script(config: Config, arguments: Sequence[str]) -> None:
    """Raises one ConfigError that lists why the SLURM block, or what is passed on, cannot be a job."""
    problems = [*slurm_problems(config.distributed.slurm), *_control_characters(arguments)]
    if problems:
        raise ConfigError("\n".join(["the SLURM job cannot be:", *(f"  {problem}" for problem in problems)]))


def slurm_script(config: Config, arguments: Sequence[str]) -> str:
    """The text of the script. Whatever the settings and arguments hold is quoted: none of it is run."""
    check_script(config, arguments)
    slurm = config.distributed.slurm
    lines = ["#!/usr/bin/env bash", "# Written by tools/run_training.py."]
    lines += [f"#SBATCH {quote_directive(directive)}" for directive in _directives(slurm)]
    container = [f"--container-image={slurm.container_image}"] if slurm.container_image else []
    if container and slurm.container_mounts:
        container.append(f"--container-mounts={','.join(slurm.container_mounts)}")
    lines += [
        "",
        f"repository={shlex.quote(str(REPOSITORY))}",
        # In a container it is the container's.
        f"python={'python' if container else shlex.quote(sys.executable)}",
        f"container=({shlex.join(container)})",
        f"set -- {shlex.join(arguments)} " + '"$@"',
    ]
    return "\n".join(lines) + "\n" + MARK + _job()


def _job() -> str:
    """What the template does below its own settings."""
    try:
        _, mark, job = TEMPLATE.read_text(encoding="utf-8").partition(MARK)
    except OSError as error:
        raise EnvironmentSetupError(
            f"{TEMPLATE} cannot be read ({error}): work in a whole checkout"
        ) from None
    if not mark:
        raise EnvironmentSetupError(f"{TEMPLATE} has lost its line {MARK.strip()!r}: restore the file")
    return job


def quote_directive(text: str) -> str:
    """`text` as one word of an `#SBATCH` line: its quotes are sbatch's own, not the shell's.

    Between double quotes sbatch takes everything as it stands, but for a backslash, which escapes the next
    character (SLURM's `src/sbatch/opt.c`).
    """
    if re.fullmatch(r"[A-Za-z0-9_.,:/=%@+-]+", text):
        return text
    escaped = text.replace("\\", r"\\").replace('"', r"\"")
    return f'"{escaped}"'


def _directives(slurm: Slurm) -> Iterator[str]:
    yield f"--job-name={slurm.job_name}"
    yield f"--partition={slurm.partition}"
    yield f"--nodes={slurm.nodes}"
    yield f"--ntasks-per-node={slurm.ntasks_per_node}"
    if slurm.gpus_per_node:
        yield f"--gpus-per-node={slurm.gpus_per_node}"
    yield f"--cpus-per-task={slurm.cpus_per_task}"
    yield f"--mem={slurm.mem}"
    yield f"--time={slurm.time}"
    yield f"--chdir={os.getcwd()}"
    yield f"--output={slurm.output}"
    yield f"--error={slurm.error}"
    if slurm.account is not None:
        yield f"--account={slurm.account}"
    if slurm.qos is not None:
        yield f"--qos={slurm.qos}"
    # To the tasks, not to the batch script (which would be B:USR1).
    yield f"--signal=USR1@{slurm.signal_seconds}"
    yield "--requeue" if slurm.requeue else "--no-requeue"
    # A requeued job goes on in the same files.
    yield "--open-mode=append"
    yield from slurm.extra_args


def slurm_problems(slurm: Slurm) -> Iterator[str]:
    """Why a SLURM block cannot be a job, each with what to do."""
    yield from _text_problems(slurm)
    processes = slurm_processes_per_node(slurm)
    if slurm.gpus_per_node and slurm.ntasks_per_node not in (1, slurm.gpus_per_node):
        yield (
            f"{_BLOCK}.ntasks_per_node = {slurm.ntasks_per_node} and gpus_per_node = {slurm.gpus_per_node}: "
            f"there is one process per GPU; set ntasks_per_node to {slurm.gpus_per_node}, or to 1, and it is "
            "seen to"
        )
    elif slurm.ntasks_per_node * slurm.cpus_per_task < processes:
        yield (
            f"{_BLOCK}: {slurm.ntasks_per_node} tasks of {slurm.cpus_per_task} CPUs are too few for "
            f"{processes} processes per node: set cpus_per_task to at least "
            f"{-(-processes // slurm.ntasks_per_node)}"
        )
    limit = time_limit_seconds(slurm.time)
    if limit is None:
        yield (
            f"{_BLOCK}.time = {slurm.time!r} is no time limit: write hours:minutes:seconds, "
            "days-hours:minutes:"
            "seconds, or minutes"
        )
    elif limit <= slurm.signal_seconds:
        yield (
            f"{_BLOCK}.signal_seconds = {slurm.signal_seconds} is not within the time limit {slurm.time}: "
            "lengthen the one or shorten the other"
        )
    if not _MEMORY.fullmatch(slurm.mem):
        yield (
            f'{_BLOCK}.mem = {slurm.mem!r} is no amount of memory: write it as "64G", or "0" for all of a '
            "node"
        )
    yield from _extra_problems(slurm)


def _text_problems(slurm: Slurm) -> Iterator[str]:
    texts = {
        name: value for name, value in slurm.model_dump().items() if isinstance(value, str)
    }  # fmt: skip
    for name, value in texts.items():
        if not value:
            yield f"{_BLOCK}.{name} is empty: give it a value"
        elif not value.isprintable():
            yield f"{_BLOCK}.{name} = {value!r} has a line break or control character in it: remove it"
    if slurm.container_mounts and slurm.container_image is None:
        yield f"{_BLOCK}.container_mounts needs container_image: name one, or leave the mounts out"
    for mount in slurm.container_mounts:
        if not mount.isprintable() or "," in mount or not mount:
            yield f"{_BLOCK}.container_mounts: {mount!r} is no SOURCE:TARGET; write one mount per entry"


def _extra_problems(slurm: Slurm) -> Iterator[str]:
    for word in slurm.extra_args:
        name = word.partition("=")[0]
        if not word.isprintable():
            yield f"{_BLOCK}.extra_args: {word!r} has a line break or control character in it: remove it"
        elif not re.fullmatch(r"--?[A-Za-z][A-Za-z0-9-]*", name):
            yield (
                f"{_BLOCK}.extra_args: {word!r} is no option of sbatch: write each as one entry, a value "
                "after "
                'an equals sign, as in "--constraint=h100"'
            )
        elif name in _SETTINGS:
            yield f"{_BLOCK}.extra_args: {word!r} has a setting of its own: {_BLOCK}.{_SETTINGS[name]}"


def _control_characters(arguments: Sequence[str]) -> Iterator[str]:
    for word in arguments:
        if "\0" in word or "\n" in word or "\r" in word:
            yield (
                f"the argument {word!r} has a line break in it: put such a value into the configuration file"
            )


def time_limit_seconds(text: str) -> float | None:
    """The seconds of a SLURM time limit, in any of its forms; None for what is none."""
    if text.upper() in ("UNLIMITED", "INFINITE"):
        return float("inf")
    found = _TIME.fullmatch(text)
    if found is None:
        return None
    parts = [int(part) for part in found["parts"].split(":")]
    if found["days"] is not None:  # days-hours[:minutes[:seconds]]
        days, (hours, minutes, seconds) = int(found["days"]), (*parts, 0, 0)[:3]
    elif len(parts) == 3:
        days, (hours, minutes, seconds) = 0, parts
    else:  # minutes[:seconds]
        days, hours, (minutes, seconds) = 0, 0, (*parts, 0)[:2]
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)
