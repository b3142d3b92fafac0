"""What the documents say can be typed, opened and loaded; the map of the code is current."""

import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from megads.config import show
from megads.config.flags import parse_flags
from megads.config.flops import count_parameters
from megads.config.jsonc import parse_jsonc
from megads.config.loader import load_config
from megads.config.stages import load_stages, planned_processes
from megads.errors import ConfigError

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
DOCUMENTS = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TARGETS = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
ENVIRONMENT = re.compile(r"[A-Z_]+=\S*")
NOT_OURS = ("git", "cd", "source")


def blocks(path: Path, language: str) -> Iterator[str]:
    yield from re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)


def commands(path: Path) -> Iterator[list[str]]:
    """Every command of the shell blocks, and those in the text that begin like one."""
    for block in blocks(path, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            for part in line.split("&&"):
                yield shlex.split(part, comments=True)
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    for code in re.findall(r"`([^`\n]+)`", text):
        if code.startswith(("make ", "pytest ", "python ", "torchrun ")):
            yield shlex.split(code)


def load_tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"tool_{Path(name).stem}", ROOT / name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def option(words: list[str], name: str) -> int:
    return int(words[words.index(name) + 1]) if name in words else 1


def check_training(words: list[str]) -> None:
    """The run that a command starts is possible on as many processes as it asks for."""
    at = words.index("pretrain_megads.py")
    arguments = parse_flags(
        [word.replace("FILE", "configs/debug.json") for word in words[at + 1 :] if word != "N"]
    )
    stages = load_stages(ROOT / (arguments.config or ""), arguments.overrides, arguments.origins)
    launched = option(words[:at], "--nnodes") * option(words[:at], "--nproc-per-node")
    if arguments.dry_run:  # of as many processes as the configuration is for, unless it says
        launched = planned_processes(stages, arguments.world_size)[0]
    assert show.dry_run_stages(stages, launched, cuda=True)


def check_command(words: list[str]) -> None:
    while words and ENVIRONMENT.fullmatch(words[0]):
        words = words[1:]
    if not words or words[0] in NOT_OURS:
        return
    if words[0] == "make":
        assert set(words[1:]) <= TARGETS
    elif words[0] == "pytest":
        assert all((ROOT / word).exists() for word in words[1:])
    elif "pretrain_megads.py" in words:
        if "--help" not in words and "N" not in words:
            check_training(words)
    elif words[0] == "python" and words[1].startswith("benchmarks/"):
        assert len(words) == 2, "a benchmark is named without its arguments"
        assert (ROOT / words[1]).is_file()
    elif words[0] == "python" and words[1].startswith("tools/"):
        tool = load_tool(words[1])
        if hasattr(tool, "parse_arguments"):
            tool.parse_arguments(words[2:])
        elif hasattr(tool, "parse_flags"):  # it takes what pretrain_megads.py takes
            parse_flags(words[2:])
        else:
            assert len(words) == 2, f"how are the arguments of {words[1]} checked?"
    else:
        raise AssertionError("this command is checked by nobody")


EVERY_COMMAND = [(path.name, words) for path in DOCUMENTS for words in commands(path) if words]


@pytest.mark.parametrize(("document", "words"), EVERY_COMMAND, ids=lambda value: str(value)[:60])
def test_commands_can_be_typed(document: str, words: list[str]) -> None:
    check_command(words)


def test_the_commands_are_found() -> None:
    typed = {" ".join(words[:2]) for _, words in EVERY_COMMAND}
    assert {"make demo", "make test", "make bench"} <= typed
    assert sum("pretrain_megads.py" in words for _, words in EVERY_COMMAND) >= 7


@pytest.mark.parametrize(
    "command",
    [
        "make coffee",
        "pytest tests/e2e/test_coffee.py",
        "python tools/coffee.py",
        "python tools/train_tokenizer.py --coffee",
        "python pretrain_megads.py --config configs/debug.json --coffee 1",
        "torchrun --nproc-per-node 3 pretrain_megads.py --config configs/debug.json",
        "coffee --black",
    ],
)
def test_a_command_that_does_not_work_is_found(command: str) -> None:
    with pytest.raises((AssertionError, ConfigError, FileNotFoundError, SystemExit)):
        check_command(shlex.split(command))


def test_links_lead_somewhere() -> None:
    for path in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", path.read_text()):
            if not target.startswith("https://"):
                assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_files_named_in_the_text_exist() -> None:
    for path in DOCUMENTS:
        for name in re.findall(r"`((?:megads|tools|tests|configs|examples|docs)/[\w./]*)`", path.read_text()):
            assert (ROOT / name).exists(), f"{path.name}: {name}"


@pytest.mark.parametrize(
    ("path", "text"),
    [(path, text) for path in DOCUMENTS for text in blocks(path, "json")],
    ids=lambda value: value.name if isinstance(value, Path) else "",
)
def test_configurations_shown_can_be_loaded(path: Path, text: str, tmp_path: Path) -> None:
    whole = text if text.lstrip().startswith("{") else f"{{{text}}}"
    assert parse_jsonc(whole, path.name)
    shown = tmp_path / "shown.json"
    shown.write_text(whole.replace('"extends": "', f'"extends": "{ROOT / "configs"}/'))
    load_stages(shown)


def test_the_table_of_configurations() -> None:
    """Every file of configs/ is in it, with the sizes that the closed form gives."""
    rows = dict(re.findall(r"^\| `(\w+\.json)` \| (.*?) \|", README.read_text(), re.MULTILINE))
    assert rows.keys() == {path.name for path in (ROOT / "configs").glob("*.json")} - {"megads.schema.json"}
    for name, shown in rows.items():
        found = re.match(r"([\d.]+)([MB]) \(([\d.]+)([MB])\)", shown)
        if found is None:
            continue
        counts = count_parameters(load_config(ROOT / "configs" / name))
        with_mtp = "with MTP" in shown
        exact = (
            counts.total_with_mtp if with_mtp else counts.total,
            counts.active_with_mtp if with_mtp else counts.active,
        )
        units = {"M": 1e6, "B": 1e9}
        for number, unit, value in ((found[1], found[2], exact[0]), (found[3], found[4], exact[1])):
            digits = len(number.partition(".")[2])
            assert f"{value / units[unit]:.{digits}f}" == number, name


def test_the_map_of_the_code_is_current() -> None:
    """Every Python file is in it, with its purpose, and nothing else is."""
    tool = load_tool("tools/make_code_map.py")
    text = (ROOT / "CONTRIBUTING.md").read_text()
    assert tool.with_map(text) == text, "run tools/make_code_map.py"
    in_map = text.partition(tool.BEGIN)[2].partition(tool.END)[0]
    listed, directory = set(), ""
    for line in in_map.splitlines():
        if heading := re.match(r"\*\*`(.*)/`\*\*", line):
            directory = heading[1]
        elif entry := re.match(r"- `(.*?\.py)`: \S", line):
            listed.add((ROOT / directory / entry[1]).resolve())
    places = ("megads", "tools", "benchmarks", "tests")
    expected = {
        path for place in places for path in (ROOT / place).rglob("*.py") if path.name != "__init__.py"
    }
    assert listed == expected | {ROOT / "pretrain_megads.py", ROOT / "setup.py"}
