"""Instruction data: rendered as Hugging Face does, users' text stays text, whole conversations are packed."""

import itertools
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from megads.config.resolve import resolve
from megads.config.schema import Config
from megads.data.blend import Datasets, SampleCounts, build_datasets
from megads.data.chat_format import load_chat_format
from megads.data.chat_template import ChatTemplate, ConversationError, Piece
from megads.data.conversations import ConversationStream
from megads.data.encoding import Encoder
from megads.data.indexed import LOSS_MASK, sidecar_file
from megads.data.inputs import find_shards
from megads.data.inspect import ANSWER, ANSWER_END, Collection, source_of
from megads.data.instructions import messages_of
from megads.data.packing import best_fit_decreasing
from megads.data.preprocess import preprocess
from megads.data.recipe import Recipe
from megads.data.selection import Document
from megads.data.shards import Shard, convert_shard
from megads.data.stored import StoredDataset
from megads.data.tokenizer import load_tokenizer
from megads.data.tokenizer_training import train_sentencepiece
from megads.data.verify import VerifySettings, verify_dataset
from megads.errors import ConfigError, DataError

SENTENCE = "the river rose in night and by morning it had taken a bridge half of mill with boats"
WORDS = SENTENCE.split()
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>"]
CHATML = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] | trim + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_BLOCKS = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "<|im_start|>assistant\n{% generation %}{{ message['content'] | trim }}<|im_end|>{% endgeneration %}\n"
    "{% else %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] | trim + '<|im_end|>\n' }}"
    "{% endif %}\n{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ALTERNATING = (
    "{% for message in messages %}{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if message.role == 'user' %}{{ '[INST] ' + message.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + message.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# Says at its end that it is the end, so that nothing can be told from what it renders of a beginning.
WITH_END = CHATML + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"

Message = dict[str, Any]


def conversation(number: int, turns: int = 2) -> list[Message]:
    rng = random.Random(number)
    said = [" ".join(rng.choices(WORDS, k=rng.randrange(1, 15))) + "." for _ in range(2 * turns)]
    roles = itertools.cycle(["user", "assistant"])
    return [{"role": role, "content": f"{number}: {text}"} for role, text in zip(roles, said, strict=False)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE `tokenizer.json` with ChatML's control tokens, and its configuration."""
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    model.train_from_iterator([" ".join(WORDS)] * 20, trainer)
    path = tmp_path_factory.mktemp("tokenizer")
    model.save(str(path / "tokenizer.json"))
    config = {"bos_token": {"content": "<s>"}, "eos_token": "<|endoftext|>", "chat_template": CHATML}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def template_of(directory: Path, text: str, tmp_path: Path) -> ChatTemplate:
    (tmp_path / "template.jinja").write_text(text)
    tokenizer = load_tokenizer(directory)
    return ChatTemplate(load_chat_format(tokenizer, "messages", str(tmp_path / "template.jinja"))[0])


def text_of(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def answers_of(pieces: list[Piece]) -> list[str]:
    return [text_of(list(run)) for answer, run in itertools.groupby(pieces, lambda p: p.answer) if answer]


def chat_recipe(directory: Path, form: str = "messages", template: str | None = None, **more: Any) -> Recipe:
    tokenizer = load_tokenizer(directory)
    return Recipe(
        str(directory), chat=load_chat_format(tokenizer, form, template)[0], max_line_bytes=1 << 20, **more
    )


def write_lines(path: Path, records: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(r if isinstance(r, bytes) else orjson.dumps(r) + b"\n" for r in records))
    return path


def make(path: Path, prefix: Path, recipe: Recipe) -> dict[str, Any]:
    return convert_shard(Shard(find_shards([str(path)])[0], prefix), Encoder(recipe))


# ------------------------------------------------------------------ templates


@pytest.mark.parametrize("template", [CHATML, CHATML_BLOCKS, ALTERNATING, WITH_END])
@pytest.mark.parametrize(
    "text", ["hello", "  two  words \n", "\n\nlines\n\n", '{"a": "b\\n"}', "naïve 日本 🎉"]
)
def test_it_renders_as_hugging_face_does(directory: Path, tmp_path: Path, template: str, text: str) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(directory / "tokenizer.json"), bos_token="<s>", eos_token="<|endoftext|>"
    )
    ours = template_of(directory, template, tmp_path)
    messages = [
        {"role": "user", "content": text},
        {"role": "assistant", "content": f"a {text}"},
        {"role": "user", "content": "more"},
        {"role": "assistant", "content": "x" + text},
    ]
    expected = theirs.apply_chat_template(messages, chat_template=template, tokenize=False)
    if template is WITH_END:
        with pytest.raises(ConversationError, match="message 2, an answer, differently"):
            ours.pieces(messages)
        return
    pieces = ours.pieces(messages)
    assert text_of(pieces) == expected
    assert len(answers_of(pieces)) == 2
    encoder = Encoder(chat_recipe(directory, template=str(tmp_path / "template.jinja")))
    encoded = encoder.encode([Document(1, "", b"", 0.0, tuple(pieces))])
    assert encoded.tokens.tolist() == theirs.encode(expected, add_special_tokens=False)
    if template is CHATML_BLOCKS:
        with_mask = theirs.apply_chat_template(
            messages, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
        )
        assert encoded.loss_mask is not None
        assert encoded.loss_mask.tolist() == with_mask["assistant_masks"]


def test_answers_are_found_with_and_without_blocks(directory: Path, tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "s"}, *conversation(1, 3)]
    said = [message["content"] for message in messages if message["role"] == "assistant"]
    for template in (CHATML, CHATML_BLOCKS):
        pieces = template_of(directory, template, tmp_path).pieces(messages)
        assert answers_of(pieces) == [text + "<|im_end|>" for text in said]
    pieces = template_of(directory, ALTERNATING, tmp_path).pieces(messages[1:])
    assert answers_of(pieces) == [f" {text} <|endoftext|>" for text in said]


