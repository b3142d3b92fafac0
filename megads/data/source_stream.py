"""Samples of sources and of their blend, read through Megatron-Core's `GPTDataset`.

The order is `epochs` and `mix`; what a sample holds is put together by Megatron-Core.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split
from numpy.typing import NDArray
from torch import Tensor

from megads.data.conversations import ConversationStream
from megads.data.epochs import EpochIndex, SourcePart
from megads.data.mix import Mix
from megads.data.shard_group import ShardGroup
from megads.data.sources import Blend

OPEN_EPOCHS = 2


class SourceEpoch(GPTDataset):
    """One epoch of a source: Megatron-Core's dataset on an index that is there already."""

    def __init__(
        self,
        group: ShardGroup,
        index: tuple[NDArray[Any], NDArray[Any], NDArray[Any]],
        split: str,
        config: GPTDatasetConfig,
    ) -> None:
        self._index = index
        super().__init__(group, str(group.path), np.empty(0, dtype=np.int32), None, Split[split], config)

    def _build_document_sample_shuffle_indices(self) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        return self._index


class SourceStream:
    """All samples of a source of text: epoch after epoch, without an end; as `GPTDataset` gives them.

    The index of an epoch must have been built by the time a sample of it is asked for.
    """

    def __init__(self, part: SourcePart, directory: Path, eod_id: int | None) -> None:
        self.part = part
        self._group = ShardGroup.load(part.group_file)
        self._index = EpochIndex(part, directory)
        self._config = _gpt_config(part.sequence_tokens, eod_id)
        self._epochs: dict[int, SourceEpoch] = {}

    def __getitem__(self, sample: int) -> dict[str, Tensor]:
        number, position = divmod(sample, self.part.samples_per_epoch)
        return self._epoch(number)[position]

    def documents(self, sample: int) -> list[tuple[str, int, int, int]]:
        """What a sample is made of: (prefix, document of that dataset, first token, tokens) of each piece.

        The last piece includes the token that is shared with the next sample.
        """
        number, position = divmod(sample, self.part.samples_per_epoch)
        order, boundaries, shuffle = self._index.epoch(number)
        (first, skipped), (last, end) = boundaries[shuffle[position]], boundaries[shuffle[position] + 1]
        pieces = []
        for place in range(int(first), int(last) + 1):
            document = int(order[place])
            begin = int(skipped) if place == first else 0
            stop = int(end) + 1 if place == last else self._group.tokens(document, document + 1)
            if stop > begin:
                shard, number_there = self._group.shard_of(document)
                pieces.append((shard.prefix, number_there, begin, stop - begin))
        return pieces

    def _epoch(self, number: int) -> SourceEpoch:
        if number not in self._epochs:
            while len(self._epochs) >= OPEN_EPOCHS:
                del self._epochs[min(self._epochs)]
            index = self._index.epoch(number)
            self._epochs[number] = SourceEpoch(self._group, index, self.part.split, self._config)
        return self._epochs[number]


class BlendedStream:
    """All samples of a blend, without an end: as its streams give them, and `source`, their part's number.

    `mtp_depth` is what `ConversationStream` wants to know.
    """

    def __init__(self, blend: Blend, directory: Path, eod_id: int | None, mtp_depth: int) -> None:
        self.blend = blend
        self._mix = Mix(blend.phases)
        self._streams: list[SourceStream | ConversationStream] = []
        for part in blend.parts:
            if part.packing is None:
                self._streams.append(SourceStream(part, directory, eod_id))
            else:
                assert eod_id is not None, "the records of conversations name it"
                self._streams.append(ConversationStream(part, directory, eod_id, mtp_depth))

    def locate(self, sample: int) -> "tuple[SourceStream | ConversationStream, int]":
        """The source of a sample, and the sample's number there."""
        source, number = self._mix.locate(sample)
        return self._streams[source], number

    def __getitem__(self, sample: int) -> dict[str, Tensor]:
        source, number = self._mix.locate(sample)
        return self._streams[source][number] | {"source": torch.tensor(source)}


@dataclass(frozen=True)
class _NoTokenizer:
    """What `GPTDataset` asks of a tokenizer: no padding."""

    eod: int | None
    pad: int = -1
    vocab_size: int | None = None

    @property
    def unique_identifiers(self) -> dict[str, int | None]:
        return {"eod": self.eod}


def _gpt_config(sequence_tokens: int, eod_id: int | None) -> GPTDatasetConfig:
    return GPTDatasetConfig(
        random_seed=0,  # draws nothing: the index is there already
        sequence_length=sequence_tokens,
        blend=(["unused"], None),
        split="1",
        tokenizer=_NoTokenizer(eod_id),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
