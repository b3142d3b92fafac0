"""Duplicates: words and hashes against Python's own, the similarity estimate, and whole cleaning runs."""

import gzip
import itertools
import json
import os
import random
import signal
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from data_files import write_json_lines

from megads.data.cleaning import exact, keys
from megads.data.cleaning.near import (
    NO_SHINGLE,
    NearSettings,
    band_keys,
    candidate_probability,
    first_of_clusters,
    signatures,
    similarity,
)
from megads.data.cleaning.run import CleaningResult, clean
from megads.data.cleaning.scan import CleaningSettings
from megads.data.cleaning.words import LETTERS, PIECE_CHARACTERS, TOKENS, Words, ngram_hashes, split_words
from megads.data.inputs import find_shards
from megads.data.removals import Removal, read_removals, read_removals_header, removals_path
from megads.errors import DataError

WORDS = [f"w{i}" for i in range(20_000)]
PARAGRAPH = "A paragraph that is long enough to be known again, wherever it stands in the corpus."
OTHER = "Another paragraph, of about the same length, which says something else altogether."


def text_of(rng: random.Random, words: int = 200) -> str:
    return " ".join(rng.choices(WORDS, k=words))


def run(
    directory: Path, settings: CleaningSettings, *sources: str, workers: int = 1, partitions: int = 2
) -> CleaningResult:
    shards = find_shards([str(directory / source) for source in sources])
    removals, work = directory / "removals", directory / "work"
    return clean(shards, removals, settings, work=work, workers=workers, partitions=partitions)


def found(directory: Path, source: str, name: str) -> dict[int, Removal]:
    path = removals_path(directory / "removals", source, name)
    return read_removals(path, read_removals_header(path).input_sha256)


# Words.


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "a",
        "  two  words\n",
        "Don't stop: 3.14 — “quoted”…",
        "ÄÖÜ ß İstanbul",
        "x" * 5000,
        "a\u00a0b\u3000c",
    ],
)
def test_tokens_are_what_python_splits(text: str) -> None:
    ((words,),) = split_words([text], TOKENS)
    pairs = zip(words.starts, words.ends, strict=True)
    assert [text[start:end] for start, end in pairs] == text.split()


def test_letters_ignore_punctuation_and_case_and_cut_scripts_without_spaces() -> None:
    text = "It's 4-ever: NAÏVE naïve 漢字x ภา"
    ((words,),) = split_words([text], LETTERS)
    shown = [text[start:end] for start, end in zip(words.starts, words.ends, strict=True)]
    assert shown == ["It", "s", "4", "ever", "NAÏVE", "naïve", "漢", "字", "x", "ภ", "า"]
    assert words.hashes[4] == words.hashes[5]
    assert len(set(words.hashes.tolist())) == len(shown) - 1


def test_a_word_has_one_hash_wherever_it_stands() -> None:
    rng = random.Random(0)
    texts = [text_of(rng, rng.randrange(1, 400)) for _ in range(200)] + ["", "one"]
    by_word: dict[str, int] = {}
    for text, (words,) in zip(texts, split_words(texts, TOKENS), strict=True):
        assert len(words) == len(text.split())
        for word, value in zip(text.split(), words.hashes.tolist(), strict=True):
            assert by_word.setdefault(word, value) == value
    assert len(set(by_word.values())) == len(by_word)
    alone = split_words(texts[:1], TOKENS)[0][0]
    assert np.array_equal(alone.hashes, split_words(texts, TOKENS)[0][0].hashes)


