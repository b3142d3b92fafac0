"""The fast engine gives the reference's ids, whatever the text, in bounded memory; else it is not used."""

import logging
import random
import subprocess
import sys
import sysconfig
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import sentencepiece
import tokenizers
from numpy.typing import NDArray
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from megads.data import long_words, token_engines
from megads.data.long_words import LongWords
from megads.data.token_engines import (
    ByteLevelEngine,
    GigatokenEngine,
    SentencePieceEngine,
    why_not_gigatoken,
)
from megads.data.tokenizer_huggingface import HuggingFaceTokenizer
from megads.data.tokenizer_sentencepiece import SentencePieceTokenizer
from megads.data.tokenizer_training import train_sentencepiece

LIBRARY = Path(sysconfig.get_paths()["stdlib"])
# The patterns of DeepSeek-V3's pre-tokenizer.
DEEPSEEK = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^"""
    + "\r\n"
    + r"""\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+["""
    + "\r\n"
    + r"""]*|\s*["""
    + "\r\n"
    + r"""]+|\s+(?!\S)|\s+""",
)
CONTROL = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<|endoftext|>")
HARD = [
    "", " ", "\n", "\x00", "\x00\x01\x7f", "\ufeffBOM", "▁", "a▁▁b ▁", "  a  b   c     d",
    "x\r\n\r\n y\r z",
    " " * 5000, "x" + " " * 4999 + "y", "\n" * 3000, "\r\n" * 500, " \n" * 500, "\t" * 999, "a" * 20_000,
    "=" * 3000, "中" * 2000, "1" * 1000, "don't WE'LL THEY'RE I'm 's 'S",
    "🎉👩‍👩‍👧🇩🇪 e\u0301 \u0301", "ﬁ ½ ² ß İ ı Å",
    "x\u0085y\u2028z\u2029w\u00a0\u3000v\u1680", "\u1100\u1161\u11a8", "\ue000\uf8ff\uffff\U0010ffff",
    "<｜User｜>hi<｜end▁of▁sentence｜>", "<|endoftext|>", "a<|endoftext|>b", "</s><s>[INST]<0x0A><unk>",
    "\U00032e4e x", " \U0001f8d8", "ab\ua7ce:S\u2029", "\u0d3c\u0369", "\U00011935\U00011930",
    "a\u1acf\u0301\u0334",
]  # fmt: skip


def save(model: tokenizers.Tokenizer, path: Path, texts: list[str]) -> Path:
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=3000, special_tokens=list(CONTROL), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    model.train_from_iterator(texts, trainer)
    model.save(str(path))
    return path


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Real text: code, prose about it, and messages and tables in many scripts."""
    files = [
        path
        for path in sorted(LIBRARY.rglob("*.py"))
        if path.stat().st_size > 2000 and "site-packages" not in path.parts
    ]
    chosen = random.Random(0).sample(files, 60)
    metadata = sorted(Path(tokenizers.__file__).parents[1].glob("*.dist-info/METADATA"))[:40]
    found = [path.read_bytes().decode(errors="ignore") for path in [*chosen, *metadata]]
    named = [unicodedata.name(chr(c), "") + f" {chr(c)} is {chr(c)}{chr(c)}.\n" for c in range(0xA0, 0x3100)]
    return [*found, *("".join(named[i : i + 300]) for i in range(0, len(named), 300))]


