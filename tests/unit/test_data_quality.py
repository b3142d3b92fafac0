"""Quality rules: each fires on its own defect, at its published limit, and good prose passes all."""

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from data_files import write_json_lines

from megads.data.cleaning.quality import (
    Verdict,
    _covered,
    _in_duplicate_ngrams,
    _top_ngram_characters,
    c4,
    gopher,
)
from megads.data.cleaning.run import clean
from megads.data.cleaning.scan import CleaningSettings
from megads.data.cleaning.words import TOKENS, ngram_hashes, split_words
from megads.data.inputs import find_shards
from megads.data.removals import read_removals, read_removals_header

PROSE = (
    "It was late in the autumn when the old lighthouse keeper first noticed that something had changed.\n"
    "Ships which used to pass by every evening, with lamps lit and crews singing, stayed away now.\n"
    "He wrote a letter to his sister, who lived far inland, asking what people there had heard about this.\n"
    "Her answer came weeks later: nobody in her town knew anything, but the price of fish kept rising.\n"
    "So he took the small boat, some bread, a compass, and set out to find the reason himself."
)
WORDS = PROSE.replace("\n", " ").split()


def judge(text: str) -> str | None:
    ((words,),) = split_words([text], TOKENS)
    verdict = gopher(text, words)
    return verdict and verdict.rule


def distinct(count: int, length: int = 6, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=length)) for _ in range(count)]


def with_stop_words(words: list[str]) -> str:
    return " ".join(["the", "of", *words])


def test_prose_passes() -> None:
    assert judge(PROSE) is None
    ((words,),) = split_words([PROSE], TOKENS)
    assert c4(PROSE, words) is None


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (" ".join(WORDS[:49]), "gopher_word_count"),
        (" ".join(WORDS[:50]), None),
        ("", "gopher_word_count"),
        (with_stop_words(distinct(100_000)), "gopher_word_count"),
        (with_stop_words(distinct(98, 2)), "gopher_mean_word_length"),
        (with_stop_words(distinct(98, 11)), "gopher_mean_word_length"),
        (with_stop_words(distinct(98, 10)), None),
        (with_stop_words([*distinct(98), *["#"] * 0]) + "#" * 11, "gopher_hash_ratio"),
        (with_stop_words(distinct(98)) + "#" * 10, None),
        (with_stop_words([f"{word}…" for word in distinct(11)] + distinct(87)), "gopher_ellipsis_ratio"),
        (with_stop_words([f"{i:06}" for i in range(21)] + distinct(77)), "gopher_alphabetic_words"),
        (with_stop_words([f"{i:06}" for i in range(20)] + distinct(78)), None),
        (" ".join(["the", *distinct(99)]), "gopher_stop_words"),
        (" ".join(["THE", "And", *distinct(99)]), None),
        ("\n".join(f"- the and {' '.join(distinct(5, seed=i))}" for i in range(20)), "gopher_bullet_lines"),
        ("x\nthe\n" + "\n".join(f"• and {' '.join(distinct(5, seed=i))}" for i in range(18)), None),
        (
            "\n".join(f"the and {' '.join(distinct(9, seed=i))}{'...' if i < 4 else '.'}" for i in range(10)),
            "gopher_ellipsis_lines",
        ),
        (
            "\n".join(f"the and {' '.join(distinct(9, seed=i))}{'...' if i < 3 else '.'}" for i in range(10)),
            None,
        ),
        ("\n".join([*distinct(10, 3), *["same"] * 6]) + "\n" + PROSE, None),
        ("\n".join([*distinct(4, 3), *["same"] * 9]) + "\n" + PROSE, "gopher_duplicate_lines"),
        ("\n".join([*distinct(16, 3), LINE := " ".join(distinct(8)), LINE]) + "\n" + PROSE, None),
        (
            "\n".join([*distinct(16, 3), LONG := " ".join(distinct(120)), LONG]) + "\n" + PROSE,
            "gopher_duplicate_line_characters",
        ),
        (
            "\n\n".join(["one\ntwo", *[f"1\n{i}" for i in range(3)], *["a\nb"] * 4])
            + "\n\n"
            + "\n".join(f"{word} the and" for word in distinct(80)),
            "gopher_duplicate_paragraphs",
        ),
        (" ".join(distinct(40)) + " new york the and" * 20, "gopher_top_2gram"),
        (
            with_stop_words(distinct(60)) + " " + " ".join(f"{w} of the united" for w in distinct(18, 3)),
            "gopher_top_3gram",
        ),
    ],
)  # fmt: skip
def test_gopher(text: str, rule: str | None) -> None:
    assert judge(text) == rule


@pytest.mark.parametrize("n", range(5, 11))
def test_gopher_duplicate_ngrams(n: int) -> None:
    """Blocks of exactly n words repeated, each block once, as many as the limit for n allows or more.

    Rules for shorter runs have higher limits, so the one for n is the first to fire.
    """
    limits = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
    verdicts = []
    for share in (limits[n] - 0.02, limits[n] + 0.005):
        total = 3000
        in_words = share * 7 / 6  # a word has 6 characters, with its space 7
        blocks = round(total * in_words / (n - in_words))
        words = distinct(total - blocks * n)
        repeated = [words[i * 2 * n : i * 2 * n + n] for i in range(blocks)]
        # A word of its own between the blocks, so that no longer run is repeated.
        seams = distinct(blocks, seed=1)
        tail = [word for block, seam in zip(repeated, seams, strict=True) for word in (*block, seam)]
        verdicts.append(judge(with_stop_words([*words, *tail])))
    assert verdicts[0] is None
    assert verdicts[1] == f"gopher_duplicate_{n}grams"


