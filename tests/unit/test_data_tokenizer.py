"""Tokenizers: nothing is lost, no text becomes a control token, training is deterministic."""

import random
import sys
import sysconfig
from pathlib import Path

import numpy as np
import orjson
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from megads.data.documents import read_texts
from megads.data.indexed import token_type
from megads.data.inputs import find_shards
from megads.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_sha256
from megads.data.tokenizer_training import FIM_TOKENS, sample_texts, train_sentencepiece
from megads.errors import DataError

from data_files import write_json_lines  # isort: skip

CONTROL_LITERALS = [
    "</s>", "<s>", "<unk>", "<pad>", "<|endoftext|>", "<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>",
    "<｜User｜>", "<0x0A>", "[EOS]", "[INST]", *FIM_TOKENS,
]  # fmt: skip
HARD_TEXTS = [
    "", " ", "  leading and trailing  ", "\n\n\t mixed \r\n space\u00a0s\u2003", "▁", "a▁▁b ▁", "▁ \n▁",
    "日本語 العربية हिन्दी 🎉👩‍👩‍👧 e\u0301", "\x00\x01\x7f", "\ufeffBOM", "12345 3.14e-10",
    "def f(x):\n    return  x",
]  # fmt: skip


@pytest.fixture(scope="module")
def texts() -> list[str]:
    library = Path(sysconfig.get_paths()["stdlib"])
    return [(library / name).read_text() for name in ("argparse.py", "typing.py", "inspect.py", "ast.py")]


@pytest.fixture(scope="module")
def sentencepiece_model(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sp") / "tokenizer.model"
    train_sentencepiece(texts, path, 1000)
    return path


@pytest.fixture(scope="module")
def huggingface_model(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE as DeepSeek's, with all that published files bring along."""
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    special = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<pad>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(texts, trainer)
    model.add_tokens([tokenizers.AddedToken("<｜User｜>", normalized=False), "     "])
    model.post_processor = processors.TemplateProcessing(
        single="<｜begin▁of▁sentence｜> $A", special_tokens=[("<｜begin▁of▁sentence｜>", 0)]
    )
    model.enable_truncation(max_length=8)
    model.enable_padding(length=16, pad_token="<pad>", pad_id=2)
    path = tmp_path_factory.mktemp("hf") / "tokenizer.json"
    model.save(str(path))
    return path


@pytest.fixture(params=["sentencepiece", "huggingface"])
def tokenizer(
    request: pytest.FixtureRequest, sentencepiece_model: Path, huggingface_model: Path
) -> Tokenizer:
    return load_tokenizer(sentencepiece_model if request.param == "sentencepiece" else huggingface_model)


def random_texts(count: int) -> list[str]:
    """Strings over all of Unicode but surrogates, with spaces and U+2581 more often than chance."""
    rng = random.Random(0)
    planes = [(0x20, 0x7F), (0xA0, 0x2FF), (0x2580, 0x2583), (0x0, 0x20), (0xE000, 0x10FFFF), (0x20, 0x21)]
    return [
        "".join(chr(rng.randint(*rng.choice(planes))) for _ in range(rng.randint(1, 40)))
        for _ in range(count)
    ]


def test_decode_gives_back_every_text(tokenizer: Tokenizer, texts: list[str]) -> None:
    samples = [*texts, *HARD_TEXTS, *CONTROL_LITERALS, *random_texts(500)]
    for text, ids in zip(samples, tokenizer.encode_batch(samples), strict=True):
        assert tokenizer.decode(ids) == text


def test_arrays_hold_the_same_ids_as_lists(tokenizer: Tokenizer, texts: list[str]) -> None:
    samples = [*texts, *HARD_TEXTS, *CONTROL_LITERALS, *random_texts(100)]
    ids, lengths = tokenizer.encode_batch_arrays(samples)
    assert ids.dtype == token_type(tokenizer.vocab_size)
    assert [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])] == tokenizer.encode_batch(
        samples
    )
    for nothing, count in (([], 0), ([""], 1)):
        ids, lengths = tokenizer.encode_batch_arrays(nothing)
        assert (ids.dtype, ids.size, lengths.tolist()) == (token_type(tokenizer.vocab_size), 0, [0] * count)


def test_ids_are_within_the_vocabulary_and_never_the_end_of_document(
    tokenizer: Tokenizer, texts: list[str]
) -> None:
    everything = [i for ids in tokenizer.encode_batch([*texts, *HARD_TEXTS, *CONTROL_LITERALS]) for i in ids]
    assert min(everything) >= 0
    assert max(everything) < tokenizer.vocab_size
    assert tokenizer.eod_id not in everything
    assert 0 <= tokenizer.eod_id < tokenizer.vocab_size
    assert tokenizer.decode([tokenizer.eod_id]) == ""