@pytest.fixture(scope="module")
def deepseek(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tokenizers.Tokenizer(models.BPE())
    split = [pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in DEEPSEEK]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.pre_tokenizer = pre_tokenizers.Sequence([*split, byte_level])
    path = save(model, tmp_path_factory.mktemp("deepseek") / "tokenizer.json", texts)
    model = tokenizers.Tokenizer.from_file(str(path))
    model.add_tokens([tokenizers.AddedToken("<｜User｜>", normalized=False)])
    model.save(str(path))
    return path


@pytest.fixture(scope="module")
def neox(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As GPT-NeoX's and Dolma's: normal form C, GPT-2's pattern, added tokens that are text."""
    model = tokenizers.Tokenizer(models.BPE())
    model.normalizer = normalizers.NFC()
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    path = save(model, tmp_path_factory.mktemp("neox") / "tokenizer.json", texts)
    model = tokenizers.Tokenizer.from_file(str(path))
    spaces = [tokenizers.AddedToken(" " * n, normalized=True) for n in range(24, 1, -1)]
    model.add_tokens([*spaces, tokenizers.AddedToken("|||IP_ADDRESS|||", normalized=True)])
    model.save(str(path))
    return path


def load(path: Path, *, fast: bool = True) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(path, path.read_bytes(), CONTROL[1], fast=fast)


def random_texts(count: int) -> list[str]:
    rng = random.Random(1)
    blocks = [
        (0x20, 0x7F), (0x20, 0x21), (0, 0x20), (0xA0, 0x370), (0x370, 0x2000), (0x2000, 0x3100),
        (0x4E00, 0x9FFF),
        (0xA000, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x20000), (0x20000, 0x34000), (0x40000, 0x10FFFF),
    ]  # fmt: skip
    mixed = ["".join(chr(rng.randint(*rng.choice(blocks))) for _ in range(30)) for _ in range(count)]
    spaced = ["".join(rng.choices(" \n\r\t\x0b\u00a0\u3000aB1.'!,é中|<", k=30)) for _ in range(count)]
    return mixed + spaced


@pytest.mark.parametrize("name", ["deepseek", "neox"])
def test_ids_are_the_reference_s_on_every_document(
    name: str, texts: list[str], request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(name)
    fast, reference = load(path), load(path, fast=False)
    assert fast.engine.startswith("gigatoken")
    assert reference.engine.startswith("tokenizers")
    named = [f"{text}|||IP_ADDRESS||| {text}" for text in ("", "x", " ", "   ", "\n")]
    for batch in (texts, HARD, named, random_texts(3000)):
        expected = reference.encode_batch(batch)
        assert fast.encode_batch(batch) == expected
        ids, lengths = fast.encode_batch_arrays(batch)
        assert ids.tolist() == [i for part in expected for i in part]
        assert lengths.tolist() == list(map(len, expected))
        assert (ids.dtype, lengths.dtype) == (np.uint16, np.int32)


@pytest.mark.parametrize("name", ["deepseek", "neox"])
def test_characters_newer_than_the_reference(name: str, request: pytest.FixtureRequest) -> None:
    """Every character of the younger blocks, in surroundings where its class and its marks matter."""
    path = request.getfixturevalue(name)
    fast, reference = load(path), load(path, fast=False)
    codes = [
        *range(0x300, 0x3100),
        *range(0xA640, 0xABFF),
        *range(0xF900, 0xFFFF),
        *range(0x10000, 0x1FC00, 3),
    ]
    batch = [f"a{chr(code)}b {chr(code)} 1'{chr(code)}{chr(code)}\n{chr(code)}\u0301\u0334" for code in codes]
    assert fast.encode_batch(batch) == reference.encode_batch(batch)
    assert fast._fast is not None
    doubtful = fast._fast.encode(batch)[2]
    assert 0 < len(doubtful) < len(batch) / 2, "some go to the reference, most do not"
    old = ["日本語 العربية हिन्दी ไทย 한국어 Привет 🎉👩‍👩‍👧 “é” e\u0301"]
    assert fast._fast.encode(old)[2] == []


@pytest.mark.parametrize("adds_space", [False, True])
def test_sentencepiece_ids_are_the_reference_s(texts: list[str], tmp_path: Path, adds_space: bool) -> None:
    path = tmp_path / "tokenizer.model"
    if adds_space:  # as Llama's and Mistral's
        train_plain(texts, path, normalization_rule_name="identity", remove_extra_whitespaces=False)
    else:
        train_sentencepiece(texts[::4], path, 2000, character_coverage=0.99)
    content = path.read_bytes()
    fast, reference = (SentencePieceTokenizer(path, content, None, fast=fast) for fast in (True, False))
    assert fast.engine.startswith("gigatoken")
    assert reference.engine.startswith("sentencepiece")
    for batch in (texts, HARD, random_texts(3000), ["</s>", "a<s>b", "<unk>", "<0x0A>", "<|fim_begin|>x"]):
        expected = reference.encode_batch(batch)
        assert fast.encode_batch(batch) == expected
        assert fast.encode_batch_arrays(batch)[0].tolist() == [i for part in expected for i in part]


def train_plain(texts: list[str], path: Path, **options: Any) -> None:
    lines = [line[:1000] for text in texts[::4] for line in text.split("\n") if line]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(path.with_suffix("")), model_type="bpe",
        vocab_size=2000, byte_fallback=True, character_coverage=0.99, minloglevel=2, **options,
    )  # fmt: skip


def test_sentencepiece_that_normalizes_is_left_to_the_reference(texts: list[str], tmp_path: Path) -> None:
    train_plain(texts, tmp_path / "t.model")
    content = (tmp_path / "t.model").read_bytes()
    assert SentencePieceTokenizer(tmp_path / "t.model", content, None).engine.startswith("sentencepiece")
    with pytest.raises(ValueError, match="normalizer"):
        SentencePieceEngine(content, np.dtype(np.uint16), [], "")


def edited(path: Path, edit: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    spec: dict[str, Any] = orjson.loads(path.read_bytes())
    edit(spec)
    return spec


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda spec: spec["model"].update(type="Unigram"), "byte-level BPE"),
        (lambda spec: spec["model"].update(byte_fallback=True), "byte-level BPE"),
        (lambda spec: spec["model"].update(ignore_merges=True), "ignore_merges"),
        (lambda spec: spec["model"].update(continuing_subword_prefix="##"), "continuing_subword_prefix"),
        (lambda spec: spec.update(normalizer={"type": "Lowercase"}), "normalizer"),
        (lambda spec: spec.update(pre_tokenizer=None), "pre-tokenizer"),
        (lambda spec: spec["pre_tokenizer"]["pretokenizers"].pop(), "pre-tokenizer"),
        (lambda spec: spec["pre_tokenizer"]["pretokenizers"][-1].update(use_regex=True), "pre-tokenizer"),
        (lambda spec: spec["model"]["merges"].append(["<|endof", "text|>"]), "control token '<|endoftext|>'"),
    ],
)
def test_what_the_engine_would_ignore_is_left_to_the_reference(
    deepseek: Path, edit: Callable[[dict[str, Any]], object], reason: str
) -> None:
    assert why_not_gigatoken(edited(deepseek, lambda spec: None), CONTROL) is None
    found = why_not_gigatoken(edited(deepseek, edit), CONTROL)
    assert found is not None
    assert reason in found


