"""What logging costs: its share of the time of a training step on this machine.

    python benchmarks/logging_overhead.py [--model debug] [--steps 100]

Trains on random tokens of three sources with everything on that a run logs by default (console lines,
`metrics.jsonl`, TensorBoard). Two measurements in one run:

- the time inside the calls of `Reporter`, per step and per log interval, over the time of a step;
- every other step without the reporter and without the counting in batches: the ratio of medians shows
  what logging costs where it is not called, such as in the loss function.
"""

import argparse
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megads.config.loader import load_config
from megads.config.resolve import resolve
from megads.config.schema import Config
from megads.data.indexed import IndexedWriter
from megads.data.manifest import RECORD_FORMAT

ROOT = Path(__file__).parents[1]
MODELS = {"debug": "configs/debug.json", "tiny": "configs/train_config_tiny.json"}
SOURCES = ("prose", "code", "math")
DOCUMENTS, DOCUMENT_TOKENS = 200, 1000
EOD_ID = 2
WARM_UP_STEPS = 4
LOG_INTERVALS = (1, 10)


@dataclass
class TimedReporter:
    """Passes every call on, and notes how long it took."""

    reporter: Any
    seconds: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self.reporter, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            result = method(*args, **kwargs)
            self.seconds[name].append(time.perf_counter() - started)
            return result

        return timed


class SilentReporter:
    """Says nothing."""

    def step_time(self, tokens: int, flops: float) -> float:
        return 0.0

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def write_sources(directory: Path, vocab_size: int) -> None:
    """Random documents; their tokens do not matter for the time."""
    rng = np.random.default_rng(0)
    for name in SOURCES:
        with IndexedWriter(directory / name, vocab_size) as writer:
            lengths = np.full(DOCUMENTS, DOCUMENT_TOKENS, dtype=np.int32)
            ids = rng.integers(EOD_ID + 1, vocab_size, lengths.sum(), dtype=writer.dtype)
            ids[DOCUMENT_TOKENS - 1 :: DOCUMENT_TOKENS] = EOD_ID
            writer.add(ids, lengths)
            record = {"format": RECORD_FORMAT, "tokenizer": {"sha256": "0" * 64}, "eod_id": EOD_ID}
            writer.finish({**record, "vocab_size": vocab_size})


def configuration(file: str, directory: Path, steps: int) -> Config:
    """The shape and batch of a shipped configuration on the sources above, every step a log interval."""
    changes = {
        "output_dir": str(directory / "run"),
        "data.cache_dir": str(directory),
        "data.tokenizer_path": None,
        "data.split": "1",
        "data.num_workers": 0,
        "data.sources": [{"name": name, "subset": name} for name in SOURCES],
        "training.train_steps": 2 * (WARM_UP_STEPS + steps),
        "training.lr_warmup_steps": 0,
        "training.log_interval": 1,
        "training.eval_interval": 0,
        "training.save_interval": 0,
        "training.use_bf16": False,
        "distributed.device": "cpu",
    }
    return load_config(str(ROOT / file), changes)


def measure(config: Config, steps: int) -> dict[str, Any]:
    """Seconds per step of both kinds, and of each call of the reporter."""
    from megads.checkpoint.store import CheckpointStore
    from megads.mcore.groups import destroy_process_groups, initialize_device, initialize_process_groups
    from megads.train.contents import Contents
    from megads.train.loop import Run
    from megads.train.signals import StopRequest

    resolved = resolve(config, 1, False)
    initialize_device("cpu")
    initialize_process_groups(resolved, timeout_minutes=5, seed=config.seed)
    with CheckpointStore(resolved.checkpoint_dir, keep_last_n=1, keep_best=False, async_save=False) as store:
        run = Run(config, resolved, store)
        run.stop = StopRequest()
        run.open_loader()
        loud, silent = (TimedReporter(run.reporter), run.step.contents), (SilentReporter(), Contents())
        seconds: dict[str, list[float]] = {"loud": [], "silent": []}
        for number in range(2 * (WARM_UP_STEPS + steps)):
            arm, (reporter, contents) = ("loud", loud) if number % 2 == 0 else ("silent", silent)
            run.reporter, run.step.contents = reporter, contents  # type: ignore[assignment]
            started = time.perf_counter()
            run._one_step()
            seconds[arm].append(time.perf_counter() - started)
        loud[0].reporter.close()
        run.stop.close()
    destroy_process_groups()
    calls = {name: values[WARM_UP_STEPS:] for name, values in loud[0].seconds.items()}
    intervals = calls["interval"]
    inside = [sum(parts) for parts in zip(calls["step_time"], calls["step_done"], intervals, strict=True)]
    without = [total - part for total, part in zip(seconds["loud"][WARM_UP_STEPS:], inside, strict=True)]
    return {"step": without, "silent": seconds["silent"][WARM_UP_STEPS:], "calls": calls}


def summarize(measured: dict[str, Any]) -> dict[str, Any]:
    """Shares of a step's time at each log interval, and the ratio of the two kinds of steps."""
    step = statistics.mean(measured["step"])
    per_step = sum(statistics.mean(measured["calls"][name]) for name in ("step_time", "step_done"))
    per_interval = statistics.mean(measured["calls"]["interval"])
    shares = {}
    for interval in LOG_INTERVALS:
        spent = per_step + per_interval / interval
        shares[interval] = spent / (step + spent)
    return {
        "step_seconds": step,
        "reporter_seconds_per_step": per_step,
        "reporter_seconds_per_interval": per_interval,
        "share_at_log_interval": shares,
        "counting_ratio": statistics.median(measured["step"]) / statistics.median(measured["silent"]),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, action="append", help="default: all")
    parser.add_argument("--steps", type=int, default=100, help="of each kind (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write the results here")
    arguments = parser.parse_args()
    # The lines of the console are made and written, but not here.
    logging.basicConfig(filename=os.devnull, level=logging.INFO)
    results = {}
    for name in arguments.model or MODELS:
        with tempfile.TemporaryDirectory() as directory:
            config = configuration(MODELS[name], Path(directory), arguments.steps)
            write_sources(Path(directory), config.model.vocab_size)
            results[name] = found = summarize(measure(config, arguments.steps))
        shares = ", ".join(f"{share:.2%} at {n}" for n, share in found["share_at_log_interval"].items())
        print(
            f"{name}: a step takes {1e3 * found['step_seconds']:.0f} ms; the reporter "
            f"{1e3 * found['reporter_seconds_per_step']:.2f} ms a step and "
            f"{1e3 * found['reporter_seconds_per_interval']:.1f} ms a log interval. Share of the time by log "
            f"interval: {shares}. Steps with counting over steps without: {found['counting_ratio']:.3f}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