@pytest.mark.parametrize("literal", CONTROL_LITERALS)
def test_control_tokens_in_a_text_stay_text(tokenizer: Tokenizer, literal: str) -> None:
    (ids,) = tokenizer.encode_batch([f"before {literal} after{literal}"])
    (alone,) = tokenizer.encode_batch([literal])
    assert len(alone) > 1, f"{literal} became one token"
    assert len(ids) > 2 + 2
    assert tokenizer.decode(ids) == f"before {literal} after{literal}"


def test_huggingface_would_have_injected_them(huggingface_model: Path) -> None:
    """The defence above is needed: the library itself turns the literal into the control id."""
    plain = tokenizers.Tokenizer.from_file(str(huggingface_model))
    plain.no_truncation()
    plain.no_padding()
    ids = plain.encode("a<｜end▁of▁sentence｜>b<｜User｜>", add_special_tokens=False).ids
    assert {plain.token_to_id("<｜end▁of▁sentence｜>"), plain.token_to_id("<｜User｜>")} <= set(ids)


def test_huggingface_extras_of_the_file_do_not_act(huggingface_model: Path) -> None:
    """No truncation to 8, no padding to 16, no beginning-of-sentence; added tokens that are text stay."""
    tokenizer = load_tokenizer(huggingface_model)
    spec = orjson.loads(huggingface_model.read_bytes())
    by_name = {token["content"]: token["id"] for token in spec["added_tokens"]}
    (ids,) = tokenizer.encode_batch(["one two three four five six seven eight nine ten eleven twelve"])
    assert len(ids) > 16
    assert not set(by_name.values()) & set(ids)
    assert by_name["     "] in tokenizer.encode_batch(["a" + " " * 5 + "b"])[0]
    assert tokenizer.vocab_size == max(by_name.values()) + 1
    assert tokenizer.eod_id == by_name["<｜end▁of▁sentence｜>"]


def test_end_of_document_by_name_and_by_config(
    huggingface_model: Path, sentencepiece_model: Path, tmp_path: Path
) -> None:
    assert load_tokenizer(huggingface_model, eod_token="<pad>").eod_id == 2
    copy = tmp_path / "tokenizer.json"
    copy.write_bytes(huggingface_model.read_bytes())
    for eos in ("<pad>", {"content": "<pad>"}):
        (tmp_path / "tokenizer_config.json").write_bytes(orjson.dumps({"eos_token": eos}))
        assert load_tokenizer(tmp_path).eod_id == 2
    for path in (huggingface_model, sentencepiece_model):
        with pytest.raises(DataError, match="'<nothing>'"):
            load_tokenizer(path, eod_token="<nothing>")


def test_files_that_are_no_tokenizer(tmp_path: Path) -> None:
    for name, content in (
        ("a.model", b"garbage"),
        ("a.json", b'{"a": 1}'),
        ("b.json", b'{"a'),
        ("empty.model", b""),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=name):
            load_tokenizer(tmp_path / name)
    for missing in (tmp_path, tmp_path / "none.model"):
        with pytest.raises(DataError, match=missing.name):
            load_tokenizer(missing)


def test_training_is_deterministic_and_says_what_it_holds(
    texts: list[str], sentencepiece_model: Path, tmp_path: Path
) -> None:
    again = train_sentencepiece(texts, tmp_path / "b.model", 1000)
    assert again.path.read_bytes() == sentencepiece_model.read_bytes()
    tokenizer = load_tokenizer(again.path)
    assert tokenizer.vocab_size == 1000
    assert tokenizer.kind == "sentencepiece"
    assert tokenizer.sha256 == tokenizer_sha256(again.path)
    # Digits stand alone and line breaks are tokens, so numbers and code are spelled evenly.
    assert len(tokenizer.encode_batch(["20252025"])[0]) == 8
    assert len(tokenizer.encode_batch(["\n\t\n"])[0]) == 3
    bytes_per_token = sum(len(t.encode()) for t in texts) / sum(map(len, tokenizer.encode_batch(texts)))
    assert bytes_per_token > 2.0


@pytest.mark.parametrize("vocab_size", [10, 100_000])
def test_an_impossible_vocabulary_is_a_data_error(tmp_path: Path, vocab_size: int) -> None:
    with pytest.raises(DataError, match=f"{vocab_size:,}"):
        train_sentencepiece(["a few words of text, no more"], tmp_path / "t.model", vocab_size)
    assert not list(tmp_path.iterdir())


def test_training_passes_on_what_is_wrong_with_the_texts(tmp_path: Path) -> None:
    """The trainer would wrap it, traceback and all, into an error of its own."""
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "some words"}\n{"text": 3}\n')
    with pytest.raises(DataError, match=r"^\S+bad\.jsonl, line 2: field 'text' must be a string[^\n]*$"):
        train_sentencepiece(read_texts([bad]), tmp_path / "t.model", 500)


