"""Quality rules of Gopher (MassiveText, arXiv:2112.11446, appendix A.1.1) and of C4 (arXiv:1910.10683, 2.2).

Made for English web text: code, mathematics and tables fail them by nature, so say which sources they
are for. Each rule drops a document, and has a name that reports carry; C4 also cuts lines.

Choices where the papers leave one. Words are runs without whitespace, lowercased. "Duplicate" is every
occurrence after the first. Shares of n-grams are the characters of their words, none counted twice, of
all characters of the text; shares of lines and paragraphs are of the characters in them. C4's bracket
is looked for in the whole page, as the paper says, not in the lines that stay. On 1,200 documents
(manuals, licenses, code), Gopher's rules decided as those of datatrove 0.10.1, given the same words, on
96.5%; most others come from the mean word length, which datatrove takes without words of symbols.

Not done: C4's list of bad words, its language filter (Dolma is filtered already), and its removal of
repeated three-sentence spans, for which exact removal of paragraphs stands here.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from megads.data.cleaning.words import LETTER, TOKENS, Words, ngram_hashes, split_words

GOPHER_STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
ELLIPSES = ("...", "…")
BULLETS = ("•", "‣", "▪", "●", "-", "*")
# (words of the n-gram, largest share of characters), table A1.
TOP_NGRAMS = ((2, 0.20), (3, 0.18), (4, 0.16))
DUPLICATE_NGRAMS = ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10))
MAX_DUPLICATE_LINES = MAX_DUPLICATE_PARAGRAPHS = 0.30
MAX_DUPLICATE_LINE_CHARACTERS = MAX_DUPLICATE_PARAGRAPH_CHARACTERS = 0.20
PARAGRAPH_BREAK = re.compile(r"\n{2,}")

C4_TERMINAL = (".", "!", "?", '"', "”")
C4_MIN_LINE_WORDS = 5
C4_MIN_SENTENCES = 3
C4_LINES = re.compile(
    "javascript|terms of use|privacy policy|cookie policy|uses cookies|use of cookies|use cookies",
    re.IGNORECASE,
)
SENTENCE_END = re.compile(r"[.!?][\"'”’)\]]*(?=\s|$)")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a rule makes of a document: dropped, or, where there are spans, some characters cut."""

    rule: str
    detail: str
    spans: tuple[tuple[int, int], ...] | None = None


def gopher(text: str, words: Words) -> Verdict | None:
    """The first Gopher rule that a document breaks; `words` are its TOKENS."""
    return _gopher_words(text, words) or _gopher_lines(text) or _gopher_repetition(text, words)


def _gopher_words(text: str, words: Words) -> Verdict | None:
    count = len(words)
    if not 50 <= count <= 100_000:
        return Verdict("gopher_word_count", f"{count} words")
    mean = float((words.ends - words.starts).mean())
    if not 3 <= mean <= 10:
        return Verdict("gopher_mean_word_length", f"{mean:.2f} characters")
    for name, symbols in (("hash", ("#",)), ("ellipsis", ELLIPSES)):
        ratio = sum(map(text.count, symbols)) / count
        if ratio > 0.1:
            return Verdict(f"gopher_{name}_ratio", f"{ratio:.3f} per word")
    alphabetic = float((words.classes >= LETTER).mean())
    if alphabetic < 0.8:
        return Verdict("gopher_alphabetic_words", f"{alphabetic:.3f} of the words")
    stop_words = sum(bool((words.hashes == stop).any()) for stop in _stop_word_hashes())
    if stop_words < 2:
        return Verdict("gopher_stop_words", f"{stop_words} of {len(GOPHER_STOP_WORDS)}")
    return None


def _gopher_lines(text: str) -> Verdict | None:
    lines = [line for line in map(str.strip, text.split("\n")) if line]
    bullets = sum(line.startswith(BULLETS) for line in lines) / len(lines)
    if bullets > 0.9:
        return Verdict("gopher_bullet_lines", f"{bullets:.3f} of the lines")
    ellipses = sum(line.endswith(ELLIPSES) for line in lines) / len(lines)
    if ellipses > 0.3:
        return Verdict("gopher_ellipsis_lines", f"{ellipses:.3f} of the lines")
    if verdict := _duplicate_parts("line", lines, MAX_DUPLICATE_LINES, MAX_DUPLICATE_LINE_CHARACTERS):
        return verdict
    parts = [part for part in map(str.strip, PARAGRAPH_BREAK.split(text)) if part]
    return _duplicate_parts("paragraph", parts, MAX_DUPLICATE_PARAGRAPHS, MAX_DUPLICATE_PARAGRAPH_CHARACTERS)


