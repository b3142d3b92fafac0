"""Data under gloo: one index for all ranks, one error on all ranks, forked workers beside a process group."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megads.config.resolve import resolve
from megads.config.schema import Config
from megads.data.blend import SampleCounts, build_datasets
from megads.data.indexed import IndexedWriter
from megads.data.loader import build_loader
from megads.data.manifest import RECORD_FORMAT
from megads.errors import DataError
from tests.dist.harness import run_distributed

SEQ = 16


def write_random_dataset(prefix: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(5, 60, 200, dtype=np.int32)
    tokens = rng.integers(3, 500, lengths.sum(), dtype=np.uint16)
    with IndexedWriter(prefix, 500) as writer:
        writer.add(tokens, lengths)
        record = {"format": RECORD_FORMAT, "tokenizer": {"sha256": "a" * 64}, "vocab_size": 500, "eod_id": 2}
        writer.finish(record)


def config_of(directory: str, subsets: list[str]) -> Config:
    return Config.model_validate(
        {
            "model": {"vocab_size": 500},
            "training": {"seq_length": SEQ, "total_training_tokens": 10_000},
            "data": {
                "cache_dir": directory, "split": "90,10,0", "document_mask": True,
                "sources": [{"name": name, "subset": name} for name in subsets],
            },
        }
    )  # fmt: skip


def start_gloo() -> None:
    # The harness's processes are daemons, which may not have children; a trainer under torchrun may.
    torch.multiprocessing.current_process()._config["daemon"] = False
    dist.init_process_group("gloo")


def build_on_ranks(directory: str, subsets: list[str]) -> Any:
    start_gloo()
    config = config_of(directory, subsets)
    try:
        built = build_datasets(
            config, resolve(config, dist.get_world_size(), False), SampleCounts(100, 20, 0, 5)
        )
    except DataError as error:
        return str(error)
    ids = [built.train[i]["tokens"].tolist() for i in range(100)]
    ids += [part[i]["tokens"].tolist() for part in built.valid_by_source.values() for i in range(5)]
    return ids


def test_all_ranks_see_the_samples_of_a_single_process(tmp_path: Path) -> None:
    for seed, name in enumerate(("a", "b")):
        write_random_dataset(tmp_path / name, seed)
    two = run_distributed(2, build_on_ranks, directory=str(tmp_path), subsets=["a", "b"])
    (one,) = run_distributed(1, build_on_ranks, directory=str(tmp_path), subsets=["a", "b"])
    assert two[0] == two[1] == one
    assert len(one) == 110
    made = sorted(file.name.rsplit("-", 2)[0] for file in (tmp_path / "index").glob("*.epochs"))
    assert made == ["a-train", "a-valid", "b-train", "b-valid"]


def test_what_rank_0_finds_wrong_is_raised_everywhere(tmp_path: Path) -> None:
    write_random_dataset(tmp_path / "a", 0)
    said = run_distributed(2, build_on_ranks, directory=str(tmp_path), subsets=["a", "missing"])
    assert "missing.bin: no such file" in said[0]
    assert said[0] == said[1]


def load_beside_collectives(directory: str, num_workers: int) -> list[list[int]]:
    """Micro-batches from forked workers while all-reduces are under way, and evaluations in between."""
    start_gloo()
    rank, size = dist.get_rank(), dist.get_world_size()
    config = config_of(directory, ["a"])
    built = build_datasets(config, resolve(config, size, False), SampleCounts(200, 40))
    assert built.valid is not None
    of_rank = {
        "micro_batch_size": 2, "dp_rank": rank, "dp_size": size, "num_workers": num_workers,
        "prefetch_factor": 2, "pin_memory": False,
    }  # fmt: skip
    train = build_loader(built.train, consumed_samples=0, **of_rank)
    read = []
    for step in range(20):
        pending = [dist.all_reduce(torch.ones(1 << 16), async_op=True) for _ in range(4)]
        if step % 10 == 0:  # workers are forked here, with the collectives in flight
            valid = build_loader(built.valid, consumed_samples=0, **of_rank)
            read += [next(valid)["tokens"].flatten().tolist() for _ in range(3)]
            valid.close()
        batch = next(train)
        assert batch["document_ids"].shape == (2, SEQ)
        read.append(batch["tokens"].flatten().tolist())
        for work in pending:
            work.wait()
    train.close()
    dist.destroy_process_group()
    return read


@pytest.mark.parametrize("num_workers", [0, 2])
def test_forked_workers_beside_a_process_group(tmp_path: Path, num_workers: int) -> None:
    write_random_dataset(tmp_path / "a", 0)
    read = run_distributed(2, load_beside_collectives, directory=str(tmp_path), num_workers=num_workers)
    (alone,) = run_distributed(1, load_beside_collectives, directory=str(tmp_path), num_workers=0)
    trained = [
        [batch for step, batch in enumerate(rank) if step not in (0, 1, 2, 13, 14, 15)]
        for rank in (*read, alone)
    ]
    interleaved = [batch for pair in zip(*trained[:2], strict=True) for batch in pair]
    assert interleaved[:20] == trained[2]
    assert all(rank[0:3] == rank[13:16] for rank in read), "each evaluation reads the same batches"
