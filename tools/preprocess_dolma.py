"""Tokenize Dolma-format files (JSON lines, plain, gzip or zstd) into indexed datasets.

One dataset:      --input FILES_OR_DIRECTORIES --output PREFIX
A whole corpus:   --input-root DIRECTORY --output-root DIRECTORY
                  each subdirectory becomes the dataset OUTPUT_ROOT/SUBDIRECTORY, which a source finds by
                  `"subset": "SUBDIRECTORY"` when data.cache_dir is OUTPUT_ROOT

Writes PREFIX.bin and PREFIX.idx (Megatron-Core's format) and PREFIX.json, a record of what they are.
The files do not depend on the number of workers. Any bad record stops the run, with file and line, and
nothing is published of that dataset.
"""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megads.data.inputs import find_inputs
from megads.data.indexed import refuse_existing
from megads.data.preprocess import Encoder, Summary, preprocess
from megads.errors import DataError, MegadsError


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", type=Path, nargs="+", help="files and directories of JSON lines")
    parser.add_argument("--output", type=Path, help="prefix of the dataset")
    parser.add_argument("--input-root", type=Path, help="directory with a subdirectory per source")
    parser.add_argument("--output-root", type=Path, help="directory of the datasets")
    parser.add_argument(
        "--tokenizer", type=Path, required=True, help="sentencepiece .model or tokenizer.json"
    )
    parser.add_argument(
        "--eod-token", help="name of the end-of-document token, where it is not found by itself"
    )
    parser.add_argument("--text-field", default="text", help="field of the text (default: %(default)s)")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="tokenizing processes (default: %(default)s)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace datasets that are there")
    options = parser.parse_args(arguments)
    one, corpus = (options.input, options.output), (options.input_root, options.output_root)
    if not ((all(one) and not any(corpus)) or (all(corpus) and not any(one))):
        parser.error("give either --input and --output, or --input-root and --output-root")
    if options.workers < 1:
        parser.error("--workers must be at least 1")
    return options


def list_jobs(options: argparse.Namespace) -> list[tuple[list[Path], Path]]:
    """(inputs, prefix) of each dataset to make."""
    if options.input:
        return [(options.input, options.output)]
    if not options.input_root.is_dir():
        raise DataError(f"{options.input_root}: no such directory.")
    sources = sorted(p for p in options.input_root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not sources:
        raise DataError(f"{options.input_root}: no subdirectories; one per source is expected.")
    return [([source], options.output_root / source.name) for source in sources]


@contextmanager
def progress_bar(total_bytes: int) -> Iterator[Callable[[str, int], None]]:
    """A bar over all input, on a terminal only; gives the function to call with name and bytes done."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total_bytes)
        yield lambda name, done_bytes: progress.update(task, description=name, completed=done_bytes)


def run(options: argparse.Namespace) -> None:
    jobs = list_jobs(options)
    if not options.overwrite:
        for _, prefix in jobs:
            refuse_existing(prefix)
    sizes = [sum(file.stat().st_size for file in find_inputs(inputs)) for inputs, _ in jobs]
    summaries = []
    with (
        Encoder(
            options.tokenizer,
            eod_token=options.eod_token,
            text_field=options.text_field,
            workers=options.workers,
        ) as encoder,
        progress_bar(sum(sizes)) as show,
    ):
        before = 0
        for (inputs, prefix), size in zip(jobs, sizes, strict=True):

            def advance(done: int, name: str = prefix.name, before: int = before) -> None:
                show(name, before + done)

            summaries.append(
                preprocess(inputs, prefix, encoder, overwrite=options.overwrite, on_progress=advance)
            )
            before += size
    print_summary(summaries)


def print_summary(summaries: list[Summary]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    table.add_column("dataset", overflow="fold")
    for heading in (
        "documents",
        "empty",
        "tokens",
        "MB of text",
        "bytes/token",
        "tokens/document",
        "seconds",
        "MB/s",
    ):
        table.add_column(heading, justify="right")
    for s in summaries:
        megabytes = s.text_bytes / 1e6
        table.add_row(
            s.prefix.name,
            f"{s.documents:,}",
            f"{s.empty_documents:,}",
            f"{s.tokens:,}",
            f"{megabytes:,.2f}",
            f"{s.text_bytes / s.tokens:.2f}",
            f"{s.tokens / s.documents:,.0f}",
            f"{s.seconds:.1f}",
            f"{megabytes / s.seconds:.2f}",
        )
    # Off a terminal rich would fold the table to 80 columns.
    console = Console() if sys.stdout.isatty() else Console(width=130)
    console.print(table)
    for s in summaries:
        console.print(f"{s.prefix}.bin, .idx, .json", highlight=False, soft_wrap=True)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    # A scheduler's SIGTERM ends the run as an error would: temporary files and workers go too.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        run(options)
    except MegadsError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; nothing of the unfinished dataset was kept", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
