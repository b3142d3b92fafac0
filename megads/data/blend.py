"""The weighted blend of sources, through Megatron-Core's blended datasets.

Weights are normalized after w^tau (`data.mixing_temperature`), as for multilingual data in
arXiv:1911.02116; a source of several prefixes spreads its weight over them by tokens. Every split is
a blend of its own: the same weights over sources, the documents of that split. Samples are packed:
documents one after the other, cut every `seq_length` tokens, one token shared with the next for the
labels, nothing padded.

What Megatron-Core 0.19.2 does that is minded here:
- A split without tokens is an endless loop in `GPTDataset._get_num_epochs`; one shorter than a
  sequence repeats its documents inside it. Both are refused beforehand.
- The first and last documents of a file make up the splits, in order; nothing is shuffled across.
- The order of samples depends on how many are asked for (epochs are shuffled together unless the last
  one is used for less than 80%), so a run must ask for its whole length from its first start on.
- Mid-level datasets get `mid_level_dataset_surplus` (0.5%) more samples than their share, which is
  too little for many prefixes and raises IndexError; the surplus here follows from the counts.
- The index cache is keyed by path and settings but not by content, and its files are written in place
  (see `index_cache`).
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from megads.config.schema import Config
from megads.data.index_cache import IndexCache
from megads.data.samples import PackedSamples
from megads.data.sources import Blend, Corpus, SourceInfo, plan_corpus
from megads.errors import DataError, MegadsError

if TYPE_CHECKING:
    from megads.config.resolve import Resolved

logger = logging.getLogger(__name__)

SPLITS = ("train", "valid", "test")
# Repeating data helps up to about 4 epochs: arXiv:2305.16264.
USEFUL_EPOCHS = 4


@dataclass(frozen=True)
class SampleCounts:
    """Sequences wanted of each split over the whole run; 0: the split is not built."""

    train: int
    valid: int = 0
    test: int = 0
    valid_per_source: int = 0
    """Sequences of each source's own validation set."""


@dataclass(frozen=True)
class Datasets:
    """The samples of a run, each set as long as was asked for, and what they come from."""

    train: PackedSamples
    valid: PackedSamples | None
    test: PackedSamples | None
    valid_by_source: dict[str, PackedSamples]
    sources: tuple[SourceInfo, ...]
    eod_id: int | None
    tokenizer_sha256: str | None
    fingerprint: str
    """Changes with anything that changes the samples or their order."""


def build_datasets(config: Config, resolved: "Resolved", samples: SampleCounts) -> Datasets:
    """Check all datasets of the run and build its samples; collective where torch.distributed is on.

    Rank 0 does the checking and writes the index cache (`data.cache_dir`/index), which all nodes must
    see; every rank raises the error that rank 0 found. More samples than a source has in one epoch
    repeat it. Raises DataError for missing, damaged or unfitting datasets and for a split too small
    for one sequence, ConfigError for a blend that cannot be.
    """
    assert resolved.world_size == 1 or torch.distributed.is_initialized(), (
        "build datasets after the process group: the other ranks read the index that rank 0 writes"
    )
    counts = {"train": samples.train, "valid": samples.valid, "test": samples.test}
    corpus = _on_rank_0(lambda: plan_corpus(config, counts, samples.valid_per_source))
    _warn_of_repetition(corpus)
    cache = _on_rank_0(lambda: IndexCache.open(config, corpus.fingerprint))
    try:
        sets = {name: _build_split(config, corpus, corpus.blends.get(name), cache) for name in SPLITS}
        by_source = {
            name: _build_split(config, corpus, blend, cache) for name, blend in corpus.valid_by_source.items()
        }
    except OSError as error:
        cache.discard()
        raise DataError(
            f"{cache.directory}: the index of samples cannot be written or read: {error}. "
            "data.cache_dir must be writable, and the same storage on every node."
        ) from error
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    _on_rank_0(cache.complete)
    train = sets["train"]
    assert train is not None
    return Datasets(
        train,
        sets["valid"],
        sets["test"],
        {k: v for k, v in by_source.items() if v is not None},
        corpus.sources,
        corpus.eod_id,
        corpus.tokenizer_sha256,
        corpus.fingerprint,
    )


def _build_split(
    config: Config, corpus: Corpus, blend: Blend | None, cache: IndexCache
) -> PackedSamples | None:
    """One blend of one split; every rank builds it, rank 0 first."""
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    if blend is None:
        return None
    # A single prefix given a weight would be wrapped in a blend of one, with a warning.
    weights = list(blend.weights) if len(blend.prefixes) > 1 else None
    settings = GPTDatasetConfig(
        random_seed=corpus.seed,
        sequence_length=config.training.seq_length,
        blend=(list(blend.prefixes), weights),
        split=config.data.split,
        path_to_cache=str(cache.directory),
        tokenizer=_TokenIds(corpus.eod_id, corpus.tokenizer_sha256),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        mid_level_dataset_surplus=_surplus(blend),
    )
    # The other splits are left out: building them would read, or loop over, what nobody asked for.
    settings.split_matrix = [
        bounds if split == blend.split else None
        for split, bounds in zip(SPLITS, settings.split_matrix, strict=True)
    ]
    sizes = [blend.samples if split == blend.split else 0 for split in SPLITS]
    built = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, settings).build()
    return PackedSamples(
        built[SPLITS.index(blend.split)],
        blend.samples,
        vocab_size=config.model.vocab_size,
        eod_id=corpus.eod_id,
        reset_position_ids=config.data.reset_position_ids,
        document_mask=config.data.document_mask,
        eod_mask_loss=config.data.eod_mask_loss,
    )


def _surplus(blend: Blend) -> float:
    """The share of extra samples that Megatron-Core must build of each prefix so that none runs out.

    A blend of N samples over K prefixes is ceil'd to at most N + K, and takes of each prefix at most
    w (N + K) + 1 (it always takes of the one that lags most); Megatron-Core builds
    ceil(ceil(N w) (1 + surplus)).
    """
    total = blend.samples + len(blend.prefixes)
    return max(
        0.005,
        *((weight * total + 0.5) / max(1.0, blend.samples * weight) - 1 for weight in blend.weights),
    )


@dataclass(frozen=True)
class _TokenIds:
    """What Megatron-Core's datasets ask of a tokenizer: no padding, and a name for the cache key."""

    eod: int | None
    sha256: str | None
    pad: int = -1
    vocab_size: int | None = None

    @property
    def unique_identifiers(self) -> dict[str, str | int | None]:
        return {"class": "megads", "sha256": self.sha256, "eod": self.eod}


def _warn_of_repetition(corpus: Corpus) -> None:
    for source in corpus.sources:
        if source.train_epochs > USEFUL_EPOCHS:
            logger.warning(
                "Source %s is read %.1f times over: beyond about %d epochs repetition adds little "
                "(arXiv:2305.16264). Give it less weight or more data.",
                source.name,
                source.train_epochs,
                USEFUL_EPOCHS,
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
