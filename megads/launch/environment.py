"""What a machine has for a run, looked at without torch: a check per line, with what to do about it.

A check is an error where a run would fail, a warning where it would go on worse. What is only for GPUs is no
trouble on a machine without one.
"""

import importlib.metadata
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import psutil
from packaging.requirements import Requirement
from packaging.version import Version

from megads.config.disk import checkpoint_bytes, size_text
from megads.config.memory import heaviest_stage
from megads.config.resolve import checkpoint_directory, planned_hardware, resolve
from megads.config.schema import Config, Data, DataSource
from megads.config.validate import find_problems
from megads.errors import MegadsError
from megads.launch.commands import REPOSITORY
from megads.launch.options import DEFAULT_PORT
from megads.launch.submit import check_slurm

SECONDS_FOR_A_TOOL = 20.0
MAIN_PACKAGES = ("torch", "megatron-core")
NCCL_PACKAGES = ("nvidia-nccl-cu13", "nvidia-nccl-cu12")
INSTALL = "pip install -c constraints.txt -e ."
SMALLEST_MEMORY_BYTES = 4 * 2**30


@dataclass(frozen=True)
class Check:
    """What was looked at, what was found, and, unless it is ok, what to do."""

    name: str
    level: Literal["ok", "warning", "error"]
    found: str
    fix: str = ""


@dataclass(frozen=True)
class Gpus:
    """The GPUs that the driver shows; `trouble` is what it said instead."""

    names: tuple[str, ...] = ()
    memory_bytes: int = 0
    driver: str = ""
    cuda: str = ""
    trouble: str = ""


def check_environment(config: Config, gpus: Gpus) -> Iterator[Check]:
    """Every check, in the order of the table; `config` says what the machine is for."""
    yield check_python()
    yield from check_packages()
    yield from check_cuda(gpus)
    yield check_apex()
    yield check_configuration(config)
    yield check_disk(config)
    yield check_memory(config, gpus)
    yield check_port()
    yield check_host_name()
    yield check_tokenizer(config)
    yield check_data(config)
    yield check_slurm_cluster(config)


# --- software --------------------------------------------------------------------------------------


def check_python() -> Check:
    """The version that MegaDS is tested with; an older one cannot even read this file."""
    found, tested = f"{platform.python_version()}, {sys.executable}", _tested_python()
    if platform.python_version().startswith(f"{tested}."):
        return Check("Python", "ok", found)
    return Check("Python", "warning", found, f"MegaDS is tested with Python {tested}: make a .venv with that")


def _tested_python() -> str:
    return (REPOSITORY / ".python-version").read_text(encoding="utf-8").strip()


def check_packages() -> Iterator[Check]:
    """The packages that MegaDS requires: the main ones in lines of their own, the others together."""
    try:
        texts = importlib.metadata.requires("megads") or []
    except importlib.metadata.PackageNotFoundError:
        yield Check("packages", "error", "MegaDS is not installed in this environment", INSTALL)
        return
    requirements = [Requirement(text) for text in texts]
    needed = [one for one in requirements if one.marker is None or one.marker.evaluate({"extra": ""})]
    others: list[str] = []
    for requirement in needed:
        found = installed_version(requirement.name)
        fits = found is not None and requirement.specifier.contains(found, prereleases=True)
        if requirement.name in MAIN_PACKAGES:
            yield _package_check(requirement, found, fits)
        elif not fits:
            others.append(f"{requirement} ({found or 'not installed'})")
    if others:
        yield Check("packages", "error", f"missing or too old: {', '.join(others)}", INSTALL)
    else:
        yield Check("packages", "ok", f"all {len(needed)} that MegaDS requires")


def _package_check(requirement: Requirement, found: str | None, fits: bool) -> Check:
    if fits:
        return Check(requirement.name, "ok", str(found))
    return Check(requirement.name, "error", f"{found or 'not installed'}; {requirement} is needed", INSTALL)


