"""Find what to take out of a Dolma-format corpus: duplicates, text of low quality, evaluation sets.

  --input FILES_OR_DIRECTORIES ... or --input-root DIRECTORY (a subdirectory per source)
  --removals DIRECTORY    where the result goes: a small file per input file, for
                          tools/preprocess_dolma.py --removals DIRECTORY, and report.json

The corpus itself is not changed. Choose stages by --exact, --paragraphs, --near, --quality and --evaluation;
none chosen means --exact --near. A run that was stopped continues where it was when it is started again with
the same arguments. The result does not depend on the number of workers.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath

from megads.command_line import local_path, positive_number, run_tool
from megads.data.cleaning.decontaminate import EvaluationIndex
from megads.data.cleaning.near import NearSettings, candidate_probability
from megads.data.cleaning.quality import RULE_SETS
from megads.data.cleaning.report import HEADINGS, table_sections, write_report
from megads.data.cleaning.run import Progress, clean
from megads.data.cleaning.scan import CleaningSettings
from megads.data.documents import MAX_LINE_BYTES, open_input
from megads.data.inputs import InputShard, find_shards, find_sources, shards_of_manifest
from megads.errors import DataError
from megads.tables import print_table


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    inputs = parser.add_mutually_exclusive_group(required=True)
    inputs.add_argument("--input", nargs="+", help="files, directories, globs and URLs of JSON lines")
    inputs.add_argument("--input-root", help="directory with a subdirectory per source")
    inputs.add_argument("--manifest", help="text file that lists PATH or SOURCE<tab>PATH a line")
    parser.add_argument("--removals", type=local_path, required=True, help="directory of the result")
    parser.add_argument(
        "--work", type=local_path, help="directory for what is kept between runs (default: REMOVALS/.work)"
    )
    parser.add_argument("--text-field", default="text", help="field of the text (default: %(default)s)")
    parser.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: %(default)s)"
    )
    parser.add_argument(
        "--max-line-mb", type=positive_number, default=MAX_LINE_BYTES / 2**20, metavar="MB",
        help="longer lines hold no document; give preprocessing the same (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--partitions", type=int, help="parts that keys are divided into (default: by input size)"
    )
    _add_stages(parser)
    options = parser.parse_args(arguments)
    if options.workers < 1:
        parser.error("--workers must be at least 1")
    if options.paragraphs < 0:
        parser.error("--paragraphs must be at least 1, or 0 for none")
    if options.partitions is not None and (options.partitions < 1 or options.partitions.bit_count() != 1):
        parser.error("--partitions must be a power of two")
    if min(options.bands, options.rows, options.shingle_words, options.ngram_words) < 1:
        parser.error("--bands, --rows, --shingle-words and --ngram-words must be at least 1")
    if not 0 <= options.near_threshold <= 1:
        parser.error("--near-threshold must be between 0 and 1")
    if not 1 <= options.min_evaluation_words <= options.ngram_words:
        parser.error("--min-evaluation-words must be between 1 and --ngram-words")
    chosen = (options.exact, options.paragraphs, options.near, options.quality, options.evaluation)
    if not any(chosen):
        options.exact = options.near = True
    return options


def _add_stages(parser: argparse.ArgumentParser) -> None:
    exact = parser.add_argument_group("exact duplicates")
    exact.add_argument("--exact", action="store_true", help="drop documents equal to an earlier one")
    exact.add_argument(
        "--paragraphs", type=int, default=0, metavar="CHARACTERS",
        help="cut paragraphs of at least this length that came before anywhere",
    )  # fmt: skip
    near = parser.add_argument_group("near duplicates (MinHash LSH)")
    default = NearSettings()
    near.add_argument("--near", action="store_true", help="drop documents much like an earlier one")
    near.add_argument("--bands", type=int, default=default.bands, help="(default: %(default)s)")
    near.add_argument(
        "--rows", type=int, default=default.rows, help="hashes of a band (default: %(default)s)"
    )
    near.add_argument(
        "--shingle-words",
        type=int,
        default=default.shingle_words,
        help="words of a shingle (default: %(default)s)",
    )
    near.add_argument(
        "--near-threshold", type=float, default=default.threshold,
        help="least estimated Jaccard similarity; 0: whatever shares a band (default: %(default)s)",
    )  # fmt: skip
    near.add_argument("--near-seed", type=int, default=default.seed, help="(default: %(default)s)")
    quality = parser.add_argument_group("quality")
    quality.add_argument("--quality", nargs="+", choices=sorted(RULE_SETS), default=[], help="sets of rules")
    quality.add_argument(
        "--quality-sources", nargs="+", default=[], metavar="SOURCE",
        help="sources the rules are for (default: all; code and mathematics fail them)",
    )  # fmt: skip
    evaluation = parser.add_argument_group("evaluation sets")
    evaluation.add_argument(
        "--evaluation",
        nargs="+",
        default=[],
        metavar="FILE",
        help="JSON lines: drop documents that share text",
    )
    evaluation.add_argument(
        "--evaluation-fields",
        nargs="+",
        default=[],
        metavar="FIELD",
        help="fields to look for (default: all strings)",
    )
    evaluation.add_argument(
        "--ngram-words", type=int, default=13, help="words in a row (default: %(default)s)"
    )
    evaluation.add_argument(
        "--min-evaluation-words",
        type=int,
        default=8,
        help="shorter strings are not looked for (default: %(default)s)",
    )


def list_shards(options: argparse.Namespace) -> list[InputShard]:
    if options.input_root:
        return find_sources(options.input_root)
    return shards_of_manifest(options.manifest) if options.manifest else find_shards(options.input)


def settings_of(
    options: argparse.Namespace, evaluation_files: list[str], sources: set[str]
) -> CleaningSettings:
    if unknown := set(options.quality_sources) - sources:
        raise DataError(
            f"--quality-sources: no source is called {', '.join(sorted(unknown))}; the input has "
            f"{', '.join(sorted(sources))}."
        )
    near = NearSettings(
        options.bands, options.rows, options.shingle_words, options.near_threshold, options.near_seed
    )
    return CleaningSettings(
        text_field=options.text_field,
        max_line_bytes=int(options.max_line_mb * 2**20),
        exact_documents=options.exact,
        min_paragraph_characters=options.paragraphs,
        near=near if options.near else None,
        quality=tuple(options.quality),
        quality_sources=tuple(sorted(options.quality_sources)) if options.quality else (),
        evaluation_sha256=tuple(map(_sha256, evaluation_files)),
        ngram_words=options.ngram_words,
        min_evaluation_words=options.min_evaluation_words,
        evaluation_fields=tuple(options.evaluation_fields),
    )


def _sha256(path: str) -> str:
    with open_input(path) as file:
        return file.sha256()


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A bar per stage, on a terminal only."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        tasks: dict[str, object] = {}

        def show(stage: str, share: float) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=1.0)
            progress.update(tasks[stage], completed=share)  # type: ignore[arg-type]

        yield show


def run(options: argparse.Namespace) -> None:
    begun = time.monotonic()
    shards = list_shards(options)
    files = [shard.path for shard in find_shards(options.evaluation)] if options.evaluation else []
    settings = settings_of(options, files, {shard.directory for shard in shards})
    index = None
    if files:
        index = EvaluationIndex(
            files,
            ngram_words=options.ngram_words,
            min_words=options.min_evaluation_words,
            fields=options.evaluation_fields,
        )
    with progress_bar() as show:
        result = clean(
            shards,
            options.removals,
            settings,
            work=options.work or options.removals / ".work",
            index=index,
            partitions=options.partitions,
            workers=options.workers,
            on_progress=show,
        )
    evaluation = None
    if index:
        evaluation = {
            "files": [PurePosixPath(file).name for file in files],
            "strings_looked_for": len(index.items),
            "strings_too_short": index.too_short,
        }
    content = write_report(options.removals, result, settings, evaluation)
    print_table(HEADINGS, table_sections(content), label_columns=2)
    text_bytes = sum(source["text_bytes"] for source in content["sources"].values())
    seconds = time.monotonic() - begun
    said = [f"{text_bytes / 1e6:,.1f} MB of text in {seconds:.1f} s. {options.removals / 'report.json'}"]
    if index:
        said.append(
            f"{len(index.items):,} strings of the evaluation sets were looked for, {index.too_short:,} are "
            "too short."
        )
    if settings.near:
        curve = (f"{candidate_probability(j, settings.near):.2f} at {j}" for j in (0.6, 0.7, 0.8, 0.9))
        said.append(f"Near duplicates share a band with probability {', '.join(curve)} (Jaccard similarity).")
    defects = sum(sum(source["defective_lines"].values()) for source in content["sources"].values())
    if defects:
        said.append(
            f"{defects:,} lines hold no document and were passed over; preprocessing says what is wrong."
        )
    print("\n".join(said))
    if not any(source["documents"] for source in content["sources"].values()):
        raise DataError(
            f"No line of the {len(shards)} files holds a document with a text in its field "
            f"{options.text_field!r} (--text-field)."
        )


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    interrupted = "interrupted; the same command continues where it was"
    return run_tool(lambda: run(options), interrupted=interrupted, cleans_up=True)


if __name__ == "__main__":
    sys.exit(main())
