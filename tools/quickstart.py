"""From a fresh checkout to a run: which configurations there are, what this machine has, and a first start.

  python tools/quickstart.py --list
  python tools/quickstart.py --check --config configs/train_config_small.json
  python tools/quickstart.py

Without an option it asks for a configuration, data and processes, and shows the command before it runs it.
Any flag of pretrain_megads.py may follow. Needs no torch.
"""

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that it runs from a checkout that is not installed

from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from megads.command_line import run_tool  # noqa: E402
from megads.config.flags import Arguments, parse_flags  # noqa: E402
from megads.config.schema import Config  # noqa: E402
from megads.config.stages import Stage, load_stages, planned_processes  # noqa: E402
from megads.config.validate import find_problems  # noqa: E402
from megads.errors import ConfigError, EnvironmentSetupError  # noqa: E402
from megads.launch.catalog import COLUMNS, Entry, describe, load_catalog  # noqa: E402
from megads.launch.environment import Check, check_environment, check_tokenizer, find_gpus, missing_sources  # noqa: E402

CONFIGS = ROOT / "configs"
FIRST_CONFIG = CONFIGS / "debug.json"
SAMPLE = Path("data/sample")
SAMPLE_VOCAB_SIZE = 4096
LEVEL_STYLES = {"ok": "green", "warning": "yellow", "error": "red"}


