"""Weave facts and questions into text: a corpus that teaches a small model to look things up.

    python tools/make_retrieval_corpus.py --text data/sample/corpus/licenses --output data/retrieval/corpus

The text gives sentences of plain words. OUTPUT/recall holds documents of them with facts ("The pass key of
Oslo is copper.") and, further on, their questions with the answers; OUTPUT/haystack holds sentences that
occur in no document, for tools/evaluate_retrieval.py. Dolma format. The result depends on the text and the
arguments only.
"""

import argparse
import gzip
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random

import orjson

from megads.command_line import run_tool
from megads.data.documents import read_texts
from megads.data.inputs import find_shards
from megads.data.needles import STATEMENT, check_statement, sentences_of, woven_text
from megads.errors import DataError
from megads.publish import publish_file

HELD_OUT_SHARE = 0.1
FEWEST_SENTENCES = 20
SENTENCES_PER_DOCUMENT = 200
SHARD_BYTES = 4_000_000


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--text", nargs="+", required=True, help="JSON lines to take sentences from")
    add("--output", type=Path, required=True, help="directory; a subdirectory for each of the two parts")
    add("--mb", type=float, default=6.0, help="megabytes of woven text (default: %(default)s)")
    add("--sentences", type=int, default=200, help="different ones at most (default: %(default)s)")
    add("--reach-words", type=int, default=60,
        help="how far back a question may reach (default: %(default)s)")  # fmt: skip
    add("--statement", default=STATEMENT, help="words of a fact (default: %(default)s)")
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--overwrite", action="store_true", help="replace a corpus that is there")
    options = parser.parse_args(arguments)
    if options.mb <= 0 or options.reach_words < 1 or options.sentences < FEWEST_SENTENCES:
        parser.error(f"--mb, --reach-words must be positive, --sentences at least {FEWEST_SENTENCES}")
    return options


def run(options: argparse.Namespace) -> None:
    check_statement(options.statement)
    directories = [options.output / name for name in ("recall", "haystack")]
    old = [file for directory in directories for file in directory.glob("*.json.gz")]
    if old and not options.overwrite:
        raise DataError(
            f"{options.output}: holds a corpus already; replace it with --overwrite or write elsewhere"
        )
    sentences = sorted(set(sentences_of(read_texts(shard.path for shard in find_shards(options.text)))))
    if len(sentences) < FEWEST_SENTENCES:
        raise DataError(
            f"{', '.join(options.text)}: {len(sentences)} sentences of plain words are less than "
            f"{FEWEST_SENTENCES}; give more text, of prose"
        )
    random = Random(options.seed)
    random.shuffle(sentences)
    del sentences[options.sentences :]
    held_out = max(1, round(HELD_OUT_SHARE * len(sentences)))
    for file in old:
        file.unlink()
    woven = _woven(sentences[held_out:], options, random)
    for directory, texts in zip(directories, (woven, _joined(sentences[:held_out])), strict=True):
        documents, text_bytes = write(directory, texts)
        print(f"{directory}: {documents:,} documents, {text_bytes / 1e6:.2f} MB")


def _woven(sentences: list[str], options: argparse.Namespace, random: Random) -> Iterator[str]:
    """Documents of many reaches, so that few samples lie across two of them."""
    left_bytes, reach = int(options.mb * 1e6), options.reach_words
    while left_bytes > 0:
        text = woven_text(sentences, options.statement, reach, 20 * reach, random)
        left_bytes -= len(text.encode())
        yield text


def _joined(sentences: list[str]) -> Iterator[str]:
    for first in range(0, len(sentences), SENTENCES_PER_DOCUMENT):
        yield "\n".join(sentences[first : first + SENTENCES_PER_DOCUMENT])


def write(directory: Path, texts: Iterator[str]) -> tuple[int, int]:
    """Write texts as shards of gzipped JSON lines; returns documents and bytes of text."""
    documents = total_bytes = shard = size = 0
    lines: list[bytes] = []

    def flush() -> None:
        nonlocal shard, size
        if lines:
            path = directory / f"{directory.name}-{shard:04d}.json.gz"
            publish_file(path, gzip.compress(b"".join(lines), 6, mtime=0))
            lines.clear()
            shard, size = shard + 1, 0

    for text in texts:
        record = {"id": f"{directory.name}-{documents}", "text": text, "source": directory.name}
        lines.append(orjson.dumps(record) + b"\n")
        documents, size = documents + 1, size + len(text.encode())
        total_bytes += len(text.encode())
        if size >= SHARD_BYTES:
            flush()
    flush()
    return documents, total_bytes


def main(arguments: list[str] | None = None) -> int:
    return run_tool(lambda: run(parse_arguments(arguments)))


if __name__ == "__main__":
    sys.exit(main())
