"""From the launcher's options to what it will start, everything checked."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from megads.config import show
from megads.config.deepspeed import deepspeed_table
from megads.config.flags import parse_flags
from megads.config.resolve import slurm_processes_per_node
from megads.config.schema import Config
from megads.config.stages import Stage, check_stages, load_stages, planned_processes
from megads.errors import ConfigError
from megads.launch.commands import Pretraining, Replacement, deepspeed
from megads.launch.hostfile import choose_hosts, read_hostfile
from megads.launch.hosts import over_ssh
from megads.launch.options import Options
from megads.launch.slurm import check_script
from megads.launch.submit import Submission


class Start(Protocol):
    """Something that can be started, and can say what it is."""

    def describe(self) -> str:
        """The exact commands and scripts."""

    def run(self) -> int:
        """Start it; the exit code."""


@dataclass(frozen=True)
class Checked:
    """Stages that can run on so many processes, and for people what would run."""

    stages: tuple[Stage, ...]
    processes: int
    cuda: bool
    shown: str


def prepare(options: Options) -> tuple[Start, Checked]:
    """What to start, and what it would run. Raises a MegadsError for whatever cannot work."""
    config = _stages(options)[0].config
    if _through_slurm(options, config):
        options = replace(options, arguments=(*options.arguments, *_slurm_flags(options, config)))
        return _slurm(options)
    if options.chain is not None:
        raise ConfigError("--chain is for SLURM jobs: give --submit too, or leave it out")
    if options.hostfile is None and (options.nodes or 1) > 1:
        raise ConfigError(
            f"--nodes {options.nodes}: on which machines? Give --hostfile FILE with a line `HOST slots=N` "
            "for each, or --submit for a SLURM job"
        )
    if options.deepspeed or config.distributed.launcher == "deepspeed":
        return _through_deepspeed(options)
    if options.hostfile is not None:
        hosts, processes = choose_hosts(
            read_hostfile(options.hostfile), options.nodes, options.gpus, options.hostfile
        )
        checked = _check(options, len(hosts) * processes)
        return over_ssh(hosts, processes, options.port, options.arguments), checked
    processes = options.gpus or planned_processes(_stages(options))[0]
    checked = _check(options, processes)
    return Pretraining(processes, tuple(options.arguments)), checked


def _stages(options: Options) -> tuple[Stage, ...]:
    arguments = parse_flags(options.arguments, "run_training.py")
    if (arguments.world_size, arguments.nproc_per_node) != (None, None):
        raise ConfigError(
            "--world-size and --nproc-per-node are for pretrain_megads.py; here give --gpus and --nodes"
        )
    return load_stages(arguments.config, arguments.overrides, arguments.origins)


def _check(options: Options, processes: int, cuda: bool | None = None) -> Checked:
    """All stages on so many processes; raises ConfigError where they could not run."""
    stages = _stages(options)
    if cuda is None:
        cuda = planned_processes(stages)[1]
    check_stages(stages, processes, cuda)
    lines = [show.dry_run_stages(stages, processes, cuda)]
    for stage in stages:
        if rows := deepspeed_table(stage.config):
            title = f"DeepSpeed's settings{f' in stage {stage.name}' if stage.name else ''}:"
            lines += ["", title, *(f"  {row}" for row in rows)]
    return Checked(stages, processes, cuda, "\n".join(lines))


def _through_slurm(options: Options, config: Config) -> bool:
    asked = options.submit or options.script is not None
    configured = config.distributed.slurm.enabled or config.distributed.launcher == "slurm"
    # A way that was asked for on the command line comes before the configured one.
    return asked or (configured and not options.deepspeed and options.hostfile is None)


def _slurm_flags(options: Options, config: Config) -> list[str]:
    """`--gpus` and `--nodes` as settings of the job."""
    per_node = "ntasks_per_node" if config.distributed.slurm.gpus_per_node == 0 else "gpus_per_node"
    flags = []
    if options.gpus is not None:
        flags += [f"--distributed.slurm.{per_node}", str(options.gpus)]
    if options.nodes is not None:
        flags += ["--distributed.slurm.nodes", str(options.nodes)]
    return flags


def _slurm(options: Options) -> tuple[Start, Checked]:
    stage = _stages(options)[0]
    slurm = stage.config.distributed.slurm
    cuda = slurm.gpus_per_node > 0 and stage.config.distributed.device != "cpu"
    checked = _check(options, slurm.nodes * slurm_processes_per_node(slurm), cuda)
    output = Path(stage.config.output_dir)
    path = options.script or (output.parent if stage.name else output) / "slurm" / "pretrain.sbatch"
    check_script(stage.config, options.arguments)
    return Submission(stage.config, options.arguments, path, options.chain, options.script is None), checked


def _through_deepspeed(options: Options) -> tuple[Start, Checked]:
    nodes = 1
    if options.hostfile is not None:
        hosts, processes = choose_hosts(
            read_hostfile(options.hostfile), options.nodes, options.gpus, options.hostfile
        )
        nodes = len(hosts)
    else:
        processes = options.gpus or planned_processes(_stages(options))[0]
    command = deepspeed(processes, options.arguments, options.hostfile, nodes, options.port)
    return Replacement(tuple(command)), _check(options, nodes * processes)