def _duplicate_parts(name: str, parts: Sequence[str], most: float, most_characters: float) -> Verdict | None:
    distinct = set(parts)
    if len(distinct) == len(parts):
        return None
    share = 1 - len(distinct) / len(parts)
    if share > most:
        return Verdict(f"gopher_duplicate_{name}s", f"{share:.3f} of the {name}s")
    characters = 1 - sum(map(len, distinct)) / sum(map(len, parts))
    if characters > most_characters:
        return Verdict(f"gopher_duplicate_{name}_characters", f"{characters:.3f} of the characters")
    return None


def _gopher_repetition(text: str, words: Words) -> Verdict | None:
    lengths = words.ends - words.starts
    for n, most in TOP_NGRAMS:
        share = _top_ngram_characters(ngram_hashes(words.hashes, n), n, lengths) / len(text)
        if share > most:
            return Verdict(f"gopher_top_{n}gram", f"{share:.3f} of the characters")
    least = DUPLICATE_NGRAMS[-1][1]
    for n, most in DUPLICATE_NGRAMS:
        share = int(lengths[_in_duplicate_ngrams(ngram_hashes(words.hashes, n), n)].sum()) / len(text)
        if share > most:
            return Verdict(f"gopher_duplicate_{n}grams", f"{share:.3f} of the characters")
        if share <= least:
            return None  # what a longer duplicate covers, shorter ones cover too
    return None


def _top_ngram_characters(hashes: NDArray[np.uint64], n: int, lengths: NDArray[np.int64]) -> int:
    """Characters in the most frequent n-gram, all occurrences; 0 where none occurs twice.

    Of several that are equally frequent it is the one that occurs first.
    """
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    starts = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))
    counts = np.diff(np.append(starts, ordered.size))
    most = counts.max()
    if most < 2:
        return 0
    group = min(starts[counts == most], key=lambda start: order[start])
    places = order[group : group + most]
    return int(lengths[_covered(places, n, lengths.size)].sum())


def _in_duplicate_ngrams(hashes: NDArray[np.uint64], n: int) -> NDArray[np.bool_]:
    """Which words lie in an n-gram that occurred before [words]."""
    order = np.argsort(hashes, kind="stable")
    again = order[1:][hashes[order[1:]] == hashes[order[:-1]]]
    return _covered(again, n, hashes.size + n - 1)


def _covered(places: NDArray[np.int64], n: int, words: int) -> NDArray[np.bool_]:
    """Which words lie in an n-gram that starts at one of `places` [words]."""
    change = np.zeros(words + 1, np.int32)
    change[places] = 1
    change[places + n] -= 1  # the places differ
    return np.cumsum(change[:-1]) > 0


@cache
def _stop_word_hashes() -> tuple[np.uint64, ...]:
    return tuple(words.hashes[0] for (words,) in split_words(GOPHER_STOP_WORDS, TOKENS))


def c4(text: str, words: Words) -> Verdict | None:
    """C4's rules: a document dropped, or the lines cut that are no sentences; `words` are not used.

    A line stays if it ends in a terminal mark, has at least 5 words, and mentions no script or policy.
    Sentences are counted by their end marks, not by a trained splitter.
    """
    del words
    if "{" in text:
        return Verdict("c4_curly_bracket", "a { in the text")
    if "lorem ipsum" in text.lower():
        return Verdict("c4_lorem_ipsum", "lorem ipsum in the text")
    spans: list[tuple[int, int]] = []
    sentences = start = 0
    while start < len(text):
        end = text.find("\n", start) + 1 or len(text)
        line = text[start:end].strip()
        if line and (
            not line.endswith(C4_TERMINAL)
            or line.endswith(ELLIPSES)
            or len(line.split(None, C4_MIN_LINE_WORDS)) < C4_MIN_LINE_WORDS
            or C4_LINES.search(line)
        ):
            if spans and spans[-1][1] == start:
                spans[-1] = (spans[-1][0], end)
            else:
                spans.append((start, end))
        elif line:
            sentences += len(SENTENCE_END.findall(line)) or 1
        start = end
    if sentences < C4_MIN_SENTENCES:
        return Verdict("c4_sentences", f"{sentences} sentences in the lines that stay")
    return Verdict("c4_lines", f"{len(spans)} runs of lines", tuple(spans)) if spans else None


RULE_SETS: dict[str, Callable[[str, Words], Verdict | None]] = {"gopher": gopher, "c4": c4}
