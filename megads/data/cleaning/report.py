"""What cleaning took out of each source, and why: a table for people, `report.json` for programs."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import orjson

from megads import __version__
from megads.data.cleaning.decide import EXAMPLES, Count, ShardReport
from megads.data.cleaning.run import CleaningResult
from megads.data.cleaning.scan import CleaningSettings
from megads.publish import publish_file

REPORT_FORMAT = "megads-cleaning-1"


def write_report(
    directory: Path, result: CleaningResult, settings: CleaningSettings, evaluation: dict[str, Any] | None
) -> dict[str, Any]:
    """Publish `report.json`, and `contaminated.jsonl` where documents met an evaluation set."""
    by_source: dict[str, list[ShardReport]] = {}
    for report in result.reports:
        by_source.setdefault(report.source, []).append(report)
    content = {
        "format": REPORT_FORMAT,
        "megads_version": __version__,
        "run": result.run,
        "settings": asdict(settings),
        "evaluation": evaluation,
        "sources": {source: _source(reports) for source, reports in by_source.items()},
    }
    publish_file(directory / "report.json", orjson.dumps(content, option=orjson.OPT_INDENT_2) + b"\n")
    if evaluation is not None:
        contaminated = [
            {"shard": f"{report.source}/{report.name}", **entry}
            for report in result.reports
            for entry in report.contaminated
        ]
        lines = b"".join(orjson.dumps(entry) + b"\n" for entry in contaminated)
        publish_file(directory / "contaminated.jsonl", lines)
    return content


def _source(reports: Sequence[ShardReport]) -> dict[str, Any]:
    """Documents in = documents kept + dropped; what a reason cut is in the kept ones."""
    reasons: dict[str, Count] = {}
    examples: dict[str, list[dict[str, Any]]] = {}
    defects: Counter[str] = Counter()
    for report in reports:
        defects.update(report.defects)
        for reason, count in report.reasons.items():
            total = reasons.setdefault(reason, Count())
            total.documents += count.documents
            total.text_bytes += count.text_bytes
            total.documents_cut += count.documents_cut
            total.characters_cut += count.characters_cut
        for reason, some in report.examples.items():
            shown = examples.setdefault(reason, [])
            shown += [{"shard": report.name, **example} for example in some[: EXAMPLES - len(shown)]]
    documents = sum(report.documents for report in reports)
    text_bytes = sum(report.text_bytes for report in reports)
    return {
        "shards": len(reports),
        "documents": documents,
        "text_bytes": text_bytes,
        "documents_kept": documents - sum(count.documents for count in reasons.values()),
        "text_bytes_kept_before_cuts": text_bytes - sum(count.text_bytes for count in reasons.values()),
        "defective_lines": dict(sorted(defects.items())),
        "reasons": {
            reason: {**asdict(count), "examples": examples[reason]}
            for reason, count in sorted(reasons.items())
        },
    }


HEADINGS = ("source", "reason", "documents", "% of source", "MB", "cut in documents", "characters cut")


def table_sections(content: dict[str, Any]) -> list[list[list[str]]]:
    """A section per source, a row per reason, under HEADINGS."""
    return [_section(name, source) for name, source in content["sources"].items()]


def _section(name: str, source: dict[str, Any]) -> list[list[str]]:
    total = source["documents"] or 1
    rows = [
        [
            name,
            reason,
            f"{count['documents']:,}",
            f"{100 * count['documents'] / total:.2f}",
            f"{count['text_bytes'] / 1e6:,.2f}",
            f"{count['documents_cut']:,}",
            f"{count['characters_cut']:,}",
        ]
        for reason, count in source["reasons"].items()
    ]
    for label, documents, text_bytes in (
        ("kept", source["documents_kept"], source["text_bytes_kept_before_cuts"]),
        ("of", source["documents"], source["text_bytes"]),
    ):
        share = f"{100 * documents / total:.2f}"
        rows.append([name, label, f"{documents:,}", share, f"{text_bytes / 1e6:,.2f}", "", ""])
    return rows
