"""Writes configs/megads.schema.json, which editors complete configurations with.

Run it after a change of megads/config/schema.py; `--check` only compares, for CI.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that it runs from a checkout that is not installed

from megads.config.jsonschema import as_text  # noqa: E402

TARGET = ROOT / "configs" / "megads.schema.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--check", action="store_true", help="exit with 1 when the file is not current")
    arguments = parser.parse_args()
    text = as_text()
    if arguments.check:
        current = TARGET.is_file() and TARGET.read_text(encoding="utf-8") == text
        print(f"{TARGET.name} is {'current' if current else 'not current: run tools/make_schema.py'}")
        return 0 if current else 1
    TARGET.write_text(text, encoding="utf-8")
    print(f"wrote {TARGET}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
