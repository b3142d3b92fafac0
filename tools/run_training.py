"""Start pretraining anywhere: here, over the hosts of a file, through DeepSpeed's launcher, as a SLURM job.

    run_training.py --config configs/train_config_small.json --gpus 8
    run_training.py --config configs/train_config_large.json --submit

Everything is checked before anything starts; --dry-run prints the exact commands and scripts.
"""

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

from megads.command_line import run_tool
from megads.config.schema import Config
from megads.launch import slurm
from megads.launch.options import Options, parse_options
from megads.launch.start import prepare


def create_slurm_script(config: Config, config_path: str | Path, path: str | Path) -> str:
    """Write the SLURM script of a configuration that was loaded from `config_path`; returns its text."""
    return slurm.create_slurm_script(config, ["--config", str(config_path)], Path(path))


def parse_arguments(arguments: Sequence[str]) -> Options:
    return parse_options(arguments)


def main(arguments: Sequence[str]) -> int:
    return run_tool(lambda: run(arguments))


def run(arguments: Sequence[str]) -> int:
    """The exit code of what was started; 0 after a dry run."""
    options = parse_arguments(arguments)
    start, shown = prepare(options)
    if not options.dry_run:
        return start.run()
    with contextlib.suppress(BrokenPipeError):  # of `--dry-run | head`
        print(f"{shown}\n\ncommands:\n\n{start.describe()}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
