"""What batches hold, by hand and from data that was made with and without fill-in-the-middle."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megads.config.resolve import resolve
from megads.config.schema import Config
from megads.data.blend import Datasets, SampleCounts, build_datasets
from megads.data.inputs import find_sources
from megads.data.manifest import read_record
from megads.data.preprocess import preprocess
from megads.data.recipe import Recipe
from megads.data.shards import Shard
from megads.data.tokenizer import load_tokenizer
from megads.data.tokenizer_training import train_sentencepiece
from megads.train.contents import Contents

from data_files import write_json_lines  # isort: skip

TEXTS = [f"Document {i}: " + " ".join(str(i * j) for j in range(i % 50)) for i in range(200)]
SEQ, SAMPLES = 32, 2000


def test_counts_by_hand() -> None:
    contents = Contents(("prose", "code", "math"), eod_id=0, fim_begin_id=9)
    batch = {"tokens": torch.tensor([[9, 5, 0], [0, 5, 0], [9, 5, 5]]), "source": torch.tensor([2, 0, 2])}
    mask = torch.tensor([[1.0, 1, 0], [0, 0, 0], [1, 1, 1]])
    losses = torch.tensor([[1.0, 2, 7], [7, 7, 7], [3, 4, 5]]) * mask
    assert contents.names == ("loss/prose", "loss/code", "loss/math", "tokens_per_document", "fim_rate")
    assert contents.count(batch, losses, mask).tolist() == [[0, 0, 15, 9, 2], [0, 0, 5, 3, 3]]


@pytest.mark.parametrize(
    ("contents", "names"),
    [
        (Contents(), ()),
        (Contents(eod_id=0), ("tokens_per_document",)),
        (Contents(fim_begin_id=9), ()),
        (Contents(("prose",)), ("loss/prose",)),
    ],
)
def test_what_is_not_known_is_not_counted(contents: Contents, names: tuple[str, ...]) -> None:
    batch = {"tokens": torch.zeros(2, 3, dtype=torch.int64), "source": torch.zeros(2, dtype=torch.int64)}
    assert contents.names == names
    assert contents.count(batch, torch.ones(2, 3), torch.ones(2, 3)).shape == (2, len(names))


def datasets(directory: Path, tokenizer: Path, fim_rate: float, **data: Any) -> Datasets:
    write_json_lines(directory / "in" / "web" / "a.jsonl", TEXTS)
    shards = [Shard(found, directory / found.source) for found in find_sources(str(directory / "in"))]
    preprocess(shards, Recipe(str(tokenizer), fim_rate=fim_rate), workers=1)
    data |= {"cache_dir": str(directory), "sources": [{"name": "web", "subset": "web"}], "split": "1"}
    training = {"seq_length": SEQ, "total_training_tokens": 10_000}
    config = Config.model_validate({"model": {"vocab_size": 300}, "training": training, "data": data})
    return build_datasets(config, resolve(config, 1, False), SampleCounts(train=SAMPLES))


def test_the_data_tell_whether_documents_are_rearranged(tmp_path: Path) -> None:
    train_sentencepiece(TEXTS, tmp_path / "t.model", 300)
    path = {"tokenizer_path": str(tmp_path / "t.model")}
    assert datasets(tmp_path / "plain", tmp_path / "t.model", 0.0, **path).fim_begin_id is None
    assert datasets(tmp_path / "unknown", tmp_path / "t.model", 0.5).fim_begin_id is None
    built = datasets(tmp_path / "fim", tmp_path / "t.model", 0.5, **path)
    assert built.fim_begin_id == load_tokenizer(tmp_path / "t.model").control_id("<|fim_begin|>")
    contents = Contents(built.source_names, built.corpus.eod_id, built.fim_begin_id)
    # An epoch leaves out less than a sequence, which is shorter than most documents.
    samples = [built.train[i] for i in range((built.corpus.blends["train"].parts[0].tokens - 1) // SEQ)]
    batch = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
    totals, weights = contents.count(batch, batch["loss_mask"], batch["loss_mask"])
    rates = dict(zip(contents.names, (totals / weights).tolist(), strict=True))
    record = read_record(tmp_path / "fim" / "web")
    assert record is not None
    assert rates["fim_rate"] == pytest.approx(record["fim"]["rate"], rel=0.02)
    assert rates["tokens_per_document"] == pytest.approx(record["mean_document_tokens"], rel=0.02)
    assert rates["loss/web"] == 1
