"""Run a training command, and start it again from its newest checkpoint until it is finished.

    supervise.py -- torchrun --nproc-per-node 8 pretrain_megads.py --config configs/train_config_small.json

For machines that are taken away and fail (docs/spot.md). Exit code: 0 finished; 75 stopped, start it again;
6 given up; otherwise that of a mistake which another try would only repeat.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megads.command_line import run_tool
from megads.errors import ConfigError
from megads.launch.notice import build_check
from megads.launch.supervisor import Policy, Supervisor, describe_run
from megads.log import setup_logging


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [options] -- COMMAND ...",
    )
    add = parser.add_argument
    add("--checkpoints", type=Path, action="append", default=[], metavar="DIR", help="where the command's "
        "checkpoints are (default: what its configuration says)")  # fmt: skip
    add("--tries", type=int, default=3, help="given up after so many in a row without a new checkpoint "
        "(default: %(default)s)")  # fmt: skip
    add("--backoff-seconds", type=float, default=10.0, help="before another try; doubled after each without "
        "a new checkpoint (default: %(default)s)")  # fmt: skip
    add("--longest-backoff-seconds", type=float, default=300.0, help="(default: %(default)s)")
    add("--stop-seconds", type=float, default=600.0, help="that the command has to save and stop after a "
        "signal (default: %(default)s)")  # fmt: skip
    add("--log-file", type=Path, help="also write there what is done")
    own = list(arguments)
    command: list[str] = []
    if "--" in own:
        at = own.index("--")
        own, command = own[:at], own[at + 1 :]
    options = parser.parse_args(own)
    if options.tries < 1 or min(options.backoff_seconds, options.stop_seconds) < 0:
        parser.error("--tries must be at least 1, and no time below 0")
    options.command = command
    return options


def main(arguments: Sequence[str]) -> int:
    options = parse_arguments(arguments)
    return run_tool(lambda: run(options))


def run(options: argparse.Namespace) -> int:
    """The exit code of the whole."""
    if not options.command:
        raise ConfigError("what is to be run? Give the command after --")
    setup_logging(rank=0, stream=sys.stderr, log_file=options.log_file)
    supervised = describe_run(options.command, options.checkpoints)
    policy = Policy(
        options.tries, options.backoff_seconds, options.longest_backoff_seconds, options.stop_seconds
    )
    leaving = build_check(supervised.preemption.notice, supervised.preemption.command)
    return Supervisor(options.command, supervised, policy, leaving).supervise()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
