"""From files and flags to a `Config`: default < JSON (`"extends"` first) < a stage's settings < flags.

Every problem of every file and flag is reported at once, one line each, with where it comes from.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megads.config.deepspeed import translated
from megads.config.explain import expected_value, explain, nearest_settings
from megads.config.jsonc import parse_jsonc
from megads.config.schema import Config, Section
from megads.config.tree import MOVED, Leaf, fields_of
from megads.errors import ConfigError


def load_config(
    path: str | Path | None,
    overrides: Mapping[str, Any] = {},
    origins: Mapping[str, str] = {},
) -> Config:
    """The configuration of `path` (None: the defaults) with `overrides` on top.

    `overrides` maps dotted paths to values (`{"training.learning_rate": 1e-3}`); `origins` says for
    error messages which flag a path was given by. Raises ConfigError that lists everything wrong. It is of
    one run: for a file that may have stages see `stages.load_stages`.
    """
    loading = Loading.of(path, overrides, origins)
    config = loading.finish()
    refuse_settings(loading.problems)
    assert config is not None
    if config.stages:
        names = ", ".join(str(stage.get("name")) for stage in config.stages)
        raise ConfigError(
            f"{path} names stages ({names}), and this is for one run: give it the config.json that a stage "
            "writes into its directory when it starts, or a file without stages"
        )
    return config


def refuse_settings(problems: Sequence[str]) -> None:
    """Raises one ConfigError with all problems, a line each, if there are any."""
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise ConfigError("\n".join([f"{count} in the configuration:", *(f"  {p}" for p in problems)]))


def _nested(dotted: str, value: Any) -> dict[str, Any]:
    for name in reversed(dotted.split(".")):
        value = {name: value}
    return value  # type: ignore[no-any-return]


@dataclass
class Loading:
    """Values merged so far, which layer gave each of them, and what was wrong."""

    values: dict[str, Any] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        path: str | Path | None,
        overrides: Mapping[str, Any],
        origins: Mapping[str, str],
        between: tuple[str, dict[str, Any]] | None = None,
    ) -> "Loading":
        """All layers of `load_config` merged; `between` is one more, above files and below flags, by name.

        Raises ConfigError for files that cannot be read.
        """
        loading = cls()
        layers = loading._files(Path(path)) if path is not None else []
        for name, layer in [*layers, *([between] if between else [])]:
            loading._add(layer, name)
        for dotted, value in overrides.items():
            loading._add(_nested(dotted, value), origins.get(dotted, f"--{dotted}"))
        loading._add_deepspeed()
        return loading

    def _files(self, path: Path) -> list[tuple[str, dict[str, Any]]]:
        """(name, content) of `path` and what it extends, the outermost base first."""
        chain: list[tuple[str, dict[str, Any]]] = []
        seen: list[Path] = []
        while True:
            if path.resolve() in seen:
                names = " -> ".join(str(one) for one in [*seen, path.resolve()])
                raise ConfigError(f'"extends" goes in a circle: {names}; remove one of them')
            seen.append(path.resolve())
            content = _read(path, chain[-1][0] if chain else None)
            content.pop("$schema", None)
            base = content.pop("extends", None)
            chain.append((str(path), content))
            if base is None:
                return chain[::-1]
            if not isinstance(base, str):
                raise ConfigError(f'{path}: "extends" must be the name of one JSON file, got {base!r}')
            path = path.parent / base

    def _add(self, layer: dict[str, Any], origin: str) -> None:
        """Puts one file or one flag on top of what is there."""
        self._relocate(layer, origin)
        self._section(layer, Config, self.values, "", origin)

    def _add_deepspeed(self) -> None:
        """What DeepSpeed's settings say, where ours are silent."""
        distributed = self.values.get("distributed")
        block = distributed.get("deepspeed") if isinstance(distributed, dict) else None
        for path, (value, where) in translated(block).items():
            if path not in self.origin:
                self._add(_nested(path, value), where)

    def _relocate(self, layer: dict[str, Any], origin: str) -> None:
        """Settings that the guide has in another section go to ours."""
        for old, new in MOVED.items():
            (old_section, name), (new_section, new_name) = old.split("."), new.split(".")
            source = layer.get(old_section)
            if not isinstance(source, dict) or name not in source:
                continue
            value = source.pop(name)
            target = layer.setdefault(new_section, {})
            if isinstance(target, dict) and target.setdefault(new_name, value) != value:
                self.problems.append(f"{old} and {new} are one setting with two values; keep one ({origin})")

    def _section(
        self, given: dict[str, Any], section: type[Section], into: dict[str, Any], prefix: str, origin: str
    ) -> None:
        known = {name: leaf for leaf in fields_of(section) for name in (leaf.name, *leaf.aliases)}
        first_name: dict[str, str] = {}
        for name, value in given.items():
            leaf = known.get(name)
            if leaf is None:
                hint = nearest_settings(prefix + name)
                self.problems.append(f"{prefix}{name}: unknown setting{hint} ({origin})")
                continue
            earlier = first_name.setdefault(leaf.name, name)
            if earlier != name and given[earlier] != value:
                self.problems.append(
                    f"{prefix}{earlier} and {prefix}{name} are two names of one setting, but their values "
                    f"differ: {given[earlier]!r} and {value!r}; keep one ({origin})"
                )
            self._value(leaf, value, into, prefix, origin)

    def _value(self, leaf: Leaf, value: Any, into: dict[str, Any], prefix: str, origin: str) -> None:
        path, inner = prefix + leaf.name, leaf.section
        self.origin[path] = origin
        if isinstance(value, bool) and not leaf.is_bool and {int, float} & set(leaf.members):
            # pydantic would take it for 0 or 1
            self.problems.append(
                f"{path}: must be {expected_value(leaf)}, got {str(value).lower()} ({origin})"
            )
        elif inner is None or (value is None and leaf.is_optional):
            into[leaf.name] = value
        elif isinstance(value, dict):
            if not isinstance(into.get(leaf.name), dict):
                into[leaf.name] = {}
            self._section(value, inner, into[leaf.name], f"{path}.", origin)
        else:
            self.problems.append(f"{path}: must be an object {{...}} of settings, got {value!r} ({origin})")

    def finish(self) -> Config | None:
        """The validated tree, or None where there are problems: `problems` then has them all."""
        try:
            config = Config.model_validate(self.values)
        except ValidationError as error:
            self.problems += explain(error, self._origin_of)
            return None
        return None if self.problems else config

    def _origin_of(self, path: str) -> str:
        while path not in self.origin and path:
            path = path.rpartition(".")[0]
        return self.origin.get(path, "default")


def _read(path: Path, extended_by: str | None) -> dict[str, Any]:
    what = f"{path} (extended by {extended_by})" if extended_by else str(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        others = sorted(str(other) for other in path.parent.glob("*.json"))[:12]
        found = f"; in {path.parent} there are: {', '.join(others)}" if others else ""
        raise ConfigError(f"configuration file not found: {what}{found}") from None
    except OSError as error:
        raise ConfigError(f"cannot read the configuration file {what}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{what} is not UTF-8 text (byte {error.start}); is it a JSON file?") from None
    content = parse_jsonc(text, str(path))
    if not isinstance(content, dict):
        raise ConfigError(f"{what} must hold one JSON object {{...}}, not {type(content).__name__}")
    return content