def test_long_texts_are_cut_between_words() -> None:
    text = "some words of prose " * (PIECE_CHARACTERS // 10)
    ((words,),) = split_words([text], TOKENS)
    assert len(words) == len(text.split())
    assert len(set(words.hashes.tolist())) == 4
    assert text[words.starts[-1] : words.ends[-1]] == "prose"


@pytest.mark.parametrize("n", range(1, 15))
def test_ngrams_are_equal_where_their_words_are(n: int) -> None:
    rng = random.Random(n)
    text = " ".join(rng.choices("abc", k=3000))
    hashes = ngram_hashes(split_words([text], TOKENS)[0][0].hashes, n)
    words = text.split()
    ngrams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    assert len(hashes) == len(ngrams)
    assert (
        len(set(zip(ngrams, hashes.tolist(), strict=True))) == len(set(ngrams)) == len(set(hashes.tolist()))
    )
    assert ngram_hashes(hashes[: n - 1], n).size == 0


# Keys.


def test_repeats_are_those_of_a_python_loop() -> None:
    rng = np.random.default_rng(0)
    for low_values in (1, 5):  # 5: equal upper halves with different lower ones, which must not be one
        entries = np.zeros(3000, keys.DOCUMENT)
        entries["high"], entries["low"] = rng.integers(0, 900, 3000), rng.integers(0, low_values, 3000)
        seen: dict[tuple[int, int], int] = {}
        expected = {}
        for place, (high, low, _) in enumerate(entries.tolist()):
            first = seen.setdefault((high, low), place)
            if first != place:
                expected[place] = first
        later, first_places = exact.repeats(entries)
        assert dict(zip(later.tolist(), first_places.tolist(), strict=True)) == expected
        assert expected
    assert exact.repeats(entries[:0])[0].size == 0


@pytest.mark.parametrize("partitions", [1, 8])
def test_keys_come_back_by_partition_in_order(tmp_path: Path, partitions: int) -> None:
    rng = np.random.default_rng(0)
    shards = []
    for number, count in enumerate((500, 0, 700)):
        entries = keys.entries(
            keys.DOCUMENT, rng.integers(0, 1 << 63, (count, 2), np.uint64) * 2, np.arange(count)
        )
        path = tmp_path / f"{number}.documents"
        keys.write_keys(path, np.array_split(entries, 3), keys.DOCUMENT, partitions)
        shards.append((path, entries))
    total = 0
    for partition in range(partitions):
        read, numbers = keys.read_partition([path for path, _ in shards], keys.DOCUMENT, partition)
        expected = [
            (number, *entry)
            for number, (_, entries) in enumerate(shards)
            for entry in entries.tolist()
            if entry[0] * partitions >> 64 == partition
        ]
        assert [(n, *entry) for n, entry in zip(numbers.tolist(), read.tolist(), strict=True)] == expected
        total += len(read)
    assert total == 1200


def test_paragraphs() -> None:
    text = f"\n \nshort\n{PARAGRAPH}\r\n\n  {OTHER}  "
    one, two = exact.paragraphs(text, 40)
    assert text[one.start : one.end] == f"{PARAGRAPH}\r\n\n"
    assert text[two.start : two.end] == f"  {OTHER}  "
    assert two.key == exact.text_key(OTHER.replace(" ", "  ")) != one.key
    (only,) = exact.paragraphs(f"\n\n{PARAGRAPH}\n\n", 40)
    assert (only.start, only.end) == (0, len(PARAGRAPH) + 4), "nothing but blank lines would be left"
    assert exact.text_key("e\u0301t\u00e9") == exact.text_key("\u00e9te\u0301")


# Near duplicates.


def test_the_estimate_is_the_jaccard_similarity() -> None:
    rng = np.random.default_rng(0)
    settings = NearSettings(shingle_words=1)
    for shared in (200, 300, 360):
        estimates = []
        for _ in range(100):
            values = rng.integers(0, 1 << 63, 800 - shared, np.uint64) * np.uint64(2)
            places = np.zeros(400, np.int64)
            both = [Words(v, places, places, places.astype(np.uint8)) for v in (values[:400], values[-400:])]
            of_both = signatures(both, settings)
            estimates.append(similarity(of_both[:1], of_both[1:])[0])
        jaccard = shared / (800 - shared)
        spread = (jaccard * (1 - jaccard) / settings.hashes) ** 0.5
        assert abs(np.mean(estimates) - jaccard) < 4 * spread / 10
        assert 0.7 * spread < np.std(estimates) < 1.4 * spread


def test_bands_meet_as_often_as_the_curve_says() -> None:
    settings = NearSettings(bands=6, rows=4)
    rng = np.random.default_rng(1)
    jaccard = 0.6
    first = rng.integers(0, 1 << 32, (4000, settings.hashes), np.uint32)
    second = np.where(rng.random(first.shape) < jaccard, first, first + 1).astype(np.uint32)
    equal = (band_keys(first, settings) == band_keys(second, settings)).all(axis=2).any(axis=1).mean()
    assert abs(equal - candidate_probability(jaccard, settings)) < 0.03
    assert candidate_probability(0.8, NearSettings()) == pytest.approx(0.924, abs=0.001)


def test_documents_without_words_have_no_signature() -> None:
    words = [letters for (letters,) in split_words(["... !", "", "a", "a b", "b a"], LETTERS)]
    of_each = signatures(words, NearSettings())
    assert (of_each[:2] == NO_SHINGLE).all()
    assert not np.array_equal(of_each[3], of_each[4])
    assert (of_each[2:, 0] != NO_SHINGLE).all()


def test_clusters_are_those_of_a_plain_union_find() -> None:
    rng = random.Random(3)
    chain = [(i, i + 1) for i in range(1000, 1400)]
    pairs = [(rng.randrange(900), rng.randrange(900)) for _ in range(400)] + rng.sample(chain, len(chain))
    parent = list(range(2000))

    def root(x: int) -> int:
        while parent[x] != x:
            x = parent[x]
        return x

    for a, b in pairs:
        low, high = sorted((root(a), root(b)))
        parent[high] = low
    expected = {x: root(x) for x in range(2000) if root(x) != x}
    later, first = first_of_clusters(np.array(pairs, np.int64))
    assert dict(zip(later.tolist(), first.tolist(), strict=True)) == expected
    assert first_of_clusters(np.empty((0, 2), np.int64))[0].size == 0


# Whole runs.


def test_the_first_of_equal_documents_stays(tmp_path: Path) -> None:
    write_json_lines(tmp_path / "a" / "1.jsonl", ["one", "two", "one", "", ""])
    write_json_lines(tmp_path / "a" / "2.json.gz", ["three", " two \n"])
    write_json_lines(tmp_path / "b" / "1.jsonl", ["One", "three", "four"])
    result = run(tmp_path, CleaningSettings(), "a", "b")
    duplicate = Removal("exact_duplicate")
    assert found(tmp_path, "a", "1.jsonl") == {3: duplicate, 5: duplicate}
    assert found(tmp_path, "a", "2.json.gz") == {2: duplicate}
    assert found(tmp_path, "b", "1.jsonl") == {2: duplicate}
    assert result.reports[1].examples == {"exact_duplicate": [{"line": 2, "detail": "a/1.jsonl:2"}]}
    assert [report.documents for report in result.reports] == [5, 2, 3]


def test_lines_are_those_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a" / "1.jsonl"
    path.parent.mkdir()
    path.write_text('\n{"text": "one"}\nnot json\n\n{"text": "one"}\n{"text": null}\n')
    result = run(tmp_path, CleaningSettings(), "a")
    assert found(tmp_path, "a", "1.jsonl") == {5: Removal("exact_duplicate")}
    assert result.reports[0].defects == {"bad_json": 1, "null_text": 1}


def test_paragraphs_seen_before_are_cut(tmp_path: Path) -> None:
    texts = [
        f"Top\n{PARAGRAPH}\nEnd",
        f"{OTHER}\n\n{PARAGRAPH}\nMore",
        f"{PARAGRAPH}\n{OTHER}\n",
        f"short\n{OTHER}",
    ]
    write_json_lines(tmp_path / "a" / "1.jsonl", texts)
    settings = CleaningSettings(exact_documents=False, min_paragraph_characters=40)
    result = run(tmp_path, settings, "a")
    removals = found(tmp_path, "a", "1.jsonl")
    assert removals.keys() == {2, 3, 4}
    assert removals[2].cut(texts[1]) == f"{OTHER}\n\nMore"
    assert removals[3] == Removal("duplicate_paragraph"), "nothing would be left of it"
    assert removals[4].cut(texts[3]) == "short\n"
    count = result.reports[0].reasons["duplicate_paragraph"]
    assert (count.documents, count.documents_cut) == (1, 2)
    assert count.characters_cut == len(PARAGRAPH) + 1 + len(OTHER)


def test_a_dropped_document_does_not_stand_for_the_text_of_another(tmp_path: Path) -> None:
    """The second document goes; its last paragraph is then nowhere but in the third, and stays there."""
    rng = random.Random(5)
    body = text_of(rng, 2000)
    write_json_lines(
        tmp_path / "a" / "1.jsonl", [body, f"{body}\n{PARAGRAPH}", f"{PARAGRAPH}\n{text_of(rng)}"]
    )
    settings = CleaningSettings(near=NearSettings(), min_paragraph_characters=40)
    run(tmp_path, settings, "a")
    assert found(tmp_path, "a", "1.jsonl") == {2: Removal("near_duplicate")}


def planted(rng: random.Random, count: int, edits: Sequence[int]) -> tuple[list[str], dict[int, int]]:
    """Originals of 200 words, and after them copies with some words changed; which copies which."""
    originals = [text_of(rng) for _ in range(count)]
    texts, copy_of = list(originals), {}
    for original, text in enumerate(originals):
        words = text.split()
        for place in rng.sample(range(len(words)), edits[original % len(edits)]):
            words[place] = "changed" + str(rng.random())
        copy_of[len(texts)] = original
        texts.append(" ".join(words))
    return texts, copy_of


def test_near_duplicates_are_found_and_others_are_not(tmp_path: Path) -> None:
    """2 changed words in 200 leave a similarity of about 0.9, 40 of about 0.2."""
    texts, copy_of = planted(random.Random(0), 300, (2, 40))
    for shard in range(3):
        write_json_lines(tmp_path / "a" / f"{shard}.jsonl", texts[shard * 200 : shard * 200 + 200])
    run(tmp_path, CleaningSettings(near=NearSettings()), "a")
    gone = {shard * 200 + line - 1 for shard in range(3) for line in found(tmp_path, "a", f"{shard}.jsonl")}
    expected = {copy for copy, original in copy_of.items() if original % 2 == 0}
    assert len(gone & expected) >= 0.98 * len(expected)
    assert gone <= expected


def test_without_a_threshold_more_is_taken(tmp_path: Path) -> None:
    texts, _ = planted(random.Random(1), 200, (10,))  # a similarity of about 0.63
    write_json_lines(tmp_path / "a" / "1.jsonl", texts)
    counts = []
    for threshold in (0.0, 0.7):
        near = NearSettings(threshold=threshold)
        counts.append(
            len(
                run(tmp_path, CleaningSettings(near=near), "a").reports[0].examples
                and found(tmp_path, "a", "1.jsonl")
            )
        )
    assert counts[0] > counts[1] + 20


def test_the_result_does_not_depend_on_workers_or_partitions(tmp_path: Path) -> None:
    rng = random.Random(2)
    texts, _ = planted(rng, 150, (0, 2, 5))
    texts = [f"{text}\n{(PARAGRAPH, OTHER, '')[i % 3]}" for i, text in enumerate(texts)]
    settings = CleaningSettings(near=NearSettings(), min_paragraph_characters=40)
    contents = []
    for number, (workers, partitions) in enumerate(((1, 1), (2, 8))):
        directory = tmp_path / str(number)
        for shard in range(3):
            write_json_lines(directory / "a" / f"{shard}.jsonl", texts[shard * 100 : shard * 100 + 100])
        run(directory, settings, "a", workers=workers, partitions=partitions)
        contents.append([found(directory, "a", f"{shard}.jsonl") for shard in range(3)])
    assert contents[0] == contents[1]
    assert {removal.reason for removal in contents[0][1].values()} >= {
        "exact_duplicate",
        "duplicate_paragraph",
    }
    assert any(
        removal.reason == "near_duplicate" for of_shard in contents[0] for removal in of_shard.values()
    )


def snapshot(directory: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(directory)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != "lock"
    }


def test_a_second_run_does_nothing_and_a_changed_shard_is_seen(tmp_path: Path) -> None:
    write_json_lines(tmp_path / "a" / "1.jsonl", ["one", "two"])
    write_json_lines(tmp_path / "a" / "2.jsonl", ["two", "three"])
    settings = CleaningSettings(near=NearSettings(), min_paragraph_characters=10)
    first = run(tmp_path, settings, "a")
    before = snapshot(tmp_path)
    assert run(tmp_path, settings, "a") == first
    assert snapshot(tmp_path) == before
    write_json_lines(tmp_path / "a" / "1.jsonl", ["one", "three", "other"])
    run(tmp_path, settings, "a")
    after = snapshot(tmp_path)
    scan = "work/scan/a/2.jsonl.scan/scan.json"
    assert after[scan] == before[scan], "an unchanged shard is not read again"
    assert len(list((tmp_path / "work" / "stages").iterdir())) == 1
    assert found(tmp_path, "a", "2.jsonl") == {2: Removal("exact_duplicate")}
    with pytest.raises(DataError, match="another content"):
        read_removals(removals_path(tmp_path / "removals", "a", "1.jsonl"), "0" * 64)


def test_kills_at_every_kind_of_moment_change_nothing(tmp_path: Path) -> None:
    """Whenever something was or is about to be published, the process dies; the next one goes on."""
    rng = random.Random(4)
    texts, _ = planted(rng, 300, (0, 2, 5))
    texts = [f"{text}\n{rng.choice((PARAGRAPH, OTHER, ''))}" for text in texts]
    for directory in ("whole", "killed"):
        for shard in range(4):
            write_json_lines(
                tmp_path / directory / "a" / f"{shard}.jsonl", texts[shard * 150 : shard * 150 + 150]
            )
    settings = CleaningSettings(near=NearSettings(), min_paragraph_characters=40)
    run(tmp_path / "whole", settings, "a")
    kills = 0
    while (status := status_of_a_run_that_dies(tmp_path / "killed", settings, rng, kills)) == signal.SIGKILL:
        kills += 1
        rng.random()
    assert status == 0
    assert kills > 5
    whole, killed = (
        {name: content for name, (_, content) in snapshot(tmp_path / directory / "removals").items()}
        for directory in ("whole", "killed")
    )
    assert killed == whole
    assert len(whole) == 4


def status_of_a_run_that_dies(
    directory: Path, settings: CleaningSettings, rng: random.Random, kills: int
) -> int:
    """Of a forked process, as `os.waitpid` gives it."""
    if process := os.fork():
        return os.waitpid(process, 0)[1]
    try:
        die_at_replace(rng.randrange(1, 4), before=kills % 2 == 0)
        run(directory, settings, "a")
        os._exit(0)
    finally:
        os._exit(1)  # whatever it was: only the parent goes on with the tests


def die_at_replace(count: int, *, before: bool) -> None:
    """In a forked process: be killed before or after the `count`-th file gets its name."""
    replace = os.replace
    calls = itertools.count(1)

    def replace_and_die(*paths: Path) -> None:
        last = next(calls) == count
        if not (last and before):
            replace(*paths)
        if last:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replace_and_die  # type: ignore[assignment]


def test_two_shards_of_one_name_and_a_busy_directory_are_refused(tmp_path: Path) -> None:
    for parent in ("x", "y"):
        write_json_lines(tmp_path / parent / "a" / "1.jsonl", ["one"])
    with pytest.raises(DataError, match=r"both are a/1\.jsonl"):
        run(tmp_path, CleaningSettings(), "x/a", "y/a")
    import fcntl

    (tmp_path / "work").mkdir(exist_ok=True)
    with open(tmp_path / "work" / "lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another cleaning run"):
            run(tmp_path, CleaningSettings(), "x/a")


def test_damaged_input_is_an_error_and_leaves_no_scan(tmp_path: Path) -> None:
    path = write_json_lines(tmp_path / "a" / "1.json.gz", [text_of(random.Random(i)) for i in range(50)])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"1\.json\.gz, line \d+"):
        run(tmp_path, CleaningSettings(), "a")
    assert not (tmp_path / "removals").exists()
    path.write_bytes(gzip.compress(b"".join(json.dumps({"text": t}).encode() + b"\n" for t in "aba")))
    run(tmp_path, CleaningSettings(), "a")
    assert found(tmp_path, "a", "1.json.gz").keys() == {3}
