"""Samples of instruction data: whole conversations side by side, each as if it were alone."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megads.data.epochs import EpochIndex, SourcePart
from megads.data.shard_group import ShardGroup


class ConversationStream:
    """All samples of a source of conversations: epoch after epoch, without an end.

    A sample, S = the part's `sequence_tokens`: tokens, labels and position_ids [S] int64, document_ids [S]
    int32, loss_mask [S] float32. Every conversation has a document id and positions of its own; what follows
    the last one is padding, with those of one more. Labels stay within a conversation. The mask is 1 where
    the label is part of an answer, but not at the first `mtp_depth` positions of a conversation: what is
    predicted k tokens further ahead counts where the mask k positions on does, and must not count across a
    border.
    """

    def __init__(self, part: SourcePart, directory: Path, padding_id: int, mtp_depth: int) -> None:
        self.part = part
        self._group = ShardGroup.load(part.group_file)
        self._index = EpochIndex(part, directory)
        self._padding_id = padding_id
        self._mtp_depth = mtp_depth

    def __getitem__(self, sample: int) -> dict[str, Tensor]:
        length = self.part.sequence_tokens
        tokens, labels = np.full((2, length), self._padding_id, dtype=np.int64)
        loss_mask = np.zeros(length, dtype=np.float32)
        positions, document_ids = np.empty(length, dtype=np.int64), np.empty(length, dtype=np.int32)
        begin = number = 0
        for number, document in enumerate(self._conversations(sample), 1):
            ids, mask = self._group.get(*document), self._group.loss_mask(*document)
            end = begin + ids.size - 1
            tokens[begin:end], labels[begin:end] = ids[:-1], ids[1:]
            loss_mask[begin + self._mtp_depth : end] = mask[1 + self._mtp_depth :]
            positions[begin:end], document_ids[begin:end] = np.arange(end - begin), number - 1
            begin = end
        positions[begin:], document_ids[begin:] = np.arange(length - begin), number
        arrays: dict[str, Any] = {
            "tokens": tokens,
            "labels": labels,
            "loss_mask": loss_mask,
            "position_ids": positions,
            "document_ids": document_ids,
        }
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def documents(self, sample: int) -> list[tuple[str, int, int, int]]:
        """What a sample is made of: (prefix, document of that dataset, first token, tokens) of each piece."""
        pieces = []
        for document, first, count in self._conversations(sample):
            shard, number_there = self._group.shard_of(document)
            pieces.append((shard.prefix, number_there, first, count))
        return pieces

    def _conversations(self, sample: int) -> list[tuple[int, int, int]]:
        """(document, first token, tokens) of each conversation; one that is too long lacks its end."""
        number, position = divmod(sample, self.part.samples_per_epoch)
        order, boundaries, shuffle = self._index.epoch(number)
        first, last = boundaries[shuffle[position] : shuffle[position] + 2, 0]
        longest = self.part.sequence_tokens + 1
        return [
            (document, 0, min(longest, self._group.tokens(document, document + 1)))
            for document in order[first:last].tolist()
        ]
