"""The order of one source: epoch after epoch, each a permutation of its own.

An epoch packs the source's documents in a random order, cuts them every `sequence_tokens` (one token is
shared with the next sequence, for the labels) and shuffles the sequences: what Megatron-Core's
`GPTDataset` does for a single epoch. It draws several epochs from one generator and shuffles them
together, so that asking for more samples changes the order of all; here each epoch has a generator of its
own, seeded by the run's seed, the source's name and the epoch's number. So a source is an endless stream:
sample k is sample k mod n of epoch k div n, however long the run is.

numpy's `RandomState` is used because its streams never change between versions. Less than a sequence is
left over at the end of an epoch; which tokens these are changes with each.
"""

import hashlib
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megads.data.index_cache import Arrays, load_arrays, publish_arrays
from megads.data.shard_group import ShardGroup
from megads.errors import DataError

logger = logging.getLogger(__name__)

VERSION = 1  # of the order; a change of it changes what every seed gives
# Epochs of a small source share a file, so that thousands of them are not thousands of files.
BLOCK_ITEMS = 1 << 14
PIECE_DOCUMENTS = 1 << 22


@dataclass(frozen=True)
class SourcePart:
    """The documents of a source that make up one split, and the sequences that an epoch of them gives.

    `group_file` is where `ShardGroup.load` finds the source, `content_sha256` its content.
    """

    name: str
    split: str
    group_file: Path
    content_sha256: str
    first_document: int
    documents: int
    tokens: int
    sequence_tokens: int
    seed: int

    @property
    def samples_per_epoch(self) -> int:
        return max(0, self.tokens - 1) // self.sequence_tokens


class EpochIndex:
    """Which tokens make up each sample of each epoch, in files of the index cache.

    Per epoch of D documents and n samples: `documents` [D], their numbers in the group in packing order;
    `boundaries` [n + 1, 2], for the start of each sequence its place in `documents` and the token there;
    `shuffle` [n], the sequence that each sample is.
    """

    def __init__(self, part: SourcePart, directory: Path) -> None:
        assert part.samples_per_epoch > 0
        self.part = part
        self._document_type = _integer(part.first_document + part.documents)
        self._sample_type = _integer(part.samples_per_epoch)
        self.block_epochs = max(1, BLOCK_ITEMS // (part.documents + part.samples_per_epoch))
        key = [
            VERSION, part.name, part.split, part.content_sha256, part.first_document, part.documents,
            part.tokens, part.sequence_tokens, part.seed,
        ]  # fmt: skip
        sha256 = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
        self._stem = directory / f"{re.sub(r'[^0-9A-Za-z_.-]', '_', part.name)[:60]}-{part.split}-{sha256}"
        self._blocks: dict[int, Arrays] = {}

    def missing(self, epochs: int) -> list[int]:
        """The blocks that the first `epochs` epochs lack: not there, or damaged."""
        blocks = range(-(-epochs // self.block_epochs))
        return [block for block in blocks if load_arrays(self._file(block), check=True) is None]

    def epoch(self, number: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """(documents, boundaries, shuffle) of an epoch whose block has been built, here or elsewhere."""
        block, row = divmod(number, self.block_epochs)
        if block not in self._blocks:
            found = load_arrays(self._file(block), check=False)
            if found is None:
                raise DataError(
                    f"{self._file(block)}: disappeared, or is not visible here: data.cache_dir must be the "
                    "same storage on every node."
                )
            self._blocks[block] = found[1]
        arrays = self._blocks[block]
        return arrays["documents"][row], arrays["boundaries"][row], arrays["shuffle"][row]

    def _file(self, block: int) -> Path:
        return self._stem.with_name(f"{self._stem.name}-{block:06d}.epochs")

    def build_block(self, block: int) -> None:
        """Make the file of one block; several processes may, each its own."""
        part, samples = self.part, self.part.samples_per_epoch
        group = ShardGroup.load(part.group_file)
        first = block * self.block_epochs
        logger.info("Indexing %s, %s, from epoch %d on", part.name, part.split, first + 1)

        def fill(arrays: Arrays) -> None:
            for row in range(self.block_epochs):
                draw = np.random.RandomState(_seed_words(part, first + row))
                order = np.arange(
                    part.first_document, part.first_document + part.documents, dtype=self._document_type
                )
                draw.shuffle(order)
                arrays["documents"][row] = order
                _cut(group, order, part.sequence_tokens, arrays["boundaries"][row])
                del order
                shuffle = np.arange(samples, dtype=self._sample_type)
                draw.shuffle(shuffle)
                arrays["shuffle"][row] = shuffle

        rows = self.block_epochs
        shapes = {
            "documents": (self._document_type, (rows, part.documents)),
            "boundaries": (self._document_type, (rows, samples + 1, 2)),
            "shuffle": (self._sample_type, (rows, samples)),
        }
        facts = {"source": part.name, "split": part.split, "first_epoch": first}
        publish_arrays(self._file(block), facts, shapes, fill)


def _cut(group: ShardGroup, order: NDArray[Any], sequence_tokens: int, boundaries: NDArray[Any]) -> None:
    """Place every `sequence_tokens`-th token of the documents in `order`: (place in order, token in it)."""
    packed_tokens, done = 0, 0
    for first in range(0, order.size, PIECE_DOCUMENTS):
        ends = np.cumsum(group.lengths_of(order[first : first + PIECE_DOCUMENTS]), dtype=np.int64)
        ends += packed_tokens
        # Sequence i begins at token i * sequence_tokens; this piece holds those before its last end.
        count = min(boundaries.shape[0] - done, -(-int(ends[-1]) // sequence_tokens) - done)
        begins = np.arange(done, done + count, dtype=np.int64) * sequence_tokens
        places = np.searchsorted(ends, begins, side="right")
        before = np.where(places > 0, ends[places - 1], packed_tokens)
        boundaries[done : done + count, 0] = places + first
        boundaries[done : done + count, 1] = begins - before
        packed_tokens = int(ends[-1])
        done += count
    assert done == boundaries.shape[0], f"{done} of {boundaries.shape[0]} sequences placed"


def _seed_words(part: SourcePart, epoch: int) -> NDArray[np.uint32]:
    text = repr([VERSION, part.seed, part.name, part.split, epoch])
    return np.frombuffer(hashlib.sha256(text.encode()).digest(), dtype=np.uint32)


def _integer(largest: int) -> np.dtype[Any]:
    return np.dtype(np.int32 if largest < 2**31 - 1 else np.int64)