def test_shares_of_ngrams_are_those_of_a_python_loop() -> None:
    rng = random.Random(1)
    for _ in range(50):
        words = rng.choices(distinct(12, 3) + distinct(12, 7), k=rng.randrange(12, 200))
        ((split,),) = split_words([" ".join(words)], TOKENS)
        lengths = split.ends - split.starts
        for n in (2, 3, 5, 8):
            ngrams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
            counts = Counter(ngrams)
            most = max(counts.values())

            def covered(places: list[int], n: int = n, words: list[str] = words) -> int:
                return sum(len(words[i]) for i in {i + k for i in places for k in range(n)})

            top = counts.most_common(1)[0][0]  # the first of the most frequent
            expected = covered([i for i, gram in enumerate(ngrams) if gram == top]) if most > 1 else 0
            hashes = ngram_hashes(split.hashes, n)
            assert _top_ngram_characters(hashes, n, lengths) == expected
            again = [i for i, gram in enumerate(ngrams) if gram in ngrams[:i]]
            assert int(lengths[_in_duplicate_ngrams(hashes, n)].sum()) == covered(again)
    assert _covered(np.array([0, 3]), 2, 6).tolist() == [True, True, False, True, True, False]


C4_GOOD = "This line has more than five words. And it ends well."


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (f"{C4_GOOD}\n{C4_GOOD}", None),
        (C4_GOOD, "c4_sentences"),
        ("", "c4_sentences"),
        (f"{C4_GOOD}\n{C4_GOOD}\nfunction() {{ }}", "c4_curly_bracket"),
        (f"{C4_GOOD}\n{C4_GOOD}\nLorem Ipsum dolor sit amet yes.", "c4_lorem_ipsum"),
    ],
)
def test_c4_documents(text: str, rule: str | None) -> None:
    verdict = c4(text, split_words([text], TOKENS)[0][0])
    assert (verdict and verdict.rule) == rule


@pytest.mark.parametrize(
    ("line", "stays"),
    [
        ("He said that it was \"over and done.\"", True),
        ("Is this the line you asked for?", True),
        ("No end mark in this line of words", False),
        ("Only four words here.", False),
        ("It goes on and on and on...", False),
        ("Please enable Javascript to see this page now.", False),
        ("By reading on you accept our Cookie Policy today.", False),
        ("   ", True),
    ],
)  # fmt: skip
def test_c4_lines(line: str, stays: bool) -> None:
    text = f"{C4_GOOD}\n{line}\n{line}\n{C4_GOOD} Done now."
    verdict = c4(text, split_words([text], TOKENS)[0][0])
    if stays:
        assert verdict is None
        return
    assert isinstance(verdict, Verdict)
    assert verdict.spans is not None
    ((start, end),) = verdict.spans
    assert text[:start] + text[end:] == f"{C4_GOOD}\n{C4_GOOD} Done now."


def test_a_run_applies_rules_to_the_sources_named(tmp_path: Path) -> None:
    cut = f"{PROSE}\nHome | News | About"
    for source in ("web", "code"):
        write_json_lines(tmp_path / source / "1.jsonl", [PROSE, "too few words", cut])
    settings = CleaningSettings(exact_documents=False, quality=("c4", "gopher"), quality_sources=("web",))
    shards = find_shards([str(tmp_path / "web"), str(tmp_path / "code")])
    reports = clean(shards, tmp_path / "removals", settings, work=tmp_path / "work").reports
    path = tmp_path / "removals" / "web" / "1.jsonl.removals.zst"
    removals = read_removals(path, read_removals_header(path).input_sha256)
    assert {line: removal.reason for line, removal in removals.items()} == {2: "c4_sentences", 3: "c4_lines"}
    assert removals[3].cut(cut) == f"{PROSE}\n"
    assert reports[0].reasons["c4_sentences"].text_bytes == len("too few words")
    assert reports[1].reasons == {}


def test_cuts_of_rules_and_of_paragraphs_are_joined(tmp_path: Path) -> None:
    """A line that a rule cuts stands for no other: in a source without rules the same line stays."""
    menu = "Home | News | About this company and all of its many products"
    again = f"A second page starts here. It says little. Then it ends.\n{PROSE}\n{menu}"
    write_json_lines(tmp_path / "a_web" / "1.jsonl", [f"{PROSE}\n{menu}", again])
    write_json_lines(tmp_path / "code" / "1.jsonl", [f"{menu}\nother text", f"{menu}\nmore text"])
    settings = CleaningSettings(
        exact_documents=False, min_paragraph_characters=50, quality=("c4",), quality_sources=("a_web",)
    )
    shards = find_shards([str(tmp_path / "a_web"), str(tmp_path / "code")])
    reports = clean(shards, tmp_path / "removals", settings, work=tmp_path / "work").reports
    web, code = (
        read_removals(path, read_removals_header(path).input_sha256)
        for path in sorted((tmp_path / "removals").rglob("*.zst"))
    )
    assert {line: removal.reason for line, removal in web.items()} == {
        1: "c4_lines",
        2: "c4_lines+duplicate_paragraph",
    }
    assert web[1].cut(f"{PROSE}\n{menu}") == f"{PROSE}\n"
    assert web[2].cut(again) == again[: again.index("It was late")]
    assert {line: removal.reason for line, removal in code.items()} == {2: "duplicate_paragraph"}
    assert reports[0].reasons["c4_lines+duplicate_paragraph"].characters_cut == len(PROSE) + 1 + len(menu)
