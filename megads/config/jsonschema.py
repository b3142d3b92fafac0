"""The JSON Schema of a configuration file, for editors: completion, units, ranges, every alias."""

import json
from typing import Any

from megads.config.schema import Config
from megads.config.tree import MOVED

_KEPT_OUT = ("unit", "source", "aliases", "flags")


def json_schema() -> dict[str, Any]:
    """The schema of `configs/*.json`; comments in the files are the editor's business (JSONC)."""
    schema = Config.model_json_schema()
    for definition in (schema, *schema["$defs"].values()):
        _improve(definition)
    for old, new in MOVED.items():
        (old_section, name), (new_section, new_name) = old.split("."), new.split(".")
        target = schema["$defs"][_definition(schema, new_section)]["properties"][new_name]
        place = schema["$defs"][_definition(schema, old_section)]["properties"]
        place[name] = target | {"description": f"same as {new}", "deprecated": True}
        place[name].pop("default", None)
    extra = {
        "$schema": {"type": "string", "description": "this schema; ignored by MegaDS"},
        "extends": {"type": "string", "description": "JSON file, relative to this one, to start from"},
    }
    schema["properties"]["stages"]["items"] = _stage(schema["properties"])
    schema["properties"] = extra | schema["properties"]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "MegaDS configuration",
    } | schema


def _stage(settings: dict[str, Any]) -> dict[str, Any]:
    """An entry of `stages`: its name, and any settings but those that are the whole file's."""
    overrides = {name: value for name, value in settings.items() if name not in ("stages", "output_dir")}
    name = {"type": "string", "description": "its directory below output_dir"}
    return {
        "type": "object",
        "required": ["name"],
        "properties": {"name": name} | overrides,
        "additionalProperties": False,
    }


def _definition(schema: dict[str, Any], section: str) -> str:
    return str(schema["properties"][section]["$ref"]).rpartition("/")[2]


def _improve(definition: dict[str, Any]) -> None:
    """Puts unit and source into the descriptions, and each alias beside its setting."""
    properties: dict[str, Any] = {}
    for name, setting in definition["properties"].items():
        details = {key: setting.pop(key) for key in _KEPT_OUT if key in setting}
        words = [setting.get("description", ""), details.get("unit", ""), details.get("source", "")]
        description = "; ".join(word for word in words if word)
        if description:
            setting["description"] = description
        # A section's default is the defaults of its settings, which are listed anyway.
        if "$ref" in setting:
            setting.pop("default", None)
        setting.pop("title", None)
        properties[name] = setting
        for alias in details.get("aliases", []):
            same = {key: value for key, value in setting.items() if key != "default"}
            properties[alias] = same | {"description": f"same as {name}: {description}"}
    definition["properties"] = properties


def as_text() -> str:
    """The schema file's content."""
    return json.dumps(json_schema(), indent=2) + "\n"