FRAGMENTS = [
    *SPECIAL, "<|", "<|im_", "im_end|>", "|>", "<", ">", "<s", "s>", " ", "\n", "a", "<|im_end|><|im_end|>",
]  # fmt: skip


@pytest.mark.parametrize("template", [CHATML, CHATML_BLOCKS, ALTERNATING, "default"])
def test_no_text_of_a_user_becomes_a_control_token(directory: Path, tmp_path: Path, template: str) -> None:
    rng = random.Random(template)
    tokenizer = load_tokenizer(directory)
    if template == "default":
        ours = ChatTemplate(load_chat_format(tokenizer, "messages", "default")[0])
    else:
        ours = template_of(directory, template, tmp_path)
    encoder = Encoder(chat_recipe(directory))
    harmless = [{"role": role, "content": "x"} for role in ("user", "assistant") * 2]
    expected = [piece.control_id for piece in ours.pieces(harmless) if piece.control_id is not None]
    controls = [tokenizer.control_id(name) for name in SPECIAL]
    for _ in range(300):
        contents = ["".join(rng.choices(FRAGMENTS, k=rng.randrange(1, 8))) for _ in harmless]
        messages = [m | {"content": content} for m, content in zip(harmless, contents, strict=True)]
        pieces = ours.pieces(messages)
        ids = encoder.encode([Document(1, "", b"", 0.0, tuple(pieces))]).tokens
        assert ids[np.isin(ids, controls)].tolist() == expected, contents
        read = tokenizer.decode(ids.tolist())
        for content in contents:
            assert content.strip() in read, "nothing of a text is lost or changed"


