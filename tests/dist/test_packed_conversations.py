"""Packing does not leak: a conversation in a packed sequence has the losses that it has alone."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megads.data.indexed import IndexedWriter
from megads.data.manifest import RECORD_FORMAT
from tests.dist import tiny
from tests.dist.harness import run_distributed

SETTINGS = {
    "data.document_mask": True,
    "data.reset_position_ids": True,
    "training.micro_batch_size": 1,
    "training.global_batch_size": 2,
    "training.eval_interval": 0,
}


def write_conversations(prefix: Path) -> None:
    """30 of 4 to 8 random tokens; some begin with an answer, which a packed neighbour could learn from."""
    rng = np.random.default_rng(0)
    with IndexedWriter(prefix, tiny.VOCABULARY) as writer:
        for _ in range(30):
            length = int(rng.integers(4, 9))
            ids = rng.integers(3, tiny.VOCABULARY, length).astype(writer.dtype)
            mask = (rng.random(length) < 0.6).astype(np.uint8)
            mask[-1] = 1
            writer.add(ids, np.array([length], np.int32), loss_mask=mask)
        record = {
            "format": RECORD_FORMAT, "tokenizer": {"sha256": "a" * 64}, "vocab_size": tiny.VOCABULARY,
            "eod_id": 2,
        }  # fmt: skip
        writer.finish(record)


def packed_and_alone(directory: str) -> Any:
    """Loss sums and token counts [2, K] of packed samples, and of each of their conversations by itself."""
    import torch

    from megads.data.blend import SampleCounts, build_datasets

    source = [{"name": "chat", "path": f"{directory}/chat"}]
    settings = SETTINGS | {"data.sources": source, "data.cache_dir": directory, "data.split": "100,0,0"}
    step = tiny.start(settings)
    train = build_datasets(step.config, step.resolved, SampleCounts(12)).train
    results = []
    for index in range(len(train)):
        sample = train[index]
        ids = sample["document_ids"]
        runs = [(ids == number).nonzero().flatten() for number in ids.unique()]
        whole = step.evaluate(iter([{name: t[None] for name, t in sample.items()}]), 1)
        alone = []
        for places in runs:
            if not sample["loss_mask"][places].any():
                continue
            single = {name: torch.zeros_like(t) for name, t in sample.items()}
            for name in ("tokens", "labels", "loss_mask", "position_ids"):
                single[name][: len(places)] = sample[name][places]
            single["document_ids"][len(places) :] = 1
            alone.append(step.evaluate(iter([{name: t[None] for name, t in single.items()}]), 1))
        sums, counts = (torch.stack(part).sum(dim=0).tolist() for part in zip(*alone, strict=True))
        results.append((len(runs), [part.tolist() for part in whole], [sums, counts]))
    return results


def test_packed_losses_are_those_of_conversations_alone(tmp_path: Path) -> None:
    write_conversations(tmp_path / "chat")
    (results,) = run_distributed(1, packed_and_alone, directory=str(tmp_path))
    assert max(conversations for conversations, _, _ in results) > 2, "sequences hold several"
    for _, (sums, counts), (expected_sums, expected_counts) in results:
        assert len(counts) == 1 + tiny.BASE["training.num_predict_tokens"] - 1
        assert counts == expected_counts
        assert min(counts) >= 0
        assert sums == pytest.approx(expected_sums, rel=1e-5, abs=1e-5)
    assert sum(counts[1] for _, (_, counts), _ in results) > 20, "the deeper predictions count too"
