"""Training samples: fixed-length sequences cut from the packed documents, with masks and positions."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import Dataset

from megads.errors import DataError

if TYPE_CHECKING:
    from megads.data.source_stream import BlendedStream


class PackedSamples(Dataset[dict[str, Tensor]]):
    """The first `length` sequences of a blend, completed to what the model takes.

    A sample, S = `seq_length`:
      tokens [S] int64, labels [S] int64 (the next token of each), loss_mask [S] float32 (1: counts),
      position_ids [S] int64, source [] int64 (the part of the blend that it is from), and with
      `document_mask` document_ids [S] int32: a token may attend to those of equal id only. Ids start at
      0 in every sample. An end-of-document token belongs to the document that it ends.

    Samples of conversations come complete from `ConversationStream`, and always have document_ids.

    Megatron-Core's own masks are left alone: it loops over documents in Python, caches one loss mask
    and edits that cache in place for the first sample it serves, and ties position resets to document
    masking in `inter_document_masking`.
    """

    def __init__(
        self,
        stream: "BlendedStream",
        length: int,
        *,
        vocab_size: int,
        eod_id: int | None,
        reset_position_ids: bool,
        document_mask: bool,
        eod_mask_loss: bool,
    ) -> None:
        assert eod_id is not None or not (reset_position_ids or document_mask or eod_mask_loss)
        self.stream = stream
        self._length = length
        self._vocab_size = vocab_size
        self._eod_id = eod_id
        self._reset_position_ids = reset_position_ids
        self._document_mask = document_mask
        self._eod_mask_loss = eod_mask_loss

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self._length:
            raise IndexError(f"sample {index} of {self._length}")
        packed = self.stream[index]
        tokens, labels = packed["tokens"], packed["labels"]
        self._check_ids(index, tokens, labels)
        if "document_ids" in packed:  # conversations, complete as they are
            return packed
        positions = torch.arange(tokens.numel())
        sample = {
            "tokens": tokens,
            "labels": labels,
            "loss_mask": torch.ones(tokens.numel()),
            "position_ids": positions,
            "source": packed["source"],
        }
        if self._eod_mask_loss:
            # As in Megatron: what follows an end of document cannot be foreseen, so that position is
            # not counted; the end itself is a token to learn like any other.
            sample["loss_mask"][tokens == self._eod_id] = 0.0
        if self._reset_position_ids or self._document_mask:
            first = torch.zeros(tokens.numel(), dtype=torch.bool)
            first[1:] = tokens[:-1] == self._eod_id
            if self._reset_position_ids:
                sample["position_ids"] = positions - torch.where(first, positions, 0).cummax(0).values
            if self._document_mask:
                sample["document_ids"] = first.cumsum(0, dtype=torch.int32)
        return sample

    def _check_ids(self, index: int, tokens: Tensor, labels: Tensor) -> None:
        """An id beyond the vocabulary would read past the embedding table, on CUDA without a word."""
        lowest = min(int(tokens.min()), int(labels.min()))
        highest = max(int(tokens.max()), int(labels.max()))
        if lowest < 0 or highest >= self._vocab_size:
            source, number = self.stream.locate(index)
            read = ", ".join(sorted({f"{prefix}.bin" for prefix, *_ in source.documents(number)}))
            raise DataError(
                f"Sample {index} holds token id {highest if lowest >= 0 else lowest}, the vocabulary has "
                f"{self._vocab_size:,}: damaged, or made with another tokenizer. It was read from {read}."
            )
