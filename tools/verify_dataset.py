"""Check indexed datasets against their records and, where it is at hand, the text they were made from.

Hashes, sizes, pointers; ids below the vocabulary; ends of documents; documents in = out + quarantined +
dropped; the input read again, its counts compared; with --tokenizer, sampled documents compared token by
token and as text. --quick reads records and indexes only. Prints a line per problem; exit code 0 if there is
none, 1 if there is one.
"""

import argparse
import os
import sys
from pathlib import Path

from megads.command_line import run_tool
from megads.data.cleaning.parallel import Workers
from megads.data.stored import find_datasets
from megads.data.verify import (
    Verification,
    VerifySettings,
    check_complete,
    check_together,
    one_line,
    verify_dataset,
)
from megads.errors import DataError


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("datasets", type=Path, nargs="+", help="prefixes, and directories of datasets")
    parser.add_argument("--quick", action="store_true", help="records, sizes and indexes only")
    parser.add_argument("--tokenizer", help="compare sampled documents with their text, encoded again")
    parser.add_argument(
        "--sample", type=int, default=20, metavar="N", help="documents of each dataset (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sample (default: %(default)s)")
    parser.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    if options.workers < 1 or options.sample < 1:
        parser.error("--workers and --sample must be at least 1")
    if options.quick and options.tokenizer:
        parser.error("--quick does not look at text, so it has no use for --tokenizer")
    return options


def run(options: argparse.Namespace) -> int:
    """The number of problems, after printing them."""
    prefixes = find_datasets(options.datasets)
    if options.tokenizer and not (Path(options.tokenizer).exists() or ":" in options.tokenizer):
        raise DataError(f"{options.tokenizer}: no such tokenizer.")
    settings = VerifySettings(options.quick, options.tokenizer, options.sample, options.seed)
    found: list[Verification] = [Verification(prefix) for prefix in prefixes]
    with Workers(min(options.workers, len(prefixes))) as workers:
        for number, one in workers.each(verify_dataset, settings, prefixes):
            found[number] = one
    problems = 0
    unchecked: dict[str, list[str]] = {}
    for one in found:
        for problem in one.problems:
            print(f"PROBLEM {problem}")
        if not one.problems:
            print(f"ok      {one_line(one)}")
        for what in one.unchecked:
            unchecked.setdefault(what, []).append(one.prefix)
        problems += len(one.problems)
    for problem in [*check_complete(options.datasets, found), *check_together(found)]:
        print(f"PROBLEM {problem}")
        problems += 1
    for what, where in unchecked.items():
        more = f" and {len(where) - 1:,} more" if len(where) > 1 else ""
        print(f"not checked: {where[0]}{more}: {what}")
    documents, tokens = sum(one.documents for one in found), sum(one.tokens for one in found)
    count = f"{problems:,} problem{'' if problems == 1 else 's'}"
    print(f"{len(found):,} datasets, {documents:,} documents, {tokens:,} tokens: {count}")
    return problems


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    return run_tool(lambda: 1 if run(options) else 0)


if __name__ == "__main__":
    sys.exit(main())
