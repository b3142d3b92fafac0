"""Cleaning a corpus: scans of its shards, duplicates over all of them, then a removals file for each.

Everything between is kept in a work directory, by what it depends on. A run that was killed is
started again as it was and does only what is missing; one whose input changed scans what changed. The
removals depend on settings and input alone, not on the number of workers or of interruptions.
"""

import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import orjson

from megads.data.cleaning import duplicates, keys
from megads.data.cleaning.decide import ShardReport, Stages, decide
from megads.data.cleaning.decontaminate import EvaluationIndex
from megads.data.cleaning.duplicates import Corpus
from megads.data.cleaning.parallel import Workers
from megads.data.cleaning.scan import CleaningSettings, is_scanned, read_scan, scan_shard
from megads.data.inputs import InputShard
from megads.errors import DataError
from megads.publish import open_locked

SCAN_VERSION = 1
"""To be raised when the same settings come to find something else."""

Progress = Callable[[str, float], None]
"""Called with the name of the stage and how much of it is done, 0 to 1."""


@dataclass(frozen=True)
class CleaningResult:
    """Reports of all shards, in order, and what they came from."""

    run: str
    reports: tuple[ShardReport, ...]


@dataclass(frozen=True)
class _ScanContext:
    directory: Path
    settings: CleaningSettings
    index: EvaluationIndex | None
    partitions: int
    digest: str


def clean(
    shards: Sequence[InputShard],
    removals: Path,
    settings: CleaningSettings,
    *,
    work: Path,
    index: EvaluationIndex | None = None,
    partitions: int | None = None,
    workers: int = 1,
    on_progress: Progress = lambda stage, share: None,
) -> CleaningResult:
    """Write a removals file for every shard under `removals`.

    First come is what stays of duplicates: the order of `shards` and the lines in them decide.
    `partitions`: a power of two; chosen by the size of the input without it. Raises DataError for
    input that cannot be read, two shards of one name, and a work directory in use.
    """
    _check_names(shards)
    partitions = partitions or keys.partition_count(sum(shard.bytes for shard in shards))
    description = orjson.dumps([SCAN_VERSION, partitions, asdict(settings)])
    digest = hashlib.sha256(description).hexdigest()
    with _only_one(work), Workers(workers) as processes:
        context = _ScanContext(work / "scan", settings, index, partitions, digest)
        _scan(context, shards, processes, on_progress)
        scans = [read_scan(_scan_directory(context.directory, shard), shard) for shard in shards]
        corpus = Corpus.of(scans)
        of_input = orjson.dumps([digest, [(scan.source, scan.name, scan.sha256) for scan in scans]])
        run = hashlib.sha256(of_input).hexdigest()
        stages = Stages(corpus, settings, work / "stages" / run[:16], removals, run, partitions)
        _find_duplicates(stages, processes, on_progress)
        reports: list[ShardReport | None] = [None] * len(scans)
        ended = processes.each(decide, stages, range(len(scans)))
        for done, (number, report) in enumerate(ended, 1):
            reports[number] = report
            on_progress("writing", done / len(scans))
        for other in stages.directory.parent.iterdir():
            if other != stages.directory:
                shutil.rmtree(other)  # of other input or settings, whose scans are gone too
    return CleaningResult(run, tuple(report for report in reports if report is not None))


def _scan(
    context: _ScanContext, shards: Sequence[InputShard], processes: Workers, on_progress: Progress
) -> None:
    missing = [
        shard
        for shard in shards
        if not is_scanned(_scan_directory(context.directory, shard), shard, context.digest)
    ]
    missing.sort(key=lambda shard: -shard.bytes)  # so that no long one is left for the end
    total_bytes = sum(shard.bytes for shard in missing) or 1
    done_bytes = 0
    on_progress("scanning", 0.0)
    for number, _ in processes.each(_scan_one, context, missing):
        done_bytes += missing[number].bytes
        on_progress("scanning", done_bytes / total_bytes)


def _scan_one(context: _ScanContext, shard: InputShard) -> None:
    directory = _scan_directory(context.directory, shard)
    scan_shard(shard, directory, context.settings, context.index, context.partitions, context.digest)


def _scan_directory(root: Path, shard: InputShard) -> Path:
    return root / shard.directory / (shard.name + ".scan")


def _find_duplicates(stages: Stages, processes: Workers, on_progress: Progress) -> None:
    def over_partitions(name: str, work: Callable[[Stages, int], None]) -> None:
        ended = processes.each(work, stages, range(stages.partitions))
        for done, _ in enumerate(ended, 1):
            on_progress(name, done / stages.partitions)

    settings, corpus = stages.settings, stages.corpus
    if settings.exact_documents:
        over_partitions("equal documents", _equal_documents)
    if settings.near is not None:
        _keep_dropped(stages, "near")
        over_partitions("near duplicates", _candidates)
        cluster = partial(duplicates.near_duplicates, corpus, stages.candidates(), settings.near)
        duplicates.keep_repeated(stages.near(), corpus, cluster)
    if settings.min_paragraph_characters:
        _keep_dropped(stages, "paragraphs")
        over_partitions("equal paragraphs", _equal_paragraphs)


def _keep_dropped(stages: Stages, before: str) -> None:
    """Which documents the stages so far dropped, for the next one."""
    so_far = [path for path in (*stages.equal(), stages.near()) if path.exists()]
    mark = partial(duplicates.all_documents, so_far, stages.corpus)
    duplicates.keep_array(stages.dropped_before(before), mark)


def _equal_documents(stages: Stages, partition: int) -> None:
    duplicates.keep_repeated(
        stages.equal()[partition],
        stages.corpus,
        partial(duplicates.find_documents, stages.corpus, partition),
    )


def _candidates(stages: Stages, partition: int) -> None:
    dropped = stages.load_dropped("near")
    duplicates.keep_array(
        stages.candidates()[partition],
        partial(duplicates.find_candidates, stages.corpus, partition, dropped),
    )


def _equal_paragraphs(stages: Stages, partition: int) -> None:
    dropped = stages.load_dropped("paragraphs")
    duplicates.keep_repeated(
        stages.paragraphs()[partition],
        stages.corpus,
        partial(duplicates.find_paragraphs, stages.corpus, partition, dropped),
    )


def _check_names(shards: Sequence[InputShard]) -> None:
    seen: dict[tuple[str, str], str] = {}
    for shard in shards:
        other = seen.setdefault((shard.directory, shard.name), shard.path)
        if other != shard.path:
            raise DataError(
                f"{other} and {shard.path}: both are {shard.directory}/{shard.name}, so their removals would "
                "be one file. Rename one, or clean them as different sources."
            )


@contextmanager
def _only_one(work: Path) -> Iterator[None]:
    """Hold the work directory; the lock ends with the process, however that ends."""
    try:
        work.mkdir(parents=True, exist_ok=True)
        with open_locked(work / "lock", or_unlocked=True):
            yield
    except BlockingIOError as error:
        raise DataError(f"{work}: another cleaning run works here; wait for it to end.") from error
    except OSError as error:  # the disk is full, say; errors of reading come as DataError
        raise DataError(
            f"{work}: cannot be written: {error}. What is finished is kept; run again once there is room."
        ) from error
