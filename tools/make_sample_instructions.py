"""A small file of conversations about Python's standard library, made of the docstrings on this machine.

Each line has `messages`, two questions and their answers: what a function does, and how it is called. For
trying supervised fine-tuning (docs/instructions.md) where no instruction data is at hand.
"""

import argparse
import ast
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import orjson

MODULES = (
    "argparse", "ast", "base64", "bisect", "calendar", "codecs", "collections", "contextlib", "copy", "csv",
    "datetime", "difflib", "dis", "doctest", "email", "fractions", "functools", "gettext", "glob", "heapq",
    "http", "inspect", "ipaddress", "json", "logging", "mailbox", "mimetypes", "os", "pathlib", "pickletools",
    "posixpath", "pprint", "random", "shutil", "socket", "ssl", "statistics", "string", "subprocess",
    "tarfile", "tempfile", "textwrap", "threading", "traceback", "typing", "unittest", "urllib", "uuid",
    "warnings", "weakref", "xml", "zipfile",
)  # fmt: skip
LONGEST_ANSWER = 400


def functions(path: Path, module: str) -> Iterator[tuple[str, str, str]]:
    """(name, first paragraph of the docstring, signature) of each documented function of a source file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for parent in ast.walk(tree):
        if not isinstance(parent, ast.Module | ast.ClassDef):
            continue
        name = "" if isinstance(parent, ast.Module) else parent.name
        if name.startswith("_"):
            continue
        prefix = f"{module}.{name}".rstrip(".")
        for node in parent.body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                text = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
                if 20 < len(text) < LONGEST_ANSWER:
                    yield f"{prefix}.{node.name}", text, f"{node.name}({ast.unparse(node.args)})"


def conversations() -> Iterator[dict[str, object]]:
    library = Path(sysconfig.get_paths()["stdlib"])
    for module in MODULES:
        package = library / module
        for path in sorted(package.rglob("*.py")) if package.is_dir() else [library / f"{module}.py"]:
            if not path.is_file() or "test" in path.parts:
                continue
            name = ".".join(path.relative_to(library).with_suffix("").parts).removesuffix(".__init__")
            for function, text, signature in functions(path, name):
                yield {
                    "id": function,
                    "messages": [
                        {"role": "user", "content": f"What does {function} do?"},
                        {"role": "assistant", "content": text},
                        {"role": "user", "content": "How is it called?"},
                        {"role": "assistant", "content": signature},
                    ],
                }


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="JSON lines")
    parser.add_argument(
        "--count", type=int, default=2000, help="conversations at most (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    if options.count < 1:
        parser.error("--count must be at least 1")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    found = list(conversations())
    step = max(1, len(found) // options.count)  # from all modules, however few are wanted
    chosen = found[::step][: options.count]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_bytes(b"".join(orjson.dumps(record) + b"\n" for record in chosen))
    print(f"{options.output}: {len(chosen):,} conversations")
    return 0


if __name__ == "__main__":
    sys.exit(main())
