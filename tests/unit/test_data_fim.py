"""Fill-in-the-middle: nothing of a text is lost, and its key alone decides what happens to it."""

import math
import random
from pathlib import Path

import numpy as np
import pytest

from megads.data.fim import FillInTheMiddle, FimPieces
from megads.data.indexed import token_type
from megads.data.tokenizer import Tokenizer, load_tokenizer
from megads.data.tokenizer_training import train_sentencepiece
from megads.errors import ConfigError, DataError

TEXT = "def area(r):\n    return 3.14159 * r * r  # 日本語 🎉 e\u0301 ▁▁ <|fim_hole|>\n\n" * 20
KEYS = [f"doc-{i}".encode() for i in range(4000)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("fim") / "tokenizer.model"
    train_sentencepiece([TEXT], path, 320)
    return load_tokenizer(path)


def encode(fim: FillInTheMiddle, tokenizer: Tokenizer, pieces: FimPieces) -> "np.typing.NDArray[np.int32]":
    prefix, middle, suffix = tokenizer.encode_batch(pieces[:3])
    return fim.join(prefix, middle, suffix, pieces.mode)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_rates_are_those_asked_for(tokenizer: Tokenizer, rate: float) -> None:
    fim = FillInTheMiddle(rate, 0.3, 7, tokenizer)
    found = [pieces for key in KEYS if (pieces := fim.split(TEXT, key))]
    five_sigma = 5 * math.sqrt(len(KEYS) * rate * (1 - rate))
    assert abs(len(found) - rate * len(KEYS)) < five_sigma
    spm = sum(pieces.mode == "spm" for pieces in found)
    assert abs(spm - 0.3 * len(found)) < 5 * math.sqrt(len(found) * 0.3 * 0.7)


def test_the_cuts_are_even_over_the_text(tokenizer: Tokenizer) -> None:
    fim = FillInTheMiddle(1, 0, 0, tokenizer)
    found = [pieces for key in KEYS if (pieces := fim.split(TEXT, key))]
    assert len(found) == len(KEYS)
    # Three parts between two even cuts are a third of the text each, with a deviation of 1/sqrt(18).
    for part in range(3):
        mean = sum(len(pieces[part]) for pieces in found) / len(KEYS) / len(TEXT)
        assert abs(mean - 1 / 3) < 5 / math.sqrt(18 * len(KEYS)) + 1 / len(TEXT)
    ends = {(not pieces.prefix, not pieces.suffix) for key in KEYS if (pieces := fim.split("abc", key))}
    assert ends == {(False, False), (False, True), (True, False), (True, True)}


def test_psm_and_spm_are_the_sequences_of_the_papers(tokenizer: Tokenizer) -> None:
    fim = FillInTheMiddle(1, 0, 0, tokenizer)
    begin, hole, end = (tokenizer.control_id(f"<|fim_{name}|>") for name in ("begin", "hole", "end"))
    assert fim.join([11], [12], [13], "psm").tolist() == [begin, 11, hole, 13, end, 12]
    assert fim.join([11], [12], [13], "spm").tolist() == [begin, hole, 13, end, 11, 12]
    assert fim.join([11], [12], [13], "psm").dtype == token_type(tokenizer.vocab_size)


@pytest.mark.parametrize("spm_rate", [0.0, 0.5, 1.0])
def test_every_text_is_given_back(tokenizer: Tokenizer, spm_rate: float) -> None:
    fim = FillInTheMiddle(1, spm_rate, 3, tokenizer)
    for text in (TEXT, "a", "🎉", " \n", "<|fim_begin|><|fim_end|>"):
        for key in KEYS[:100]:
            pieces = fim.split(text, key)
            assert pieces is not None
            assert pieces.prefix + pieces.middle + pieces.suffix == text
            ids = encode(fim, tokenizer, pieces)
            assert tokenizer.decode(fim.restore(ids).tolist()) == text
            in_order = (
                pieces.prefix + pieces.suffix + pieces.middle
                if pieces.mode == "psm"
                else pieces.suffix + pieces.prefix + pieces.middle
            )
            assert tokenizer.decode(ids.tolist()) == in_order
    untouched = np.array(tokenizer.encode_batch([TEXT])[0])
    assert fim.restore(untouched) is untouched


def test_only_key_seed_and_text_matter(tokenizer: Tokenizer) -> None:
    first = FillInTheMiddle(0.5, 0.5, 1, tokenizer)
    expected = {key: first.split(TEXT, key) for key in KEYS}
    shuffled = random.Random(0).sample(KEYS, len(KEYS))
    again = FillInTheMiddle(0.5, 0.5, 1, tokenizer)
    assert {key: again.split(TEXT, key) for key in shuffled} == expected
    other = FillInTheMiddle(0.5, 0.5, 2, tokenizer)
    same = sum(other.split(TEXT, key) == expected[key] for key in KEYS)
    assert same < 0.3 * len(KEYS)  # a quarter are left alone under both seeds
    # A higher rate adds documents and changes none.
    more = FillInTheMiddle(0.9, 0.5, 1, tokenizer)
    assert all(more.split(TEXT, key) == pieces for key, pieces in expected.items() if pieces)


def test_nothing_and_empty_texts_are_left_alone(tokenizer: Tokenizer) -> None:
    assert FillInTheMiddle(1, 0, 0, tokenizer).split("", b"key") is None
    never = FillInTheMiddle(0, 0, 0, tokenizer)
    assert not any(never.split(TEXT, key) for key in KEYS)


def test_damaged_sequences_are_noticed(tokenizer: Tokenizer) -> None:
    fim = FillInTheMiddle(1, 0, 0, tokenizer)
    begin, hole, end = fim.begin_id, fim.hole_id, fim.end_id
    for ids in ([begin, 9, hole, 9], [9, begin, hole, end], [begin, end, 9, hole], [begin, hole, end, end]):
        with pytest.raises(DataError, match="Fill-in-the-middle"):
            fim.restore(ids)


def test_what_cannot_work_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    import sentencepiece

    with pytest.raises(ConfigError, match=r"1\.5"):
        FillInTheMiddle(1.5, 0, 0, tokenizer)
    with pytest.raises(ConfigError, match="-1"):
        FillInTheMiddle(0.5, -1, 0, tokenizer)
    with pytest.raises(DataError, match="<pre>"):
        FillInTheMiddle(0.5, 0, 0, tokenizer, tokens=("<pre>", "<suf>", "<mid>"))
    # A text that merely spells the names has no control tokens.
    options = {"vocab_size": 300, "model_type": "bpe", "byte_fallback": True, "minloglevel": 2}
    for name, adds_space, message in (("space", True, "adds a space"), ("plain", False, "no control tokens")):
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([TEXT]), model_prefix=str(tmp_path / name), add_dummy_prefix=adds_space,
            user_defined_symbols=["<|fim_begin|>", "<|fim_hole|>", "<|fim_end|>"], **options,
        )  # fmt: skip
        with pytest.raises(DataError, match=message):
            FillInTheMiddle(0.5, 0, 0, load_tokenizer(tmp_path / f"{name}.model"))
