"""Packing of conversations: whole ones into sequences, so that little is padding and none is cut.

Best-fit decreasing, as in "Fewer Truncations Improve Language Modeling" (arXiv:2404.10830): the longest
first, each into the fullest sequence that has room for it. Which sequences result depends on the lengths
alone, so each epoch has as many; which conversations of equal length take which place is drawn anew in each.

A conversation of L tokens takes L - 1 positions, since its last token is only a label. One that needs more
than a sequence has is cut at its end or left out, as the configuration says.
"""

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from megads.data.index_cache import Arrays, load_arrays, publish_arrays
from megads.data.shard_group import ShardGroup
from megads.errors import DataError

logger = logging.getLogger(__name__)

VERSION = 1  # of the plan; a change of it changes the order of samples
LongConversations = Literal["cut", "drop"]


@dataclass(frozen=True)
class Packing:
    """How the conversations of a part of a source are packed: the file of the plan, and what is in it."""

    plan_file: Path
    sha256: str
    """Names all that the plan follows from."""
    sequences: int
    conversations: int
    positions: int
    """Taken by conversations; the rest of `sequences` times their length is padding."""
    cut: int
    dropped: int


@dataclass(frozen=True)
class PackPlan:
    """The places of an epoch, C conversations in n sequences, without saying who takes them.

    `conversations` [C], numbers of documents, by level (see `curriculum`), the longest first; `runs` [C], the
    same for those of equal level and length, ascending; `slots` [C], places in `conversations`, sequence by
    sequence; `starts` [n + 1], where each sequence begins in `slots`; `level_starts` [levels + 1], the first
    sequence of each level.
    """

    conversations: NDArray[Any]
    runs: NDArray[np.int64]
    slots: NDArray[np.int64]
    starts: NDArray[np.int64]
    level_starts: NDArray[np.int64]

    @classmethod
    def load(cls, path: Path) -> "PackPlan":
        """What `plan_packing` has written; DataError where it is gone."""
        found = load_arrays(path, check=False)
        if found is None:
            raise DataError(
                f"{path}: disappeared, or is not visible here: data.cache_dir must be the same storage on "
                "every node."
            )
        return cls(**found[1])

    def fill(self, draw: np.random.RandomState) -> NDArray[Any]:
        """The conversations of an epoch, sequence by sequence [C]: equal ones change places by chance."""
        mixed = np.lexsort((draw.random_sample(self.conversations.size), self.runs))
        return self.conversations[mixed][self.slots]


def best_fit_decreasing(sizes: NDArray[Any], capacity: int) -> list[list[int]]:
    """Bins, each the numbers of the items in it; `sizes` descend from at most `capacity` to at least 1.

    A set of free sizes as the bits of an integer finds the fullest bin with room in a few machine words.
    """
    bins: list[list[int]] = []
    with_room: dict[int, list[int]] = {}
    free_sizes = 0
    for item, size in enumerate(sizes.tolist()):
        fitting = free_sizes >> size
        if fitting:
            free = size + (fitting & -fitting).bit_length() - 1
            number = with_room[free].pop()
            if not with_room[free]:
                free_sizes ^= 1 << free
        else:
            free, number = capacity, len(bins)
            bins.append([])
        bins[number].append(item)
        left = free - size
        if left:
            with_room.setdefault(left, []).append(number)
            free_sizes |= 1 << left
    return bins


def plan_packing(
    group: ShardGroup,
    first_document: int,
    documents: int,
    sequence_tokens: int,
    long: LongConversations,
    directory: Path,
    levels: tuple[str, NDArray[Any]] | None = None,
) -> Packing:
    """Pack conversations, or find them packed in `directory`.

    `levels`: a name of what they follow from, and the level of each document [documents]; none shares a
    sequence with one of another level. Raises DataError where no conversation is left to train on.
    """
    masks = [shard.loss_mask_sha256 for shard in group.shards]
    key = [VERSION, group.sha256, masks, first_document, documents, sequence_tokens, long]
    key += [levels[0]] if levels else []
    sha256 = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
    path = directory / f"{sha256}.packs"
    if (found := load_arrays(path, check=True)) is None:
        level = levels[1] if levels else np.zeros(documents, np.int64)
        _publish_plan(path, group, first_document, level, sequence_tokens, long)
        found = load_arrays(path, check=False)
        assert found is not None
    return Packing(path, sha256, **found[0])


def _publish_plan(
    path: Path,
    group: ShardGroup,
    first_document: int,
    level: NDArray[Any],
    sequence_tokens: int,
    long: LongConversations,
) -> None:
    stop = first_document + level.size
    logger.info("Packing %d conversations into sequences of %d tokens", level.size, sequence_tokens)
    positions = group.lengths(first_document, stop).astype(np.int64) - 1
    too_long = positions > sequence_tokens
    kept = (positions > 0) & (_answered_in_time(group, first_document, too_long, sequence_tokens))
    if long == "drop":
        kept &= ~too_long
    numbers = np.flatnonzero(kept)
    if not numbers.size:
        raise DataError(
            f"{group.shards[0].prefix}: none of {level.size:,} conversations has an answer within a sequence "
            f"of {sequence_tokens:,} tokens: use a longer training.seq_length, more data or a larger share."
        )
    positions = np.minimum(positions, sequence_tokens)
    numbers = numbers[np.lexsort((numbers, -positions[numbers], level[numbers]))]
    sizes, levels = positions[numbers], level[numbers]
    changes = (np.diff(sizes) != 0) | (np.diff(levels) != 0)
    packs: list[list[int]] = []
    level_starts = [0]
    for value in range(int(level.max(initial=0)) + 1):
        first, last = np.searchsorted(levels, [value, value + 1]).tolist()
        packs += [
            [first + item for item in pack]
            for pack in best_fit_decreasing(sizes[first:last], sequence_tokens)
        ]
        level_starts.append(len(packs))
    arrays = {
        "conversations": numbers + first_document,
        "runs": np.concatenate(([0], np.cumsum(changes))),
        "slots": np.array([item for pack in packs for item in pack], np.int64),
        "starts": np.cumsum([0, *map(len, packs)]),
        "level_starts": np.array(level_starts),
    }
    facts = {
        "sequences": len(packs),
        "conversations": int(numbers.size),
        "positions": int(sizes.sum()),
        "cut": int((kept & too_long).sum()),
        "dropped": int(level.size - numbers.size),
    }

    def fill(into: Arrays) -> None:
        for name, array in arrays.items():
            into[name][:] = array

    publish_arrays(path, facts, {name: (np.dtype(np.int64), a.shape) for name, a in arrays.items()}, fill)


def _answered_in_time(
    group: ShardGroup, first_document: int, too_long: NDArray[np.bool_], sequence_tokens: int
) -> NDArray[np.bool_]:
    """Whether a token counts within what is left of each conversation [documents] when it is cut."""
    answered = np.ones(too_long.size, dtype=bool)
    for number in np.flatnonzero(too_long).tolist():
        answered[number] = group.loss_mask(first_document + number, 1, sequence_tokens).any()
    return answered
