"""The launcher's command line: its own options, and the arguments that go on to `pretrain_megads.py`."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from megads.errors import ConfigError

DESCRIPTION = """\
Start pretraining: one process, torchrun on this machine or over the hosts of a file, DeepSpeed's launcher, or
a SLURM job. Everything is checked before anything starts.
"""
EPILOG = """\
Any setting may follow as a flag (--training.train_steps 100); pretrain_megads.py --help lists them.
"""
DEFAULT_PORT = 29500


@dataclass(frozen=True)
class Options:
    """A parsed command line. `gpus`: processes per host, one for each GPU. `arguments`: pretraining's own."""

    gpus: int | None = None
    nodes: int | None = None
    hostfile: Path | None = None
    port: int = DEFAULT_PORT
    deepspeed: bool = False
    submit: bool = False
    chain: int | None = None
    script: Path | None = None
    dry_run: bool = False
    lint: bool = True
    strict: bool = False
    arguments: tuple[str, ...] = ()


def parse_options(argv: Sequence[str], program: str = "run_training.py") -> Options:
    """Reads a command line without its first word. Raises ConfigError; `--help` prints and exits."""
    parser = _build_parser(program)
    known, arguments = parser.parse_known_args(list(argv))
    values = vars(known)
    if (resume := values.pop("resume")) is not None:
        arguments += ["--checkpointing.load", _checkpoint(resume)]
    options = Options(**values, arguments=tuple(arguments))
    _check_together(options)
    return options


def _build_parser(program: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=program,
        description=DESCRIPTION,
        epilog=EPILOG,
        usage="%(prog)s --config PATH [options] [--section.setting VALUE ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument_group("where").add_argument
    add("--gpus", type=_positive, metavar="N", help="GPUs (on a CPU: processes) per machine; default: as "
        "few as the layout needs, for SLURM those of its block")  # fmt: skip
    add("--nodes", type=_positive, metavar="N", help="machines: the first of --hostfile, or of the SLURM job")
    add(
        "--hostfile", type=Path, metavar="FILE", help="lines of `HOST slots=N`: torchrun on each, through ssh"
    )
    add("--port", type=_port, default=DEFAULT_PORT, metavar="N", help="where the first host of --hostfile "
        "waits for the others (default: %(default)s)")  # fmt: skip
    add("--deepspeed", action="store_true", help="through DeepSpeed's launcher (it must be installed)")
    add("--submit", action="store_true", help="as a SLURM job, by distributed.slurm")
    add("--chain", type=_positive, metavar="N", help="with --submit: N jobs, each after the one before it "
        "ended unfinished")  # fmt: skip
    add(
        "--write-script",
        dest="script",
        type=Path,
        metavar="FILE",
        help="write the SLURM script, submit nothing",
    )

    add = parser.add_argument_group("what").add_argument
    add("--resume", metavar="PATH|latest", help="start from this checkpoint, or from the newest of save_dir")
    add("--dry-run", action="store_true", help="print the commands and scripts, and what would run")
    add("--strict", action="store_true", help="do not start with settings that the linter warns of either")
    add("--no-lint", dest="lint", action="store_false", help="start whatever the linter finds")
    return parser


def _check_together(options: Options) -> None:
    of_slurm = {"--submit": options.submit, "--chain": options.chain, "--write-script": options.script}
    slurm = [name for name, given in of_slurm.items() if given]
    if slurm and options.deepspeed:
        raise ConfigError(
            f"{slurm[0]} and --deepspeed exclude each other: a SLURM job starts its processes itself"
        )
    if slurm and options.hostfile is not None:
        raise ConfigError(f"{slurm[0]} and --hostfile exclude each other: SLURM chooses the hosts")
    if options.strict and not options.lint:
        raise ConfigError("--strict and --no-lint exclude each other: leave one of them out")
    if options.chain is not None and options.script is not None:
        raise ConfigError("--chain submits jobs and --write-script submits none: leave one of them out")


def _checkpoint(text: str) -> str:
    if text == "latest":
        return text
    path = Path(text)
    if path.is_dir():
        return str(path.absolute())
    if path.is_file():
        raise ConfigError(
            f"--resume {text}: is a file; a checkpoint here is a directory, like "
            "OUTPUT_DIR/checkpoints/step_00001000"
        )
    near = sorted(str(one) for one in path.parent.glob("step_*"))[-3:]
    raise ConfigError(
        f"--resume {text}: there is no such checkpoint; give a directory step_N, or latest"
        + (f" (there are {', '.join(near)})" if near else "")
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be a whole number, at least 1")
    return int(text)


def _port(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if not 1024 <= number <= 65535:
        raise argparse.ArgumentTypeError(f"{text} is no free port: choose one from 1024 to 65535")
    return number


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"command line: {message}")
