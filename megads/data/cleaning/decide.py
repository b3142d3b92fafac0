"""The last pass: from what all stages found to the removals of a shard, and a report of them.

A document that one stage drops is not counted by a later one, so the reasons add up. Cuts of several
stages are joined; a document of which nothing would be left is dropped.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from megads.data.cleaning import duplicates
from megads.data.cleaning.duplicates import Corpus
from megads.data.cleaning.scan import CONTAMINATED, CleaningSettings
from megads.data.removals import Removal, read_removals_header, removals_path, write_removals
from megads.errors import DataError
from megads.publish import publish_file

EXACT, NEAR, PARAGRAPH = "exact_duplicate", "near_duplicate", "duplicate_paragraph"
EXAMPLES = 3


@dataclass
class Count:
    """What one reason took: whole documents with their text, or characters of documents."""

    documents: int = 0
    text_bytes: int = 0
    documents_cut: int = 0
    characters_cut: int = 0


@dataclass
class ShardReport:
    """What was found in a shard; `examples` and `contaminated` have line and detail."""

    source: str
    name: str
    path: str
    documents: int
    text_bytes: int
    defects: dict[str, int]
    reasons: dict[str, Count] = field(default_factory=dict)
    examples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    contaminated: list[dict[str, Any]] = field(default_factory=list)

    def add(self, reason: str, line: int, detail: str) -> Count:
        examples = self.examples.setdefault(reason, [])
        if len(examples) < EXAMPLES:
            examples.append({"line": line, "detail": detail})
        return self.reasons.setdefault(reason, Count())


@dataclass(frozen=True)
class Stages:
    """Where the results of a run lie."""

    corpus: Corpus
    settings: CleaningSettings
    directory: Path
    removals: Path
    run: str
    partitions: int

    def equal(self) -> list[Path]:
        return self._of_partitions("documents")

    def candidates(self) -> list[Path]:
        return self._of_partitions("candidates")

    def paragraphs(self) -> list[Path]:
        return self._of_partitions("paragraphs")

    def near(self) -> Path:
        return self.directory / "near"

    def dropped_before(self, stage: str) -> Path:
        return self.directory / f"dropped_before_{stage}.npy"

    def load_dropped(self, stage: str) -> NDArray[np.bool_]:
        """Which documents earlier stages dropped [documents], mapped from the disk."""
        loaded: NDArray[np.bool_] = np.load(self.dropped_before(stage), mmap_mode="r")
        return loaded

    def report(self, shard: int) -> Path:
        scan = self.corpus.scans[shard]
        return self.directory / "reports" / scan.source / f"{scan.name}.json"

    def _of_partitions(self, name: str) -> list[Path]:
        return [self.directory / f"{name}-{partition:05}" for partition in range(self.partitions)]


def decide(stages: Stages, shard: int) -> ShardReport:
    """Publish the removals of a shard, unless they are there, and return the report of them."""
    scan = stages.corpus.scans[shard]
    path = removals_path(stages.removals, scan.source, scan.name)
    if (report := _finished(path, stages, shard)) is not None:
        return report
    entries, report = _entries(stages, shard)
    write_removals(
        path,
        input_file=f"{scan.source}/{scan.name}",
        input_bytes=scan.bytes,
        input_sha256=scan.sha256,
        documents=scan.documents,
        entries=entries,
        run=stages.run,
    )
    publish_file(stages.report(shard), orjson.dumps(asdict(report)))
    return report


def _finished(path: Path, stages: Stages, shard: int) -> ShardReport | None:
    """The report of an earlier, equal run that got as far as this shard."""
    try:
        if read_removals_header(path).run != stages.run:
            return None
        report = orjson.loads(stages.report(shard).read_bytes())
    except (DataError, OSError, orjson.JSONDecodeError):
        return None
    report["reasons"] = {reason: Count(**count) for reason, count in report["reasons"].items()}
    return ShardReport(**report)


def _entries(stages: Stages, shard: int) -> tuple[dict[int, Removal], ShardReport]:
    corpus = stages.corpus
    scan = corpus.scans[shard]
    lines, sizes = scan.lines(), scan.sizes()
    report = ShardReport(
        scan.source,
        scan.name,
        scan.path,
        scan.documents,
        int(sizes["bytes"].sum(dtype=np.int64)),
        scan.defects,
    )
    entries: dict[int, Removal] = {}
    cuts: dict[int, list[tuple[str, tuple[int, int]]]] = {}

    def drop(row: int, reason: str, detail: str) -> None:
        line = int(lines[row])
        entries[line] = Removal(reason)
        count = report.add(reason, line, detail)
        count.documents += 1
        count.text_bytes += int(sizes["bytes"][row])

    for row, verdict in scan.verdicts().items():
        if verdict.spans is not None:
            cuts[row] = [(verdict.rule, span) for span in verdict.spans]
            continue
        drop(row, verdict.rule, verdict.detail)
        if verdict.rule == CONTAMINATED:
            report.contaminated.append({"line": int(lines[row]), "detail": verdict.detail})
    for reason, results in ((EXACT, stages.equal()), (NEAR, [stages.near()])):
        for found in _found(stages, results, shard):
            wanted = len(report.examples.get(reason, ())) < EXAMPLES  # it takes a look at another file
            place = _place(corpus, int(found["first"])) if wanted else ""
            drop(int(found["document"] - corpus.starts[shard]), reason, place)
    for found in _found(stages, stages.paragraphs(), shard):
        row = int(found["document"] - corpus.starts[shard])
        cuts.setdefault(row, []).append((PARAGRAPH, (int(found["start"]), int(found["end"]))))
    for row, parts in sorted(cuts.items()):
        line = int(lines[row])
        if line in entries:
            continue  # what rules would cut of a document that is dropped anyway
        spans = _joined(span for _, span in parts)
        reason = "+".join(sorted({name for name, _ in parts}))
        if sum(end - start for start, end in spans) == sizes["characters"][row]:
            drop(row, reason, "nothing would be left")
            continue
        entries[line] = Removal(reason, spans)
        count = report.add(reason, line, f"{len(spans)} spans")
        count.documents_cut += 1
        count.characters_cut += sum(end - start for start, end in spans)
    return entries, report


def _found(stages: Stages, results: list[Path], shard: int) -> NDArray[Any]:
    return duplicates.of_shard([path for path in results if path.exists()], stages.corpus, shard)


def _joined(spans: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """The union of spans, in order; those that touch become one."""
    result: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(result[-1][1], end))
        else:
            result.append((start, end))
    return tuple(result)


def _place(corpus: Corpus, document: int) -> str:
    """SOURCE/NAME:LINE of the document that stays."""
    shard = int(corpus.shard_of(np.array([document]))[0])
    scan = corpus.scans[shard]
    row = document - int(corpus.starts[shard])
    line = int(np.fromfile(scan.directory / "lines", np.int64, count=1, offset=8 * row)[0])
    return f"{scan.source}/{scan.name}:{line}"
