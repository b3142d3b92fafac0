"""A run of preprocessing: many shards, of which some are done, on some workers, within a quota.

Which shard is converted by whom, in what order, and in how many runs, changes nothing in the output.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from megads.data.finished import find_finished
from megads.data.recipe import Recipe
from megads.data.selection import describe
from megads.data.shard_workers import Converted, convert_shards
from megads.data.shards import Shard
from megads.data.tokenizer import tokenizer_sha256
from megads.data.work_division import check_prefixes
from megads.errors import DataError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is: bytes of all its input, of that read or done before, of text tokenized now."""

    input_bytes: int
    input_bytes_done: int
    text_bytes: int


@dataclass
class Summary:
    """What became of a number of shards; counts cover those that were done before."""

    name: str
    shards: int = 0
    done_before: int = 0
    damaged: int = 0
    documents_in: int = 0
    documents: int = 0
    quarantined: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    text_bytes: int = 0
    fim_documents: int = 0
    """Rearranged for fill-in-the-middle."""
    converted_bytes: int = 0
    """Of text, in this run."""
    converting_seconds: float = 0.0
    """Of all processes together."""
    peak_memory_bytes: int = 0

    def add(self, record: dict[str, Any], converted: Converted | None = None) -> None:
        self.shards += 1
        self.damaged += record["damaged"] is not None
        for name in ("documents_in", "documents", "tokens", "text_bytes"):
            setattr(self, name, getattr(self, name) + record[name])
        self.fim_documents += record["fim"]["documents"]
        self.quarantined.update(record["quarantined"])
        self.dropped.update(record["dropped"])
        if converted is None:
            self.done_before += 1
            return
        self.converted_bytes += record["text_bytes"]
        self.converting_seconds += converted.seconds
        self.peak_memory_bytes = max(self.peak_memory_bytes, converted.peak_memory_bytes)


def preprocess(
    shards: Sequence[Shard],
    recipe: Recipe,
    *,
    workers: int = 1,
    overwrite: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
) -> dict[str, Summary]:
    """Convert the shards that are not done yet, in the order given; returns a summary per source.

    On any error the shards in work leave nothing, and those that are done stay for the next run.
    Raises DataError for what `find_finished` and `convert_shard` refuse, and when the files that could
    not be read hold a larger share of the bytes than the quota. (Of the lines, no shard may exceed it,
    so neither do all together.)
    """
    check_prefixes(shards)
    settings = recipe.settings(tokenizer_sha256(recipe.tokenizer))
    run = _Run(shards, recipe, on_progress)
    waiting = []
    for shard in shards:
        record = find_finished(shard, recipe, settings, overwrite=overwrite)
        if record is None:
            waiting.append(shard)
        else:
            run.was_done(shard, record)
    convert_shards(waiting, recipe, workers, run.tell, run.advance, run.converted)
    return run.summaries()


class _Run:
    """The books of a run."""

    def __init__(
        self, shards: Sequence[Shard], recipe: Recipe, on_progress: Callable[[Progress], None] | None
    ) -> None:
        self._recipe = recipe
        self._on_progress = on_progress
        self._input_bytes = sum(shard.input.bytes for shard in shards)
        self._done_bytes = self._text_bytes = self._damaged_bytes = 0
        self._made_of: dict[str, list[str]] = {}
        self._in_work: dict[Shard, tuple[int, int]] = {}
        self._sources = {shard.input.source: Summary(shard.input.source) for shard in shards}

    def was_done(self, shard: Shard, record: dict[str, Any]) -> None:
        self._count(shard, record, None)

    def advance(self, shard: Shard, input_bytes: int, text_bytes: int) -> None:
        self._in_work[shard] = (input_bytes, text_bytes)
        self.tell()

    def converted(self, done: Converted) -> None:
        self._in_work.pop(done.shard, None)
        self._text_bytes += done.record["text_bytes"]
        self._count(done.shard, done.record, done)
        self.tell()

    def _count(self, shard: Shard, record: dict[str, Any], converted: Converted | None) -> None:
        self._done_bytes += shard.input.bytes
        if record["documents"]:
            self._made_of.setdefault(record["input"]["sha256"], []).append(shard.input.path)
        self._sources[shard.input.source].add(record, converted)
        if record["damaged"] is None:
            return
        logger.warning("Nothing was taken of a damaged file: %s", record["damaged"])
        self._damaged_bytes += shard.input.bytes
        quota = self._recipe.quarantine_quota
        if quota is not None and self._damaged_bytes > quota * self._input_bytes:
            raise DataError(
                f"{self._damaged_bytes:,} of {self._input_bytes:,} bytes of input are in files that cannot "
                f"be read to their end, more than the quota of {quota:g}. The last one: {record['damaged']} "
                "Mend them, or raise --quarantine-quota."
            )

    def tell(self) -> None:
        if self._on_progress:
            reading, tokenizing = (sum(part) for part in zip(*self._in_work.values(), (0, 0), strict=True))
            self._on_progress(
                Progress(self._input_bytes, self._done_bytes + reading, self._text_bytes + tokenizing)
            )

    def summaries(self) -> dict[str, Summary]:
        for name, summary in self._sources.items():
            if summary.documents == 0:
                logger.warning(
                    "Source %s has no document: of %d lines, quarantined: %s; dropped: %s.",
                    name,
                    summary.documents_in,
                    describe(summary.quarantined) or "none",
                    describe(summary.dropped) or "none",
                )
        for paths in filter(lambda paths: len(paths) > 1, self._made_of.values()):
            logger.warning(
                "These %d files have the same content, each document comes as often: %s. Leave out all but "
                "one, or clean with tools/clean_dolma.py.",
                len(paths),
                ", ".join(sorted(paths)[:5]) + (", ..." if len(paths) > 5 else ""),
            )
        return self._sources


def total_of(name: str, summaries: Iterable[Summary]) -> Summary:
    """The sum of summaries, under a name of its own."""
    total = Summary(name)
    for part in summaries:
        for count in vars(part):
            if count == "peak_memory_bytes":
                total.peak_memory_bytes = max(total.peak_memory_bytes, part.peak_memory_bytes)
            elif count != "name":
                setattr(total, count, getattr(total, count) + getattr(part, count))
    return total
