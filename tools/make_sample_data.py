"""Sample data in one command: a corpus of what this machine has installed, a tokenizer, and datasets.

    make_sample_data.py --output data/sample

Runs tools/make_sample_corpus.py, train_tokenizer.py and preprocess_dolma.py, a minute or two. Data that are
there stay as they are, unless an earlier try was interrupted, or --overwrite asks for others.
"""

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megads.command_line import run_tool
from megads.errors import DataError, EnvironmentSetupError

TOOLS = Path(__file__).resolve().parent
RECORD = "sample.json"
UNFINISHED: dict[str, Any] = {"unfinished": True}


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output", type=Path, default=Path("data/sample"), help="directory (default: %(default)s)")
    add("--mb", type=float, default=12, help="megabytes of text (default: %(default)s)")
    add("--vocab-size", type=int, default=4096, help="pieces of the tokenizer (default: %(default)s)")
    add("--overwrite", action="store_true", help="replace data that are there, unless they are the same")
    return parser.parse_args(list(arguments))


def main(arguments: Sequence[str]) -> int:
    options = parse_arguments(arguments)
    return run_tool(lambda: make(options.output, options.mb, options.vocab_size, options.overwrite))


def make(output: Path, mb: float, vocab_size: int, overwrite: bool) -> None:
    """The data in `output`, where they are not there yet. Raises DataError when a tool fails."""
    wanted, found = {"mb": mb, "vocab_size": vocab_size}, _found(output)
    if found is not None and found != UNFINISHED and (found == wanted or not overwrite):
        print(f"sample data: {output} is there already")
        return
    record, corpus, tokenizer = output / RECORD, output / "corpus", output / "tokenizer.model"
    try:
        output.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(UNFINISHED), encoding="utf-8")
        _remove_datasets(output, corpus)
    except OSError as error:
        raise EnvironmentSetupError(f"cannot write to {output}: {error}; choose another --output") from error
    _run("make_sample_corpus.py", "--output", corpus, "--mb", mb)
    _run("train_tokenizer.py", "--input", corpus, "--output", tokenizer, "--vocab-size", vocab_size)
    _run("preprocess_dolma.py", "--input-root", corpus, "--output-root", output, "--tokenizer", tokenizer)
    record.write_text(json.dumps(wanted), encoding="utf-8")


def _found(output: Path) -> dict[str, Any] | None:
    """What is in `output`: with which arguments it was made, {} for data of others, None for nothing."""
    try:
        return dict(json.loads((output / RECORD).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {} if (output / "tokenizer.model").exists() else None
    except (OSError, ValueError):
        return UNFINISHED


def _remove_datasets(output: Path, corpus: Path) -> None:
    """Those of an earlier corpus, which may have had more shards, and another tokenizer."""
    for source in corpus.glob("*"):
        for shard in (output / source.name).glob(f"{source.name}-[0-9]*"):
            shard.unlink()


def _run(name: str, *arguments: object) -> None:
    command = [sys.executable, str(TOOLS / name), *map(str, arguments), "--overwrite"]
    print(f"$ {shlex.join(command)}", flush=True)
    if code := subprocess.run(command, check=False).returncode:
        raise DataError(f"tools/{name} ended with exit code {code}; see what it said above")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
