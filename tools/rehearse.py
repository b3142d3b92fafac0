"""Write a configuration that goes through all phases of a recipe at the size of another configuration.

    python tools/rehearse.py configs/deepseek_v3_671b.json --like configs/debug.json --output rehearsal.json

Schedules and balancing are the recipe's, shrunk to `--tokens` and `--batch-size`; the model, the data and
the layout are those of `--like`. So a change of batch size, learning rate or balancing in a run of months is
seen on a laptop first, stops and resumes included. Needs no torch.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megads.command_line import run_tool
from megads.config.loader import load_config
from megads.config.rehearsal import rehearsal
from megads.config.resolve import planned_hardware, run_length
from megads.config.validate import check


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", help="the configuration whose schedules are wanted")
    parser.add_argument("--like", default="configs/debug.json", help="the configuration to run them on")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="length of the run")
    parser.add_argument("--batch-size", type=int, default=20, help="sequences per step at the end")
    parser.add_argument("--output", required=True, type=Path, help="the configuration to write")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Write the configuration; one that cannot run is refused, and the file left out."""
    recipe, like = load_config(options.recipe), load_config(options.like)
    settings = rehearsal(recipe, like, options.tokens, options.batch_size)
    name = f"{recipe.experiment_name}_rehearsal"
    settings |= {"experiment_name": name, "output_dir": f"outputs/{name}"}
    config = load_config(options.like, settings)
    check(config, planned_hardware(config)[0], cuda=False)
    extends = os.path.relpath(Path(options.like).resolve(), options.output.resolve().parent)
    content = {"extends": extends} | _nested(settings)
    options.output.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    planned, steps = run_length(recipe)[0], run_length(config)[1]
    tokens = f"the {planned:,} tokens of {recipe.experiment_name} in {options.tokens:,}"
    print(f"{options.output}: {tokens}, {steps:,} steps")


def _nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in settings.items():
        *sections, name = path.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    return tree


def main(arguments: list[str] | None = None) -> int:
    return run_tool(lambda: run(parse_arguments(arguments)))


if __name__ == "__main__":
    sys.exit(main())
