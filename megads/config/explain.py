"""Mistakes in words: the nearest name of an unknown setting, and pydantic's errors in one line each."""

import json
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from functools import cache
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError

from megads.config.schema import Config
from megads.config.tree import Leaf, fields_of, is_section, leaf_by_path, leaves

_LIMITS = {
    "greater_than": ("gt", "greater than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}
_KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    dict: "an object {...}",
}
# What an entry of a list must be, by the first word of pydantic's error.
_ENTRIES = {"int": "a whole number", "float": "a number", "string": "text"} | dict.fromkeys(
    ("model", "dict"), "an object {...}"
)


def nearest_settings(path: str) -> str:
    """'; did you mean ...?' for an unknown dotted path, or nothing when no setting is near.

    Names of the same section come first, then the same name in other sections: a setting in the wrong
    place is as common as a misspelt one.
    """
    section, _, name = path.rpartition(".")
    names = _names()
    siblings = {known: paths for known, paths in names.items() if any(_parent(p) == section for p in paths)}
    found: list[str] = []
    if name in names:
        return f"; did you mean {' or '.join(names[name][:3])}?"
    for known in get_close_matches(name, siblings, 2, 0.6):
        found += [p for p in siblings[known] if _parent(p) == section]
    for known in get_close_matches(name, names, 2, 0.75):
        found += names[known]
    unique = list(dict.fromkeys(found))[:3]
    return f"; did you mean {' or '.join(unique)}?" if unique else ""


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


@cache
def _names() -> dict[str, list[str]]:
    """Each name a setting or section goes by, Megatron-LM's flags included, to its dotted paths."""
    names: dict[str, list[str]] = {}

    def add(name: str, path: str) -> None:
        if path not in names.setdefault(name, []):
            names[name].append(path)

    for leaf in leaves():
        for flag in leaf.flags:
            add(flag.lstrip("-").replace("-", "_"), leaf.path)
        for name in (leaf.name, *leaf.aliases):
            add(name, leaf.path)
        section = _parent(leaf.path)
        if section:
            add(section.rpartition(".")[2], section)
    return names


def explain(error: ValidationError, origin_of: Callable[[str], str]) -> Iterator[str]:
    """One line per wrong setting: path, what it must be, what it is, where it was given."""
    reported = set()
    for problem in error.errors(include_url=False):
        leaf, path = _locate(problem["loc"])
        if path in reported:
            continue  # a union reports one error for each of its members
        reported.add(path)
        yield f"{path}: {_reason(problem, leaf)} ({origin_of(path)})"


def _locate(location: tuple[int | str, ...]) -> tuple[Leaf | None, str]:
    """The leaf that an error's location lies in, and the path to name: `data.sources[0].weight`."""
    known = leaf_by_path()
    leaf, path = None, ""
    section = {field.name: field for field in fields_of(Config)}
    for step in location:
        if isinstance(step, int):
            path += f"[{step}]"
            item = leaf.item if leaf else None
            section = {field.name: field for field in fields_of(item)} if item else {}
            continue
        inside = f"{path}.{step}" if path else step
        if step not in section:
            # The name of a union's member, or an unknown key of a list's entry.
            return leaf, inside if section else path
        path, leaf = inside, known.get(inside, section[step])
        inner = section[step].section
        section = {field.name: field for field in fields_of(inner)} if inner else {}
    return leaf, path


def _reason(problem: Any, leaf: Leaf | None) -> str:
    kind, given = problem["type"], problem["input"]
    shown = shorten(given)
    if kind == "missing":
        return "is required"
    if kind == "extra_forbidden":
        return f"unknown setting{_nearest_entry(leaf, problem['loc'][-1])}"
    if kind in _LIMITS:
        key, words = _LIMITS[kind]
        return f"must be {words} {problem['ctx'][key]:g}, got {shown}"
    if kind == "literal_error":
        choices = leaf.choices if leaf else ()
        close = get_close_matches(str(given), [str(choice) for choice in choices], 1)
        hint = f"; did you mean {json.dumps(close[0])}?" if close else ""
        of_list = isinstance(problem["loc"][-1], int)  # an entry, of which the leaf does not know
        wanted = problem["ctx"]["expected"] if leaf is None or of_list else expected_value(leaf)
        return f"must be {wanted}, got {shown}{hint}"
    if kind == "int_from_float":
        return f"must be a whole number, got {shown}"
    entry = _ENTRIES.get(kind.partition("_")[0])
    if isinstance(problem["loc"][-1], int) and entry:
        return f"must be {entry}, got {shown}"
    if leaf is not None and kind.endswith(("_type", "_parsing", "finite_number")):
        return f"must be {expected_value(leaf)}, got {shown}"
    return f"{problem['msg']}, got {shown}"


def expected_value(leaf: Leaf) -> str:
    """What a setting can hold, in words: 'a whole number or null'."""
    words = [f"{json.dumps(choice)}" for choice in leaf.choices]
    for member in leaf.members:
        origin = get_origin(member) or member
        if origin is type(None):
            words.append("null")
        elif origin is tuple:
            words.append("a list [...]")
        elif origin is Literal:
            words += [json.dumps(choice) for choice in get_args(member)]
        elif is_section(origin):
            words.append("an object {...} of settings")
        elif origin in _KINDS:
            words.append(_KINDS[origin])
    return " or ".join(dict.fromkeys(words))


def _nearest_entry(leaf: Leaf | None, name: Any) -> str:
    if leaf is None or leaf.item is None:
        return ""
    names = [field.name for field in fields_of(leaf.item)]
    close = get_close_matches(str(name), names, 1)
    return f"; did you mean {close[0]}?" if close else f"; an entry has {', '.join(names)}"


def shorten(value: Any) -> str:
    """As JSON, cut where it is long."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
