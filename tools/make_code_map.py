"""Writes the map of the code in CONTRIBUTING.md: a line per file, from the file's own docstring.

Run it after adding, moving or renaming a file, or changing what it is for; `--check` only compares, for CI.
"""

import argparse
import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "CONTRIBUTING.md"
BEGIN, END = "<!-- the map: written by tools/make_code_map.py -->", "<!-- end of the map -->"
ROOT_FILES = ("pretrain_megads.py", "setup.py")
PLACES = ("megads", "tools", "benchmarks", "tests")


def purpose(path: Path) -> str:
    """The first sentence or paragraph of a file's docstring, on one line. Raises ValueError without one."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    if not text:
        raise ValueError(f"{path.relative_to(ROOT)} has no docstring to take its line in the map from")
    return " ".join(text.split("\n\n")[0].split())


def directories() -> list[Path]:
    """The repository's root, then every directory with code, parents before children."""
    found = [ROOT]
    for place in PLACES:
        found += sorted({path.parent for path in (ROOT / place).rglob("*.py")})
    return found


def code_map() -> str:
    """The map as Markdown: a heading per directory, a list entry per file."""
    lines: list[str] = []
    for directory in directories():
        package = directory / "__init__.py"
        about = f": {purpose(package)}" if package.is_file() and package.stat().st_size else ""
        files = [path for path in sorted(directory.glob("*.py")) if path.name != "__init__.py"]
        if directory == ROOT:
            files = [ROOT / name for name in ROOT_FILES]
        name = f"{directory.relative_to(ROOT).as_posix()}/" if directory != ROOT else "./"
        lines += [f"**`{name}`**{about}", "", *(f"- `{path.name}`: {purpose(path)}" for path in files)]
        lines += [""] if files else []
    return "\n".join(lines).strip()


def with_map(text: str) -> str:
    """`text` with the map between its two marks."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{TARGET.name} must hold the lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{code_map()}\n\n{END}{after}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--check", action="store_true", help="exit with 1 when the map is not current")
    options = parser.parse_args(arguments)
    current = TARGET.read_text(encoding="utf-8")
    try:
        wanted = with_map(current)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.check:
        same = current == wanted
        print(
            f"the map in {TARGET.name} is {'current' if same else 'not current: run tools/make_code_map.py'}"
        )
        return 0 if same else 1
    TARGET.write_text(wanted, encoding="utf-8")
    print(f"wrote {TARGET.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
