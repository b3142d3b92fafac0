"""The order of micro-batches: one integer decides it, whatever the number of ranks and workers."""

import multiprocessing
import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from megads.config.resolve import resolve
from megads.config.schema import Config
from megads.data.blend import build_datasets
from megads.data.indexed import IndexedWriter
from megads.data.loader import Loader, OneTensor, build_loader
from megads.data.manifest import RECORD_FORMAT
from megads.data.samples import PackedSamples
from megads.data.sources import SampleCounts
from megads.errors import DataError, TrainingError
from tests.waiting import alive, until


class Numbers(Dataset[dict[str, Tensor]]):
    """Sample i is the number i."""

    def __init__(self, length: int, bad: int = -1) -> None:
        self.length = length
        self.bad = bad

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index == self.bad:
            raise DataError(f"sample {index} is bad")
        return {"tokens": torch.full((4,), index), "pid": torch.tensor(os.getpid())}


def loader_of(dataset: Numbers, **changes: Any) -> Loader:
    settings = {
        "micro_batch_size": 2, "dp_rank": 0, "dp_size": 1, "consumed_samples": 0, "num_workers": 0,
        "prefetch_factor": 2, "pin_memory": False,
    }  # fmt: skip
    return build_loader(dataset, **{**settings, **changes})


def numbers(loader: Loader, batches: int | None = None) -> list[list[int]]:
    taken = loader if batches is None else (next(loader) for _ in range(batches))
    return [batch["tokens"][:, 0].tolist() for batch in taken]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_global_batches_are_the_same_for_every_layout(dp_size: int, num_workers: int) -> None:
    """Global batches of 8 out of 40 samples, consumed from 8 on: {8..15}, {16..23}, ..."""
    rounds = 8 // (2 * dp_size)
    per_rank = [
        numbers(
            loader_of(Numbers(43), dp_rank=rank, dp_size=dp_size, consumed_samples=8, num_workers=num_workers)
        )
        for rank in range(dp_size)
    ]
    assert {len(batches) for batches in per_rank} == {(43 - 8) // (2 * dp_size)}
    for step in range(4):
        batch = [
            n for ranks in per_rank for chunk in ranks[step * rounds : (step + 1) * rounds] for n in chunk
        ]
        assert sorted(batch) == list(range(8 + 8 * step, 16 + 8 * step))
    first_round = [n for ranks in per_rank for n in ranks[0]]
    assert first_round == list(range(8, 8 + 2 * dp_size)), "rank r takes the r-th slice"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resuming_anywhere_gives_the_rest(num_workers: int) -> None:
    whole = numbers(loader_of(Numbers(40), num_workers=num_workers))
    for consumed in (2, 14, 38, 40, 100):
        assert (
            numbers(loader_of(Numbers(40), consumed_samples=consumed, num_workers=num_workers))
            == whole[consumed // 2 :]
        )


@pytest.mark.parametrize("one_hangs", [False, True])
def test_a_closed_loader_has_no_workers(one_hangs: bool) -> None:
    loader = loader_of(Numbers(1000), num_workers=2)
    pids = {int(pid) for _ in range(2) for pid in next(loader)["pid"]}
    assert len(pids) == 2
    if one_hangs:
        os.kill(min(pids), signal.SIGSTOP)
    loader.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_an_error_on_its_way_up_keeps_no_worker() -> None:
    loader = loader_of(Numbers(40, bad=5), num_workers=2)
    before = set(multiprocessing.active_children())
    with pytest.raises(DataError, match="sample 5 is bad") as caught:
        numbers(loader)
    loader.close()
    assert set(multiprocessing.active_children()) == before
    assert caught.tb is not None, "it held what it went through until here"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_error_in_a_worker_reaches_the_trainer(num_workers: int) -> None:
    loader = loader_of(Numbers(40, bad=5), num_workers=num_workers)
    assert numbers(loader, 2) == [[0, 1], [2, 3]]
    with pytest.raises(DataError, match="sample 5 is bad"):
        next(loader)


def test_a_killed_worker_is_an_error_and_no_hang() -> None:
    loader = loader_of(Numbers(100_000), num_workers=2)
    pids = {int(p) for _ in range(2) for p in next(loader)["pid"]}
    os.kill(pids.pop(), signal.SIGKILL)
    with pytest.raises(TrainingError, match="loader process was killed"):
        for _ in loader:
            pass


def test_workers_die_with_a_killed_trainer_and_ignore_its_signals(tmp_path: Path) -> None:
    script = f"""
import os, sys, time, signal
import torch.utils.data._utils.worker as watchdog
watchdog.MP_STATUS_CHECK_INTERVAL = 3600  # torch's own would end them too, after five seconds
sys.path[:0] = {[str(Path(__file__).parent), *sys.path]!r}
signal.signal(signal.SIGUSR1, lambda *a: None)
from test_data_loader import Numbers, loader_of
loader = loader_of(Numbers(100_000), num_workers=2)
pids = {{int(p) for _ in range(4) for p in next(loader)["pid"]}}
for pid in pids:
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        os.kill(pid, number)
for _ in range(50):
    next(loader)
print(*pids, flush=True)
time.sleep(600)
"""
    trainer = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    pids = [int(pid) for pid in trainer.stdout.readline().split()]
    assert len(pids) == 2
    trainer.kill()
    trainer.wait()
    until(lambda: not any(alive(pid) for pid in pids))


def test_a_batch_arrives_as_it_was_packed() -> None:
    """Shapes whose bytes do not fill whole alignments, types of every width, values of no shape."""
    samples = [
        {
            "tokens": torch.arange(5) + i, "loss_mask": torch.rand(5),
            "document_ids": torch.arange(3, dtype=torch.int32),
            "flag": torch.tensor(i % 2 == 0), "small": torch.randint(-9, 9, (2, 3), dtype=torch.int8),
        }
        for i in range(3)
    ]  # fmt: skip
    packed = OneTensor.pack(samples)
    assert packed.content.is_shared()
    batch = packed.unpack()
    expected = default_collate(samples)
    assert list(batch) == list(expected)
    for name, tensor in expected.items():
        assert batch[name].dtype == tensor.dtype
        assert torch.equal(batch[name], tensor)


# ------------------------------------------------------------------ the ledger

# By hand: MEGADS_LEDGER=1000000,100 pytest tests/unit/test_data_loader.py -k ledger
LEDGER_SAMPLES, RESUMES = map(int, os.environ.get("MEGADS_LEDGER", "100000,26").split(","))
LEDGER_SEQ, SOURCE_TOKENS = 8, (200_000, 130_000, 70_000)


def ledger_run(tmp_path: Path) -> PackedSamples:
    """Three sources whose token number n is n, so that a token tells where it was read.

    Tokens are counted from a different number in each; more samples are asked for than an epoch has.
    """
    sources, first = [], 0
    for number, tokens in enumerate(SOURCE_TOKENS):
        rng = np.random.default_rng(number)
        for shard in range(4):
            lengths = rng.integers(5, 60, tokens // 4 // 36, dtype=np.int32)
            lengths[-1] += tokens // 4 - lengths.sum()
            with IndexedWriter(tmp_path / f"source{number}" / str(shard), sum(SOURCE_TOKENS)) as writer:
                writer.add(np.arange(first, first + tokens // 4, dtype=writer.dtype), lengths)
                writer.finish({
                    "format": RECORD_FORMAT, "tokenizer": {"sha256": "a" * 64}, "eod_id": 0,
                    "vocab_size": sum(SOURCE_TOKENS),
                })  # fmt: skip
            first += tokens // 4
        sources.append({"name": f"source{number}", "subset": f"source{number}", "weight": 5.0 - number})
    half = LEDGER_SAMPLES // 2 * LEDGER_SEQ
    config = Config.model_validate({
        "model": {"vocab_size": sum(SOURCE_TOKENS)},
        "training": {"seq_length": LEDGER_SEQ, "total_training_tokens": 2 * half},
        "data": {
            "cache_dir": str(tmp_path), "split": "100,0,0", "sources": sources,
            "phases": [
                {"from_tokens": 0, "weights": {"source0": 5, "source1": 4, "source2": 3}},
                {"from_tokens": half, "weights": {"source0": 1, "source1": 1, "source2": 2}},
            ],
        },
    })  # fmt: skip
    return build_datasets(config, resolve(config, 1, False), SampleCounts(LEDGER_SAMPLES)).train


def test_the_ledger(tmp_path: Path) -> None:
    """Every sample once and in order over many resumes with other workers and data-parallel sizes.

    Then, by the tokens alone: within an epoch of a source no token is read twice, and none is missing
    but for the remainder of an epoch that is shorter than a sequence.
    """
    train = ledger_run(tmp_path)
    layouts = [(workers, ranks) for workers in (0, 1, 4) for ranks in (1, 2, 4)]
    rng = np.random.default_rng(0)
    global_batch = 200
    stops = np.sort(rng.choice(LEDGER_SAMPLES // global_batch, RESUMES, replace=False)) * global_batch
    read: list[np.ndarray] = []
    for number, (start, stop) in enumerate(pairwise([0, *stops.tolist(), LEDGER_SAMPLES])):
        workers, ranks = layouts[number % len(layouts)]
        read.append(read_by_ranks(train, start, stop, global_batch, ranks, workers))
    tokens = np.concatenate(read)
    assert tokens.shape == (LEDGER_SAMPLES // global_batch * global_batch, LEDGER_SEQ)

    of_source = np.searchsorted(np.cumsum(SOURCE_TOKENS), tokens[:, 0], side="right")
    expected = [train.stream.locate(sample)[0].part.name for sample in range(len(tokens))]
    assert [f"source{number}" for number in of_source] == expected
    for number, part in enumerate(train.stream.blend.parts):
        mine = tokens[of_source == number]
        whole_epochs = len(mine) // part.samples_per_epoch
        assert whole_epochs >= 1
        for epoch in range(whole_epochs + 1):
            ids = mine[epoch * part.samples_per_epoch : (epoch + 1) * part.samples_per_epoch].ravel()
            assert len(np.unique(ids)) == ids.size, "no token twice in an epoch"
            if epoch < whole_epochs:
                assert SOURCE_TOKENS[number] - ids.size <= LEDGER_SEQ, "none is missing"


def read_by_ranks(
    train: PackedSamples, start: int, stop: int, global_batch: int, ranks: int, workers: int
) -> np.ndarray:
    """Tokens [stop - start, S] of a part of a run, in global order, read as its ranks read them."""
    micro_batch = 50
    loaders = [
        build_loader(
            train, micro_batch_size=micro_batch, dp_rank=rank, dp_size=ranks, consumed_samples=start,
            num_workers=workers, prefetch_factor=2, pin_memory=False,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    rounds = (stop - start) // (micro_batch * ranks)
    assert rounds * micro_batch * ranks == stop - start
    batches = [next(loader)["tokens"].numpy() for _ in range(rounds) for loader in loaders]
    for loader in loaders:
        loader.close()
    return np.concatenate(batches) if batches else np.empty((0, LEDGER_SEQ), dtype=np.int64)
