"""JSON with `//` and `/* */` comments, and error messages that show the line."""

import json
import re
from typing import Any

from megads.errors import ConfigError

# A string is matched first, so that "http://..." is no comment.
_STRING_OR_COMMENT = re.compile(r'"(?:\\.|[^"\\\n])*"|//[^\n]*|/\*.*?\*/', re.DOTALL)


def parse_jsonc(text: str, name: str) -> Any:
    """The value that `text` holds. Raises ConfigError with `name`, line and column.

    A key that occurs twice, NaN and Infinity are errors: the first hides a setting, the others are no
    JSON and no setting's value.
    """
    bare = _STRING_OR_COMMENT.sub(_blank, text)
    try:
        return json.loads(bare, object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        line = text.splitlines()[error.lineno - 1].strip() if text.strip() else ""
        raise ConfigError(
            f"{name}, line {error.lineno}, column {error.colno}: not JSON: {error.msg}"
            + (f"\n    {line[:100]}" if line else " (the file is empty)")
        ) from None
    except RecursionError:
        raise ConfigError(f"{name}: brackets are nested too deeply for a configuration") from None
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from None


def _blank(match: re.Match[str]) -> str:
    """Comments become blanks, so that positions in errors stay true."""
    found = match.group()
    return found if found.startswith('"') else re.sub(r"[^\n]", " ", found)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        raise ValueError(f"key given more than once in one object: {', '.join(twice)}; keep one")
    return values


def _no_constant(constant: str) -> Any:
    raise ValueError(f"{constant} is not a value that a setting can have")
