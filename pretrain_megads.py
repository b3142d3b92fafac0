"""Pretrain a model: `torchrun --nproc-per-node N pretrain_megads.py --config configs/debug.json`.

Every setting has a flag (`--help`); `--dry-run` says what would run and touches nothing. Without
torchrun it is a run of one process.
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Sequence
from types import FrameType

from megads.config import show
from megads.config.flags import Arguments, parse_flags
from megads.config.schema import Config
from megads.config.stages import Stage, check_stages, load_stages, planned_processes, select
from megads.errors import ConfigError, MegadsError, RunStopped
from megads.launch.local_ranks import fork_ranks
from megads.log import setup_logging
from megads.mcore.imports import without_garbage_collection

SECONDS_FOR_RANK_0 = 10.0


def main(argv: list[str]) -> int:
    """The exit code: 0, 75 for a run that was stopped, or that of the error that was printed."""
    try:
        arguments = parse_flags(argv)
        stages = load_stages(arguments.config, arguments.overrides, arguments.origins)
        if arguments.stage is not None:
            select(stages, arguments.stage)
        processes = _processes(arguments)
        if arguments.dry_run:
            with contextlib.suppress(BrokenPipeError):  # of `--dry-run | head`
                planned = planned_processes(stages, arguments.world_size or arguments.nproc_per_node)
                print(show.dry_run_stages(stages, *planned), flush=True)
            return 0
        # Before torch is imported: a mistake in the configuration is told at once.
        may_have_cuda = _may_have_cuda(stages[0].config)
        check_stages(stages, processes, may_have_cuda)
        _stop_on_signals()
        if arguments.nproc_per_node is not None:
            # CUDA would not survive the fork, so there each process imports torch for itself.
            code = fork_ranks(processes, _nothing if may_have_cuda else _load_training_on_cpu)
            if code is not None:
                return code
        _pretrain(stages, processes, arguments.stage)
    except MegadsError as error:
        _tell(error)
        return error.exit_code
    return 0


def _tell(error: MegadsError) -> None:
    """Print an error once: rank 0's, or another's where rank 0 has none. All ranks have the same RunStopped.

    torchrun ends a job when its first process exits. So the other ranks leave rank 0 time to speak, and
    are ended while they wait when it had the same error.
    """
    rank = os.environ.get("RANK", "0")
    if rank != "0" and isinstance(error, RunStopped):
        return
    if rank != "0":
        time.sleep(SECONDS_FOR_RANK_0)
    name = type(error).__name__ if rank == "0" else f"rank {rank}: {type(error).__name__}"
    print(f"{name}: {error}", file=sys.stderr, flush=True)


def _processes(arguments: Arguments) -> int:
    """Of the whole job. Raises ConfigError where two launchers would start some."""
    launched, asked = os.environ.get("WORLD_SIZE"), arguments.nproc_per_node
    if asked is None:
        return int(launched or "1")
    if launched is not None and not arguments.dry_run:
        raise ConfigError(
            "--nproc-per-node: a launcher has started this process already (WORLD_SIZE is set); "
            "leave the flag out, or start pretrain_megads.py without the launcher"
        )
    if asked < 1:
        raise ConfigError(f"--nproc-per-node {asked}: must be at least 1")
    return asked


def _stop_on_signals() -> None:
    """While training does not listen for them itself (`train/signals.py`), at start and at the end, signals
    that ask it to stop end the process with the same exit code: there is nothing to save.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        if os.environ.get("RANK", "0") == "0":
            name = signal.Signals(number).name
            text = f"RunStopped: {name}: outside of training, nothing to save; the same command goes on\n"
            os.write(sys.stderr.fileno(), text.encode())
        os._exit(RunStopped.exit_code)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, stop)


def _load_training_on_cpu() -> None:
    """Import what every process of a CPU run needs, and whatever it takes from there."""
    with without_garbage_collection():
        from megads.mcore.groups import initialize_device

        initialize_device("cpu")
        import megads.train.loop
        import megads.train.stages  # noqa: F401


def _nothing() -> None:
    """Each process loads what it needs."""


def _may_have_cuda(config: Config) -> bool:
    return config.distributed.device == "cuda" or os.path.exists("/dev/nvidiactl")


def _pretrain(stages: Sequence[Stage], world_size: int, only: str | None) -> None:
    setup_logging(log_file=stages[0].log_file)
    with without_garbage_collection():
        import torch

        from megads.train.stages import run_stages

    cuda = torch.cuda.is_available() and stages[0].config.distributed.device != "cpu"
    check_stages(stages, world_size, cuda)
    run_stages(stages, world_size, cuda, only)


if __name__ == "__main__":
    exit_code = main(sys.argv[1:])
    # Python gives its handlers up before it has taken the libraries down, which takes a while: a stop request
    # that comes then must not make a finished run one that was killed.
    for late in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(late, signal.SIG_IGN)
    sys.exit(exit_code)