def parse_arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, Arguments, list[str]]:
    """Our own options; those of pretrain_megads.py, read and as they were given."""
    parser = argparse.ArgumentParser(
        prog="tools/quickstart.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="list the configurations")
    what.add_argument(
        "--check",
        action="store_true",
        help="check this machine for --config, or for a first run; exit code 5: errors",
    )
    options, rest = parser.parse_known_args(list(argv))
    return options, parse_flags(rest, "tools/quickstart.py"), rest


def run(argv: Sequence[str]) -> int:
    """The exit code; does not return from a run that it starts."""
    options, arguments, rest = parse_arguments(argv)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    if options.list:
        console.print(catalog_table(load_catalog(CONFIGS)))
        return 0
    if options.check:
        return check(arguments, console)
    if not sys.stdin.isatty():
        raise ConfigError(
            "there is nobody to ask: standard input is no terminal. Use --list, --check, or start a run with "
            "tools/run_training.py --config FILE"
        )
    command = Interview(console, arguments, rest).command()
    if not yes_or_no("Run it?"):
        print("nothing was started")
        return 0
    sys.stdout.flush()
    os.execv(command[0], command)


def catalog_table(entries: Sequence[Entry], *, numbered: bool = False) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in (*([""] if numbered else []), *COLUMNS):
        justify: Literal["left", "right"] = "left" if name in ("configuration", "devices") else "right"
        table.add_column(name, justify=justify, no_wrap=True)
    for number, entry in enumerate(entries, 1):
        table.add_row(*([str(number)] if numbered else []), *describe(entry))
    return table


def check(arguments: Arguments, console: Console) -> int:
    """Print every check with its fix; the exit code is 5 where one is an error."""
    path = arguments.config or str(FIRST_CONFIG)
    config = load_stages(path, arguments.overrides, arguments.origins)[0].config
    checks = []
    for found in check_environment(config, find_gpus()):
        if arguments.config is None and found.name in ("tokenizer", "data") and found.level == "error":
            # Of a fresh checkout: nothing is wrong yet.
            found = replace(
                found, level="warning", fix="python tools/quickstart.py, or make demo, makes a sample"
            )
        checks.append(found)
    console.print(f"for {os.path.relpath(path)}")
    console.print(check_table(checks))
    levels = [found.level for found in checks]
    console.print(f"{levels.count('error')} errors, {levels.count('warning')} warnings")
    return EnvironmentSetupError.exit_code if "error" in levels else 0


def check_table(checks: Sequence[Check]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("check", "level", "found; what to do"):
        table.add_column(name, overflow="fold")
    for found in checks:
        style = LEVEL_STYLES[found.level]
        table.add_row(found.name, f"[{style}]{found.level}[/]", found.found.replace("[", "\\["))
        if found.level != "ok":
            table.add_row("", "", f"-> {found.fix}".replace("[", "\\["))
    return table


# --- the interview ---------------------------------------------------------------------------------


class Interview:
    """Asks for what a run needs, each question with a default; `command` is what it comes to."""

    def __init__(self, console: Console, arguments: Arguments, given: Sequence[str]) -> None:
        self._console, self._arguments = console, arguments
        self._flags = list(given)

    def command(self) -> list[str]:
        """The command line of tools/run_training.py, which was printed too."""
        path = self._choose_configuration()
        stages = load_stages(path, self._arguments.overrides, self._arguments.origins)
        self._choose_data(stages[0].config)
        place = self._choose_devices(stages)
        command = [sys.executable, str(ROOT / "tools" / "run_training.py"), *self._flags, *place]
        self._console.print("\nThe command:", style="bold")
        print(f"  {shlex.join(command)}\n")
        return command

    def _choose_configuration(self) -> str:
        if self._arguments.config is not None:
            return self._arguments.config
        entries = load_catalog(CONFIGS)
        self._console.print(catalog_table(entries, numbered=True))
        names = [entry.path.name for entry in entries]

        def chosen(text: str) -> str:
            if text.isdecimal() and 1 <= int(text) <= len(entries):
                return os.path.relpath(entries[int(text) - 1].path)
            if text in names:
                return os.path.relpath(CONFIGS / text)
            if Path(text).is_file():
                load_stages(text)  # says what is wrong with it
                return text
            raise ConfigError(f"{text}: a number from 1 to {len(entries)}, a name of the list, or a file")

        path = ask("Configuration", str(names.index(FIRST_CONFIG.name) + 1), chosen)
        self._flags = ["--config", path, *self._flags]
        return path

    def _choose_data(self, config: Config) -> None:
        """The datasets of the configuration if they are there, else one's own, else a sample made now."""
        if "data.sources" in self._arguments.overrides:
            return
        sources, missing = config.data.sources, missing_sources(config.data)
        if sources and not missing:
            print(f"Data: {len(sources)} sources below {config.data.cache_dir}")
            return
        print(f"Data: no dataset of {', '.join(missing) or 'any source'} below {config.data.cache_dir}")
        prefix = ask(
            "Prefix of your own .bin/.idx pair, or Enter for a small sample of real text", "", _dataset
        )
        if prefix:
            self._flags += ["--data-path", prefix]
            if check_tokenizer(config).level == "error":
                self._flags += ["--tokenizer-model", ask("Its tokenizer, or Enter for none", "null", str)]
            return
        made = make_sample(min(SAMPLE_VOCAB_SIZE, config.model.vocab_size))
        if missing_sources(config.data):
            self._flags += ["--data-path", *map(str, made)]
            self._flags += ["--tokenizer-model", str(SAMPLE / "tokenizer.model")]

    def _choose_devices(self, stages: Sequence[Stage]) -> list[str]:
        slurm = stages[0].config.distributed.slurm
        if slurm.enabled and yes_or_no(f"Submit it to SLURM, to {slurm.nodes} nodes?"):
            return ["--submit"]
        gpus = find_gpus()
        fewest, _ = planned_processes(stages)
        cuda = bool(gpus.names) and stages[0].config.distributed.device != "cpu"

        def possible(text: str) -> int:
            processes = int(text) if text.isdecimal() else 0
            if processes < 1:
                raise ConfigError(f"{text}: a number from 1 on")
            if cuda and processes > len(gpus.names):
                raise ConfigError(f"{processes}: this machine has {len(gpus.names)} GPUs")
            for stage in stages:
                for problem in find_problems(stage.config, processes, cuda):
                    raise ConfigError(problem)
            return processes

        what = f"GPUs (there are {len(gpus.names)})" if cuda else "Processes (no GPU is used)"
        return ["--gpus", str(ask(what, str(fewest), possible))]


def _dataset(text: str) -> str:
    prefix = text.removesuffix(".idx").removesuffix(".bin")
    if text and not Path(f"{prefix}.idx").is_file() and not any(Path(prefix).glob("*.idx")):
        raise ConfigError(f"{prefix}.idx: no such file, nor is {prefix} a directory of datasets")
    return prefix if not text or Path(f"{prefix}.idx").is_file() else text


def make_sample(vocab_size: int) -> list[Path]:
    """A dataset per source, where none are there yet with a tokenizer of their own: a minute or two."""
    tool = (str(ROOT / "tools" / "make_sample_data.py"), "--output", str(SAMPLE))
    command = [sys.executable, *tool, "--vocab-size", str(vocab_size)]
    if code := subprocess.run(command, check=False).returncode:
        raise EnvironmentSetupError(f"the sample data could not be made (exit code {code}), see above")
    return sorted(path for path in SAMPLE.glob("*") if any(path.glob("*.idx")))


def ask[T](question: str, default: str, understand: Callable[[str], T]) -> T:
    """Until the answer is understood; Enter is `default`. `understand` raises ConfigError to say why not."""
    while True:
        try:
            answer = input(f"{question}{f' [{default}]' if default else ''}: ").strip()
        except EOFError:
            raise ConfigError("the input ended before all was answered; nothing was started") from None
        try:
            return understand(answer or default)
        except ConfigError as error:
            print(f"  {error}")


def yes_or_no(question: str) -> bool:
    """No unless it is a clear yes."""
    return ask(f"{question} (yes/no)", "no", lambda text: text.lower() in ("y", "yes"))


def main(argv: Sequence[str]) -> int:
    return run_tool(lambda: run(argv), interrupted="\nnothing was started")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
