"""Verifying datasets: a sound one passes, whatever it was made with; each kind of damage has its line."""

import hashlib
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from data_files import write_dataset, write_json_lines

from megads.data.encoding import Encoder
from megads.data.inputs import find_shards
from megads.data.inspect import Collection, source_of
from megads.data.recipe import Recipe
from megads.data.removals import Removal, removals_path, write_removals
from megads.data.shards import Shard, convert_shard
from megads.data.stored import StoredDataset, find_datasets
from megads.data.tokenizer import load_tokenizer
from megads.data.tokenizer_training import train_sentencepiece
from megads.data.verify import Verification, VerifySettings, check_complete, check_together, verify_dataset
from megads.errors import DataError

SENTENCE = "the river rose in night and by morning it had taken a bridge half of mill with boats"
ALL = 1000


def texts(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [
        f"{number}: " + " ".join(rng.choices(SENTENCE.split(), k=rng.randrange(5, 60))) + ".\n\nEnd {!\n"
        for number in range(count)
    ]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_sentencepiece(texts(200), path, 400)
    return path


class Made:
    """A shard `web/a.jsonl`, its removals, and the dataset `out/a` made of both."""

    def __init__(self, directory: Path, tokenizer: Path, recipe: Recipe | None = None) -> None:
        self.tokenizer = tokenizer
        self.input = directory / "web" / "a.jsonl"
        self.prefix = directory / "out" / "a"
        write_json_lines(self.input, [*texts(60), "", "last"])
        with open(self.input, "a") as file:
            file.write('not json\n{"text": "after it"}\n')
        self.removals = removals_path(directory / "removals", "web", "a.jsonl")
        write_removals(
            self.removals,
            input_file="web/a.jsonl",
            input_bytes=self.input.stat().st_size,
            input_sha256=hashlib.sha256(self.input.read_bytes()).hexdigest(),
            documents=63,
            entries={3: Removal("near_duplicate"), 7: Removal("duplicate_paragraph", ((0, 5), (9, 12)))},
        )
        recipe = recipe or Recipe(str(tokenizer))
        recipe = replace(recipe, removals=(str(directory / "removals"),), quarantine_quota=0.5)
        (shard,) = find_shards([str(self.input)])
        convert_shard(Shard(shard, self.prefix), Encoder(recipe))

    def verify(self, *, quick: bool = False, compare: bool = True) -> Verification:
        tokenizer = str(self.tokenizer) if compare and not quick else None
        settings = VerifySettings(quick=quick, tokenizer=tokenizer, sample_documents=ALL)
        return verify_dataset(settings, str(self.prefix))

    def problems(self, **options: bool) -> str:
        return "\n".join(self.verify(**options).problems)

    def record(self, change: Callable[[dict[str, Any]], object]) -> None:
        path = self.prefix.with_suffix(".json")
        record = orjson.loads(path.read_bytes())
        change(record)
        path.write_bytes(orjson.dumps(record))

    def tokens(self, change: Callable[[np.ndarray, StoredDataset], object]) -> None:
        """Change tokens, and the record so that it knows their hash."""
        path = self.prefix.with_suffix(".bin")
        dataset = StoredDataset(self.prefix)
        ids = np.array(dataset.tokens)
        change(ids, dataset)
        path.write_bytes(ids.tobytes())
        self.record(lambda r: r["bin"].update(sha256=hashlib.sha256(ids.tobytes()).hexdigest()))


@pytest.fixture
def made(tmp_path: Path, tokenizer: Path) -> Made:
    return Made(tmp_path, tokenizer)


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(""),
        Recipe("", fim_rate=0.5, fim_spm_rate=0.5, fim_seed=3),
        Recipe("", keep=(("id", ("3", "4", "17")),), fim_rate=1.0),
        Recipe("", text_field="source"),
    ],
    ids=["plain", "fim", "filtered", "field"],
)
def test_a_sound_dataset_has_no_problem(tmp_path: Path, tokenizer: Path, recipe: Recipe) -> None:
    if recipe.text_field == "source":  # four letters: the spans do not fit
        with pytest.raises(DataError, match="do not fit"):
            Made(tmp_path, tokenizer, replace(recipe, tokenizer=str(tokenizer)))
        return
    made = Made(tmp_path, tokenizer, replace(recipe, tokenizer=str(tokenizer)))
    found = made.verify()
    assert found.problems == []
    assert found.unchecked == []
    assert found.compared_documents == found.documents == len(StoredDataset(made.prefix))
    assert found.documents == (3 if recipe.keep else 61)
    assert made.verify(quick=True).problems == []


def test_what_cannot_be_checked_is_said(made: Made, tokenizer: Path) -> None:
    found = made.verify(compare=False)
    assert (found.problems, found.unchecked) == ([], ["text of documents: no tokenizer was given"])
    made.removals.rename(made.removals.with_name("elsewhere"))
    assert "are not here" in made.verify().unchecked[0]
    made.input.unlink()
    assert "is not here" in made.verify().unchecked[0]
    made.prefix.with_suffix(".json").unlink()
    found = made.verify()
    assert found.problems == []
    assert "no record" in found.unchecked[0]


