"""Start of training with many files: MegaDS's index and blend beside Megatron-Core's own builder.

    python benchmarks/data_start.py [--files 2419] [--documents 200] [--stock-surplus 1.0] [--json FILE]

Writes a synthetic corpus of 13 sources with the weights of configs/dolma.json, then starts each contender
in a process of its own, twice: cold, with no index cache and the corpus dropped from the page cache as
far as the kernel lets a user do that; and warm, with the cache that the cold one left. Counted is the time
from imported modules to the first sample, and the highest resident memory beyond that after the imports.

MegaDS: `build_datasets`, checks of every file included. Stock: `BlendedMegatronDatasetBuilder` over a
prefix and a weight per file, which is how Megatron-LM starts; it checks no file. It needs
`mid_level_dataset_surplus` far above its default of 0.005 here, or raises IndexError.
"""

import argparse
import json
import logging
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SEQ_LENGTH = 256
VOCAB_SIZE = 50_000
EOD_ID = 0


def dolma_weights() -> dict[str, float]:
    sources = json.loads((ROOT / "configs" / "dolma.json").read_text())["data"]["sources"]
    return {source["name"]: source["weight"] for source in sources}


def write_corpus(directory: Path, files: int, documents: int) -> int:
    """`files` datasets over the sources, as many for each as its weight says but at least one; tokens."""
    from megads.data.indexed import IndexedWriter
    from megads.data.manifest import RECORD_FORMAT

    weights = dolma_weights()
    counts = {name: max(1, round(files * weight)) for name, weight in weights.items()}
    counts[max(counts, key=lambda name: counts[name])] += files - sum(counts.values())
    rng, tokens = np.random.default_rng(0), 0
    for name, count in counts.items():
        for shard in range(count):
            lengths = np.clip(rng.lognormal(4.5, 1.0, documents), 2, 10_000).astype(np.int32)
            with IndexedWriter(directory / name / f"{shard:05d}", VOCAB_SIZE) as writer:
                writer.add(rng.integers(1, VOCAB_SIZE, lengths.sum(), dtype=np.uint16), lengths)
                writer.finish(
                    {
                        "format": RECORD_FORMAT,
                        "tokenizer": {"kind": "none", "sha256": "0" * 64},
                        "vocab_size": VOCAB_SIZE,
                        "eod_id": EOD_ID,
                    }
                )
            tokens += int(lengths.sum())
    return tokens


def start_megads(corpus: Path, cache: Path, samples: int) -> tuple[float, Any]:
    from megads.config.resolve import resolve
    from megads.config.schema import Config
    from megads.data import source_stream  # noqa: F401  Megatron-Core's part of the imports
    from megads.data.blend import build_datasets
    from megads.data.sources import SampleCounts

    sources = [{"name": n, "path": str(corpus / n), "weight": w} for n, w in dolma_weights().items()]
    config = Config.model_validate(
        {
            "model": {"vocab_size": VOCAB_SIZE},
            "training": {"seq_length": SEQ_LENGTH, "total_training_tokens": samples * SEQ_LENGTH},
            "data": {"cache_dir": str(cache), "split": "100,0,0", "sources": sources},
        }
    )
    resolved = resolve(config, 1, False)
    before = time.perf_counter()
    train = build_datasets(config, resolved, SampleCounts(samples)).train
    _ = train[0]
    return before, train


def start_stock(corpus: Path, cache: Path, samples: int, surplus: float) -> tuple[float, Any]:
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    class Tokenizer:
        eod, pad, vocab_size = EOD_ID, -1, None
        unique_identifiers = {"class": "none"}  # noqa: RUF012

    before = time.perf_counter()
    prefixes, weights = [], []
    for name, weight in dolma_weights().items():
        inside = sorted(str(path)[:-4] for path in (corpus / name).glob("*.idx"))
        sizes = [os.path.getsize(prefix + ".bin") for prefix in inside]
        prefixes += inside
        weights += [weight * size / sum(sizes) for size in sizes]
    settings = GPTDatasetConfig(
        random_seed=42,
        sequence_length=SEQ_LENGTH,
        blend=(prefixes, weights),
        split="100,0,0",
        path_to_cache=str(cache),
        tokenizer=Tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        mid_level_dataset_surplus=surplus,
    )
    train = BlendedMegatronDatasetBuilder(GPTDataset, [samples, 0, 0], lambda: True, settings).build()[0]
    _ = train[0]
    return before, train


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """One start, in this process."""
    import torch  # noqa: F401

    logging.disable(logging.WARNING)
    corpus, cache = Path(arguments.corpus), Path(arguments.cache)
    for module in ("megatron.core.datasets.gpt_dataset", "megatron.core.datasets.blended_dataset"):
        __import__(module)
    base_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if arguments.start == "megads":
        before, train = start_megads(corpus, cache, arguments.samples)
    else:
        before, train = start_stock(corpus, cache, arguments.samples, arguments.stock_surplus)
    seconds = time.perf_counter() - before
    peak_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert len(train) >= arguments.samples
    maps = Path("/proc/self/maps").read_text().count("\n")
    return {"seconds": seconds, "added_mb": (peak_kb - base_kb) / 1024, "maps": maps}


def drop_from_page_cache(directory: Path) -> None:
    for path in directory.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def start(name: str, corpus: Path, cache: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    command = [
        sys.executable, "-W", "ignore", __file__, "--start", name, "--corpus", corpus, "--cache", cache,
        "--samples", arguments.samples, "--stock-surplus", arguments.stock_surplus,
    ]  # fmt: skip
    done = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    files = [path.stat() for path in cache.rglob("*") if path.is_file()]
    return found | {"cache_files": len(files), "cache_mb": sum(file.st_size for file in files) / 1e6}


def compare(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    directory = Path(tempfile.mkdtemp(prefix="data_start_", dir=arguments.directory))
    results = []
    try:
        corpus = directory / "corpus"
        tokens = write_corpus(corpus, arguments.files, arguments.documents)
        arguments.samples = arguments.samples or tokens // SEQ_LENGTH // 2
        print(
            f"{arguments.files:,} files in {len(dolma_weights())} sources, "
            f"{arguments.files * arguments.documents:,} documents, {tokens / 1e6:.1f} M tokens; "
            f"{arguments.samples:,} samples of {SEQ_LENGTH}"
        )
        for name in ("megads", "stock"):
            drop_from_page_cache(corpus)
            for state in ("cold", "warm"):
                results.append(
                    {"name": name, "state": state, **start(name, corpus, directory / name, arguments)}
                )
    finally:
        shutil.rmtree(directory)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", type=int, default=2419, help="default: %(default)s, as Dolma v1.6")
    parser.add_argument("--documents", type=int, default=200, help="per file (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=0, help="of the run (default: half of the tokens)")
    parser.add_argument("--stock-surplus", type=float, default=1.0, help="default: %(default)s")
    parser.add_argument(
        "--directory", help="where the corpus is written for the while (default: the system's)"
    )
    parser.add_argument("--json", type=Path, help="also write the results here")
    for hidden in ("--start", "--corpus", "--cache"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.start:
        print(json.dumps(measure(arguments)))
        return 0
    results = compare(arguments)
    print(
        f"{'':<16}{'seconds':>9}{'memory added, MB':>18}{'mappings':>10}{'cache files':>13}{'cache, MB':>11}"
    )
    for row in results:
        print(
            f"{row['name'] + ', ' + row['state']:<16}{row['seconds']:>9.2f}{row['added_mb']:>18.0f}"
            f"{row['maps']:>10,}{row['cache_files']:>13,}{row['cache_mb']:>11.1f}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