def installed_version(package: str) -> str | None:
    """Without importing it; None: not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# --- GPUs ------------------------------------------------------------------------------------------


def find_gpus() -> Gpus:
    """What nvidia-smi shows; nothing where there is no driver."""
    if shutil.which("nvidia-smi") is None:
        return Gpus()
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]
    try:
        listed = _output(query)
        cuda = re.search(r"CUDA Version:\s*([\d.]+)", _output(["nvidia-smi"]))
        rows = [[cell.strip() for cell in line.split(",")] for line in listed.splitlines() if line.strip()]
        memory = min(int(row[1]) for row in rows) * 2**20
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        return Gpus(trouble=str(error))
    return Gpus(tuple(row[0] for row in rows), memory, rows[0][2], cuda[1] if cuda else "")


def check_cuda(gpus: Gpus) -> Iterator[Check]:
    """Driver and torch's CUDA, NCCL, Transformer Engine."""
    built_for = torch_cuda_version()
    if gpus.trouble:
        yield Check("CUDA", "error", f"nvidia-smi fails: {gpus.trouble}", "reinstall the driver, or reboot")
    elif not gpus.names:
        yield Check("CUDA", "ok", "no NVIDIA GPU here: runs are on the CPU")
    else:
        yield _cuda_check(gpus, built_for)
    nccl = next((f"{name} {found}" for name in NCCL_PACKAGES if (found := installed_version(name))), None)
    engine = installed_version("transformer-engine")
    if gpus.names and nccl is None:
        yield Check(
            "NCCL", "warning", "none of its packages is installed", "reinstall torch, which brings it"
        )
    else:
        yield Check("NCCL", "ok", nccl or "not installed; only GPUs need it")
    if gpus.names and engine is None:
        fix = "pip install -c constraints.txt -e '.[gpu]' for fused kernels and FP8"
        yield Check("Transformer Engine", "warning", "not installed: torch's own kernels are used", fix)
    else:
        yield Check("Transformer Engine", "ok", engine or "not installed; only GPUs can use it")


def _cuda_check(gpus: Gpus, built_for: str | None) -> Check:
    found = f"{len(gpus.names)} x {gpus.names[0]}, {size_text(gpus.memory_bytes)} each, driver {gpus.driver}"
    if built_for is None:
        return Check("CUDA", "error", f"{found}, but this torch is built without CUDA", INSTALL)
    if gpus.cuda and Version(gpus.cuda).major < Version(built_for).major:
        fix = f"install a newer driver, or a torch that is built for CUDA {gpus.cuda}"
        return Check("CUDA", "error", f"{found} for CUDA {gpus.cuda}; torch is built for {built_for}", fix)
    return Check("CUDA", "ok", f"{found}; torch is built for CUDA {built_for}")


def torch_cuda_version() -> str | None:
    """The CUDA that torch is built for, from its `version.py`; None: none, or no torch."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"^cuda\b[^=]*=\s*'([\d.]+)'", text, re.MULTILINE)
    return found[1] if found else None


def check_apex() -> Check:
    """NVIDIA's has fused optimizers; the apex of the package index is a toolkit for web sites."""
    spec = find_spec("apex")
    places = [] if spec is None else [Path(place) for place in spec.submodule_search_locations or ()]
    if not places:
        return Check("apex", "ok", "not installed, nor needed: torch's or Transformer Engine's Adam is used")
    if any((place / "optimizers").is_dir() for place in places):
        return Check("apex", "ok", f"NVIDIA's, {places[0]}")
    return Check(
        "apex",
        "error",
        f"{places[0]} is not NVIDIA's apex, but the web toolkit of the same name",
        "pip uninstall apex; NVIDIA's is built from github.com/NVIDIA/apex",
    )


# --- the machine -----------------------------------------------------------------------------------


def check_configuration(config: Config) -> Check:
    processes, cuda = planned_hardware(config)
    problems = list(find_problems(config, processes, cuda))
    where = f"{processes:,} {'GPUs' if cuda else 'processes'}"
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        return Check(
            "configuration", "error", f"for {where}: {problems[0]}{more}", "see pretrain_megads.py --dry-run"
        )
    return Check("configuration", "ok", f"{config.experiment_name}, for {where}")


def check_disk(config: Config) -> Check:
    directory = Path(checkpoint_directory(config)).absolute()
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    _, cuda = planned_hardware(config)
    one = checkpoint_bytes(config, "bf16" if cuda else "fp32")
    kept = (config.checkpointing.keep_last_n or 1) + 1
    found = f"{size_text(free)} free for {directory}; a checkpoint takes about {size_text(one)}"
    fix = "make room, or set checkpointing.save_dir to another place"
    if not os.access(existing, os.W_OK):
        return Check("disk", "error", f"{existing} is not writable", "set output_dir to another place")
    if free < one:
        return Check("disk", "error", found, fix)
    if free < kept * one:
        return Check("disk", "warning", f"{found}, and {kept} will be there at once", fix)
    return Check("disk", "ok", found)


