"""Random splitting of tokens: the text stays, the share is right, the key alone decides."""

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from numpy.typing import NDArray
from tokenizers import decoders, models, pre_tokenizers, trainers

from megads.data.token_splitting import RandomTokenSplitter
from megads.data.tokenizer import Tokenizer, load_tokenizer
from megads.data.tokenizer_training import train_sentencepiece
from megads.errors import ConfigError, DataError

# Punctuation with the line breaks that follow, as in DeepSeek-V3's pattern.
PATTERN = r" ?[\p{P}\p{S}]+[\r\n]*| ?\p{L}+|\s+"
LINES = [
    "one two.\n\n",
    "f(x);\n",
    "{\r\n",
    " )\n",
    "three, four!\n",
    "wait...\n\n\n",
    "“so”\n",
    "a\n",
    "  \n",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    model.train_from_iterator(["".join(LINES)] * 20, trainer)
    path = tmp_path_factory.mktemp("splitting") / "tokenizer.json"
    model.save(str(path))
    return load_tokenizer(path)


def documents(count: int) -> tuple[list[str], list[bytes]]:
    rng = random.Random(0)
    texts = ["".join(rng.choices(LINES, k=rng.randint(0, 60))) for _ in range(count)]
    return texts, [f"doc-{i}".encode() for i in range(count)]


def parts(ids: NDArray[Any], lengths: NDArray[np.int32]) -> list[list[int]]:
    return [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])]


def test_which_tokens_are_combined(tokenizer: Tokenizer) -> None:
    splits = RandomTokenSplitter(tokenizer, 1, 0).splits
    texts = {tokenizer.decode([token]): [tokenizer.decode([p]) for p in of] for token, of in splits.items()}
    assert texts[".\n\n"] in ([".", "\n\n"], [".", "\n", "\n"])
    assert texts[");\n"] in ([");", "\n"], [")", ";", "\n"])
    assert {"”\n", "{\r\n", " )\n", "...\n\n\n"} <= set(texts)
    assert not {"\n", "\n\n", " \n", "  \n", ".", "a\n"} & set(texts)
    for text, of in texts.items():
        assert tokenizer.decode(splits[tokenizer.encode_batch([text])[0][0]]) == text
        assert of[-1].strip("\r\n") == ""


@pytest.mark.parametrize("rate", [0.1, 0.5, 1.0])
def test_the_text_stays_and_the_share_is_right(tokenizer: Tokenizer, rate: float) -> None:
    texts, keys = documents(400)
    splitter = RandomTokenSplitter(tokenizer, rate, 5)
    ids, lengths = tokenizer.encode_batch_arrays(texts)
    before = ids.copy()
    split, split_lengths = splitter.apply(ids, lengths, keys)
    assert (ids == before).all(), "the input is not written to"
    assert (split.dtype, split_lengths.dtype) == (ids.dtype, lengths.dtype)
    assert [tokenizer.decode(part) for part in parts(split, split_lengths)] == texts
    candidates = np.isin(ids, list(splitter.splits)).sum()
    left = np.isin(split, list(splitter.splits)).sum()
    assert candidates > 3000
    assert abs((candidates - left) / candidates - rate) <= 5 * math.sqrt(rate * (1 - rate) / candidates)


def test_order_batches_and_neighbours_do_not_matter(tokenizer: Tokenizer) -> None:
    texts, keys = documents(60)
    splitter = RandomTokenSplitter(tokenizer, 0.5, 5)
    expected = dict(
        zip(keys, parts(*splitter.apply(*tokenizer.encode_batch_arrays(texts), keys)), strict=True)
    )
    for text, key in zip(texts, keys, strict=True):
        alone, _ = splitter.apply(*tokenizer.encode_batch_arrays([text]), [key])
        assert alone.tolist() == expected[key]
    order = random.Random(1).sample(range(60), 60)
    moved = splitter.apply(
        *tokenizer.encode_batch_arrays([texts[i] for i in order]), [keys[i] for i in order]
    )
    assert dict(zip([keys[i] for i in order], parts(*moved), strict=True)) == expected
    for other in (
        RandomTokenSplitter(tokenizer, 0.5, 6).apply(*tokenizer.encode_batch_arrays(texts), keys),
        splitter.apply(*tokenizer.encode_batch_arrays(texts), keys[::-1]),
    ):
        assert parts(*other) != list(expected.values())


def test_equal_tokens_of_a_document_are_drawn_one_by_one(tokenizer: Tokenizer) -> None:
    splitter = RandomTokenSplitter(tokenizer, 0.5, 5)
    ids, lengths = tokenizer.encode_batch_arrays(["so.\n\n" * 1000])
    split, _ = splitter.apply(ids, lengths, [b"key"])
    whole = np.isin(split, list(splitter.splits)).sum()
    assert abs(whole - 500) < 5 * math.sqrt(250)


def test_nothing_to_split_costs_no_copy(tokenizer: Tokenizer) -> None:
    splitter = RandomTokenSplitter(tokenizer, 1, 0)
    for texts in (["no line breaks", ""], [], [""]):
        ids, lengths = tokenizer.encode_batch_arrays(texts)
        split, split_lengths = splitter.apply(ids, lengths, [b"k"] * len(texts))
        assert split is ids
        assert split_lengths is lengths


def test_what_cannot_work_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="2"):
        RandomTokenSplitter(tokenizer, 2, 0)
    train_sentencepiece(LINES * 30, tmp_path / "t.model", 300)  # line breaks are tokens of their own there
    with pytest.raises(DataError, match="no token combines"):
        RandomTokenSplitter(load_tokenizer(tmp_path / "t.model"), 0.1, 0)
