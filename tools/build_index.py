"""Check the datasets of a run, show what it will read, and build its index of samples, without torch.

  python tools/build_index.py --config configs/dolma.json
  python tools/build_index.py --config configs/dolma.json --dry-run     the table alone

Takes every flag of pretrain_megads.py; of a file with stages it does all, or the one that --stage names.
Training builds what is missing by itself, on its first process while the others wait; a job that finds the
index there starts at once. The index lies below data.cache_dir/index and does not depend on the number of
processes, so this can run anywhere that sees the same data: on a login node, or in a job without GPUs.
data.preprocessing.num_workers processes share the work.
"""

import logging
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that it runs from a checkout that is not installed

from megads.command_line import run_tool  # noqa: E402
from megads.config.flags import Arguments, parse_flags  # noqa: E402
from megads.config.resolve import Resolved, resolve  # noqa: E402
from megads.config.schema import Config  # noqa: E402
from megads.config.stages import check_stages, load_stages, planned_processes, select  # noqa: E402
from megads.data.index_cache import index_directory  # noqa: E402
from megads.data.mix_table import mix_table, repetition_warnings  # noqa: E402
from megads.data.sources import build_index, plan_corpus, sample_counts  # noqa: E402


def parse_arguments(argv: list[str]) -> Arguments:
    """Those of pretrain_megads.py."""
    return parse_flags(argv, "tools/build_index.py")


def main(argv: list[str]) -> int:
    """The exit code: 0, or that of the error that was printed."""
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    return run_tool(lambda: run(argv))


def run(argv: list[str]) -> None:
    arguments = parse_arguments(argv)
    stages = load_stages(arguments.config, arguments.overrides, arguments.origins)
    if arguments.stage is not None:
        stages = (select(stages, arguments.stage),)
    processes, cuda = planned_processes(stages, arguments.world_size)
    check_stages(stages, processes, cuda)
    for stage in stages:
        if stage.name:
            print(f"stage {stage.name}")
        build(stage.config, resolve(stage.config, processes, cuda), only_show=arguments.dry_run)


def build(config: Config, resolved: Resolved, only_show: bool) -> None:
    """Show what one run reads, and make the index files that are missing."""
    started = time.monotonic()
    corpus = plan_corpus(config, sample_counts(config, resolved))
    print(mix_table(config, corpus))
    for warning in repetition_warnings(config, corpus):
        print(f"warning: {warning}")
    if not only_show:
        made = build_index(corpus, min(config.data.preprocessing.num_workers, os.cpu_count() or 1))
        seconds = time.monotonic() - started
        print(f"index: {made:,} files made, {seconds:.1f} s, in {index_directory(corpus.cache_dir)}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
