"""Preflight: the machines of a job look at each other before the first step (`distributed.preflight`).

A job that starts on 128 hosts of which one has another driver, a throttled GPU or a half-broken cable fails
after hours, or runs at that host's speed. So each rank reports, all compare, and a finding names the host.
The speed tests take a second or two. docs/preflight.md lists every check.
"""

import hashlib
import logging
import os
import platform
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.distributed as dist

import megads
from megads.config.disk import checkpoint_bytes, size_text
from megads.config.resolve import Resolved
from megads.config.schema import Config
from megads.errors import EnvironmentSetupError
from megads.mcore.backend import choose_backend
from megads.mcore.fusions import choose_fusions
from megads.train.machines import (
    Finding,
    Report,
    Transfer,
    mismatches,
    pairings,
    skewed_clocks,
    slow_devices,
    slow_links,
    unseen_directories,
)
from megads.train.matmul_rate import measure_matmul_rate

logger = logging.getLogger(__name__)

PACKAGES = ("torch", "megatron-core", "transformer-engine", "numpy")
DRIVER_FILE = Path("/proc/driver/nvidia/version")
# Caches of network filesystems hold a directory's listing for seconds.
SECONDS_TO_APPEAR = 10.0
MATMUL = {"cuda": (torch.bfloat16, 8192, 0.5), "cpu": (torch.float32, 256, 0.05)}  # dtype, size, seconds
TRANSFER_BYTES = {"cuda": 16 * 2**20, "cpu": 2**20}
TRANSFERS = 3
MOST_PARTNERS = 8


def run_preflight(config: Config, resolved: Resolved) -> None:
    """Check the machines; collective, before anything is built.

    Raises EnvironmentSetupError on every rank for what `distributed.preflight.policy` does not let pass.
    """
    settings = config.distributed.preflight
    if settings.policy == "off":
        return
    began = time.monotonic()
    findings = list(free_disk_findings(config, resolved)) if dist.get_rank() == 0 else []
    reports: list[Report] = []
    if resolved.world_size > 1:
        reports = _gather_reports(config, resolved)
        transfers = _gather_transfers(reports, resolved.device) if settings.speed_test else []
        findings += mismatches(reports)
        findings += unseen_directories(reports)
        findings += skewed_clocks(reports, settings.max_clock_skew_seconds)
        findings += slow_devices(reports, settings.slow_factor, by_host=resolved.device == "cpu")
        findings += slow_links(reports, transfers, settings.slow_factor)
        # The disk is rank 0's to judge, and all must come to the same end.
        shared = [findings]
        dist.broadcast_object_list(shared, src=0)
        findings = shared[0]
    _conclude(findings, settings.policy, resolved.device)
    if dist.get_rank() == 0 and reports:
        hosts = len({report.host for report in reports})
        seconds = time.monotonic() - began
        logger.info("preflight: %d ranks on %d hosts compared in %.1f s", len(reports), hosts, seconds)


def _conclude(findings: Sequence[Finding], policy: str, device: str) -> None:
    """Warn of each finding, or raise for all of them if one of them ends the job."""
    stopping = {"error", "slow"} if device == "cuda" else {"error"}
    if policy == "stop" and any(finding.kind in stopping for finding in findings):
        lines = "\n".join(f"  {number}. {finding.text}" for number, finding in enumerate(findings, 1))
        raise EnvironmentSetupError(
            f"preflight found fault with the machines of this job:\n{lines}\n"
            'put that right, or start anyway with distributed.preflight.policy = "warn"'
        )
    if dist.get_rank() == 0:
        for finding in findings:
            logger.warning("preflight: %s", finding.text)


def _gather_reports(config: Config, resolved: Resolved) -> list[Report]:
    """All ranks' reports, by rank."""
    token = [secrets.token_hex(8)]
    dist.broadcast_object_list(token, src=0)
    written = [_write_tokens(config, token[0]) if dist.get_rank() == 0 else []]
    dist.broadcast_object_list(written, src=0)
    before_seconds = time.time()
    dist.barrier()  # processes of a host measure at once, as they will work
    clock_seconds = before_seconds, time.time()
    rate = None
    if config.distributed.preflight.speed_test:
        dtype, size, seconds = MATMUL[resolved.device]
        rate = measure_matmul_rate(resolved.device, dtype, size=size, seconds=seconds)
    mine = Report(
        rank=dist.get_rank(),
        host=host_name(),
        device=f"cuda:{torch.cuda.current_device()}" if resolved.device == "cuda" else "cpu",
        facts=machine_facts(config, resolved),
        clock_seconds=clock_seconds,
        flops_per_second=rate,
        hidden=tuple(path for path in written[0] if not _sees(path, token[0])),
    )
    reports: list[Report] = [mine] * resolved.world_size
    dist.all_gather_object(reports, mine)
    if dist.get_rank() == 0:
        for path in written[0]:
            _token_file(path, token[0]).unlink(missing_ok=True)
    return reports


def host_name() -> str:
    """As other hosts know this one."""
    return socket.gethostname()


