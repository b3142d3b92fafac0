"""Tokenize Dolma-format files (JSON lines, plain, gzip or zstd) into indexed datasets.

A whole corpus:   --input-root DIRECTORY --output-root DIRECTORY
                  each subdirectory is a source; each of its files becomes a shard of the source,
                  OUTPUT_ROOT/SUBDIRECTORY/FILE.bin, .idx and .json. A source finds its shards by
                  `"subset": "SUBDIRECTORY"` when data.cache_dir is OUTPUT_ROOT
From a list:      --manifest FILE --output-root DIRECTORY
                  a line per file: PATH, or SOURCE<tab>PATH
One source:       --input FILES --output PREFIX
                  files, directories, globs; one file becomes PREFIX.bin, .idx and .json, several become
                  shards in the directory PREFIX

Anything may be an fsspec URL (s3://bucket/corpus). Writes Megatron-Core's format, and a record (.json) of
what became of every line. What is finished stays: the same command again goes on where it was. The
files depend on the input and the settings alone, not on workers, tasks or interruptions.

In a job array (SLURM_ARRAY_TASK_ID, or --num-tasks and --task-id) each task does its share of the bytes.
A bad line stops the run, with file and line; --tolerant puts bad lines aside instead.

Instruction data (docs/instructions.md): with --conversations the lines are conversations, rendered by the
tokenizer's chat template; training then learns the answers alone.
"""

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from megads.command_line import local_path, positive_number, run_tool
from megads.data.chat_format import DEFAULT, FORMS, ChatFormat, load_chat_format
from megads.data.inputs import (
    InputShard,
    find_shards,
    find_sources,
    load_source_table,
    rename_sources,
    shard_stem,
    shards_of_manifest,
)
from megads.data.preprocess import Progress, Summary, preprocess, total_of
from megads.data.recipe import Recipe
from megads.data.selection import describe
from megads.data.shards import Shard
from megads.data.tokenizer import load_tokenizer
from megads.data.work_division import array_task, check_prefixes, divide
from megads.errors import DataError
from megads.log import setup_logging, terminal_console
from megads.tables import print_table

logger = logging.getLogger("megads.preprocess")

DEFAULT_QUOTA = 0.001
LINE_SECONDS = 30.0


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument_group("input and output").add_argument
    add("--input", nargs="+", metavar="PATH", help="files, directories and globs of JSON lines")
    add("--input-root", metavar="DIRECTORY", help="directory with a subdirectory per source")
    add("--manifest", metavar="FILE", help="list of files")
    add("--output", type=local_path, metavar="PREFIX", help="prefix, or directory, of one source")
    add("--output-root", type=local_path, metavar="DIRECTORY", help="directory of the sources")
    add("--sources", type=Path, metavar="TABLE", help="names of directories to names of sources, as in "
        "configs/data/dolma_sources.json")  # fmt: skip
    add("--overwrite", action="store_true", help="replace datasets of other settings or another input")

    add = parser.add_argument_group("documents").add_argument
    add("--tokenizer", required=True, help="tokenizer.json, sentencepiece .model, or plugin module:Class")
    add("--eod-token", help="name of the end-of-document token, where it is not found by itself")
    add("--text-field", default="text", help="field of the text (default: %(default)s)")
    add("--keep", action="append", default=[], type=_field_and_values, metavar="FIELD=VALUE[,VALUE]",
        help="drop documents whose metadata says otherwise (metadata.language=en); may repeat")  # fmt: skip
    add("--score-field", metavar="FIELD", help="number of each document to keep in PREFIX.scores.npy")
    add("--removals", action="append", default=[], metavar="DIRECTORY",
        help="what tools/clean_dolma.py takes out; may repeat")  # fmt: skip
    add("--fim-rate", type=float, default=0.0, metavar="SHARE",
        help="documents rearranged for fill-in-the-middle (DeepSeek-V3: 0.1; default: 0)")  # fmt: skip
    add("--fim-spm-rate", type=float, default=0.0, metavar="SHARE",
        help="of those, in suffix-prefix-middle order (default: 0, all prefix-suffix-middle)")  # fmt: skip
    add("--fim-seed", type=int, default=0, metavar="N")
    add("--split-punctuation-rate", type=float, default=0.0, metavar="SHARE",
        help="tokens of punctuation and line breaks split in two (default: 0)")  # fmt: skip
    add("--split-punctuation-seed", type=int, default=0, metavar="N")

    add = parser.add_argument_group("conversations").add_argument
    add("--conversations", choices=FORMS, metavar="FORM", help="the lines are conversations: "
        + "; ".join(f"{form}: {what}" for form, what in FORMS.items()))  # fmt: skip
    add("--chat-template", metavar="FILE",
        help=f"Jinja template, or {DEFAULT!r} for the built-in one (default: the tokenizer's, else the "
        "built-in one)")  # fmt: skip

    add = parser.add_argument_group("bad input").add_argument
    add("--tolerant", action="store_true",
        help="put lines without a document, and damaged files, aside (PREFIX.quarantine.jsonl)")  # fmt: skip
    add("--quarantine-quota", type=float, metavar="SHARE",
        help=f"lines of a shard, and bytes of damaged files in all (default: {DEFAULT_QUOTA})")  # fmt: skip
    add("--max-line-mb", type=positive_number, default=16.0, metavar="MB",
        help="longer lines hold no document; bounds memory (default: %(default)s)")  # fmt: skip

    add = parser.add_argument_group("work").add_argument
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: %(default)s)")
    add("--num-tasks", type=int, metavar="N", help="tasks that share the work (default: of the job array)")
    add("--task-id", type=int, metavar="K", help="this one, from 0 (default: of the job array)")
    options = parser.parse_args(arguments)
    _check_choices(parser, options)
    return options