def test_a_tokenizer_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "t.model").touch()
    monkeypatch.setattr(Path, "read_bytes", refuse)
    for read in (load_tokenizer, tokenizer_sha256):
        with pytest.raises(DataError, match=r"t\.model: the tokenizer cannot be read: Permission denied"):
            read(tmp_path / "t.model")


def test_sampling_spreads_over_files(tmp_path: Path) -> None:
    small = write_json_lines(tmp_path / "small.jsonl", ["s" * 100] * 3)
    large = write_json_lines(tmp_path / "large.jsonl", ["l" * 100] * 100)
    taken = list(sample_texts(find_shards([str(large), str(small)]), max_bytes=2000))
    assert sum(text[0] == "s" for text in taken) == 3
    assert sum(text[0] == "l" for text in taken) == 17


def test_control_tokens_that_are_plain_pieces_of_the_model(tmp_path: Path) -> None:
    """A unigram vocabulary that holds `</s>` itself, as published ones do, would match it in a text."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((c, -5.0) for c in "</s>ab ")]
    model = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0))
    model.add_special_tokens(["<unk>", "</s>"])
    model.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    (ids,) = tokenizer.encode_batch(["a</s>b</s>"])
    assert tokenizer.eod_id == 1
    assert [pieces[i][0] for i in ids] == list("a</s>b</s>")


@pytest.fixture
def documented_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The example of docs/tokenizers.md, importable as its first line says."""
    page = (Path(__file__).parents[2] / "docs" / "tokenizers.md").read_text()
    code = page.split("```python\n", 1)[1].split("```", 1)[0]
    file = tmp_path / code.splitlines()[0].removeprefix("# ")
    file.parent.mkdir()
    file.write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.startswith("my_package")]:
        monkeypatch.delitem(sys.modules, name)
    return "my_package.tokens:Utf8Tokenizer"


def test_a_plugin_as_documented(documented_plugin: str, texts: list[str]) -> None:
    tokenizer = load_tokenizer(documented_plugin)
    samples = [*texts, *HARD_TEXTS, *CONTROL_LITERALS]
    ids, lengths = tokenizer.encode_batch_arrays(samples)
    assert tokenizer.decode(ids.tolist()) == "".join(samples)
    assert lengths.tolist() == [len(text.encode()) for text in samples]
    assert tokenizer.use_exact_engine(samples) == tokenizer.engine == "utf8 1.0"
    assert tokenizer.sha256 == tokenizer_sha256(documented_plugin)
    assert load_tokenizer(f"{documented_plugin}@data/bytes.txt").path == Path("data/bytes.txt")
    assert load_tokenizer(Path(documented_plugin)).vocab_size == 257


def test_a_plugin_by_the_name_of_its_entry_point(
    documented_plugin: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    information = tmp_path / "my_package-1.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1\n")
    (information / "entry_points.txt").write_text(f"[megads.tokenizers]\nutf8 = {documented_plugin}\n")
    assert load_tokenizer("utf8").kind == "utf8"
    assert load_tokenizer("utf8@vocabulary.txt").path == Path("vocabulary.txt")
    with pytest.raises(DataError, match="utf9: no such tokenizer"):
        load_tokenizer("utf9")
    # A file of that name is what a path means.
    monkeypatch.chdir(tmp_path)
    Path("utf8").write_bytes(b"not a model")
    with pytest.raises(DataError, match="neither a sentencepiece model"):
        load_tokenizer("utf8")


def test_plugins_that_do_not_keep_their_promises(documented_plugin: str, tmp_path: Path) -> None:
    for name, message in (
        ("my_package.tokens:Nothing", "Nothing"),
        ("my_package.nothing:Tokenizer", "my_package.nothing"),
        ("pathlib:Path", "not a subclass"),
    ):
        with pytest.raises(DataError, match=message):
            load_tokenizer(name)
    (tmp_path / "my_package" / "bad.py").write_text(
        "from my_package.tokens import Utf8Tokenizer\n"
        "class NoEnd(Utf8Tokenizer):\n"
        "    def __init__(self, path, eod_token):\n"
        "        super().__init__(path, eod_token)\n"
        "        self.eod_id = 257\n"
        "class Outside(Utf8Tokenizer):\n"
        "    def encode_batch(self, texts):\n"
        "        return [[257] for text in texts]\n"
        "class Ends(Utf8Tokenizer):\n"
        "    def encode_batch(self, texts):\n"
        "        return [[97, 256, 97] for text in texts]\n"
    )
    with pytest.raises(DataError, match="257"):
        load_tokenizer("my_package.bad:NoEnd")
    for name, message in (
        ("Outside", "id 257, which is not in the vocabulary"),
        ("Ends", "end of a document"),
    ):
        with pytest.raises(DataError, match=message):
            load_tokenizer(f"my_package.bad:{name}").encode_batch_arrays(["a"])
