"""Start pretraining anywhere: here, over the hosts of a file, through DeepSpeed's launcher, as a SLURM job.

    run_training.py --config configs/train_config_small.json --gpus 8
    run_training.py --config configs/train_config_large.json --submit

Everything is checked before anything starts, and settings that look wrong are told (docs/planning.md says
which); --dry-run prints the exact commands and scripts.
"""

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

from megads.command_line import run_tool
from megads.config.resolve import resolve
from megads.config.schema import Config
from megads.errors import ConfigError
from megads.launch import slurm
from megads.launch.options import Options, parse_options
from megads.launch.start import Checked, prepare
from megads.plan.datasets import data_tokens
from megads.plan.findings import Run
from megads.plan.lint import is_refused, lint


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
    start, checked = prepare(options)
    if options.dry_run:
        with contextlib.suppress(BrokenPipeError):  # of `--dry-run | head`
            print(f"{checked.shown}\n\ncommands:\n\n{start.describe()}", flush=True)
    if options.lint:
        _lint(checked, options.strict)
    return 0 if options.dry_run else start.run()


def _lint(checked: Checked, strict: bool) -> None:
    """Tell what looks wrong; raises ConfigError for what is too bad to start with."""
    refused = False
    for stage in checked.stages:
        resolved = resolve(stage.config, checked.processes, checked.cuda)
        findings = lint(Run(stage.config, resolved, data_tokens=data_tokens(stage.config)))
        refused |= is_refused(findings, strict)
        for finding in findings:
            if finding.severity != "note":
                print(f"stage {stage.name}: {finding}" if stage.name else finding, file=sys.stderr)
    if refused:
        raise ConfigError("nothing was started: mend the settings above, or give --no-lint")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
