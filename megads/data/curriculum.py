"""Easy before hard: documents of a source in the order of a score of theirs (Bengio et al., ICML 2009).

Preprocessing keeps a score of each document (`--score-field`). A source's documents are divided by score into
levels of equal numbers of documents; an epoch goes through them level by level, in random order within each.
"""

import hashlib
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from megads.data.indexed import SCORES, sidecar_file
from megads.data.manifest import read_record
from megads.data.shard_group import ShardGroup
from megads.errors import DataError


@dataclass(frozen=True)
class ScoreOrder:
    """In the first `epochs` epochs of a source documents come by `levels` of their score."""

    order: Literal["ascending", "descending"]
    levels: int
    epochs: int
    scores_sha256: str

    @property
    def key(self) -> str:
        """Names the levels of the documents."""
        return f"{self.order} {self.levels} {self.scores_sha256}"


def missing_scores(group: ShardGroup) -> str | None:
    """The first dataset of a source that has no scores, as the path where they would be."""
    paths = (sidecar_file(shard.prefix, SCORES) for shard in group.shards)
    return next((str(path) for path in paths if not path.is_file()), None)


def scores_sha256(group: ShardGroup) -> str:
    """Names the scores of a source, by its records where they have them. DataError where they do not fit."""
    digest = hashlib.sha256()
    for shard in group.shards:
        path = sidecar_file(shard.prefix, SCORES)
        recorded = (read_record(shard.prefix) or {}).get("scores")
        if recorded is None:
            with open(path, "rb") as file:
                recorded = {"sha256": hashlib.file_digest(file, "sha256").hexdigest()}
        elif path.stat().st_size != recorded["bytes"]:
            raise DataError(
                f"{path}: {path.stat().st_size:,} bytes, its dataset was made with {recorded['bytes']:,}. "
                "Copy it again, or make the dataset again."
            )
        digest.update(recorded["sha256"].encode())
    return digest.hexdigest()


def document_levels(
    group: ShardGroup, first_document: int, documents: int, order: ScoreOrder
) -> NDArray[np.int64]:
    """The level, from 0, of each document [documents]: as many in each, those of equal score by number.

    Raises DataError for scores that are no numbers, or not as many as documents.
    """
    scores = np.concatenate([_scores_of(shard.prefix, shard.documents) for shard in group.shards])
    part = scores[first_document : first_document + documents]
    ranks = np.empty(documents, np.int64)
    ranks[np.argsort(part if order.order == "ascending" else -part, kind="stable")] = np.arange(documents)
    return ranks * order.levels // max(1, documents)


def _scores_of(prefix: str, documents: int) -> NDArray[Any]:
    path = sidecar_file(prefix, SCORES)
    try:
        scores = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: the scores of data.curriculum cannot be read: {error}.") from error
    if scores.shape != (documents,) or not np.issubdtype(scores.dtype, np.floating):
        raise DataError(
            f"{path}: {scores.shape} {scores.dtype}, not a score for each of {documents:,} documents."
        )
    if (wrong := np.flatnonzero(np.isnan(scores))).size:
        raise DataError(
            f"{path}: {wrong.size:,} scores are not numbers (NaN), the first is of document {wrong[0]:,}. "
            "Score the documents again, or train without data.curriculum."
        )
    return scores
