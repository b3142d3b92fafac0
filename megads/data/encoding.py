"""Texts of documents to token ids: tokenizer, fill-in-the-middle, token splitting, end of document."""

import ctypes
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megads.data.fim import FillInTheMiddle, Mode, check_pieces_join
from megads.data.indexed import token_type
from megads.data.recipe import Recipe
from megads.data.selection import Document
from megads.data.token_splitting import RandomTokenSplitter
from megads.data.tokenizer import load_tokenizer

# malloc.h of glibc. By default each large block that is freed raises the size from which blocks are mapped
# by themselves, so that those of a long document stay with the process; fixed, they go back.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
MAPPED_BLOCK_BYTES, TRIMMED_BYTES = 4 << 20, 16 << 20


@dataclass(frozen=True, slots=True)
class Encoded:
    """Documents, end-of-document tokens included: all tokens, and each one's length.

    Of conversations, which have no such token of ours, `loss_mask` is 1 for each token of an answer.
    """

    tokens: NDArray[Any]
    lengths: NDArray[np.int32]
    fim_documents: int = 0
    spm_documents: int = 0
    loss_mask: NDArray[np.uint8] | None = None


class Encoder:
    """Makes token ids of documents as a recipe says; it takes a second to load, and forks share it.

    Raises DataError for a tokenizer that is not there or cannot do what the recipe asks.
    """

    def __init__(self, recipe: Recipe) -> None:
        _settle_process()
        self.recipe = recipe
        self.tokenizer = load_tokenizer(recipe.tokenizer, eod_token=recipe.eod_token)
        self.tokenizer.use_exact_engine(())  # loads it now, so that a fork need not
        self.settings = recipe.settings(self.tokenizer.sha256)
        self.dtype = token_type(self.tokenizer.vocab_size)
        self._fim = self._splitter = None
        if recipe.chat is not None:
            check_pieces_join(self.tokenizer, "A chat template")
        if recipe.fim_rate > 0:
            self._fim = FillInTheMiddle(recipe.fim_rate, recipe.fim_spm_rate, recipe.fim_seed, self.tokenizer)
        if recipe.split_punctuation_rate > 0:
            self._splitter = RandomTokenSplitter(
                self.tokenizer, recipe.split_punctuation_rate, recipe.split_punctuation_seed
            )

    def encode(self, documents: Sequence[Document]) -> Encoded:
        """The token ids of documents, in one call of the tokenizer."""
        if self.recipe.chat is not None:
            return self._conversations(documents)
        modes: list[Mode | None] = []
        if self._fim is None:
            ids, lengths = self.tokenizer.encode_batch_arrays([document.text for document in documents])
        else:
            ids, lengths, modes = self._rearranged(self._fim, documents)
        if self._splitter is not None:
            keys = [document.key for document in documents]
            ids, lengths = self._splitter.apply(ids, lengths, keys)
        rearranged = len(modes) - modes.count(None)
        return Encoded(*self._with_ends(ids, lengths), rearranged, modes.count("spm"))

    def _conversations(self, documents: Sequence[Document]) -> Encoded:
        """Each stretch of text by itself, between control tokens and up to where an answer begins: what a
        model is given when it is to answer ends there too.
        """
        pieces = [piece for document in documents for piece in document.pieces]
        texts = [piece.text for piece in pieces if piece.control_id is None]
        ids, lengths = self.tokenizer.encode_batch_arrays(texts)
        encoded = iter(np.split(ids, np.cumsum(lengths, dtype=np.int64)[:-1]))
        parts = [
            next(encoded) if piece.control_id is None else np.array([piece.control_id], self.dtype)
            for piece in pieces
        ]
        sizes = np.array([part.size for part in parts], np.int64)
        counts = np.array([len(document.pieces) for document in documents])
        firsts = np.cumsum(counts) - counts
        return Encoded(
            np.concatenate(parts).astype(self.dtype, copy=False),
            np.add.reduceat(sizes, firsts).astype(np.int32),
            loss_mask=np.repeat(np.array([piece.answer for piece in pieces], np.uint8), sizes),
        )

    def _rearranged(
        self, fim: FillInTheMiddle, documents: Sequence[Document]
    ) -> tuple[NDArray[Any], NDArray[np.int32], list[Mode | None]]:
        """Ids and length of each document, some of them rearranged, and in which mode."""
        cuts = [fim.split(document.text, document.key) for document in documents]
        texts: list[str] = []
        for document, pieces in zip(documents, cuts, strict=True):
            texts += [document.text] if pieces is None else pieces[:3]
        ids, lengths = self.tokenizer.encode_batch_arrays(texts)
        parts = iter(np.split(ids, np.cumsum(lengths, dtype=np.int64)[:-1]))
        joined = [
            next(parts) if pieces is None else fim.join(next(parts), next(parts), next(parts), pieces.mode)
            for pieces in cuts
        ]
        modes = [None if pieces is None else pieces.mode for pieces in cuts]
        return np.concatenate(joined), np.array([part.size for part in joined], np.int32), modes

    def _with_ends(
        self, ids: NDArray[Any], lengths: NDArray[np.int32]
    ) -> tuple[NDArray[Any], NDArray[np.int32]]:
        """Add the end-of-document token to each of the documents that `ids` holds one after the other."""
        tokens = np.empty(ids.size + lengths.size, self.dtype)
        start = 0
        for number, length in enumerate(lengths.tolist()):
            end = start + length
            tokens[start + number : end + number] = ids[start:end]
            tokens[end + number] = self.tokenizer.eod_id
            start = end
        return tokens, lengths + np.int32(1)


def _settle_process() -> None:
    """One core and bounded memory for this process, before the tokenizer libraries are first used."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["RAYON_NUM_THREADS"] = "1"
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(M_MMAP_THRESHOLD, MAPPED_BLOCK_BYTES)
        mallopt(M_TRIM_THRESHOLD, TRIMMED_BYTES)
