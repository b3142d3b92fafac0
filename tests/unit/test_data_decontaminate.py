"""Decontamination: what shares a run of words with an evaluation set goes, and nothing else."""

import gzip
import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from data_files import write_json_lines

from megads.data.cleaning.decontaminate import EvaluationIndex
from megads.data.cleaning.run import clean
from megads.data.cleaning.scan import CleaningSettings
from megads.data.cleaning.words import LETTERS, split_words
from megads.data.inputs import find_shards
from megads.data.removals import Removal, read_removals, read_removals_header
from megads.errors import DataError

QUESTION = "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May."
SHORT = "How many clips did Natalia sell altogether in spring?"


def evaluation_file(directory: Path, items: Sequence[object], name: str = "math.jsonl.gz") -> Path:
    path = directory / name
    path.write_bytes(gzip.compress("".join(json.dumps(item) + "\n" for item in items).encode()))
    return path


def hit(index: EvaluationIndex, text: str) -> tuple[str, str] | None:
    ((words,),) = split_words([text], LETTERS)
    overlap = index.overlap(words)
    return overlap and (text[overlap.start : overlap.end], overlap.item)


@pytest.fixture
def index(tmp_path: Path) -> EvaluationIndex:
    items = [{"id": "x1", "question": QUESTION, "n": 3}, {"a": {"b": ["too short", SHORT]}}]
    return EvaluationIndex([evaluation_file(tmp_path, items)])


def test_a_shared_run_is_found_whatever_its_case_and_punctuation(index: EvaluationIndex) -> None:
    disguised = "and THEN she sold -- half as many clips -- in (May) of that year"
    run = "48 of her friends in\nApril and then she sold half as many"
    assert hit(index, f"Some text. {run} apples") == (run, "math.jsonl.gz:1:question")
    assert hit(index, f"to 48 of her friends in april {disguised}") is not None
    assert hit(index, f"Here: {QUESTION}") == (
        QUESTION[: QUESTION.index(" sold half")],
        "math.jsonl.gz:1:question",
    )


def test_fewer_words_in_a_row_are_no_overlap(index: EvaluationIndex) -> None:
    twelve = " ".join(QUESTION.split()[:12])
    assert hit(index, f"{twelve} otherwise") is None
    assert hit(index, f"{twelve} she") is not None
    assert hit(index, "") is None


def test_strings_shorter_than_a_run_are_found_whole(index: EvaluationIndex) -> None:
    assert hit(index, f"Q: {SHORT} A: 72") == (SHORT[:-1], "math.jsonl.gz:2:a.b.1")
    assert hit(index, SHORT.replace("spring", "summer")) is None
    assert hit(index, "too short") is None
    assert index.too_short == 2


def test_agrees_with_sets_of_words(tmp_path: Path) -> None:
    rng = random.Random(0)

    def text(words: int) -> str:
        return " ".join(rng.choices("abc", k=words))

    questions = [text(rng.randrange(3, 30)) for _ in range(40)]
    index = EvaluationIndex(
        [evaluation_file(tmp_path, [{"q": q} for q in questions])], ngram_words=8, min_words=6
    )
    runs = set()
    for words in (question.split() for question in questions):
        size = min(8, len(words))
        if size >= 6:
            runs |= {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}
    outcomes = []
    for _ in range(400):
        words = text(rng.randrange(1, 25)).split()
        expected = any(
            tuple(words[i : i + size]) in runs for size in (6, 7, 8) for i in range(len(words) - size + 1)
        )
        outcomes.append(expected)
        assert (hit(index, " ".join(words)) is not None) == expected, words
    assert 20 < sum(outcomes) < 380


def test_fields(tmp_path: Path) -> None:
    file = evaluation_file(tmp_path, [{"question": QUESTION, "passage": SHORT}])
    assert hit(EvaluationIndex([file], fields=["passage"]), QUESTION) is None
    assert hit(EvaluationIndex([file], fields=["passage"]), SHORT) is not None
    with pytest.raises(DataError, match="8 words to look for in the fields answer"):
        EvaluationIndex([file], fields=["answer"])


def test_bad_evaluation_files(tmp_path: Path) -> None:
    good = evaluation_file(tmp_path, [QUESTION])
    bad = tmp_path / "bad.jsonl"
    bad.write_text(f'{{"question": "{QUESTION}"}}\nnot json\n')
    with pytest.raises(DataError, match=r"bad\.jsonl, line 2: not JSON"):
        EvaluationIndex([good, bad])
    bad.write_text(f'["{QUESTION}"]\n')
    assert hit(EvaluationIndex([bad]), QUESTION) is not None
    with pytest.raises(DataError, match=r"bad\.jsonl, line 1: not a JSON object"):
        EvaluationIndex([bad], fields=["question"])
    bad.write_text(f'{{"question": "{QUESTION}"}}\n{{"question": "{"x" * (16 << 20)}"}}\n')
    with pytest.raises(DataError, match=r"bad\.jsonl, line 2: the line is longer than"):
        EvaluationIndex([bad])
    with pytest.raises(DataError, match="no string of at least 8 words"):
        EvaluationIndex([good, evaluation_file(tmp_path, [{"x": "few words"}], "few.jsonl.gz")])


def test_a_run_removes_the_documents_and_says_which_item(tmp_path: Path) -> None:
    file = evaluation_file(tmp_path, [{"question": QUESTION}])
    texts = ["clean", f"A blog. {QUESTION}", "clean too", "clean"]
    write_json_lines(tmp_path / "web" / "1.jsonl", texts)
    result = clean(
        find_shards([str(tmp_path / "web")]),
        tmp_path / "removals",
        CleaningSettings(evaluation_sha256=("x",)),
        work=tmp_path / "work",
        index=EvaluationIndex([file]),
    )
    path = tmp_path / "removals" / "web" / "1.jsonl.removals.zst"
    removals = read_removals(path, read_removals_header(path).input_sha256)
    assert removals == {2: Removal("contaminated"), 4: Removal("exact_duplicate")}
    (entry,) = result.reports[0].contaminated
    assert entry["line"] == 2
    assert entry["detail"].startswith("math.jsonl.gz:1:question: Natalia sold clips")
