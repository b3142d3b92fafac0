"""Write a run as one HTML page that opens from disk: curves, schedules, experts, events, configuration.

    python tools/report.py outputs/debug
    python tools/report.py outputs/debug --compare outputs/demo --output comparison.html
    python tools/report.py outputs/debug --watch 30

RUN_DIR is the output_dir of a run that has begun, runs, or has ended in whatever way; one that holds the
directories of stages gives one report of all of them. Needs no torch and no network.
"""

import argparse
import time
from pathlib import Path

from megads.command_line import run_tool
from megads.report.page import REPORT_FILE, write_report


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="output_dir of a run")
    parser.add_argument(
        "--compare", type=Path, metavar="OTHER_RUN",
        help="another run: its curves dashed, and how the configurations differ",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, metavar="FILE", help=f"default: RUN_DIR/{REPORT_FILE}")
    parser.add_argument(
        "--watch", type=float, metavar="SECONDS",
        help="write the page anew so often, until the run has finished; the page loads itself again",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    if options.watch is not None and not options.watch >= 1:
        parser.error("--watch needs at least 1 second")
    return options


def report(options: argparse.Namespace) -> None:
    output = options.output or options.run_dir / REPORT_FILE

    def write() -> str:
        return write_report(options.run_dir, output, compare=options.compare, reload_seconds=options.watch)

    state = write()
    print(output, flush=True)
    while options.watch is not None and state != "finished":
        time.sleep(options.watch)
        state = write()


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    return run_tool(lambda: report(options), cleans_up=True)


if __name__ == "__main__":
    raise SystemExit(main())