def test_damaged_files(made: Made) -> None:
    copy = made.prefix.parent.with_name("copy")
    shutil.copytree(made.prefix.parent, copy)
    for ending, damage, quick, said in (
        (".bin", lambda b: b[:100] + bytes([b[100] ^ 1]) + b[101:], "", "a.bin: the content is not what"),
        (".bin", lambda b: b[:-2], "truncated", "truncated"),
        (".idx", lambda b: b[:-8], "truncated", "truncated"),
        (".idx", lambda b: b"x" + b[1:], "bad magic", "bad magic"),
        (".idx", lambda b: b[:40] + bytes([b[40] ^ 1]) + b[41:], "offsets", "offsets"),
        (".json", lambda b: b[:-10], "not a record", "not a record"),
    ):
        path = made.prefix.with_suffix(ending)
        path.write_bytes(damage(path.read_bytes()))
        assert said in made.problems(), ending
        assert quick in made.problems(quick=True)
        assert bool(quick) == bool(made.problems(quick=True))
        shutil.copytree(copy, made.prefix.parent, dirs_exist_ok=True)
    assert made.problems() == ""
    record = made.prefix.with_suffix(".json")
    record.rename(record.with_suffix(".moved"))
    record.mkdir()  # stands for any record that cannot be read
    assert f"{record}: the record cannot be read" in made.problems(quick=True)
    record.rmdir()
    record.with_suffix(".moved").rename(record)
    made.prefix.with_suffix(".idx").unlink()
    assert "No such file" in made.problems(quick=True)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: r["dropped"].update(near_duplicate=0), "64 documents in, but 61 out, 1 quarantined and 1"),
        (lambda r: r.update(documents=60, documents_in=63), "60 documents, but the index has 61"),
        (lambda r: r.update(tokens=5), "5 tokens, but the index has"),
        (lambda r: r["settings"].update(fim_rate=0.1), "not those of their hash"),
        (lambda r: r.update(vocab_size=300), "is not in the vocabulary of 300"),
        (
            lambda r: (r["dropped"].update(near_duplicate=2), r.update(quarantined={})),
            "quarantined is none in the record, bad_json 1 in the input",
        ),
    ],
)  # fmt: skip
def test_a_record_that_does_not_add_up(made: Made, change: Callable[[Any], object], said: str) -> None:
    made.record(change)
    assert said in made.problems()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda ids, d: ids.__setitem__(d.starts[30], ids[d.starts[30]] - 1), "document 30 ("),
        (lambda ids, d: ids.__setitem__(d.starts[9] + 2, 60_000), "id 60000 at token"),
        (lambda ids, d: ids.__setitem__(d.starts[5] + 1, d.record["eod_id"]), "1 ends of documents inside"),
        (lambda ids, d: ids.__setitem__(d.starts[5] - 1, 40), "1 documents do not end with"),
    ],
)
def test_tokens_that_are_not_the_text(
    made: Made, change: Callable[[np.ndarray, StoredDataset], object], said: str
) -> None:
    made.tokens(change)
    assert said in made.problems()
    assert made.problems(quick=True) == ""


def test_line_numbers_count_removed_and_bad_lines(made: Made) -> None:
    made.tokens(lambda ids, d: ids.__setitem__(d.starts[-3], 40))
    assert f"document 59 ({made.input}, line 62)" in made.problems()
    collection = Collection([str(made.prefix)], load_tokenizer(made.tokenizer))
    assert source_of(collection.place(0)) == f"{made.input}, line 1"
    assert source_of(collection.place(2)) == f"{made.input}, line 4"
    assert source_of(collection.place(60)) == f"{made.input}, line 64"


def test_another_input_or_tokenizer(made: Made, tmp_path: Path) -> None:
    other = tmp_path / "other.model"
    train_sentencepiece(texts(200, seed=1), other, 401)
    settings = VerifySettings(tokenizer=str(other))
    assert "made with another tokenizer" in verify_dataset(settings, str(made.prefix)).problems[0]
    made.input.write_text(made.input.read_text().replace("river", "rover", 1))
    assert "not the content that" in made.problems()


def test_scores(tmp_path: Path, tokenizer: Path) -> None:
    made = Made(tmp_path, tokenizer, Recipe(str(tokenizer)))
    write_json_lines(made.input, [])
    made.input.write_text("".join(f'{{"text": "a {i}", "score": {i}}}\n' for i in range(5)))
    recipe = Recipe(str(tokenizer), score_field="score")
    (shard,) = find_shards([str(made.input)])
    convert_shard(Shard(shard, made.prefix), Encoder(recipe))
    assert made.problems() == ""
    scores = made.prefix.with_name("a.scores.npy")
    np.save(scores, np.zeros(5, np.float32))
    assert "not the scores" in made.problems(quick=True)
    scores.unlink()
    assert "a.scores.npy: cannot be read" in made.problems(quick=True)