def test_a_wrong_engine_is_found_out_when_it_is_loaded(
    deepseek: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """gigatoken does not say that it cannot do without a pattern: its ids do."""
    path = tmp_path / "tokenizer.json"
    last = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    path.write_bytes(orjson.dumps(edited(deepseek, lambda spec: spec.update(pre_tokenizer=last))))
    monkeypatch.setattr("megads.data.tokenizer_huggingface.why_not_gigatoken", lambda spec, control: None)
    tokenizer = load(path)
    assert tokenizer.engine.startswith("tokenizers")
    assert "gigatoken 0" in caplog.text
    assert str(path) in caplog.text


def test_a_shard_on_which_the_engines_differ_falls_back_alone(
    deepseek: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    texts = [text[:5000] for text in texts]
    tokenizer, expected = load(deepseek), load(deepseek, fast=False).encode_batch(texts)
    right = GigatokenEngine.encode

    def wrong(engine: GigatokenEngine, texts: list[str]) -> Any:
        ids, lengths, doubtful = right(engine, texts)
        if texts and "import" in texts[0]:
            ids = ids.copy()
            ids[50] += 1
        return ids, lengths, doubtful

    monkeypatch.setattr(GigatokenEngine, "encode", wrong)
    code = [text for text in texts if "import" in text]
    prose = [text for text in texts if "import" not in text]
    assert tokenizer.use_exact_engine(prose, "prose.jsonl.gz").startswith("gigatoken")
    assert not caplog.records
    assert tokenizer.encode_batch(code) != load(deepseek, fast=False).encode_batch(code)
    with caplog.at_level(logging.WARNING):
        assert tokenizer.use_exact_engine(code, "code.jsonl.gz").startswith("tokenizers")
    (record,) = caplog.records
    assert "code.jsonl.gz" in record.getMessage()
    assert "document 1, from token 50" in record.getMessage()
    assert tokenizer.encode_batch(texts) == expected
    assert tokenizer.encode_batch_arrays(texts)[0].tolist() == [i for part in expected for i in part]
    assert tokenizer.use_exact_engine(prose, "prose.jsonl.gz").startswith("gigatoken")
    assert tokenizer.use_exact_engine([], "empty.jsonl.gz").startswith("gigatoken")


def engine_of(path: Path) -> GigatokenEngine:
    engine = load(path)._fast
    assert engine is not None
    return engine


def as_lists(encoded: tuple[NDArray[Any], NDArray[np.int32], list[int]]) -> tuple[list[int], list[int]]:
    return encoded[0].tolist(), encoded[1].tolist()


def test_long_texts_in_parts_give_the_same_ids(
    deepseek: Path, neox: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hard = [text + line for text in HARD for line in ("\nabc", " \nabc", "\r\nAbc", ".\n\nabc", "x\nAbc")]
    batch = [*texts[::8], "".join(random.Random(0).sample(hard * 5, 5 * len(hard)))]
    for path in (deepseek, neox):
        engine = engine_of(path)
        whole = as_lists(engine.encode(batch))
        with monkeypatch.context() as patch:
            patch.setattr(token_engines, "PART_CHARACTERS", 40)
            assert sum(1 for text in batch for _ in engine._parts(text)) > 10 * len(batch)
            assert as_lists(engine.encode(batch)) == whole


def test_long_words_in_windows_give_the_same_ids(
    deepseek: Path, neox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(3)
    monkeypatch.setattr(long_words, "WINDOW_CHARACTERS", 512)
    monkeypatch.setattr(long_words, "OVERLAP_BYTES", 128)

    def run(alphabet: Sequence[str]) -> str:
        return "".join(rng.choices(alphabet, k=rng.randrange(1000, 5000)))

    alphabets = (
        *("abcdefgh", ["the", "ing", "self", "Z"], "a", "=-*", "=", " ", "\n", "中文的是", "中"),
        *("абвгд", "ж", ["при", "на", "é"], "กขฃ", "가나다", "═║╒", "═", "😀😁", "𝐀𝐁", "aбcд"),
    )
    around = ("", " ", "/", "é", "1", "self.", "\n", "，", "\u0301", "_x", "/а", "́\u1100", "\u11a8", "가")
    batch = ["".join(rng.choice(around) + run(rng.choice(alphabets)) for _ in range(3)) for _ in range(150)]
    for path in (deepseek, neox):
        engine = engine_of(path)
        assert isinstance(engine, ByteLevelEngine)
        windows: list[str] = []

        def encode(text: str, engine: GigatokenEngine = engine, seen: list[str] = windows) -> NDArray[Any]:
            seen.append(text)
            return np.asarray(engine._model.encode(text))

        for text in batch:
            whole = engine._model.encode(text)
            assert engine._long_words.encode(text, encode).tolist() == whole.tolist()
        assert sum(map(len, windows)) < 2 * sum(map(len, batch)), "hardly any was encoded whole after all"
        assert len(windows) > 5 * len(batch)
        for alphabet in ("абвгд", "กขฃ", "가나다", "═║╒", "😀😁", "𝐀𝐁"):
            windows.clear()
            engine._long_words.encode(run(alphabet), encode)
            assert max(map(len, windows)) < 2 * 512, alphabet


def test_the_reference_is_given_long_words_in_windows_too(
    deepseek: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(long_words, "WINDOW_CHARACTERS", 512)
    monkeypatch.setattr(long_words, "OVERLAP_BYTES", 128)
    unknown_to_reference = "\U00032e4e x "
    text = unknown_to_reference + "".join(random.Random(1).choices("абвг", k=5000))
    tokenizer = load(deepseek)
    whole = tokenizer._encode_reference([text])[0]
    longest = 0

    def encode_reference(texts: Sequence[str], encode: Any = tokenizer._encode_reference) -> list[list[int]]:
        nonlocal longest
        longest = max(longest, *map(len, texts))
        return encode(texts)

    monkeypatch.setattr(tokenizer, "_encode_reference", encode_reference)
    ids, _ = tokenizer.encode_batch_arrays([text])
    assert ids.tolist() == whole
    assert 0 < longest <= 2 * 512


def test_words_that_depend_on_what_is_around_are_not_cut(neox: Path) -> None:
    def kinds(edit: Callable[[dict[str, Any]], object]) -> str:
        nothing_unknown = np.zeros(0x110000, np.bool_)
        return LongWords(edited(neox, edit), nothing_unknown, composed=True)._run.pattern

    def by_case(spec: dict[str, Any]) -> None:
        pattern = {
            "type": "Split",
            "pattern": {"Regex": r"\p{Lu}?\p{Ll}+"},
            "behavior": "Isolated",
            "invert": False,
        }
        last = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [pattern, last]}

    assert "[A-Za-z]" in kinds(lambda spec: None)
    assert "[A-Za-z]" not in kinds(by_case)
    assert " {" not in kinds(lambda spec: None), "runs of spaces are added tokens there"


def test_no_parts_where_a_line_does_not_start_a_word(deepseek: Path, neox: Path, tmp_path: Path) -> None:
    def prefix_space(spec: dict[str, Any]) -> None:
        spec["pre_tokenizer"]["add_prefix_space"] = True

    def greedy(spec: dict[str, Any]) -> None:
        spec["added_tokens"][-1]["rstrip"] = True

    for edit in (prefix_space, greedy):
        spec = edited(neox, edit)
        assert not token_engines._lines_stand_alone(spec)
    assert token_engines._lines_stand_alone(edited(neox, lambda spec: None))
    letters = {"type": "Split", "pattern": {"Regex": r"\s*\p{L}+"}, "behavior": "Isolated", "invert": False}
    spec = edited(deepseek, lambda spec: spec["pre_tokenizer"]["pretokenizers"].__setitem__(2, letters))
    assert not token_engines._lines_stand_alone(spec)


GROWTH = """
import random, sys
from pathlib import Path
import psutil
from megads.data import token_engines
from megads.data.tokenizer_huggingface import HuggingFaceTokenizer

path, limit = Path(sys.argv[1]), int(sys.argv[2])
token_engines.CACHE_BYTES, token_engines.RENEWAL_TEXT_CHARACTERS = limit, 1 << 20
engine = HuggingFaceTokenizer(path, path.read_bytes(), None)._fast
rng, process = random.Random(0), psutil.Process()
batches = [["".join(rng.choices("abcdefghijklmnop \\n", k=1 << 20))] for _ in range(16)]
engine.encode(["a"])
start, most = process.memory_info().rss, 0
for batch in batches:
    engine.encode(batch)
    most = max(most, process.memory_info().rss - start)
print(most, engine.renewals)
"""


def test_memory_is_bounded_by_making_the_engine_anew(deepseek: Path) -> None:
    """Text of words that never repeat makes the engine remember all of them."""

    def growth(limit_bytes: int) -> tuple[int, int]:
        root = str(Path(token_engines.__file__).parents[2])
        command = [sys.executable, "-c", GROWTH, str(deepseek), str(limit_bytes)]
        said = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True, timeout=600)
        most_bytes, renewals = map(int, said.stdout.split())
        return most_bytes, renewals

    unbounded_bytes, none = growth(1 << 40)
    bounded_bytes, renewals = growth(16 << 20)
    assert none == 0
    assert renewals >= 2
    assert unbounded_bytes > 64 << 20
    assert bounded_bytes < unbounded_bytes / 2


def test_an_engine_made_anew_gives_the_same_ids(deepseek: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = as_lists(engine_of(deepseek).encode(HARD))
    engine = engine_of(deepseek)
    monkeypatch.setattr(token_engines, "CACHE_BYTES", -1)
    monkeypatch.setattr(token_engines, "RENEWAL_TEXT_CHARACTERS", 0)
    assert as_lists(engine.encode(HARD)) == expected
    assert engine.renewals == 1
    assert as_lists(engine.encode(HARD)) == expected
