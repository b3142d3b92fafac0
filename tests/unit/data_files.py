"""Small datasets and corpora for the tests of `megads.data`."""

import gzip
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from megads.data.indexed import IndexedWriter
from megads.data.manifest import RECORD_FORMAT

VOCAB_SIZE = 500
EOD_ID = 2
SHA256 = "a" * 64


def write_dataset(
    prefix: Path, documents: Iterable[Sequence[int]], *, vocab_size: int = VOCAB_SIZE, sha256: str = SHA256
) -> Path:
    """A dataset of token lists, as they are."""
    with IndexedWriter(prefix, vocab_size, overwrite=True) as writer:
        for ids in documents:
            writer.add(np.array(ids, dtype=writer.dtype), np.array([len(ids)], dtype=np.int32))
        writer.finish(
            {
                "format": RECORD_FORMAT,
                "tokenizer": {"kind": "sentencepiece", "sha256": sha256},
                "vocab_size": vocab_size,
                "eod_id": EOD_ID,
            }
        )
    return prefix


def numbered_documents(count: int, low: int, high: int, seed: int = 0) -> list[list[int]]:
    """Documents of 5 to 60 random ids in [low, high), each with an end of document."""
    rng = np.random.default_rng(seed)
    return [[*rng.integers(low, high, rng.integers(5, 60)).tolist(), EOD_ID] for _ in range(count)]


def write_json_lines(path: Path, texts: Iterable[str]) -> Path:
    """A Dolma-format file, gzip if its name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (
        json.dumps({"id": str(i), "text": text, "source": "test"}) + "\n" for i, text in enumerate(texts)
    )
    data = "".join(lines).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path