def test_an_input_without_documents_is_sound(tmp_path: Path, tokenizer: Path) -> None:
    path = write_json_lines(tmp_path / "a.jsonl", [""])
    (shard,) = find_shards([str(path)])
    convert_shard(Shard(shard, tmp_path / "out"), Encoder(Recipe(str(tokenizer))))
    settings = VerifySettings(tokenizer=str(tokenizer))
    found = verify_dataset(settings, str(tmp_path / "out"))
    assert (found.problems, found.documents) == ([], 0)
    (tmp_path / "out.bin").write_bytes(b"12")
    assert "no documents, but there is out.bin" in verify_dataset(settings, str(tmp_path / "out")).problems[0]


def test_what_a_killed_run_left_is_a_problem(made: Made) -> None:
    made.prefix.with_name(".a.bin.partial").write_bytes(b"")
    assert "left by a run that was killed" in made.problems(quick=True)
    directory, found = made.prefix.parent, [Verification(str(made.prefix))]
    assert check_complete([directory], found) == []
    (directory / "sub").mkdir()
    (directory / "sub" / ".b.bin.partial").touch()
    (problem,) = check_complete([directory, directory / "sub", made.prefix], found)
    assert problem.startswith(f"{directory}/sub/b: is being made")


def test_datasets_of_two_tokenizers_do_not_go_together(tmp_path: Path) -> None:
    one = write_dataset(tmp_path / "one", [[3, 4, 2]])
    two = write_dataset(tmp_path / "two", [[5, 2]], sha256="b" * 64)
    found = [verify_dataset(VerifySettings(), str(prefix)) for prefix in (one, one, two)]
    assert check_together(found[:2]) == []
    (problem,) = check_together(found)
    assert "different tokenizers" in problem
    assert "aaaaaaaaaaaa" in problem
    assert "bbbbbbbbbbbb" in problem


def test_a_source_made_with_two_recipes_is_a_problem(tmp_path: Path, tokenizer: Path) -> None:
    """What an interrupted --overwrite with other settings leaves."""
    for name, rate in (("a", 0.0), ("b", 1.0)):
        input_file = write_json_lines(tmp_path / f"{name}.jsonl", ["one text", "another one"] * 3)
        shard = Shard(find_shards([str(input_file)])[0], tmp_path / "out" / name)
        convert_shard(shard, Encoder(Recipe(str(tokenizer), fim_rate=rate)))
    found = [verify_dataset(VerifySettings(), str(tmp_path / "out" / name)) for name in "ab"]
    assert [one.problems for one in found] == [[], []]
    assert check_together(found[:1]) == []
    (problem,) = check_together(found)
    assert problem.endswith("out/b: one source, other settings (fim_rate: 0.0, now 1.0)")


def test_finding_datasets(tmp_path: Path) -> None:
    write_dataset(tmp_path / "x" / "b.1", [[3, 2]])
    write_dataset(tmp_path / "x" / "a", [[3, 2]])
    (tmp_path / "x" / "orphan.bin").touch()
    (tmp_path / "x" / "notes.json").write_text("{}")
    (tmp_path / "x" / ".b.bin.partial").touch()
    found = find_datasets([tmp_path / "x"])
    assert found == [str(tmp_path / "x" / name) for name in ("a", "b.1", "orphan")]
    assert find_datasets([tmp_path / "x" / "b.1.idx", tmp_path / "x" / "b.1"]) == found[1:2]
    for wrong in (tmp_path / "none", tmp_path / "x" / "notes.txt"):
        with pytest.raises(DataError, match="neither a dataset"):
            find_datasets([wrong])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no datasets"):
        find_datasets([tmp_path / "empty"])


def test_samples_are_the_stream_in_order(tmp_path: Path, tokenizer: Path) -> None:
    documents = [[[10 + i % 50] * (i % 7) + [2] for i in range(start, start + 40)] for start in (0, 40)]
    sha256 = load_tokenizer(tokenizer).sha256
    prefixes = [
        str(write_dataset(tmp_path / name, part, sha256=sha256))
        for name, part in zip("ab", documents, strict=True)
    ]
    collection = Collection(prefixes, load_tokenizer(tokenizer))
    flat = [(number, i) for number, ids in enumerate(documents[0] + documents[1]) for i in ids]
    assert collection.tokens == len(flat)
    count = (len(flat) - 1) // 16
    for sample in range(count):
        parts = collection.sample(sample, 16)
        read = [(place.overall, int(i)) for place, ids in parts for i in ids]
        assert read == flat[sample * 16 : sample * 16 + 17]
    with pytest.raises(DataError, match=f"there are {count}, from 0"):
        collection.sample(count, 16)
    with pytest.raises(DataError, match="There is no document 80"):
        collection.place(80)


def test_a_foreign_tokenizer_is_refused(tmp_path: Path, tokenizer: Path) -> None:
    with pytest.raises(DataError, match="made with another tokenizer"):
        Collection([str(write_dataset(tmp_path / "a", [[3, 2]]))], load_tokenizer(tokenizer))
