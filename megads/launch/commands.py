"""The command lines that start processes on one machine, and what starts them."""

import os
import runpy
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import megads
from megads.errors import EnvironmentSetupError

REPOSITORY = Path(megads.__file__).resolve().parents[1]
PRETRAIN = REPOSITORY / "pretrain_megads.py"
TORCHRUN = "torch.distributed.run"


def torchrun_on_host(
    rank: int, hosts: int, processes: int, endpoint: tuple[str, int], arguments: Sequence[str]
) -> list[str]:
    """torchrun on one of several hosts: its place is given, so rank 0 is on the first one."""
    address, port = endpoint
    own = ["--nnodes", str(hosts), "--node-rank", str(rank), "--nproc-per-node", str(processes)]
    own += ["--master-addr", address, "--master-port", str(port)]
    return [sys.executable, "-m", TORCHRUN, *own, str(PRETRAIN), *arguments]


def deepspeed(
    processes: int, arguments: Sequence[str], hostfile: Path | None, nodes: int, port: int
) -> list[str]:
    """DeepSpeed's launcher. It only starts the processes: what they run is Megatron-Core.

    Raises EnvironmentSetupError where DeepSpeed is not installed.
    """
    if find_spec("deepspeed") is None:
        raise EnvironmentSetupError(
            "--deepspeed needs DeepSpeed's launcher, which is not installed: pip install deepspeed, or "
            "leave --deepspeed out: torchrun starts the same processes, and the settings of "
            "distributed.deepspeed hold either way"
        )
    own = ["--num_gpus", str(processes), "--no_local_rank", "--master_port", str(port)]
    if hostfile is not None:
        own += ["--hostfile", str(hostfile), "--num_nodes", str(nodes)]
    return [sys.executable, "-m", "deepspeed.launcher.runner", *own, str(PRETRAIN), *arguments]


@dataclass(frozen=True)
class Pretraining:
    """`pretrain_megads.py` in this process, which has loaded the configuration; it forks several."""

    processes: int
    arguments: tuple[str, ...]

    def describe(self) -> str:
        """What a shell would be given."""
        return shlex.join([sys.executable, *self._words()])

    def run(self) -> int:
        """Does not return: the script ends the process."""
        sys.argv = self._words()
        runpy.run_path(sys.argv[0], run_name="__main__")
        raise AssertionError("pretrain_megads.py ends with sys.exit")

    def _words(self) -> list[str]:
        several = ["--nproc-per-node", str(self.processes)] if self.processes > 1 else []
        return [str(PRETRAIN), *several, *self.arguments]


@dataclass(frozen=True)
class Replacement:
    """A command that takes the launcher's place: signals and exit code are its own."""

    command: tuple[str, ...]

    def describe(self) -> str:
        """What a shell would be given."""
        return shlex.join(self.command)

    def run(self) -> int:
        """Does not return."""
        sys.stdout.flush()
        sys.stderr.flush()
        os.execv(self.command[0], self.command)
