"""Print what is in indexed datasets: documents and samples as text, with their boundaries and source.

  --document N ...    documents, numbered from 0 through all the datasets given
  --sample N ...      --seq-length tokens of the stored stream, as training cuts it (before it shuffles)
  --random K          K documents, chosen by --seed
  --find TEXT         the documents that hold a text

Ends of documents, the parts of fill-in-the-middle and the answers of conversations are marked. Source file
and line are looked up in the input, if it is where the record says.
"""

import argparse
import random
import sys
from collections.abc import Iterable
from pathlib import Path

from megads.command_line import run_tool
from megads.data.inspect import Collection, Piece, Place, source_of
from megads.data.stored import find_datasets
from megads.data.tokenizer import load_tokenizer


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("datasets", type=Path, nargs="+", help="prefixes, and directories of datasets")
    parser.add_argument("--tokenizer", required=True, help="the one they were made with")
    parser.add_argument("--eod-token", help="as it was given when they were made")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--document", type=int, nargs="+", metavar="N")
    what.add_argument("--sample", type=int, nargs="+", metavar="N")
    what.add_argument("--random", type=int, metavar="K")
    what.add_argument("--find", metavar="TEXT")
    parser.add_argument("--seq-length", type=int, default=4096, help="of samples (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of --random (default: %(default)s)")
    parser.add_argument("--max-matches", type=int, default=10, help="of --find (default: %(default)s)")
    parser.add_argument(
        "--max-characters", type=int, default=2000,
        help="of a document or sample; 0: all of it (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--no-source", action="store_true", help="do not look up file and line")
    options = parser.parse_args(arguments)
    if options.seq_length < 1:
        parser.error("--seq-length must be at least 1")
    if options.find == "":
        parser.error("--find needs a text")
    return options


def run(options: argparse.Namespace) -> None:
    tokenizer = load_tokenizer(options.tokenizer, eod_token=options.eod_token)
    collection = Collection(find_datasets(options.datasets), tokenizer)
    if options.sample is not None:
        for number in options.sample:
            show_sample(collection, number, options)
    elif options.find is not None:
        show_matches(collection, options)
    elif options.document is not None:
        for number in options.document:
            show_document(collection, collection.place(number), options)
    else:
        # Asked for nothing in particular: a few documents, to get an impression.
        count = min(3 if options.random is None else options.random, collection.documents)
        for number in sorted(random.Random(options.seed).sample(range(collection.documents), count)):
            show_document(collection, collection.place(number), options)
    print(
        f"{len(collection.datasets):,} datasets, {collection.documents:,} documents, "
        f"{collection.tokens:,} tokens"
    )


def show_document(collection: Collection, place: Place, options: argparse.Namespace) -> None:
    ids = place.dataset.document(place.number)
    title = f"document {place.overall:,}: {place.dataset.prefix}, {place.number:,}; {ids.size:,} tokens"
    print_title(title, [] if options.no_source else [source_of(place, collection.tokenizer)])
    print_pieces(collection.document_pieces(place), options.max_characters)


def show_sample(collection: Collection, number: int, options: argparse.Namespace) -> None:
    parts = collection.sample(number, options.seq_length)
    lines = []
    for place, ids in parts:
        source = "" if options.no_source else f"; {source_of(place, collection.tokenizer)}"
        lines.append(f"{ids.size:,} tokens of document {place.overall:,}{source}")
    print_title(f"sample {number:,}: {options.seq_length:,} tokens and one more, for the last label", lines)
    pieces = (piece for _, ids in parts for piece in collection.pieces(ids))
    print_pieces(pieces, options.max_characters)


def show_matches(collection: Collection, options: argparse.Namespace) -> None:
    count = 0
    for match in collection.find(options.find):
        count += 1
        if count > options.max_matches:
            print(f"and more; --max-matches is {options.max_matches}")
            break
        place = match.place
        source = [] if options.no_source else [source_of(place, collection.tokenizer)]
        print_title(f"document {place.overall:,}: {place.dataset.prefix}, {place.number:,}", source)
        print(f"…{match.before}{mark(match.found)}{match.after}…\n")
    if not count:
        print(f"{options.find!r} is in no document")


def print_title(title: str, lines: list[str]) -> None:
    print(f"=== {title}")
    for line in lines:
        print(f"    {line}")


def print_pieces(pieces: Iterable[Piece], max_characters: int) -> None:
    left = max_characters or sys.maxsize
    for piece in pieces:
        if piece.mark is not None:
            print(mark(f"⟦{piece.mark}⟧"), end="\n" if piece.mark == "end of document" else "")
            continue
        print(piece.text[:left], end="")
        left -= len(piece.text)
        if left < 0:
            print(f"… ({-left:,} characters of this part not shown; --max-characters)")
            break
    print("\n")


def mark(text: str) -> str:
    """In reverse, on a terminal."""
    return f"\033[7m{text}\033[0m" if sys.stdout.isatty() else text


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    return run_tool(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