def _field_and_values(text: str) -> tuple[str, tuple[str, ...]]:
    field, equals, values = text.partition("=")
    if not (field and equals and values):
        raise argparse.ArgumentTypeError(f"{text!r} is not FIELD=VALUE[,VALUE]")
    return field, tuple(values.split(","))


def _check_choices(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    inputs = [options.input, options.input_root, options.manifest]
    if sum(given is not None for given in inputs) != 1:
        parser.error("give one of --input, --input-root and --manifest")
    if (options.output is not None) != (options.input is not None) or (
        (options.output_root is None) != (options.output is not None)
    ):
        parser.error("--input goes with --output, --input-root and --manifest with --output-root")
    if options.workers < 1:
        parser.error("--workers must be at least 1")
    if options.fim_spm_rate and not options.fim_rate:
        parser.error("--fim-spm-rate is the share of the documents that --fim-rate rearranges; give that too")
    if options.quarantine_quota is not None and not options.tolerant:
        parser.error("--quarantine-quota is for --tolerant")
    if options.chat_template is not None and options.conversations is None:
        parser.error("--chat-template is for --conversations")


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    setup_logging(stream=sys.stderr)
    return run_tool(
        lambda: run(options),
        interrupted="interrupted; finished shards stay, the same command goes on with the rest",
        cleans_up=True,
    )


def run(options: argparse.Namespace) -> None:
    num_tasks, task_id = array_task(options.num_tasks, options.task_id)
    recipe = make_recipe(options)
    shards = list_shards(options)
    check_output(shards)
    mine = divide(shards, num_tasks)[task_id]
    if num_tasks > 1:
        logger.info("Task %d of %d: %d of %d shards.", task_id, num_tasks, len(mine), len(shards))
    begun = time.monotonic()
    with progress_display() as show:
        summaries = preprocess(
            mine, recipe, workers=options.workers, overwrite=options.overwrite, on_progress=show
        )
    print_summary(summaries, time.monotonic() - begun)
    if num_tasks == 1 and not any(summary.documents for summary in summaries.values()):
        raise DataError(f"The input holds no document with text ({len(shards)} files).")


def make_recipe(options: argparse.Namespace) -> Recipe:
    quota = options.quarantine_quota
    if options.tolerant and quota is None:
        quota = DEFAULT_QUOTA
    return Recipe(
        tokenizer=options.tokenizer,
        eod_token=options.eod_token,
        text_field=options.text_field,
        max_line_bytes=int(options.max_line_mb * 2**20),
        keep=tuple(options.keep),
        score_field=options.score_field,
        removals=tuple(options.removals),
        fim_rate=options.fim_rate,
        fim_spm_rate=options.fim_spm_rate,
        fim_seed=options.fim_seed,
        split_punctuation_rate=options.split_punctuation_rate,
        split_punctuation_seed=options.split_punctuation_seed,
        chat=chat_format(options) if options.conversations else None,
        quarantine_quota=quota,
    )


def chat_format(options: argparse.Namespace) -> ChatFormat:
    tokenizer = load_tokenizer(options.tokenizer, eod_token=options.eod_token)
    chat, where = load_chat_format(tokenizer, options.conversations, options.chat_template, options.eod_token)
    logger.info("Conversations are rendered by %s.", where)
    return chat


def list_shards(options: argparse.Namespace) -> list[Shard]:
    """What becomes what, of the whole corpus."""
    if options.input:
        return _shards_of_one_source(find_shards(options.input), options.output)
    found = shards_of_manifest(options.manifest) if options.manifest else find_sources(options.input_root)
    if options.sources:
        found = rename_sources(found, load_source_table(options.sources))
    return [Shard(shard, options.output_root / shard.source / shard.stem) for shard in found]


def _shards_of_one_source(found: list[InputShard], output: Path) -> list[Shard]:
    one_source = [replace(shard, source=output.name) for shard in found]
    if len(found) == 1:
        return [Shard(one_source[0], output)]
    several = len({shard.directory for shard in found}) > 1
    names = [f"{shard.directory}/{shard.name}" if several else shard.name for shard in found]
    return [Shard(shard, output / shard_stem(name)) for shard, name in zip(one_source, names, strict=True)]


def check_output(shards: list[Shard]) -> None:
    """Refuse or tell of other datasets that training would read instead of these, or beside them."""
    check_prefixes(shards)
    ours = {shard.prefix for shard in shards}
    for directory in {prefix.parent for prefix in ours}:
        hides, there = directory.with_name(directory.name + ".idx"), set(directory.glob("*.idx"))
        if hides.exists() and len(shards) > 1:
            raise DataError(
                f"{hides}: this dataset would hide the shards in {directory}. Remove or rename it."
            )
        strangers = sorted(path.name for path in there if path.with_suffix("") not in ours)
        if strangers and len(shards) > 1:
            logger.warning(
                "%s holds %d datasets that are not of this input; who trains on the directory reads them: %s",
                directory,
                len(strangers),
                ", ".join(strangers[:5]) + (", ..." if len(strangers) > 5 else ""),
            )


@contextmanager
def progress_display() -> Iterator[Callable[[Progress], None]]:
    """A bar on a terminal, a line now and then elsewhere; gives the function to call with progress.

    The bar, which a thread draws, appears at the first call.
    """
    console = terminal_console()
    if console is None:
        yield _Lines().show
        return
    from rich import progress as rich

    columns = (
        rich.BarColumn(),
        rich.TaskProgressColumn(),
        rich.DownloadColumn(),
        rich.TextColumn("{task.fields[rate]}"),
        rich.TimeRemainingColumn(),
    )
    begun = time.monotonic()
    display = rich.Progress(*columns, console=console, transient=True)
    task = display.add_task("", total=None, rate="")

    def show(progress: Progress) -> None:
        rate = progress.text_bytes / 1e6 / max(time.monotonic() - begun, 1e-3)
        display.start()
        display.update(
            task,
            total=progress.input_bytes,
            completed=progress.input_bytes_done,
            rate=f"{rate:.1f} MB/s of text" if progress.text_bytes else "",
        )

    try:
        yield show
    finally:
        display.stop()


class _Lines:
    """Progress for log files."""

    def __init__(self) -> None:
        self._begun = self._told = time.monotonic()
        self._start_bytes: int | None = None

    def show(self, progress: Progress) -> None:
        now = time.monotonic()
        if self._start_bytes is None:
            self._start_bytes = progress.input_bytes_done  # what was done before took no time
        if now - self._told < LINE_SECONDS:
            return
        self._told = now
        read_bytes = progress.input_bytes_done - self._start_bytes
        left_bytes = progress.input_bytes - progress.input_bytes_done
        minutes = left_bytes * (now - self._begun) / max(read_bytes, 1) / 60
        logger.info(
            "%.2f of %.2f GB of input, %.1f MB/s of text, about %.0f minutes left",
            progress.input_bytes_done / 1e9,
            progress.input_bytes / 1e9,
            progress.text_bytes / 1e6 / (now - self._begun),
            minutes,
        )


def print_summary(summaries: dict[str, Summary], seconds: float) -> None:
    rows = [summaries[name] for name in sorted(summaries)]
    total = total_of("all", rows)
    unused = {"FIM": not total.fim_documents, "MB/s/core": not total.converting_seconds}
    columns = [name for name in COLUMNS if not unused.get(name)]

    def cells(summary: Summary) -> list[str]:
        return [summary.name, *(COLUMNS[name](summary) for name in columns)]

    sections = [list(map(cells, rows))] + ([[cells(total)]] if len(rows) > 1 else [])
    print_table(["source", *columns], sections)
    for what, reasons in (("quarantined", total.quarantined), ("dropped", total.dropped)):
        if reasons:
            print(f"{what}: {describe(reasons)}")
    made = total.shards - total.done_before
    said = f"{made} shards made, {total.done_before} done before"
    if made:
        megabytes = total.converted_bytes / 1e6
        said += (
            f", {megabytes:,.1f} MB of text in {seconds:.1f} s ({megabytes / seconds:.1f} MB/s), at most "
            f"{total.peak_memory_bytes / 1e6:,.0f} MB of memory per process"
        )
    print(said)


COLUMNS: dict[str, Callable[[Summary], str]] = {
    "shards": lambda s: f"{s.shards:,}",
    "damaged": lambda s: f"{s.damaged:,}",
    "lines": lambda s: f"{s.documents_in:,}",
    "quarantined": lambda s: f"{s.quarantined.total():,}",
    "dropped": lambda s: f"{s.dropped.total():,}",
    "documents": lambda s: f"{s.documents:,}",
    "tokens": lambda s: f"{s.tokens:,}",
    "MB of text": lambda s: f"{s.text_bytes / 1e6:,.2f}",
    "bytes/token": lambda s: f"{s.text_bytes / s.tokens:.2f}" if s.tokens else "-",
    "tokens/document": lambda s: f"{s.tokens / s.documents:,.0f}" if s.documents else "-",
    "FIM": lambda s: f"{s.fim_documents / s.documents:.1%}" if s.documents else "-",
    "MB/s/core": lambda s: (
        f"{s.converted_bytes / 1e6 / s.converting_seconds:.1f}" if s.converting_seconds else "-"
    ),
}


if __name__ == "__main__":
    sys.exit(main())
