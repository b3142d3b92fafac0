"""Measure retrieval: how often a checkpoint's model finds a fact in a haystack, by length and depth.

    python tools/evaluate_retrieval.py --checkpoint outputs/run/checkpoints --text corpus/haystack \\
        --lengths 128,256,512 --output retrieval.png

Prompts of exactly these lengths in tokens hold one fact ("The pass key of Oslo is copper.") at one of
--depths places between sentences of the text, and end with its question. Prints the share that is answered
as a table, and writes it as a heat map (PNG) and as JSON beside it. Runs in one process, whatever layout
trained the model.

Settings of the checkpoint can be changed by any flag of pretrain_megads.py: YaRN on weights trained without,

    ... --model.mla.rope_scaling.factor 4 --model.mla.rope_scaling.original_max_position_embeddings 128 \\
        --max-position-embeddings 512
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from megads.command_line import run_tool
from megads.config.flags import Arguments, parse_flags
from megads.data.documents import read_texts
from megads.data.inputs import find_shards
from megads.data.needles import STATEMENT, Haystack, check_statement, sentences_of
from megads.data.tokenizer import Tokenizer, load_tokenizer
from megads.errors import ConfigError, DataError
from megads.publish import publish_file
from megads.train.retrieval_figure import Result, draw, read_result, table

if TYPE_CHECKING:
    from megads.train.retrieval import Evaluated

MAX_SENTENCES = 20_000


@dataclass(frozen=True)
class Options:
    """What is measured, and the settings to change."""

    own: argparse.Namespace
    settings: Arguments


def parse_arguments(arguments: list[str] | None) -> Options:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--checkpoint", required=True, help="a checkpoint, or a directory of them: its newest")
    add("--text", nargs="+", required=True, help="JSON lines with the haystack's sentences")
    add("--lengths", type=_lengths, help="tokens, comma-separated (default: a quarter, half and all of "
        "model.mla.max_context_length)")  # fmt: skip
    add("--depths", type=int, default=5, help="places from start to end (default: %(default)s)")
    add("--samples", type=int, default=50, help="prompts per length and depth (default: %(default)s)")
    add("--seed", type=int, default=0, help="of names, values and sentences (default: %(default)s)")
    add("--statement", default=STATEMENT, help="words of a fact (default: %(default)s)")
    add("--title", help="of the heat map (default: the checkpoint)")
    add("--beside", type=Path, nargs="+", default=[], metavar="JSON",
        help="earlier results, drawn to the left of this one")  # fmt: skip
    add("--output", type=Path, default=Path("retrieval.png"), help="default: %(default)s")
    own, rest = parser.parse_known_args(arguments)
    if own.depths < 1 or own.samples < 1:
        parser.error("--depths and --samples must be at least 1")
    if own.output.suffix != ".png":
        parser.error("--output must end in .png; the JSON is written beside it")
    settings = parse_flags(rest)
    if settings.config is not None or settings.dry_run:
        parser.error("the configuration is the checkpoint's: no --config and no --dry-run")
    return Options(own, settings)


def _lengths(text: str) -> tuple[int, ...]:
    try:
        lengths = tuple(int(word) for word in text.split(","))
    except ValueError:
        lengths = ()
    if not lengths or min(lengths) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of lengths such as 128,256,512")
    return lengths


def run(options: Options) -> None:
    own = options.own
    check_statement(own.statement)
    earlier = [read_result(path) for path in own.beside]
    sentences = _sentences(own.text)

    import torch

    from megads.mcore.compat import quiet_megatron

    quiet_megatron()
    from megads.mcore.groups import destroy_process_groups
    from megads.train.retrieval import Grid, accuracy_by_length_and_depth, load_evaluated

    evaluated = load_evaluated(
        own.checkpoint, options.settings.overrides, options.settings.origins, cuda=torch.cuda.is_available()
    )
    try:
        reach = evaluated.config.model.mla.max_context_length
        lengths = own.lengths or tuple(sorted({max(1, reach // 4), max(1, reach // 2), reach}))
        _check_reach(lengths, reach)
        grid = Grid(lengths, own.depths, own.samples, own.seed)
        haystack = Haystack(_tokenizer(evaluated), sentences, own.statement)
        accuracy = accuracy_by_length_and_depth(evaluated.predict, haystack, grid)
    finally:
        destroy_process_groups()
    title = own.title or evaluated.info.path.name
    result = Result(title, grid.lengths, grid.depth_shares, accuracy)
    print(table(result))
    facts = _facts(evaluated, options)
    own.output.parent.mkdir(parents=True, exist_ok=True)
    publish_file(
        own.output.with_suffix(".json"), orjson.dumps(result.as_dict() | facts, option=orjson.OPT_INDENT_2)
    )
    draw([*earlier, result], own.output)
    print(f"{own.output} and {own.output.with_suffix('.json').name}")


def _sentences(paths: list[str]) -> list[str]:
    sentences: list[str] = []
    for sentence in sentences_of(read_texts(shard.path for shard in find_shards(paths))):
        sentences.append(sentence)
        if len(sentences) == MAX_SENTENCES:
            break
    return sentences


def _check_reach(lengths: tuple[int, ...], reach: int) -> None:
    if max(lengths) > reach:
        raise ConfigError(
            f"--lengths: {max(lengths)} tokens are more than the model is built for, "
            f"model.mla.max_context_length = {reach}. Extend it with YaRN (--model.mla.rope_scaling.factor, "
            "--model.mla.rope_scaling.original_max_position_embeddings and --max-position-embeddings), or "
            f"say with --max-position-embeddings {max(lengths)} alone that its RoPE is to be measured beyond "
            "what it was trained for"
        )


def _tokenizer(evaluated: "Evaluated") -> Tokenizer:
    path = evaluated.config.data.tokenizer_path
    if path is None:
        raise ConfigError("data.tokenizer_path: the checkpoint names no tokenizer; give --tokenizer-model")
    tokenizer = load_tokenizer(path)
    trained_with = evaluated.record.get("tokenizer_sha256")
    if trained_with not in (None, tokenizer.sha256):
        raise DataError(
            f"{path} is not the tokenizer that the model was trained with (its SHA-256 differs): give "
            "that one with --tokenizer-model"
        )
    return tokenizer


def _facts(evaluated: "Evaluated", options: Options) -> dict[str, Any]:
    """What was evaluated how, for the JSON."""
    own = options.own
    return {
        "checkpoint": str(evaluated.info.path),
        "step": evaluated.info.step,
        "tokens": evaluated.record["tokens"],
        "rope_scaling": evaluated.config.model.model_dump(mode="json")["mla"]["rope_scaling"],
        "changed_settings": options.settings.overrides,
        "statement": own.statement,
        "samples": own.samples,
        "seed": own.seed,
    }


def main(arguments: list[str] | None = None) -> int:
    return run_tool(lambda: run(parse_arguments(arguments)))


if __name__ == "__main__":
    sys.exit(main())
