"""tools/verify_dataset.py and tools/inspect_dataset.py on what the other tools made."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMON = "In the beginning there was a long and winding road that nobody had yet walked to its end."


def run(tool: str, *arguments: object, code: int = 0) -> str:
    process = subprocess.run(
        [sys.executable, str(ROOT / "tools" / f"{tool}.py"), *map(str, arguments)],
        capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert "Traceback" not in process.stderr, process.stderr
    assert process.returncode == code, process.stdout + process.stderr
    return process.stdout if code < 2 else process.stderr


class World:
    """Two sources of numbered stories, cleaned, tokenized, some rearranged."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.tokenizer = directory / "tokenizer.model"
        self.data = directory / "data"
        for source, count in (("web", 60), ("books", 30)):
            (directory / "corpus" / source).mkdir(parents=True)
            stories = [f"{source} story {i}. " + f"{COMMON} Part {i} of {source}. " * 4 for i in range(count)]
            lines = [json.dumps({"id": f"{source}{i}", "text": text}) for i, text in enumerate(stories)]
            lines.insert(5, lines[0])
            (directory / "corpus" / source / "a.jsonl").write_text("\n".join(lines) + "\n")
        corpus = ("--input-root", directory / "corpus")
        run(
            "train_tokenizer",
            "--input",
            directory / "corpus",
            "--output",
            self.tokenizer,
            "--vocab-size",
            400,
        )
        run("clean_dolma", *corpus, "--removals", directory / "removals", "--exact", "--workers", 1)
        run(
            "preprocess_dolma", *corpus, "--output-root", self.data, "--tokenizer", self.tokenizer,
            "--removals", directory / "removals", "--fim-rate", 0.5, "--fim-spm-rate", 0.5, "--workers", 1,
        )  # fmt: skip

    def inspect(self, *arguments: object, code: int = 0) -> str:
        return run("inspect_dataset", self.data, "--tokenizer", self.tokenizer, *arguments, code=code)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def test_what_the_tools_made_is_sound(world: World) -> None:
    said = run("verify_dataset", world.data, "--tokenizer", world.tokenizer, "--sample", 100)
    assert "PROBLEM" not in said
    assert "not checked" not in said
    assert "2 datasets, 90 documents," in said
    assert "60 compared with their text" in said
    assert said.count("ok ") == 2
    quick = run("verify_dataset", world.data / "web", world.data / "books" / "a.idx", "--quick")
    assert "2 datasets, 90 documents," in quick


def test_damage_gives_a_line_and_exit_code_1(world: World, tmp_path: Path) -> None:
    for name in ("a.bin", "a.idx", "a.json"):
        (tmp_path / name).write_bytes((world.data / "web" / name).read_bytes())
    content = bytearray((tmp_path / "a.bin").read_bytes())
    content[101] ^= 1
    (tmp_path / "a.bin").write_bytes(content)
    said = run("verify_dataset", tmp_path / "a", world.data / "books", code=1)
    problems = [line for line in said.splitlines() if line.startswith("PROBLEM")]
    assert len(problems) == 1
    assert "a.bin: the content is not what a.json records" in problems[0]
    assert "ok      " in said
    assert said.endswith(": 1 problem\n")
    assert run("verify_dataset", tmp_path / "a", "--quick").endswith("0 problems\n")


def test_verify_mistakes(world: World, tmp_path: Path) -> None:
    assert "neither a dataset" in run("verify_dataset", tmp_path / "none", code=3)
    assert "no such tokenizer" in run("verify_dataset", world.data, "--tokenizer", tmp_path / "t", code=3)
    assert "--quick" in run("verify_dataset", world.data, "--quick", "--tokenizer", world.tokenizer, code=2)


def test_documents_with_their_source(world: World) -> None:
    said = world.inspect("--document", 0, 5, 30, "--max-characters", 0)
    corpus = world.directory / "corpus"
    assert f"=== document 0: {world.data}/books/a, 0;" in said
    assert f"{corpus}/books/a.jsonl, line 1\n" in said
    assert f"{corpus}/books/a.jsonl, line 7\n" in said, "line 6 was a duplicate"
    assert f"{corpus}/web/a.jsonl, line 1\n" in said
    assert said.count("⟦end of document⟧") == 3
    assert "2 datasets, 90 documents," in said


def test_fill_in_the_middle_is_marked(world: World) -> None:
    said = world.inspect("--random", 90, "--max-characters", 0, "--no-source")
    assert said.count("⟦end of document⟧") == 90
    count = said.count("⟦fim begin⟧")
    assert 25 < count < 65
    assert said.count("⟦fim hole⟧") == said.count("⟦fim end⟧") == count
    assert 5 < said.count("⟦fim begin⟧⟦fim hole⟧") < count - 5, "some in SPM order"
    assert "line " not in said


def test_samples_show_the_documents_they_are_cut_from(world: World) -> None:
    said = world.inspect("--sample", 1, "--seq-length", 300, "--max-characters", 0)
    assert "=== sample 1: 300 tokens and one more" in said
    assert "a.jsonl, line 3\n" in said
    shown = [line.split() for line in said.splitlines() if " tokens of document " in line]
    assert sum(int(words[0].replace(",", "")) for words in shown) == 301
    assert "There is no sample 9,999" in world.inspect("--sample", 9999, code=3)


def test_find(world: World) -> None:
    said = world.inspect("--find", "winding road", "--max-matches", 3)
    assert said.count("=== document") == 3
    assert "--max-matches is 3" in said
    assert "long and winding road that nobody" in said
    assert "'Xanadu' is in no document" in world.inspect("--find", "Xanadu")


def test_inspect_mistakes(world: World, tmp_path: Path) -> None:
    assert "There is no document 90: there are 90" in world.inspect("--document", 90, code=3)
    nothing = tmp_path / "none"
    assert "neither a dataset" in run("inspect_dataset", nothing, "--tokenizer", world.tokenizer, code=3)
    assert "no such tokenizer" in run("inspect_dataset", world.data, "--tokenizer", nothing, code=3)


@pytest.mark.parametrize("tool", ["verify_dataset", "inspect_dataset"])
def test_no_torch(tool: str) -> None:
    path = ROOT / "tools" / f"{tool}.py"
    code = f"import sys, runpy; runpy.run_path({str(path)!r}); print('torch' in sys.modules)"
    said = subprocess.check_output(
        [sys.executable, "-c", code], text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert said == "False\n"
