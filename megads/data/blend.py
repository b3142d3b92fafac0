"""The samples of a run: weighted blends of sources, read through Megatron-Core's datasets.

Samples of text are packed: documents one after the other, cut every `seq_length` tokens, one token shared
with the next for the labels, nothing padded; conversations are kept whole (see `packing`). Sample n of
training is a pure function of the data, the seed and the weights: `mix` says which source it comes from,
`epochs` which piece of that source it is. Neither depends on the length of the run (but for sources held
back by `max_epochs`), on ranks or on workers.

What Megatron-Core 0.19.2's own builder does that is not so here:
- It makes a dataset of every file, so that start-up and the index grow with the number of files.
- Epochs are shuffled together, so that the order of samples depends on how many are asked for.
- A split without tokens is an endless loop in `GPTDataset._get_num_epochs`; one shorter than a sequence
  repeats its documents inside it. Both are refused here.
- Its index cache is keyed by path and settings but not by content, and written in place.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from megads.config.schema import Config
from megads.data.fim import find_tokens
from megads.data.index_cache import index_directory
from megads.data.manifest import read_record
from megads.data.mix_table import mix_table, repetition_warnings
from megads.data.samples import PackedSamples
from megads.data.shard_group import ShardGroup
from megads.data.sources import Blend, Corpus, SampleCounts, build_index, plan_corpus
from megads.data.tokenizer import load_tokenizer
from megads.errors import MegadsError

if TYPE_CHECKING:
    from megads.config.resolve import Resolved

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Datasets:
    """The samples of a run, each set as long as was asked for, and what they come from."""

    train: PackedSamples
    valid: PackedSamples | None
    test: PackedSamples | None
    valid_by_source: dict[str, PackedSamples]
    corpus: Corpus
    table: str
    """What training will read, for people: see `mix_table`."""
    fim_begin_id: int | None
    """The token that begins a document rearranged for fill-in-the-middle, where the data has such."""

    @property
    def source_names(self) -> tuple[str, ...]:
        """Names by the `source` of a training sample."""
        return tuple(part.name for part in self.corpus.blends["train"].parts)

    @property
    def tokenizer_sha256(self) -> str | None:
        return self.corpus.tokenizer_sha256

    def fingerprint(self, consumed_samples: int) -> str:
        """Changes with anything that changes the samples of training up to there, or their order."""
        return self.corpus.fingerprint(consumed_samples)

    def sampled(self, consumed_samples: int) -> dict[str, int]:
        """Training sequences of each source among the first `consumed_samples`: exact, nothing is counted."""
        return self.corpus.blends["train"].sampled(consumed_samples)


def build_datasets(config: Config, resolved: "Resolved", samples: SampleCounts) -> Datasets:
    """Check all datasets of the run and build its samples; collective where torch.distributed is on.

    Rank 0 does the checking and writes the index (`data.cache_dir`/index), which all nodes must see;
    every rank raises the error that rank 0 found. More samples than a source has in one epoch repeat it.
    Raises DataError for missing, damaged or unfitting datasets and for a split too small for one
    sequence, ConfigError for a blend that cannot be.
    """
    assert samples.train > 0
    assert resolved.world_size == 1 or torch.distributed.is_initialized(), (
        "build datasets after the process group: the other ranks read the index that rank 0 writes"
    )
    corpus, fim_begin_id = _on_rank_0(lambda: _plan_and_build(config, samples))

    def packed(blend: Blend) -> PackedSamples:
        return _packed(config, corpus, blend, resolved.shape.mtp_depth)

    sets = {name: packed(blend) for name, blend in corpus.blends.items()}
    by_source = {name: packed(blend) for name, blend in corpus.valid_by_source.items()}
    table = mix_table(config, corpus)
    return Datasets(
        sets["train"], sets.get("valid"), sets.get("test"), by_source, corpus, table, fim_begin_id
    )


def _plan_and_build(config: Config, samples: SampleCounts) -> tuple[Corpus, int | None]:
    corpus = plan_corpus(config, samples)
    for warning in repetition_warnings(config, corpus):
        logger.warning(warning)
    build_index(corpus)
    return corpus, _fim_begin_id(config, corpus)


def _fim_begin_id(config: Config, corpus: Corpus) -> int | None:
    """By the tokenizer, if the first dataset of any source has such documents: a source has one recipe."""
    groups = [ShardGroup.load(part.group_file) for part in corpus.blends["train"].parts]
    records = [read_record(group.shards[0].prefix) for group in groups]
    if not config.data.tokenizer_path or not any(
        record and record.get("fim", {}).get("documents") for record in records
    ):
        return None
    return find_tokens(load_tokenizer(config.data.tokenizer_path), None)[0]


def _packed(config: Config, corpus: Corpus, blend: Blend, mtp_depth: int) -> PackedSamples:
    # Imports Megatron-Core's datasets, which a process that only plans has no need of.
    from megads.data.source_stream import BlendedStream

    return PackedSamples(
        BlendedStream(blend, index_directory(corpus.cache_dir), corpus.eod_id, mtp_depth),
        blend.samples,
        vocab_size=config.model.vocab_size,
        eod_id=corpus.eod_id,
        reset_position_ids=config.data.reset_position_ids,
        document_mask=config.data.document_mask,
        eod_mask_loss=config.data.eod_mask_loss,
    )


def _on_rank_0[T](work: Callable[[], T]) -> T:
    """The result of `work`, done by rank 0 alone; its error is raised on every rank."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return work()
    outcome: list[tuple[str, object]] = [("", None)]
    if torch.distributed.get_rank() == 0:
        try:
            outcome = [("result", work())]
        except MegadsError as error:
            outcome = [("error", error)]
        except BaseException:
            # A bug, or an interrupt: let the others go before it is raised here with its traceback.
            torch.distributed.broadcast_object_list([("failed", None)], src=0)
            raise
    torch.distributed.broadcast_object_list(outcome, src=0)
    kind, value = outcome[0]
    if kind == "error":
        assert isinstance(value, MegadsError)
        raise value
    if kind == "failed":
        raise RuntimeError("rank 0 failed while it prepared the data; its traceback says why")
    return value  # type: ignore[return-value]
