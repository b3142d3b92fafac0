"""The order of one source: epoch after epoch, each a permutation of its own.

An epoch packs the source's documents in a random order, cuts them every `sequence_tokens` (one token is
shared with the next sequence, for the labels) and shuffles the sequences: what Megatron-Core's
`GPTDataset` does for a single epoch. It draws several epochs from one generator and shuffles them
together, so that asking for more samples changes the order of all; here each epoch has a generator of its
own, seeded by the run's seed, the source's name and the epoch's number. So a source is an endless stream:
sample k is sample k mod n of epoch k div n, however long the run is.

numpy's `RandomState` is used because its streams never change between versions. Less than a sequence is
left over at the end of an epoch; which tokens these are changes with each.

Conversations are not cut: an epoch of them has the sequences of `packing`. Under a curriculum, documents and
sequences are shuffled within the levels of `curriculum` only.
"""

import hashlib
import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megads.data.curriculum import ScoreOrder, document_levels
from megads.data.index_cache import Arrays, load_arrays, publish_arrays
from megads.data.packing import Packing, PackPlan
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

    `group_file` is where `ShardGroup.load` finds the source, `content_sha256` its content. `packing` is that
    of conversations, None of texts.
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
    packing: Packing | None = None
    score_order: ScoreOrder | None = None

    @property
    def key(self) -> list[Any]:
        """What the order of its samples follows from, beside its name, split, size and seed."""
        packing = [self.packing.sha256] if self.packing else []
        order = [self.score_order.key, self.score_order.epochs] if self.score_order else []
        return [*packing, *order]

    @property
    def samples_per_epoch(self) -> int:
        if self.packing is not None:
            return self.packing.sequences
        return max(0, self.tokens - 1) // self.sequence_tokens


class EpochIndex:
    """Which tokens make up each sample of each epoch, in files of the index cache.

    Per epoch of D documents and n samples: `documents` [D], their numbers in the group in packing order;
    `boundaries` [n + 1, 2], for the start of each sequence its place in `documents` and the token there
    (always 0 of conversations); `shuffle` [n], the sequence that each sample is.
    """

    def __init__(self, part: SourcePart, directory: Path) -> None:
        assert part.samples_per_epoch > 0
        self.part = part
        self._document_type = _integer(part.first_document + part.documents)
        self._sample_type = _integer(part.samples_per_epoch)
        self._documents = part.packing.conversations if part.packing else part.documents
        self.block_epochs = max(1, BLOCK_ITEMS // (self._documents + part.samples_per_epoch))
        key = [
            VERSION, part.name, part.split, part.content_sha256, part.first_document, part.documents,
            part.tokens, part.sequence_tokens, part.seed, *part.key,
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
        order = _packed_order(part) if part.packing else self._cut_order()
        first = block * self.block_epochs
        logger.info("Indexing %s, %s, from epoch %d on", part.name, part.split, first + 1)

        def fill(arrays: Arrays) -> None:
            for row in range(self.block_epochs):
                draw = np.random.RandomState(_seed_words(part, first + row))
                by_level = part.score_order is not None and first + row < part.score_order.epochs
                level_starts = order(draw, by_level, arrays["documents"][row], arrays["boundaries"][row])
                shuffle = np.arange(samples, dtype=self._sample_type)
                _shuffle_within(draw, shuffle, level_starts)
                arrays["shuffle"][row] = shuffle

        rows = self.block_epochs
        shapes = {
            "documents": (self._document_type, (rows, self._documents)),
            "boundaries": (self._document_type, (rows, samples + 1, 2)),
            "shuffle": (self._sample_type, (rows, samples)),
        }
        facts = {"source": part.name, "split": part.split, "first_epoch": first}
        publish_arrays(self._file(block), facts, shapes, fill)

    def _cut_order(self) -> "Order":
        """Documents in random order, cut every `sequence_tokens`."""
        part, group = self.part, ShardGroup.load(self.part.group_file)
        level = np.zeros(0, np.int64)
        if part.score_order is not None:
            level = document_levels(group, part.first_document, part.documents, part.score_order)

        def order(
            draw: np.random.RandomState, by_level: bool, documents: NDArray[Any], boundaries: NDArray[Any]
        ) -> NDArray[Any]:
            shuffled = np.arange(part.documents, dtype=self._document_type)
            level_starts = np.array([0, part.documents])
            if by_level:
                shuffled[:] = np.argsort(level, kind="stable")
                level_starts = np.concatenate(([0], np.cumsum(np.bincount(level))))
            shuffled += part.first_document
            _shuffle_within(draw, shuffled, level_starts)
            documents[:] = shuffled
            _cut(group, shuffled, part.sequence_tokens, boundaries)
            # A sequence is of the level of the document that it begins in.
            return np.searchsorted(boundaries[:-1, 0], level_starts)

        return order


Order = Callable[[np.random.RandomState, bool, NDArray[Any], NDArray[Any]], NDArray[Any]]
"""Fills `documents` and `boundaries` of an epoch, by level or not; returns the first sequence of each level,
and the end of the last."""


def _packed_order(part: SourcePart) -> Order:
    """Whole conversations, packed."""
    assert part.packing is not None
    plan = PackPlan.load(part.packing.plan_file)

    def order(
        draw: np.random.RandomState, by_level: bool, documents: NDArray[Any], boundaries: NDArray[Any]
    ) -> NDArray[Any]:
        documents[:] = plan.fill(draw)
        boundaries[:, 0], boundaries[:, 1] = plan.starts, 0
        return plan.level_starts if by_level else plan.level_starts[[0, -1]]

    return order


def _shuffle_within(draw: np.random.RandomState, items: NDArray[Any], starts: Iterable[int]) -> None:
    """Shuffle, in place, what lies between each two of `starts`."""
    for start, end in pairwise(starts):
        draw.shuffle(items[start:end])


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
