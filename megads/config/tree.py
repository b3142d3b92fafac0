"""The schema as a list of leaves: what loader, flags, printing and the tests walk over."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megads.config.schema import Config, Section

# Settings that the guide places elsewhere than we do: its path, ours.
MOVED = {"model.gradient_checkpointing": "training.gradient_checkpointing"}


@dataclass(frozen=True)
class Leaf:
    """One setting: its dotted path and what the schema says about it."""

    path: str
    field: FieldInfo

    def _extra(self, key: str, empty: Any) -> Any:
        extra = self.field.json_schema_extra
        return extra.get(key, empty) if isinstance(extra, dict) else empty

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]

    @property
    def unit(self) -> str:
        return str(self._extra("unit", ""))

    @property
    def source(self) -> str:
        return str(self._extra("source", ""))

    @property
    def aliases(self) -> list[str]:
        return list(self._extra("aliases", []))

    @property
    def flags(self) -> list[str]:
        """Megatron-LM's names on the command line, with their dashes."""
        return list(self._extra("flags", []))

    @property
    def members(self) -> tuple[Any, ...]:
        """The types that a value may have, a union taken apart."""
        annotation = self.field.annotation
        return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)

    @property
    def choices(self) -> tuple[Any, ...]:
        """The values of a `Literal`; empty where any value of the type will do."""
        return get_args(self.field.annotation) if str(self.field.annotation).startswith("typing.Lit") else ()

    @property
    def is_bool(self) -> bool:
        return bool in self.members

    @property
    def is_optional(self) -> bool:
        return type(None) in self.members

    @property
    def section(self) -> type[Section] | None:
        """The section that this setting holds when it is not null (only `rope_scaling` so far)."""
        return next((member for member in self.members if is_section(member)), None)

    @property
    def item(self) -> type[Section] | None:
        """The section that each entry of this list is."""
        for member in self.members:
            entry = next(iter(get_args(member)), None)
            if get_origin(member) is tuple and is_section(entry):
                return entry
        return None


def is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


@cache
def fields_of(section: type[Section]) -> tuple[Leaf, ...]:
    """The fields of one section, each with its bare name as the path."""
    return tuple(Leaf(name, field) for name, field in section.model_fields.items())


def leaves(section: type[Section] = Config, prefix: str = "") -> Iterator[Leaf]:
    """Every setting below `section`, in the order of the schema.

    A setting that is a section or null comes before its own fields; the entries of lists do not occur.
    """
    for field in fields_of(section):
        path = f"{prefix}{field.name}"
        inner = field.section
        if inner is None or field.is_optional:
            yield Leaf(path, field.field)
        if inner is not None:
            yield from leaves(inner, f"{path}.")


@cache
def leaf_by_path() -> dict[str, Leaf]:
    return {leaf.path: leaf for leaf in leaves()}


def get(config: BaseModel, path: str) -> Any:
    """The value at a dotted path; None where a section on the way is null."""
    value: Any = config
    for name in path.split("."):
        value = None if value is None else getattr(value, name)
    return value
