"""Near duplicates: MinHash signatures (Broder, 1997), banded (LSH) as in arXiv:2107.06499, section 4.2.

A document is the set of its runs of `shingle_words` words (case and punctuation ignored). Of each of
K = bands x rows random orders of all shingles its signature holds the first one; two signatures agree
at a place with the probability of the sets' Jaccard similarity J. Documents that agree in all rows of
any band are candidates: with probability 1 - (1 - J^rows)^bands. The default, 14 bands of 8 rows as in
FineWeb (arXiv:2406.17557), gives 0.06 at J = 0.5, 0.56 at 0.7, 0.92 at 0.8, 0.999 at 0.9. Candidates are
kept as pairs only if their whole signatures agree in at least `threshold` of the places, an estimate of
J with a standard deviation of sqrt(J (1 - J) / K), 0.04 here: this is what sharpens the curve. Pairs
are joined to clusters, and the first document of each stays.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from megads.data.cleaning.words import Words, mix, ngram_hashes

BLOCK_SHINGLES = 512  # x 112 hashes x 4 bytes: stays in the second-level cache
NO_SHINGLE = np.uint32(0xFFFFFFFF)


@dataclass(frozen=True)
class NearSettings:
    """What counts as a near duplicate."""

    bands: int = 14
    rows: int = 8
    shingle_words: int = 5
    threshold: float = 0.7
    """Least estimated Jaccard similarity of a pair; 0 takes every candidate."""
    seed: int = 0

    @property
    def hashes(self) -> int:
        return self.bands * self.rows


def candidate_probability(similarity: float, settings: NearSettings) -> float:
    """How likely two documents of this Jaccard similarity share a band."""
    return 1.0 - (1.0 - similarity**settings.rows) ** settings.bands


def signatures(words: Sequence[Words], settings: NearSettings) -> NDArray[np.uint32]:
    """MinHash signature of each document [documents, hashes]; all NO_SHINGLE where there is no word.

    A document of fewer words than a shingle has one shingle of all its words.
    """
    result = np.full((len(words), settings.hashes), NO_SHINGLE, np.uint32)
    multipliers = _multipliers(settings.seed, settings.hashes)
    block = np.empty((settings.hashes, BLOCK_SHINGLES), np.uint32)
    for signature, document in zip(result, words, strict=True):
        if not len(document):
            continue
        shingles = ngram_hashes(document.hashes, min(settings.shingle_words, len(document)))
        short = (shingles >> np.uint64(32)).astype(np.uint32)
        for start in range(0, short.size, BLOCK_SHINGLES):
            some = short[start : start + BLOCK_SHINGLES]
            # Multiplication by an odd number permutes the 32-bit numbers; the hashes are mixed already.
            ordered = np.multiply(some, multipliers, out=block[:, : some.size])
            np.minimum(signature, ordered.min(axis=1), out=signature)
    return result


def band_keys(signatures_DK: NDArray[np.uint32], settings: NearSettings) -> NDArray[np.uint64]:
    """A 128-bit key for each band of each signature [documents, bands, 2]."""
    documents = signatures_DK.shape[0]
    bands = signatures_DK.reshape(documents, settings.bands, settings.rows).astype(np.uint64)
    keys = np.empty((documents, settings.bands, 2), np.uint64)
    for half in range(2):
        rng = np.random.default_rng((settings.seed, 1, half))
        factors = rng.integers(0, 1 << 63, (settings.bands, settings.rows), np.uint64) * np.uint64(
            2
        ) + np.uint64(1)
        offsets = rng.integers(0, 1 << 63, settings.bands, np.uint64)
        keys[:, :, half] = mix((mix(bands) * factors).sum(axis=2, dtype=np.uint64) + offsets)
    return keys


def similarity(first_DK: NDArray[np.uint32], second_DK: NDArray[np.uint32]) -> NDArray[np.float64]:
    """Estimated Jaccard similarity of pairs of signatures [pairs]."""
    return (first_DK == second_DK).mean(axis=1, dtype=np.float64)


def first_of_clusters(pairs_E2: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Documents that are not the first of their cluster, ascending, and the first of each one's cluster.

    `pairs_E2` joins documents by number. Connected components by the least number, with pointer
    jumping as in Shiloach and Vishkin, 1982; memory is 50 bytes per pair, time a few passes.
    """
    nodes, edges = np.unique(pairs_E2, return_inverse=True)
    edges = edges.reshape(-1, 2)
    root = np.arange(nodes.size)
    while True:
        first, second = root[edges[:, 0]], root[edges[:, 1]]
        least = np.minimum(first, second)
        before = root.copy()
        np.minimum.at(root, first, least)
        np.minimum.at(root, second, least)
        while not np.array_equal(higher := root[root], root):
            root = higher
        if np.array_equal(root, before):
            break
    later = root != np.arange(nodes.size)
    return nodes[later], nodes[root[later]]


@cache
def _multipliers(seed: int, count: int) -> NDArray[np.uint32]:
    """Odd factors, one for each order of the shingles [count, 1]."""
    rng = np.random.default_rng((seed, 0))
    return (rng.integers(0, 1 << 31, (count, 1), np.uint32) << np.uint32(1)) | np.uint32(1)