def test_where_the_template_comes_from(directory: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(directory)
    chat, where = load_chat_format(tokenizer, "messages")
    assert chat.template == CHATML
    assert where.endswith("tokenizer_config.json")
    assert dict(chat.special_tokens) == {"bos_token": "<s>", "eos_token": "<|endoftext|>"}
    other = tmp_path / "tokenizer"
    other.mkdir()
    for file in directory.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    (other / "chat_template.jinja").write_text(ALTERNATING)
    assert load_chat_format(load_tokenizer(other), "messages")[0].template == ALTERNATING
    (other / "chat_template.jinja").unlink()
    (other / "tokenizer_config.json").unlink()
    assert load_chat_format(load_tokenizer(other), "messages")[1] == "the built-in template"
    with pytest.raises(DataError, match=r"missing\.jinja: the chat template cannot be read"):
        load_chat_format(tokenizer, "messages", "missing.jinja")
    (tmp_path / "bad.jinja").write_text("{% for %}")
    with pytest.raises(DataError, match=r"bad\.jinja: The chat template, line 1"):
        load_chat_format(tokenizer, "messages", str(tmp_path / "bad.jinja"))
    (tmp_path / "date.jinja").write_text("{{ strftime_now('%Y') }}")
    with pytest.raises(ConversationError, match="'strftime_now' is undefined"):
        # A dataset follows from its input and settings, not from the day it is made.
        ChatTemplate(load_chat_format(tokenizer, "messages", str(tmp_path / "date.jinja"))[0]).pieces([])


# ------------------------------------------------------------------ records


def test_forms() -> None:
    two = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert messages_of({"messages": two}, "messages") == two
    assert messages_of({"prompt": "q", "response": "a"}, "prompt") == two
    with_system = messages_of({"prompt": "q", "response": "a", "system": "s"}, "prompt")
    assert with_system == [{"role": "system", "content": "s"}, *two]
    assert messages_of({"instruction": "q", "output": "a", "input": ""}, "alpaca") == two
    with_input = messages_of({"instruction": "q", "output": "a", "input": "i"}, "alpaca")
    assert with_input[0]["content"] == "q\n\ni"


Q, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
BAD: list[tuple[Any, str]] = [
    ({"text": "t"}, "no_messages"),
    ({"messages": []}, "no_messages"),
    ({"messages": "q"}, "no_messages"),
    ({"messages": [Q, "a"]}, "bad_message"),
    ({"messages": [Q, {"role": "robot", "content": "a"}]}, "bad_message"),
    ({"messages": [Q, {"role": "assistant", "content": None}]}, "bad_message"),
    ({"messages": [Q, {"role": "assistant", "content": [{"type": "text", "text": "a"}]}]}, "bad_message"),
    ({"messages": [Q]}, "no_answer"),
    ({"messages": [Q, {"role": "assistant", "content": "a\ufdd1"}]}, "reserved_character"),
    ({"messages": [A, Q]}, "template_error"),
    (b"not json\n", "bad_json"),
    (b"[1]\n", "not_an_object"),
    (b'{"messages": "\xff"}\n', "bad_utf8"),
    (b'{"messages": "\\ud800"}\n', "lone_surrogate"),
    (b'{"messages": NaN}\n', "bad_json"),
]


def test_bad_records_stop_the_run_or_are_counted(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text(ALTERNATING)
    template = str(tmp_path / "t.jinja")
    good = [{"messages": conversation(number)} for number in range(40)]
    lines = [good[0], b"\n", *(record for record, _ in BAD), *good[1:]]
    path = write_lines(tmp_path / "in" / "a.jsonl", lines)
    record = make(path, tmp_path / "a", chat_recipe(directory, template=template, quarantine_quota=0.5))
    assert record["quarantined"] == dict(Counter(reason for _, reason in BAD))
    assert (record["documents_in"], record["documents"]) == (len(good) + len(BAD), len(good))
    sound = verify_dataset(VerifySettings(tokenizer=str(directory)), str(tmp_path / "a"))
    assert sound.problems == sound.unchecked == []
    assert sound.compared_documents > 10
    for number, (bad, _) in enumerate(BAD):
        alone = write_lines(tmp_path / "in" / f"bad{number}.jsonl", [good[0], bad])
        with pytest.raises(DataError, match=f"bad{number}.jsonl, line 2: "):
            make(alone, tmp_path / f"bad{number}", chat_recipe(directory, template=template))
        assert not list(tmp_path.glob(f"*bad{number}*"))


def test_the_dataset_and_its_mask(directory: Path, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "in.jsonl", [{"messages": conversation(n), "q": n} for n in range(30)])
    recipe = chat_recipe(directory, score_field="q")
    record = make(path, tmp_path / "a", recipe)
    dataset = StoredDataset(tmp_path / "a")
    tokenizer = load_tokenizer(directory)
    assert dataset.loss_mask.size == dataset.tokens.size == record["tokens"]
    assert record["loss_mask"]["counted_tokens"] == int(dataset.loss_mask.sum())
    assert np.load(tmp_path / "a.scores.npy").tolist() == list(range(30))
    end = tokenizer.control_id("<|im_end|>")
    for number in range(30):
        span = slice(*dataset.starts[number : number + 2])
        ids, mask = dataset.tokens[span], dataset.loss_mask[span]
        said = [m["content"] for m in conversation(number) if m["role"] == "assistant"]
        assert tokenizer.decode(ids[mask == 1].tolist()) == "".join(said)
        assert int((ids[mask == 1] == end).sum()) == len(said)
    collection = Collection([str(tmp_path / "a")], tokenizer)
    marks = [piece.mark for piece in collection.document_pieces(collection.place(3)) if piece.mark]
    assert marks == [ANSWER, ANSWER_END] * 2
    assert source_of(collection.place(3), tokenizer) == f"{path}, line 4"

    shards = [Shard(find_shards([str(path)])[0], tmp_path / "a")]
    assert next(iter(preprocess(shards, recipe).values())).done_before == 1
    mask_file = sidecar_file(tmp_path / "a", LOSS_MASK)
    content = mask_file.read_bytes()
    for damaged in (content[:-1], bytes([1 - content[0]]) + content[1:]):
        mask_file.write_bytes(damaged)
        problems = verify_dataset(VerifySettings(), str(tmp_path / "a")).problems
        assert [str(mask_file) in problem for problem in problems] == [True]
    mask_file.unlink()
    assert next(iter(preprocess(shards, recipe).values())).done_before == 0
    assert mask_file.read_bytes() == content


def test_what_is_refused(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not for conversations"):
        chat_recipe(directory, fim_rate=0.1)
    sentences = [" ".join(random.Random(n).choices(WORDS, k=30)) for n in range(200)]
    model = tmp_path / "tokenizer.model"
    train_sentencepiece(sentences, model, 350)
    chat, _ = load_chat_format(load_tokenizer(model), "messages")
    assert dict(chat.special_tokens)["eos_token"] == "</s>"
    path = write_lines(tmp_path / "in.jsonl", [{"messages": conversation(1)}])
    make(path, tmp_path / "a", Recipe(str(model), chat=chat))
    assert not verify_dataset(VerifySettings(tokenizer=str(model)), str(tmp_path / "a")).problems


# ------------------------------------------------------------------ packing


def best_fit_by_looking_everywhere(sizes: list[int], capacity: int) -> list[list[int]]:
    bins: list[list[int]] = []
    for item, size in enumerate(sizes):
        room = [(capacity - sum(sizes[i] for i in held), number) for number, held in enumerate(bins)]
        fitting = [free for free in room if free[0] >= size]
        if fitting:
            bins[min(fitting)[1]].append(item)
        else:
            bins.append([item])
    return bins


@pytest.mark.parametrize("seed", range(5))
def test_best_fit_decreasing(seed: int) -> None:
    rng = np.random.default_rng(seed)
    capacity = int(rng.integers(5, 200))
    sizes = np.sort(rng.integers(1, capacity + 1, 300))[::-1]
    bins = best_fit_decreasing(sizes, capacity)
    assert sorted(itertools.chain(*bins)) == list(range(300))
    filled = sorted(int(sizes[held].sum()) for held in bins)
    assert filled[-1] <= capacity
    # Among bins that are equally full it does not matter which one is taken.
    expected = best_fit_by_looking_everywhere(sizes.tolist(), capacity)
    assert filled == sorted(sum(sizes[i] for i in held) for held in expected)


SEQ = 192


@pytest.fixture(scope="module")
def dataset(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 conversations of 1 to 5 turns, some longer than SEQ; one whose answer is beyond it."""
    path = tmp_path_factory.mktemp("packing")
    late = [{"role": "user", "content": " ".join(WORDS * 12)}, A]
    records = [{"messages": conversation(n, 1 + n % 5)} for n in range(120)] + [{"messages": late}]
    make(write_lines(path / "in.jsonl", records), path / "chat", chat_recipe(directory))
    return path / "chat"


def config_of(dataset: Path, cache: Path, **data: Any) -> Config:
    masked = {"document_mask": True, "reset_position_ids": True}
    return Config.model_validate(
        {
            "model": {"vocab_size": 500},
            "training": {
                "seq_length": SEQ, "total_training_tokens": 10_000, "use_mtp": True, "num_predict_tokens": 2,
            },
            "data": {
                "cache_dir": str(cache), "split": "100,0,0", **masked,
                "sources": [{"name": "chat", "path": str(dataset)}], **data,
            },
        }
    )  # fmt: skip


def build(config: Config, train: int) -> Datasets:
    return build_datasets(config, resolve(config, 1, False), SampleCounts(train))


@pytest.mark.parametrize("long_conversations", ["cut", "drop"])
def test_an_epoch_holds_every_conversation_once(
    dataset: Path, tmp_path: Path, long_conversations: str
) -> None:
    stored = StoredDataset(dataset)
    too_long = {n for n in range(120) if stored.lengths[n] > SEQ + 1}
    kept = set(range(120)) - (too_long if long_conversations == "drop" else set())
    assert 5 < len(too_long) < 80
    config = config_of(dataset, tmp_path, long_conversations=long_conversations)
    per_epoch = build(config, 1).corpus.blends["train"].parts[0].samples_per_epoch
    built = build(config, 3 * per_epoch)
    packing = built.corpus.blends["train"].parts[0].packing
    assert packing is not None
    assert packing.conversations == len(kept)
    assert (packing.cut, packing.dropped) == (
        (len(too_long), 1) if long_conversations == "cut" else (0, len(too_long) + 1)
    )
    assert f"chat: {len(kept)} conversations fill" in built.table
    assert ("lose their end" in built.table) == (long_conversations == "cut")
    taken = sum(min(int(stored.lengths[n]) - 1, SEQ) for n in kept)
    assert packing.positions == taken
    assert taken / (per_epoch * SEQ) > 0.9, "best fit leaves little padding"
    stream, _ = built.train.stream.locate(0)
    assert isinstance(stream, ConversationStream)
    orders = []
    for epoch in range(3):
        held = [stream.documents(epoch * per_epoch + i) for i in range(per_epoch)]
        orders.append([number for sample in held for _, number, _, _ in sample])
        assert sorted(orders[-1]) == sorted(kept)
    assert orders[0] != orders[1] != orders[2]
    again = build(config, per_epoch)
    samples = [(built.train[i], again.train[i]) for i in range(per_epoch)]
    assert all(np.array_equal(one[name], other[name]) for one, other in samples for name in one)


def test_what_a_sample_holds(dataset: Path, tmp_path: Path) -> None:
    stored = StoredDataset(dataset)
    built = build(config_of(dataset, tmp_path), 1)
    per_epoch = built.corpus.blends["train"].parts[0].samples_per_epoch
    train = build(config_of(dataset, tmp_path), per_epoch).train
    counted = padded = 0
    for index in range(per_epoch):
        sample = {name: tensor.numpy() for name, tensor in train[index].items()}
        stream, number = train.stream.locate(index)
        begin = 0
        for order, (_, document, first, count) in enumerate(stream.documents(number)):
            assert first == 0
            start = stored.starts[document]
            ids, mask = stored.tokens[start : start + count], stored.loss_mask[start : start + count]
            here = slice(begin, begin + count - 1)
            assert np.array_equal(sample["tokens"][here], ids[:-1])
            assert np.array_equal(sample["labels"][here], ids[1:])
            assert np.array_equal(sample["loss_mask"][here], mask[1:]), "no answer begins a conversation"
            assert np.array_equal(sample["position_ids"][here], np.arange(count - 1))
            assert set(sample["document_ids"][here].tolist()) == {order}
            counted += int(mask[1:].sum())
            begin += count - 1
        assert begin <= SEQ
        padded += SEQ - begin
        assert not sample["loss_mask"][begin:].any()
        assert not np.isin(sample["document_ids"][begin:], sample["document_ids"][:begin]).any()
    assert counted > 1000
    assert padded > 0


def test_instructions_beside_text(dataset: Path, tmp_path: Path, directory: Path) -> None:
    """One run may read both: every sample has the same fields."""
    rows = [{"text": " ".join(random.Random(n).choices(WORDS, k=80))} for n in range(60)]
    path = write_lines(tmp_path / "in.jsonl", rows)
    make(path, tmp_path / "text", Recipe(str(directory)))
    sources = [
        {"name": "chat", "path": str(dataset), "weight": 3},
        {"name": "text", "path": str(tmp_path / "text"), "weight": 1},
    ]
    train = build(config_of(dataset, tmp_path, sources=sources), 80).train
    fields = {name: tensor.dtype for name, tensor in train[0].items()}
    shares = Counter(int(train[i]["source"]) for i in range(80))
    assert shares == {0: 60, 1: 20}
    for i in range(80):
        assert {name: tensor.dtype for name, tensor in train[i].items()} == fields
        assert bool(train[i]["loss_mask"].all()) == (int(train[i]["source"]) == 1)
    both = [{"name": "both", "path": [str(dataset), str(tmp_path / "text")]}]
    with pytest.raises(DataError, match="Make them two sources"):
        build(config_of(dataset, tmp_path, sources=both), 1)


def test_settings_that_conversations_need(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'chat': holds conversations.* data.reset_position_ids to true"):
        build(config_of(dataset, tmp_path, reset_position_ids=False), 1)
    config = config_of(dataset, tmp_path)
    phases = [{"until_tokens": 1000, "to": SEQ // 2}, {"until_tokens": 20_000, "to": SEQ}]
    shorter = config.model_dump()
    shorter["training"]["seq_length_phases"] = phases
    with pytest.raises(ConfigError, match="seq_length_phases"):
        build(Config.model_validate(shorter), 1)
    sidecar_file(dataset, LOSS_MASK).rename(tmp_path / "away")
    with pytest.raises(DataError, match=r"chat\.loss_mask: 0 bytes"):
        build(config, 1)
    (tmp_path / "away").rename(sidecar_file(dataset, LOSS_MASK))


def test_a_curriculum_of_conversations(directory: Path, tmp_path: Path) -> None:
    """Level by level, none sharing a sequence with one of another level; each once in every epoch."""
    records = [{"messages": conversation(n, 1 + n % 3), "difficulty": n * 7 % 90} for n in range(90)]
    path = write_lines(tmp_path / "in.jsonl", records)
    make(path, tmp_path / "chat", chat_recipe(directory, score_field="difficulty"))
    config = config_of(tmp_path / "chat", tmp_path, curriculum={"levels": 3})
    count = build(config, 1).corpus.blends["train"].parts[0].samples_per_epoch
    built = build(config, 2 * count)
    for epoch in range(2):
        samples = range(epoch * count, (epoch + 1) * count)
        held = [[n for _, n, _, _ in built.train.stream.locate(i)[0].documents(i)] for i in samples]
        assert sorted(itertools.chain(*held)) == list(range(90))
        levels = [{n * 7 % 90 // 30 for n in conversations} for conversations in held]
        assert all(len(level) == 1 for level in levels)
        in_order = [min(level) for level in levels]
        assert (in_order == sorted(in_order)) == (epoch == 0)
