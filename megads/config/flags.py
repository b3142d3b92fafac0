"""The command line, generated from the schema: every leaf has a flag, Megatron-LM's names work too.

`--training.learning_rate 3e-4` and `--lr 3e-4` are the same. Booleans need no value
(`--training.use_mtp`), have a negation (`--no-training.use_mtp`) and accept `true` and `false`. Lists
and objects are JSON text. Names are never completed: what is not a flag is an error.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import PurePath
from typing import Any, NoReturn

from megads.config.schema import Config
from megads.config.tree import Leaf, get, leaf_by_path, leaves
from megads.errors import ConfigError

GENERAL = ("config", "dry_run", "world_size", "nproc_per_node", "stage")  # flags that are no settings


@dataclass(frozen=True)
class Arguments:
    """A parsed command line: `load_config(arguments.config, arguments.overrides, arguments.origins)`.

    `world_size` is the number of processes to plan for in a dry run; None: see
    `resolve.planned_hardware`. `nproc_per_node` is the number to fork; None: this process is one of those
    that a launcher has started, or the only one. `stage` is the only stage to run; None: all.
    """

    config: str | None
    dry_run: bool
    world_size: int | None
    nproc_per_node: int | None = None
    stage: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)


def parse_flags(argv: Sequence[str], program: str = "pretrain_megads.py") -> Arguments:
    """Reads a command line without its first word. Raises ConfigError; `--help` prints and exits."""
    parser = build_parser(program)
    known, unknown = parser.parse_known_args(list(argv))
    if unknown:
        raise ConfigError("\n".join(_unknown(word, parser) for word in unknown))
    values = vars(known)
    origins = values.pop("origins", {})
    general = {name: values.pop(name) for name in GENERAL}
    return Arguments(**general, overrides=values, origins=origins)


def build_parser(program: str = "pretrain_megads.py") -> argparse.ArgumentParser:
    """The parser, its options grouped by section."""
    parser = _Parser(
        prog=program,
        description="Pretrain a DeepSeek-V3-style model (MLA + MoE + MTP) on Megatron-Core.",
        epilog="Precedence: default < --config < a stage's settings < flags. Every flag is also a JSON key "
        "of that path.",
        formatter_class=_Formatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    general = parser.add_argument_group("general")
    general.add_argument(
        "--config", metavar="PATH", default=None, help="JSON configuration; may hold comments"
    )
    general.add_argument(
        "--dry-run", action="store_true", default=False, help="print what would run, and exit"
    )
    general.add_argument(
        "--world-size", type=int, metavar="N", default=None,
        help="processes that --dry-run plans for; default: those the configuration asks for",
    )  # fmt: skip
    general.add_argument(
        "--nproc-per-node", type=int, metavar="N", default=None,
        help="run N processes on this machine, without a launcher",
    )  # fmt: skip
    general.add_argument("--stage", metavar="NAME", default=None, help="run only this one of the stages")
    groups = {"": general}
    defaults = Config()
    for leaf in leaves():
        section = leaf.path.rpartition(".")[0]
        if section not in groups:
            groups[section] = parser.add_argument_group(section)
        _add(groups[section], leaf, get(defaults, leaf.path))
    return parser


def _add(group: Any, leaf: Leaf, default: Any) -> None:
    names = list(dict.fromkeys([f"--{leaf.path}", *leaf.flags]))
    text = _help(leaf, default)
    common = {"dest": leaf.path, "metavar": _metavar(leaf)}
    if leaf.path == "data.sources":
        names.remove("--data-path")
        words = "the blend as in Megatron-LM: prefixes, or a weight before every prefix"
        group.add_argument(
            "--data-path", action=_DataPath, nargs="+", dest=leaf.path, metavar="WEIGHT PREFIX", help=words
        )
    optional = "?" if leaf.is_bool or True in leaf.choices else None
    group.add_argument(*names, action=_Setting, nargs=optional, help=text, **common)
    if leaf.is_bool:
        negations = [f"--no-{name[2:]}" for name in names]
        group.add_argument(*negations, action=_Negation, nargs=0, dest=leaf.path, help=argparse.SUPPRESS)


def _help(leaf: Leaf, default: Any) -> str:
    text = leaf.field.description or ""
    details = [f"default: {json.dumps(default, default=lambda value: value.model_dump())}"]
    if leaf.unit:
        details.append(f"unit: {leaf.unit}")
    if leaf.source:
        details.append(f"source: {leaf.source}")
    # argparse formats help with %.
    return f"{text} ({'; '.join(details)})".replace("%", "%%")


def _metavar(leaf: Leaf) -> str:
    if leaf.choices:
        return "{" + ",".join(_as_word(choice) for choice in leaf.choices) + "}"
    if leaf.is_bool:
        return "true|false"
    if int in leaf.members:
        return "N"
    if float in leaf.members:
        return "X"
    return "TEXT" if str in leaf.members else "JSON"


def _as_word(choice: Any) -> str:
    return choice if isinstance(choice, str) else json.dumps(choice)


def read_value(leaf: Leaf, text: str) -> Any:
    """The value that `text` on the command line means for this setting.

    Text stays text where the setting holds text; else it is JSON, and what is no JSON is left for
    validation to refuse.
    """
    if leaf.is_optional and text.lower() in ("null", "none"):
        return None
    for choice in leaf.choices:
        if text.lower() == _as_word(choice).lower():
            return choice
    if str in leaf.members:
        return text
    try:
        return json.loads(text.lower() if text.lower() in ("true", "false") else text)
    except ValueError:
        return text


class _Setting(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        leaf = leaf_by_path()[self.dest]
        _store(namespace, self.dest, True if values is None else read_value(leaf, values), option_string)


class _Negation(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        _store(namespace, self.dest, False, option_string)


class _DataPath(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        _store(namespace, self.dest, blend(values), option_string)


def _store(namespace: argparse.Namespace, path: str, value: Any, flag: str | None) -> None:
    # The flag given last wins: also the one whose section came before it on the command line.
    values = vars(namespace)
    values.pop(path, None)
    values[path] = value
    values.setdefault("origins", {})[path] = flag or path


def blend(words: Sequence[str]) -> list[dict[str, Any]]:
    """`data.sources` from Megatron-LM's `--data-path`: prefixes, or pairs of weight and prefix.

    A source is named after the last part of its prefix. Raises ConfigError for words that are neither.
    """
    numbers = [_number(word) for word in words]
    if numbers[0] is None:
        pairs: list[tuple[float, str]] = [(1.0, word) for word in words]
        numbers_wrong = any(number is not None for number in numbers)
    else:
        numbers_wrong = len(words) % 2 == 1 or None in numbers[::2]
        pairs = [(number or 0.0, word) for number, word in zip(numbers[::2], words[1::2], strict=False)]
    if numbers_wrong:
        raise ConfigError(
            "--data-path takes prefixes, or a weight before every prefix: --data-path 0.3 a 0.7 b; "
            f"got {' '.join(words)}"
        )
    names: list[str] = []
    for _, prefix in pairs:
        name = PurePath(prefix).name or prefix
        names.append(name if name not in names else f"{name}_{len(names)}")
    return [
        {"name": name, "weight": weight, "path": prefix}
        for name, (weight, prefix) in zip(names, pairs, strict=True)
    ]


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def _unknown(word: str, parser: argparse.ArgumentParser) -> str:
    if not word.startswith("-"):
        return f"{word}: belongs to no flag; values follow their flag, as in --training.learning_rate 3e-4"
    name = word.partition("=")[0]
    flags = list(parser._option_string_actions)
    # `--learning_rate` for `--training.learning_rate` shares too few letters for difflib.
    near = [flag for flag in flags if flag.rpartition(".")[2] == name.lstrip("-").replace("-", "_")]
    near += [flag for flag in get_close_matches(name, flags, 3, 0.75) if flag not in near]
    hint = f"did you mean {' or '.join(near[:3])}?" if near else "--help lists the flags"
    return f"{name}: unknown flag; {hint}"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"command line: {message}")


class _Formatter(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=6, width=110)

    def add_usage(self, usage: Any, actions: Any, groups: Any, prefix: Any = None) -> None:
        # A usage line of 200 flags helps nobody.
        super().add_usage(
            "%(prog)s [--config PATH] [--dry-run] [--section.setting VALUE ...]", [], [], prefix
        )
