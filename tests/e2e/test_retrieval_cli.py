"""The retrieval tools as a user types them: a corpus is woven, a checkpoint of any layout is measured."""

import gzip
from pathlib import Path

import orjson
import pytest

from tests.e2e.commands import pretrain_well, tool


def texts(directory: Path) -> list[str]:
    files = [gzip.decompress(file.read_bytes()) for file in sorted(directory.glob("*.json.gz"))]
    return [orjson.loads(line)["text"] for file in files for line in file.splitlines()]


@pytest.fixture(scope="module")
def woven(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("woven")
    made = tool("make_retrieval_corpus.py", "--text", corpus, "--output", directory, "--mb", 0.2)
    assert made.returncode == 0, made.stderr
    return directory


def test_the_corpus(woven: Path, corpus: Path) -> None:
    recall, haystack = texts(woven / "recall"), texts(woven / "haystack")
    assert sum(len(text) for text in recall) >= 0.2e6
    assert all("The pass key of" in text for text in recall)
    held_out = [line for text in haystack for line in text.split("\n")]
    assert held_out
    assert not any(f". {sentence} The pass key of" in text for sentence in held_out for text in recall)
    again = tool("make_retrieval_corpus.py", "--text", corpus, "--output", woven, "--mb", 0.2)
    assert again.returncode == 3
    assert "--overwrite" in again.stderr
    before = {file: file.read_bytes() for file in woven.rglob("*.gz")}
    again = tool("make_retrieval_corpus.py", "--text", corpus, "--output", woven, "--mb", 0.2, "--overwrite")
    assert again.returncode == 0
    assert {file: file.read_bytes() for file in woven.rglob("*.gz")} == before


def test_a_corpus_of_no_prose(tmp_path: Path) -> None:
    (tmp_path / "code.json").write_bytes(orjson.dumps({"id": "1", "text": "x = 1 + 2; " * 99}) + b"\n")
    refused = tool("make_retrieval_corpus.py", "--text", tmp_path / "code.json", "--output", tmp_path / "out")
    assert refused.returncode == 3
    assert "prose" in refused.stderr
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_is_measured(config: Path, woven: Path, tmp_path: Path) -> None:
    """Of two processes here, of one there; plain, then with YaRN at lengths beyond the trained ones."""
    two = ("--expert-model-parallel-size", 2, "--moe-shared-expert-overlap")  # neither is for one process
    pretrain_well("--config", config, "--train-iters", 2, *two, processes=2)
    checkpoints = tmp_path / "run" / "checkpoints"
    common = (
        "--checkpoint", checkpoints, "--text", woven / "haystack", "--samples", 4, "--depths", 3,
        "--statement", "{name} {value}.",
    )  # fmt: skip
    reach = ("--lengths", "32,96", "--max-position-embeddings", 96)

    beyond = tool("evaluate_retrieval.py", *common, "--lengths", "32,96")
    assert beyond.returncode == 2
    assert "max_context_length = 32" in beyond.stderr
    assert "rope_scaling" in beyond.stderr

    plain = tmp_path / "plain.png"
    done = tool("evaluate_retrieval.py", *common, *reach, "--title", "plain", "--output", plain)
    assert done.returncode == 0, done.stderr
    result = orjson.loads(plain.with_suffix(".json").read_bytes())
    assert (result["lengths"], result["depths"]) == ([32, 96], [0.0, 0.5, 1.0])
    assert [len(row) for row in result["accuracy"]] == [3, 3]
    assert max(share for row in result["accuracy"] for share in row) <= 0.5  # it has learnt nothing
    assert (result["step"], result["rope_scaling"]) == (2, None)

    yarn = tmp_path / "yarn.png"
    done = tool(
        "evaluate_retrieval.py", *common, *reach, "--model.mla.rope_scaling.factor", 3,
        "--model.mla.rope_scaling.original_max_position_embeddings", 32,
        "--beside", plain.with_suffix(".json"), "--output", yarn,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert orjson.loads(yarn.with_suffix(".json").read_bytes())["rope_scaling"]["factor"] == 3
    assert yarn.stat().st_size > plain.stat().st_size

    for flags, code, told in (
        (("--lengths", "8"), 2, "no room"),
        (("--model.num_layers", 3), 4, "another model"),
        (("--statement", "{name}"), 2, "--statement"),
        (("--tokenizer-model", "none.model"), 3, "none.model"),
        (("--checkpoint", tmp_path), 4, "step_NUMBER"),
        (("--beside", config), 3, "no result"),
    ):
        refused = tool("evaluate_retrieval.py", *common, *flags, "--output", tmp_path / "refused.png")
        assert refused.returncode == code, refused.stderr
        assert told in refused.stderr
    assert not (tmp_path / "refused.png").exists()
