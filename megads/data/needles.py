"""Needle in a haystack: facts hidden among other text, and questions that only they answer.

A fact ("The pass key of Oslo is copper.") gives a name a value; its question is its words up to the value.
Texts woven of sentences, facts and questions teach a small model to look a value up. A prompt with one fact
at a known depth and its question at the end measures that: pass-key retrieval (arXiv:2305.16300; RULER,
arXiv:2404.06654, "single NIAH"). The rest of a prompt holds no value: the model has to find the one that is
there over a distance, not to tell names apart. Imports no torch.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple, Protocol

from megads.errors import ConfigError, DataError

NAMES = (
    "Athens", "Berlin", "Cairo", "Dublin", "Hanoi", "Lima", "Lisbon", "London",
    "Madrid", "Moscow", "Oslo", "Paris", "Rome", "Sydney", "Tokyo", "Vienna",
)  # fmt: skip
VALUES = (
    "amber", "bronze", "carbon", "copper", "coral", "cotton", "emerald", "granite",
    "honey", "ivory", "marble", "pepper", "ruby", "silver", "steel", "velvet",
)  # fmt: skip

STATEMENT = "The pass key of {name} is {value}."

MIN_WORDS, MAX_WORDS = 4, 12
MOST_QUESTIONS = 5
_END_OF_SENTENCE = re.compile(r"(?<=[.;:!?])\s+|\n\s*\n")
_WORDS = re.compile(r"[A-Za-z][A-Za-z' -]*[A-Za-z][.,;:!?]?(?: [A-Za-z][A-Za-z' -]*[,.;:!?]?)*")


class _Encoder(Protocol):
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...


@dataclass(frozen=True)
class Fact:
    """What a name has for a value, in the words of a statement such as STATEMENT."""

    statement: str
    name: str
    value: str

    @property
    def text(self) -> str:
        return self.statement.format(name=self.name, value=self.value)

    @property
    def question(self) -> str:
        """The statement up to its value."""
        return self.statement.partition(" {value}")[0].format(name=self.name)

    @property
    def answered(self) -> str:
        return f"{self.question} {self.value}"


def check_statement(statement: str) -> str:
    """The statement, if it can be asked: a name, then, after a space, the value. Raises ConfigError."""
    try:
        fields = (statement.count("{name}"), statement.count(" {value}"))
        whole = statement.format(name="", value="")
    except (IndexError, KeyError, ValueError):
        fields, whole = (0, 0), ""
    if fields != (1, 1) or not whole or statement.index("{name}") > statement.index("{value}"):
        raise ConfigError(
            f"--statement {statement!r}: must hold {{name}} once and, after it and a space, {{value}} "
            f"once, as in {STATEMENT!r}"
        )
    return statement


def sentences_of(texts: Iterable[str]) -> Iterator[str]:
    """Sentences of plain words, one line each; code, tables, numbers and markup are passed over.

    So are those that hold a name or a value of a fact.
    """
    reserved = {word.lower() for word in (*NAMES, *VALUES)}
    for text in texts:
        for part in _END_OF_SENTENCE.split(text):
            sentence = " ".join(part.split())
            words = sentence.split(" ")
            if not MIN_WORDS <= len(words) <= MAX_WORDS or not _WORDS.fullmatch(sentence):
                continue
            if reserved.isdisjoint(word.strip(".,;:!?'-").lower() for word in words):
                yield sentence


# ---------------------------------------------------------------- texts to learn from


def woven_text(sentences: Sequence[str], statement: str, reach_words: int, words: int, random: Random) -> str:
    """A text of at least `words` words: random sentences, and again and again a fact and its questions.

    Up to about `reach_words` words lie between a fact and its question, and between one question and the
    next: half of the time any number as often as another, so that the farthest occur too, half of the time as
    often 1 to 3 as 10 to 30 of them, without which nothing is learned at first. The answer is always the
    last value before.
    """
    parts: list[str] = []
    length = 0

    def add(part: str) -> None:
        nonlocal length
        parts.append(part)
        length += part.count(" ") + 1

    while length < words:
        fact = Fact(statement, random.choice(NAMES), random.choice(VALUES))
        add(fact.text)
        for _ in range(random.randint(1, MOST_QUESTIONS)):
            far = random.random() < 0.5
            asked_at = length + (reach_words * random.random() if far else reach_words ** random.random() - 1)
            while length < asked_at - MAX_WORDS / 2:
                add(random.choice(sentences))
            add(fact.text)
    return " ".join(parts)


# ---------------------------------------------------------------- prompts to measure with


class Prompt(NamedTuple):
    """Token ids of haystack, fact, question and answer, in this order but for the depth of the fact.

    The last `answer_tokens` ids are the answer; the fact begins at `fact_at`.
    """

    ids: list[int]
    answer_tokens: int
    fact_at: int


class Haystack:
    """Sentences as token ids, to hide facts in."""

    def __init__(self, tokenizer: _Encoder, sentences: Sequence[str], statement: str) -> None:
        """Raises DataError where `sentences` is empty."""
        self._tokenizer, self._statement = tokenizer, statement
        self._sentences = [ids for ids in self._encode(sentences) if ids]
        if not self._sentences:
            raise DataError(
                f"no sentence of {MIN_WORDS} to {MAX_WORDS} plain words for a haystack: give text of prose"
            )

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        """As they stand within a text, after a space."""
        return self._tokenizer.encode_batch([f" {text}" for text in texts])

    def prompt(self, length_tokens: int, depth: float, random: Random) -> Prompt:
        """A prompt of exactly `length_tokens`, answer included, with a random fact in it.

        `depth` is the share of the haystack before the fact, to the nearest end of a sentence. Raises
        ConfigError where fact, question and answer are longer, DataError where the tokenizer joins the
        answer with the question.
        """
        fact = Fact(self._statement, random.choice(NAMES), random.choice(VALUES))
        fact_ids, question_ids, answered_ids = self._encode([fact.text, fact.question, fact.answered])
        if answered_ids[: len(question_ids)] != question_ids or len(answered_ids) == len(question_ids):
            raise DataError(
                f"the tokenizer joins question and answer of {fact.answered!r}: choose another --statement"
            )
        filler = length_tokens - len(fact_ids) - len(answered_ids)
        if filler < 0:
            raise ConfigError(
                f"a prompt of {length_tokens} tokens has no room: fact, question and answer alone are "
                f"{length_tokens - filler} tokens; give a longer --lengths"
            )
        before, after = self._split(filler, depth, random)
        return Prompt(
            ids=before + fact_ids + after + answered_ids,
            answer_tokens=len(answered_ids) - len(question_ids),
            fact_at=len(before),
        )

    def _split(self, count: int, depth: float, random: Random) -> tuple[list[int], list[int]]:
        """`count` tokens of random sentences (of the first one its end), cut between two, near `depth`."""
        chosen: list[list[int]] = []
        left = count
        while left > 0:
            sentence = random.choice(self._sentences)[-left:]
            chosen.insert(0, sentence)
            left -= len(sentence)
        ends = [0]
        for sentence in chosen:
            ends.append(ends[-1] + len(sentence))
        at = min(ends, key=lambda end: abs(end - depth * count))
        whole = [token for sentence in chosen for token in sentence]
        return whole[:at], whole[at:]
