"""Pretrain a model: `torchrun --nproc-per-node N pretrain_megads.py --config configs/debug.json`.

Every setting has a flag (`--help`); `--dry-run` says what would run and touches nothing. Without
torchrun it is a run of one process.
"""

import contextlib
import logging
import os
import sys
import time

from megads.config import show
from megads.config.flags import parse_flags
from megads.config.loader import load_config
from megads.config.resolve import planned_hardware, resolve
from megads.config.schema import Config
from megads.config.validate import check, notes
from megads.errors import MegadsError
from megads.log import setup_logging

logger = logging.getLogger("megads")

SECONDS_FOR_RANK_0 = 10.0


def main(argv: list[str]) -> int:
    """The exit code: 0, or that of the error that was printed."""
    try:
        arguments = parse_flags(argv)
        config = load_config(arguments.config, arguments.overrides, arguments.origins)
        if arguments.dry_run:
            with contextlib.suppress(BrokenPipeError):  # of `--dry-run | head`
                print(show.dry_run(config, *planned_hardware(config, arguments.world_size)), flush=True)
            return 0
        # Before torch is imported: a mistake in the configuration is told at once.
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        check(config, world_size, cuda=_may_have_cuda(config))
        _pretrain(config, world_size)
    except MegadsError as error:
        _tell(error)
        return error.exit_code
    return 0


def _tell(error: MegadsError) -> None:
    """Print an error once: rank 0's, or another's where rank 0 has none.

    torchrun ends a job when its first process exits. So the other ranks leave rank 0 time to speak, and
    are ended while they wait when it had the same error.
    """
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(SECONDS_FOR_RANK_0)
    name = type(error).__name__ if rank == "0" else f"rank {rank}: {type(error).__name__}"
    print(f"{name}: {error}", file=sys.stderr, flush=True)


def _may_have_cuda(config: Config) -> bool:
    return config.distributed.device == "cuda" or os.path.exists("/dev/nvidiactl")


def _pretrain(config: Config, world_size: int) -> None:
    rank = int(os.environ.get("RANK", "0"))
    setup_logging(rank, log_file=os.path.join(config.output_dir, "logs", f"rank{rank}.log"))
    import torch

    from megads.mcore.groups import destroy_process_groups, initialize_device, initialize_process_groups

    cuda = torch.cuda.is_available() and config.distributed.device != "cpu"
    check(config, world_size, cuda)
    resolved = resolve(config, world_size, cuda)
    initialize_device(resolved.device)
    initialize_process_groups(resolved, config.distributed.timeout_minutes, config.seed)

    from megads.train.loop import train

    if rank == 0:
        logger.info("configuration (* differs from the default):\n%s", show.render(config))
        for note in notes(config):
            logger.info("note: %s", note)
    train(config, resolved)
    destroy_process_groups()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
