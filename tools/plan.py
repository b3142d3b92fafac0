"""What a configuration needs and costs, before it runs: memory, time, money, and what looks wrong in it.

  python tools/plan.py configs/deepseek_v3_671b.json --gpu h800
  python tools/plan.py configs/deepseek_v2_lite.json --gpus 64 --gpu h100 --search
  python tools/plan.py configs/train_config_large.json --spot --plot memory.png --json plan.json
  python tools/plan.py configs/train_config_small.json --lint --strict

Any flag of pretrain_megads.py may follow, and acts as it would there. Needs no GPU and no torch.
docs/planning.md says how everything is computed.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that it runs from a checkout that is not installed

from megads.config.flags import Arguments, parse_flags  # noqa: E402
from megads.config.not_yet import missing_packages, not_yet  # noqa: E402
from megads.config.resolve import planned_hardware, resolve  # noqa: E402
from megads.config.schema import Config  # noqa: E402
from megads.config.stages import load_stages, select  # noqa: E402
from megads.config.validate import find_problems  # noqa: E402
from megads.errors import ConfigError, EnvironmentSetupError, MegadsError  # noqa: E402
from megads.plan.budget import SPOT_HOURS_BETWEEN_INTERRUPTIONS  # noqa: E402
from megads.plan.datasets import data_tokens  # noqa: E402
from megads.plan.findings import Run  # noqa: E402
from megads.plan.hardware import GPUS, gpu_named  # noqa: E402
from megads.plan.lint import is_refused, lint  # noqa: E402
from megads.plan.planner import Assumptions, as_json, make_plan  # noqa: E402

LINT_FAILED = 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tools/plan.py",
        usage="%(prog)s CONFIG [options] [--section.setting VALUE ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--gpus", type=int, metavar="N", help="processes; default: those the config asks for")
    parser.add_argument(
        "--gpu",
        metavar="NAME",
        help=f"{', '.join(GPUS)}; default: h100, or none where the config is for a CPU",
    )
    parser.add_argument("--search", action="store_true", help="look for layouts that fit, the fastest first")
    parser.add_argument(
        "--mfu", type=float, metavar="X", help="efficiency to count with, instead of predicted"
    )
    parser.add_argument("--spot", action="store_true", help="spot prices, and interruptions")
    parser.add_argument("--price", type=float, metavar="DOLLARS", help="price of a GPU hour")
    parser.add_argument(
        "--interruption-hours",
        type=float,
        metavar="HOURS",
        help=f"mean time between interruptions; with --spot {SPOT_HOURS_BETWEEN_INTERRUPTIONS:g}, else none",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write everything as JSON; -: to stdout, alone"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw memory by pipeline stage as PNG")
    parser.add_argument("--lint", action="store_true", help="only check the configuration")
    parser.add_argument("--strict", action="store_true", help="warnings of the linter fail too (exit code 1)")
    return parser


def parse_arguments(argv: list[str]) -> tuple[argparse.Namespace, Arguments]:
    """Our own options, and those of pretrain_megads.py."""
    if argv and not argv[0].startswith("-"):
        argv = ["--config", *argv]
    options, rest = _parser().parse_known_args(argv)
    arguments = parse_flags(rest, "tools/plan.py")
    if arguments.config is None:
        raise ConfigError("which configuration? It comes first: tools/plan.py configs/debug.json")
    for name in ("gpus", "mfu", "price", "interruption_hours"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise ConfigError(f"--{name.replace('_', '-')} must be above 0, got {value:g}")
    return options, arguments


def load_one(arguments: Arguments) -> Config:
    """The configuration; of a file with stages the one that --stage names."""
    path = arguments.config
    stages = load_stages(path, arguments.overrides, arguments.origins)
    if arguments.stage is None and len(stages) > 1:
        names = ", ".join(stage.name for stage in stages)
        raise ConfigError(f"{path} has several stages, and a plan is of one: --stage with one of {names}")
    stage = stages[0] if arguments.stage is None else select(stages, arguments.stage)
    return stage.config


def check_for_plan(config: Config, world_size: int, cuda: bool) -> list[str]:
    """Raises ConfigError for what can never run; what this version or machine lacks comes back as remarks."""
    lacking = [*not_yet(config, cuda), *missing_packages(config)]
    problems = [problem for problem in find_problems(config, world_size, cuda) if problem not in lacking]
    if problems:
        lines = "\n".join(f"  {number}. {problem}" for number, problem in enumerate(problems, 1))
        raise ConfigError(f"no plan for {world_size:,} processes, the configuration cannot run:\n{lines}")
    return lacking


def run(options: argparse.Namespace, arguments: Arguments) -> int:
    """The exit code of everything that was asked for."""
    config = load_one(arguments)
    world_size, cuda = planned_hardware(config, options.gpus or arguments.world_size)
    cuda = cuda or (config.distributed.device != "cpu" and bool(options.gpu or options.gpus))
    for name in ("gpu", "search", "mfu", "spot", "price", "interruption_hours"):
        if getattr(options, name) and not cuda:
            flag = name.replace("_", "-")
            fixed = config.distributed.device == "cpu"
            how = "--distributed.device auto --gpu h100" if fixed else "--gpu h100"
            why = ' (distributed.device = "cpu")' if fixed else ""
            raise ConfigError(f"--{flag}: this run is on the CPU{why}; {how} plans it for a GPU")
    gpu = gpu_named(options.gpu or "h100") if cuda else None
    remarks = check_for_plan(config, world_size, cuda)
    resolved = resolve(config, world_size, cuda)
    tokens = data_tokens(config)
    between = options.interruption_hours or (SPOT_HOURS_BETWEEN_INTERRUPTIONS if options.spot else None)
    if options.lint:
        findings = lint(Run(config, resolved, gpu, tokens, between))
        if options.json:
            write_json([vars(finding) for finding in findings], options.json)
        else:
            from megads.plan.table import print_findings

            print_findings(findings, _console())
        return LINT_FAILED if is_refused(findings, options.strict) else 0
    assumptions = Assumptions(options.mfu, options.spot, options.price, between)
    plan = make_plan(config, resolved, gpu, assumptions, with_search=options.search, data_tokens=tokens)
    if options.json:
        write_json(as_json(plan) | {"remarks": remarks}, options.json)
    if options.json != Path("-"):
        from megads.plan.table import print_plan

        print_plan(plan, _console())
        for remark in remarks:
            print(f"not in this version or on this machine: {remark}")
    if options.plot:
        from megads.plan.plot import draw_memory

        draw_memory(plan, options.plot)
    return LINT_FAILED if options.strict and is_refused(plan.findings, strict=True) else 0


def _console() -> "Console":
    """Colors on a terminal; elsewhere plain lines, wide enough for every table."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else 160)


def write_json(content: object, path: Path) -> None:
    """To `path`, or to stdout for "-". Raises EnvironmentSetupError where it cannot be written."""
    text = json.dumps(content, indent=2)
    if path == Path("-"):
        print(text)
        return
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise EnvironmentSetupError(f"--json {path}: cannot be written ({error.strerror})") from None


def main(argv: list[str]) -> int:
    """The exit code: 0, that of the error that was printed, or 1 where the linter refuses."""
    try:
        return run(*parse_arguments(argv))
    except MegadsError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
