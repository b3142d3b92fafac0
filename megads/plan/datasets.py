"""How much text there is: from the records that preprocessing leaves beside its datasets."""

import glob
import json
import os
from pathlib import Path

from megads.config.schema import Config


def data_tokens(config: Config) -> dict[str, int]:
    """Tokens of each source whose datasets are there, from the records that preprocessing left (.json)."""
    found = {}
    for source in config.data.sources:
        path = source.path or os.path.join(config.data.cache_dir, source.subset or source.name)
        prefixes = [path] if isinstance(path, str) else list(path)
        records = [record for prefix in prefixes for record in _records(prefix)]
        tokens = sum(_recorded_tokens(Path(record)) for record in records)
        if tokens:
            found[source.name] = tokens
    return found


def _records(prefix: str) -> list[str]:
    if "://" in prefix:
        return []  # not fetched for a plan
    below = os.path.join(glob.escape(prefix), "**", "*.idx")
    indexes = glob.glob(below, recursive=True) if os.path.isdir(prefix) else [f"{prefix}.idx"]
    return [index.removesuffix(".idx") + ".json" for index in indexes]


def _recorded_tokens(record: Path) -> int:
    """0 where there is no record, as of a dataset of other tools."""
    try:
        content = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return 0
    is_record = isinstance(content, dict) and str(content.get("format", "")).startswith("megads-indexed")
    return int(content["tokens"]) if is_record else 0
