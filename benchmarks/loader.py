"""The data loader's samples per second, beside what the debug and tiny models consume on this machine.

    python benchmarks/loader.py [--seconds 5] [--workers 0 1 2] [--json FILE]

Writes a synthetic dataset, reads it in random order through the loader of training (a blend of two
sources, masks and document boundaries included) and counts whole micro-batches. The models are trained
by the real `TrainingStep` on all cores, on batches that are in memory; both are measured in the same run,
one after the other, since in training they share the cores.
"""

import argparse
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from megads.config.loader import load_config  # noqa: E402
from megads.config.resolve import resolve  # noqa: E402
from megads.config.scalars import Schedules  # noqa: E402
from megads.config.schema import Config  # noqa: E402
from megads.data.blend import build_datasets  # noqa: E402
from megads.data.indexed import IndexedWriter  # noqa: E402
from megads.data.loader import build_loader  # noqa: E402
from megads.data.manifest import RECORD_FORMAT  # noqa: E402
from megads.data.sources import SampleCounts  # noqa: E402

MODELS = {"debug": "configs/debug.json", "tiny": "configs/train_config_tiny.json"}
CORPUS_TOKENS = 20_000_000
WARM_UP_STEPS, STEPS = 2, 5


def write_corpus(directory: Path, vocab_size: int) -> None:
    rng = np.random.default_rng(0)
    for name in ("web", "code"):
        with IndexedWriter(directory / name, vocab_size) as writer:
            while writer.tokens < CORPUS_TOKENS // 2:
                lengths = np.clip(rng.lognormal(6, 1, 1000), 2, 100_000).astype(np.int32)
                writer.add(rng.integers(1, vocab_size, lengths.sum()).astype(writer.dtype), lengths)
            record = {"format": RECORD_FORMAT, "tokenizer": {"sha256": "0" * 64}, "eod_id": 0}
            writer.finish({**record, "vocab_size": vocab_size})


def configuration(file: str, directory: Path) -> Config:
    sources = [{"name": name, "path": str(directory / name)} for name in ("web", "code")]
    changes = {
        "data.cache_dir": str(directory), "data.tokenizer_path": None, "data.sources": sources,
        "data.split": "98,2,0", "data.reset_position_ids": True, "data.document_mask": True,
        "distributed.device": "cpu",
    }  # fmt: skip
    return load_config(str(ROOT / file), changes)


def loaded_per_second(config: Config, workers: int, seconds: float) -> float:
    """Samples per second of one rank that does nothing but take micro-batches."""
    training = config.training
    train = build_datasets(config, resolve(config, 1, False), SampleCounts(10_000_000)).train
    loader = build_loader(
        train,
        micro_batch_size=training.micro_batch_size,
        dp_rank=0,
        dp_size=1,
        consumed_samples=0,
        num_workers=workers,
        prefetch_factor=config.data.prefetch_factor,
        pin_memory=False,
    )
    for _ in range(20):
        next(loader)
    started, taken = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        next(loader)
        taken += training.micro_batch_size
    elapsed = time.perf_counter() - started
    loader.close()
    return taken / elapsed


def consumed_per_second(config: Config) -> float:
    """Samples per second of training itself, the median of a few steps."""
    from megads.mcore.groups import (
        destroy_process_groups,
        initialize_device,
        initialize_process_groups,
    )
    from megads.train.step import TrainingStep

    resolved, training = resolve(config, 1, False), config.training
    initialize_device("cpu")
    initialize_process_groups(resolved, timeout_minutes=5, seed=1)
    step = TrainingStep(config, resolved)
    batch_size, scalars = Schedules(config, resolved).at(0)
    micro_batches = max(1, min(batch_size, 16) // training.micro_batch_size)
    shape = (training.micro_batch_size, training.seq_length)
    tokens = torch.randint(1, config.model.vocab_size, shape)
    batch = {
        "tokens": tokens,
        "labels": tokens.roll(-1, 1),
        "loss_mask": torch.ones(shape),
        "position_ids": torch.arange(shape[1]).expand(shape).contiguous(),
    }
    seconds = []
    for _ in range(WARM_UP_STEPS + STEPS):
        started = time.perf_counter()
        step.train(iter([batch] * micro_batches), micro_batches, scalars)
        seconds.append(time.perf_counter() - started)
    destroy_process_groups()
    return micro_batches * shape[0] / statistics.median(seconds[WARM_UP_STEPS:])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=5.0, help="per measurement (default: %(default)s)")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], metavar="N")
    parser.add_argument("--json", type=Path, help="also write the results here")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)  # of repetition: the corpus is small
    print(f"{os.cpu_count()} cores; samples per second")
    results: list[dict[str, Any]] = []
    for name, file in MODELS.items():
        with tempfile.TemporaryDirectory() as directory:
            config = configuration(file, Path(directory))
            write_corpus(Path(directory), config.model.vocab_size)
            row: dict[str, Any] = {"model": name, "seq_length": config.training.seq_length}
            row["loaded"] = {n: loaded_per_second(config, n, arguments.seconds) for n in arguments.workers}
            plain = {
                "data.reset_position_ids": False,
                "data.document_mask": False,
                "distributed.device": "cpu",
            }
            row["consumed"] = consumed_per_second(load_config(str(ROOT / file), plain))
        results.append(row)
        print(f"{name}, sequences of {row['seq_length']}: training consumes {row['consumed']:,.1f}")
        for workers, loaded in row["loaded"].items():
            print(f"  {workers} workers: {loaded:>9,.0f}, {loaded / row['consumed']:.0f} times as many")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