def check_memory(config: Config, gpus: Gpus) -> Check:
    """Weights, gradients and optimizer against a GPU's memory, or of all processes against this host's."""
    processes, cuda = planned_hardware(config)
    memory = psutil.virtual_memory()
    found = f"{size_text(memory.available)} of {size_text(memory.total)} free"
    if any(find_problems(config, processes, cuda)):
        return Check("memory", "ok", found)
    each = heaviest_stage(config, resolve(config, processes, cuda)).total_bytes
    fix = "spread it over more processes; tools/plan.py CONFIG --search finds layouts that fit"
    if cuda and gpus.names:
        text = f"{found}; a GPU has {size_text(gpus.memory_bytes)}, weights to optimizer {size_text(each)}"
        return Check("memory", "error" if each > gpus.memory_bytes else "ok", text, fix)
    if cuda:
        return Check("memory", "ok", f"{found}; for {processes:,} GPUs, which are not here")
    text = f"{found}; weights, gradients and optimizer take {size_text(each * processes)}"
    if each * processes > memory.available:
        return Check("memory", "error", text, fix)
    if memory.available < SMALLEST_MEMORY_BYTES:
        return Check(
            "memory", "warning", text, "close other programs: each process takes about 1 GiB besides"
        )
    return Check("memory", "ok", text)


def check_port(port: int = DEFAULT_PORT) -> Check:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            fix = "give tools/run_training.py --port another one for runs over several hosts"
            return Check("port", "warning", f"{port} cannot be used: {error.strerror}", fix)
    return Check("port", "ok", f"{port} is free")


def check_host_name() -> Check:
    """gloo and torchrun look the host's own name up."""
    name = socket.gethostname()
    try:
        address = socket.getaddrinfo(name, None)[0][4][0]
    except OSError:
        fix = f"add {name} to /etc/hosts, or set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
        return Check("host name", "warning", f"{name} has no address", fix)
    return Check("host name", "ok", f"{name} is {address}")


# --- what a run reads ------------------------------------------------------------------------------


def check_tokenizer(config: Config) -> Check:
    path = config.data.tokenizer_path
    fix = "train one with tools/train_tokenizer.py, or set data.tokenizer_path to that of the datasets"
    if path is None:
        return Check("tokenizer", "ok", "data.tokenizer_path is null: datasets say what they were made with")
    if ":" in path or os.path.isdir(path) or os.access(path, os.R_OK):
        return Check("tokenizer", "ok", path)
    return Check("tokenizer", "error", f"{path} cannot be read, or is not there", fix)


def check_data(config: Config) -> Check:
    missing = missing_sources(config.data)
    fix = "make them with tools/preprocess_dolma.py (docs/preprocessing.md), or correct data.cache_dir"
    if not config.data.sources:
        return Check("data", "error", "data.sources is empty", "name datasets there, or give --data-path")
    if missing:
        return Check("data", "error", f"no dataset (.idx) of {', '.join(missing)}", fix)
    return Check("data", "ok", f"{len(config.data.sources)} sources below {config.data.cache_dir}")


def missing_sources(data: Data) -> list[str]:
    """Names of the sources that have no dataset on this machine."""
    return [source.name for source in data.sources if not _has_datasets(source, data.cache_dir)]


def _has_datasets(source: DataSource, cache_dir: str) -> bool:
    """Whether each place of a source is, or holds, an index. What is remote is believed."""
    places = [source.path] if isinstance(source.path, str) else list(source.path or ())
    places = places or [os.path.join(cache_dir, source.subset or source.name)]
    return all(
        "://" in place or Path(f"{place}.idx").is_file() or any(Path(place).glob("*.idx")) for place in places
    )


def check_slurm_cluster(config: Config) -> Check:
    """SLURM as the configuration needs it: nothing is wrong with a machine without it otherwise."""
    if config.distributed.slurm.enabled:
        try:
            check_slurm(config)
        except MegadsError as error:
            return Check(
                "SLURM", "error", str(error), "or start it without: distributed.slurm.enabled = false"
            )
    if shutil.which("sinfo") is None:
        return Check("SLURM", "ok", "not on this machine")
    try:
        partitions = sorted(set(_output(["sinfo", "--noheader", "--format=%R"]).split()))
    except (OSError, subprocess.SubprocessError) as error:
        return Check(
            "SLURM", "warning", f"sinfo fails: {error}", "ask whether the controller is up: scontrol ping"
        )
    return Check("SLURM", "ok", f"partitions {', '.join(partitions)}")


def _output(command: list[str]) -> str:
    """What a tool prints. Raises OSError or SubprocessError, with what it said, where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS_FOR_A_TOOL)
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise subprocess.SubprocessError(said[0] if said else f"exit code {done.returncode}")
    return done.stdout
