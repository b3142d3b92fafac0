"""What the batches of a run hold, counted on the device beside the loss, where the tokens are already.

Shapes: B sequences, S tokens of each (a context-parallel rank's part), N sources, C columns.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Contents:
    """What there is to tell apart: sources by their number in a batch's `source`, and control tokens.

    An id that is None is not counted. Without `eod_id` nobody knows where documents end.
    """

    sources: tuple[str, ...] = ()
    eod_id: int | None = None
    fim_begin_id: int | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """A name per column of `count`; what it names is total / weight.

        `loss/SOURCE` in nats per token, `tokens_per_document`, and `fim_rate`, the share of documents that
        were rearranged for fill-in-the-middle.
        """
        losses = tuple(f"loss/{source}" for source in self.sources)
        documents = () if self.eod_id is None else ("tokens_per_document",)
        fim = () if self.eod_id is None or self.fim_begin_id is None else ("fim_rate",)
        return losses + documents + fim

    @torch.no_grad()
    def count(self, batch: Mapping[str, Tensor], losses_BS: Tensor, loss_mask_BS: Tensor) -> Tensor:
        """Totals and weights [2, C] of this rank's part of a micro-batch.

        `batch` has tokens [B, S] and source [B]; `losses_BS` are 0 where `loss_mask_BS` is. A column is
        a sum, so those of micro-batches and of ranks that hold different tokens can be added.
        """
        tokens_BS = batch["tokens"]
        columns = []
        if self.sources:
            of_sequences_2B = torch.stack((losses_BS.sum(-1), loss_mask_BS.sum(-1))).double()
            by_source_2N = of_sequences_2B.new_zeros(2, len(self.sources))
            columns.append(by_source_2N.index_add_(1, batch["source"], of_sequences_2B))
        if self.eod_id is not None:
            ends = (tokens_BS == self.eod_id).sum().double()
            columns.append(torch.stack((torch.full_like(ends, tokens_BS.numel()), ends))[:, None])
            if self.fim_begin_id is not None:
                begins = (tokens_BS == self.fim_begin_id).sum().double()
                columns.append(torch.stack((begins, ends))[:, None])
        return torch.cat(columns, dim=1) if columns else losses_BS.new_zeros(2, 0, dtype=torch.float64)
