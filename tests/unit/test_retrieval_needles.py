"""Needles: statements that can be asked, texts that answer their questions, prompts exactly as ordered."""

from collections.abc import Sequence
from itertools import pairwise
from random import Random

import pytest

from megads.data.needles import (
    NAMES,
    STATEMENT,
    VALUES,
    Fact,
    Haystack,
    check_statement,
    sentences_of,
    woven_text,
)
from megads.errors import ConfigError, DataError

SENTENCES = [f"sentence of plain words {'abcdefghij'[i]}." for i in range(10)]


class Words:
    """A token per word, with the space before it."""

    def __init__(self) -> None:
        self.ids: dict[str, int] = {}

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [[self.ids.setdefault(word, len(self.ids)) for word in text.split()] for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        words = {number: word for word, number in self.ids.items()}
        return " ".join(words[number] for number in ids)


class Joined(Words):
    """A tokenizer that makes one token of everything."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [[self.ids.setdefault(text, len(self.ids))] for text in texts]


def test_a_question_and_its_value_begin_the_statement() -> None:
    fact = Fact(STATEMENT, "Oslo", "copper")
    assert (fact.text, fact.question) == ("The pass key of Oslo is copper.", "The pass key of Oslo is")
    assert fact.text.startswith(fact.answered)
    assert fact.answered.endswith(" copper")


@pytest.mark.parametrize(
    "statement",
    [
        "", "no fields", "{name} only", "only {value}", "{value} of {name}", "{name}:{value}",
        "{name} {value} {x}", "{name} {value} {value}", "{name} is {value",
    ],
)  # fmt: skip
def test_a_statement_that_cannot_be_asked(statement: str) -> None:
    with pytest.raises(ConfigError, match="--statement"):
        check_statement(statement)


def test_sentences_are_plain_words_without_names_and_values() -> None:
    assert len({*NAMES, *VALUES}) == len(NAMES) + len(VALUES)
    text = (
        "This one is kept, on one\nline. x = f(1) + 2 is code. Too short. We met in Oslo last year. "
        "All that is silver goes too.\n\nA new paragraph without a stop"
    )
    assert list(sentences_of([text])) == ["This one is kept, on one line.", "A new paragraph without a stop"]


def test_every_answer_is_the_last_value_before() -> None:
    text = woven_text(SENTENCES, STATEMENT, reach_words=40, words=3000, random=Random(1))
    words = text.split()
    values = [at for at, word in enumerate(words) if word.rstrip(".") in VALUES]
    questions = distances = 0
    for before, at in pairwise(values):
        if words[at - 2] == words[before - 2]:  # the same name: a question, or the fact told again
            questions += words[at] == words[before]
            distances = max(distances, at - before)
    assert len(words) >= 3000
    assert questions > len(values) / 2
    assert 20 < distances < 40 + 2 * 12


def test_the_same_seed_weaves_the_same_text() -> None:
    texts = [woven_text(SENTENCES, STATEMENT, 40, 300, Random(seed)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("length", [14, 50, 200])
@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
def test_a_prompt_has_its_length_and_the_fact_at_its_depth(length: int, depth: float) -> None:
    words = Words()
    haystack = Haystack(words, SENTENCES, STATEMENT)
    random = Random(3)
    for _ in range(20):
        prompt = haystack.prompt(length, depth, random)
        assert len(prompt.ids) == length
        text = words.decode(prompt.ids)
        value = text.split()[-prompt.answer_tokens :][0]
        fact = words.decode(prompt.ids[prompt.fact_at :][:7])
        assert fact.startswith("The pass key of")
        assert fact.endswith(f"is {value}.")
        assert text.endswith(fact.removesuffix("."))
        filler = length - 7 - 7
        assert abs(prompt.fact_at - depth * filler) <= 3  # sentences are of five words
        assert sum(word.rstrip(".") in VALUES for word in text.split()) == 2


def test_a_prompt_that_is_too_short() -> None:
    with pytest.raises(ConfigError, match="alone are 14 tokens"):
        Haystack(Words(), SENTENCES, STATEMENT).prompt(12, 0.5, Random(0))


def test_a_haystack_without_sentences() -> None:
    with pytest.raises(DataError, match="prose"):
        Haystack(Words(), [], STATEMENT)


def test_a_tokenizer_that_joins_question_and_answer() -> None:
    with pytest.raises(DataError, match="joins question and answer"):
        Haystack(Joined(), SENTENCES, STATEMENT).prompt(50, 0.5, Random(0))
