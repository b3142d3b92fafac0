"""Train a sentencepiece BPE vocabulary on Dolma-format files.

The vocabulary can spell any text and gives it back unchanged: unknown characters become bytes, nothing
is normalized, digits stand alone. The same files and settings give the same model.
"""

import argparse
import sys
import time

from megads.command_line import local_path, positive_number, run_tool
from megads.data.inputs import find_shards
from megads.data.tokenizer import load_tokenizer
from megads.data.tokenizer_training import sample_texts, train_sentencepiece
from megads.errors import DataError


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="PATH",
        help="files, directories, globs and URLs of JSON lines",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=local_path, required=True, help="the model, usually ending in .model"
    )
    parser.add_argument(
        "--vocab-size", type=int, default=4096, help="pieces, special ones included (default: %(default)s)"
    )
    parser.add_argument(
        "--max-mb",
        type=positive_number,
        default=64,
        help="megabytes of text to train on, spread over the files (default: %(default)s)",
    )
    parser.add_argument(
        "--character-coverage",
        type=float,
        default=0.9995,
        help="share of characters with a piece of their own, bytes for the rest (default: %(default)s)",
    )
    parser.add_argument("--text-field", default="text", help="field of the text (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace a model that is there")
    options = parser.parse_args(arguments)
    if options.vocab_size < 1:
        parser.error("--vocab-size must be at least 1")
    if not 0 < options.character_coverage <= 1:
        parser.error("--character-coverage is a share, above 0 and at most 1")
    return options


def train(options: argparse.Namespace) -> None:
    if options.output.is_dir():
        raise DataError(
            f"{options.output}: a directory; name the file of the model, usually ending in .model."
        )
    if options.output.exists() and not options.overwrite:
        raise DataError(f"{options.output}: exists already. Replace it with --overwrite or write elsewhere.")
    begun = time.monotonic()
    files = find_shards(options.input)
    print(
        f"Training {options.vocab_size:,} pieces on up to {options.max_mb:g} MB of {len(files)} files ...",
        flush=True,
    )
    trained = train_sentencepiece(
        sample_texts(files, int(options.max_mb * 1e6), options.text_field),
        options.output,
        options.vocab_size,
        character_coverage=options.character_coverage,
    )
    tokenizer = load_tokenizer(trained.path)
    print(
        f"{trained.path}: {tokenizer.vocab_size:,} pieces from {trained.text_bytes / 1e6:.1f} MB in "
        f"{time.monotonic() - begun:.1f} s, sha256 {tokenizer.sha256[:12]}…"
    )


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    return run_tool(lambda: train(options))


if __name__ == "__main__":
    sys.exit(main())