def machine_facts(config: Config, resolved: Resolved) -> dict[str, str]:
    """What must be the same on all ranks; what is of a whole host is told by its first process only."""
    facts = {"Python": platform.python_version()}
    facts |= {package: _package_version(package) for package in PACKAGES}
    facts["what computes the layers"] = choose_backend(config, resolved).name
    facts["the fused kernels"] = choose_fusions(config, resolved).describe()
    if resolved.device == "cuda":
        facts["the GPU"] = torch.cuda.get_device_name()
        facts["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
        facts["the NVIDIA driver"] = driver_version(_read_text(DRIVER_FILE))
    facts["the configuration (hash)"] = hashlib.sha256(config.model_dump_json().encode()).hexdigest()[:12]
    if os.environ.get("LOCAL_RANK", "0") == "0":
        facts["the code of MegaDS (hash)"] = code_hash()
    return facts


def driver_version(text: str) -> str:
    """From what the driver says in /proc, whether its module is the open or the closed one."""
    found = re.search(r"Kernel Module\s+(?:for \S+\s+)?([\d.]+)", text)
    return found[1] if found else "unknown"


def code_hash() -> str:
    """Names the files of the package as they are on this host: a revision would not tell local changes."""
    package, content = Path(megads.__file__).parent, hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        content.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes() + b"\0")
    return content.hexdigest()[:12]


def _package_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


# --- directories that all ranks must share -----------------------------------------------------


def _write_tokens(config: Config, token: str) -> list[str]:
    """Leave a file in each shared directory; those where that worked."""
    written = []
    save_dir = [config.checkpointing.save_dir] if config.checkpointing.save_dir else []
    for directory in (config.output_dir, config.data.cache_dir, *save_dir):
        try:
            if directory != config.data.cache_dir:
                Path(directory).mkdir(parents=True, exist_ok=True)
            _token_file(directory, token).write_text(token, encoding="utf-8")
        except OSError as error:
            # Data may be for reading only; for the others the run's own error will come.
            logger.info("preflight: %s is not compared between hosts: %s", directory, error.strerror)
        else:
            written.append(directory)
    return written


def _token_file(directory: str, token: str) -> Path:
    return Path(directory) / f".preflight-{token}"


def _sees(directory: str, token: str) -> bool:
    deadline = time.monotonic() + SECONDS_TO_APPEAR
    while _read_text(_token_file(directory, token)) != token:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def free_disk_findings(config: Config, resolved: Resolved) -> Iterator[Finding]:
    """Whether the checkpoints that are to be kept will fit where they go."""
    directory = Path(resolved.checkpoint_dir).absolute()
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    free, one = shutil.disk_usage(existing).free, checkpoint_bytes(config, resolved.precision)
    checkpointing = config.checkpointing
    if free < one:
        yield Finding(
            "error",
            f"{directory} on {host_name()} has {size_text(free)} free, and one checkpoint takes about "
            f"{size_text(one)}: make room, or set checkpointing.save_dir to another place",
        )
        return
    # One more than is kept is there while it is written.
    kept = checkpointing.keep_last_n + checkpointing.keep_best + 1 if checkpointing.keep_last_n else 0
    to_come = kept - len(list(directory.glob("step_*")))
    if free < to_come * one:
        yield Finding(
            "warning",
            f"{directory} on {host_name()} has {size_text(free)} free, and {to_come} more checkpoints of "
            f"about {size_text(one)} will be kept: lower checkpointing.keep_last_n = "
            f"{checkpointing.keep_last_n}, or make room",
        )


# --- links between hosts -------------------------------------------------------------------------


def _gather_transfers(reports: Sequence[Report], device: str) -> list[Transfer]:
    """Measured between each host and up to MOST_PARTNERS others, by all their processes at once.

    A process has its counterpart on the other host, as network ports have on machines built for training.
    """
    hosts: dict[str, list[int]] = {}
    for report in reports:
        hosts.setdefault(report.host, []).append(report.rank)
    if len(hosts) < 2:
        return []
    names, rank = list(hosts), dist.get_rank()
    host = next(name for name, ranks in hosts.items() if rank in ranks)
    place = hosts[host].index(rank)
    mine = []
    for partners in pairings(len(names), MOST_PARTNERS):
        partner = partners.get(names.index(host))
        others = [] if partner is None else hosts[names[partner]]
        if place < len(others):
            mine.append(Transfer(rank, others[place], transfer_rate(others[place], device)))
    gathered: list[list[Transfer]] = [mine] * len(reports)
    dist.all_gather_object(gathered, mine)
    return [transfer for transfers in gathered for transfer in transfers]


def transfer_rate(peer: int, device: str) -> float:
    """Bytes per second in each direction, when this rank and `peer` send to each other: the best of a few."""
    outgoing = torch.zeros(TRANSFER_BYTES[device], dtype=torch.uint8, device=device)
    incoming = torch.empty_like(outgoing)
    seconds = [_transfer_seconds(outgoing, incoming, peer) for _ in range(TRANSFERS + 1)]
    return TRANSFER_BYTES[device] / min(seconds[1:])  # the first one makes the connection


def _transfer_seconds(outgoing: torch.Tensor, incoming: torch.Tensor, peer: int) -> float:
    start = time.perf_counter()
    operations = [dist.P2POp(dist.isend, outgoing, peer), dist.P2POp(dist.irecv, incoming, peer)]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    incoming[0].item()  # waits for an asynchronous device
    return time.perf_counter() - start
