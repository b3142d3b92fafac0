"""Accuracy of models that always, never or only nearby retrieve; the table and the figure of results."""

from pathlib import Path

import orjson
import pytest
import torch
from torch import Tensor

from megads.data.needles import STATEMENT, Haystack
from megads.errors import DataError
from megads.train.retrieval import Grid, accuracy_by_length_and_depth, prompts_of
from megads.train.retrieval_figure import Result, draw, read_result, table
from tests.unit.test_retrieval_needles import SENTENCES, Words

GRID = Grid(lengths=(32, 96), depths=3, samples=12)


class Reader:
    """Finds the fact by its words within the last `sight` tokens, and predicts what it says."""

    def __init__(self, words: Words, sight: int) -> None:
        self.words, self.sight = words, sight

    def __call__(self, ids_BS: Tensor, last: int) -> Tensor:
        return torch.tensor([[self.answer(row)] * last for row in ids_BS.tolist()])

    def answer(self, ids: list[int]) -> int:
        text = self.words.decode(ids[-self.sight :]).split()
        found = [text[at + 1] for at, word in enumerate(text[:-1]) if word == "is"]
        word = found[0].removesuffix(".") if found else "nothing"
        return self.words.encode_batch([word])[0][0]


def accuracy(sight: int) -> list[list[float]]:
    words = Words()
    haystack = Haystack(words, SENTENCES, STATEMENT)
    return accuracy_by_length_and_depth(Reader(words, sight), haystack, GRID, batch_tokens=200)


def test_always() -> None:
    assert accuracy(sight=96) == [[1.0] * 3, [1.0] * 3]


def test_never() -> None:
    assert accuracy(sight=5) == [[0.0] * 3, [0.0] * 3]


def test_only_nearby() -> None:
    assert accuracy(sight=32) == [[1.0] * 3, [0.0, 0.0, 1.0]]


def test_every_token_of_an_answer_counts() -> None:
    class Letters(Words):
        """Values of several tokens: a token per letter."""

        def encode_batch(self, texts):  # type: ignore[no-untyped-def]
            return super().encode_batch([" ".join(text) for text in texts])

    def knows_all_but(wrong: int):  # type: ignore[no-untyped-def]
        def predict(ids_BS: Tensor, last: int) -> Tensor:
            rows = []
            for ids in ids_BS.tolist():
                whole = next(p.ids for p in prompts if p.ids[:-1] == ids)
                rows.append([*whole[-last:-1], whole[-1] + wrong])
            return torch.tensor(rows)

        return predict

    haystack = Haystack(Letters(), SENTENCES, STATEMENT)
    grid = Grid(lengths=(120,), depths=1, samples=8)
    prompts = prompts_of(haystack, grid, 120, 0.5)
    assert len({prompt.answer_tokens for prompt in prompts}) > 1
    assert accuracy_by_length_and_depth(knows_all_but(0), haystack, grid) == [[1.0]]
    assert accuracy_by_length_and_depth(knows_all_but(1), haystack, grid) == [[0.0]]


def test_a_result_is_read_back_and_drawn(tmp_path: Path) -> None:
    result = Result("plain RoPE", (32, 96), GRID.depth_shares, [[1.0, 0.5, 0.25], [0.0, 0.0, 1.0]])
    path = tmp_path / "result.json"
    path.write_bytes(orjson.dumps(result.as_dict() | {"step": 3}))
    assert table(read_result(path)) == table(result)
    assert table(result).splitlines()[2].split() == ["32", "100.0%", "50.0%", "25.0%", "58.3%"]
    draw([result, result], tmp_path / "new" / "result.png")
    assert (tmp_path / "new" / "result.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{}", b'{"title": "", "lengths": [1], "depths": [0.5], "accuracy": [[1, 1]]}'],
)
def test_a_file_that_is_no_result(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "result.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"result\.json"):
        read_result(path)


def test_a_result_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.json"):
        read_result(tmp_path / "none.json")
