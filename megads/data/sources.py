"""From the `data` section to a plan: which files, with which weights, with how many tokens.

Everything that can be wrong with the data of a run is found here, before the first step, by one process,
without torch. Every split is a blend of its own: the same weights over sources, the documents of that
split. The first and last documents of a source make up the splits, in order, by Megatron-Core's division.
"""

import contextlib
import hashlib
import json
import logging
import re
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from megads.config.schema import Config
from megads.data.curriculum import ScoreOrder, document_levels, missing_scores, scores_sha256
from megads.data.epochs import VERSION, EpochIndex, SourcePart
from megads.data.index_cache import index_directory
from megads.data.mix import Mix, MixPhase, normalized, phases_within_caps
from megads.data.packing import Packing, plan_packing
from megads.data.shard_group import ShardGroup
from megads.data.source_files import end_of_document, open_sources
from megads.data.workers import start_helper_process
from megads.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from megads.config.resolve import Resolved

SPLIT_NAMES = {"train": "training", "valid": "validation", "test": "test"}
SPLIT_PATTERN = re.compile(r"\s*\d+(\.\d+)?\s*(,\s*\d+(\.\d+)?\s*){0,2}")


@dataclass(frozen=True)
class SampleCounts:
    """Sequences wanted of each split over the whole run; 0: the split is not built."""

    train: int
    valid: int = 0
    test: int = 0
    valid_per_source: int = 0
    """Sequences of each source's own validation set."""


def sample_counts(config: Config, resolved: "Resolved") -> SampleCounts:
    """What a run of this configuration reads. Each evaluation reads the same samples."""
    train = resolved.batch.tokens_after(resolved.train_steps) // config.training.seq_length
    if config.training.eval_interval == 0:
        return SampleCounts(train)
    valid = config.validation.eval_steps * config.training.global_batch_size
    by_source = config.validation.per_source and len(config.data.sources) > 1
    return SampleCounts(train, valid, valid_per_source=valid if by_source else 0)


@dataclass(frozen=True)
class Blend:
    """The parts of sources that one split is mixed from, in the order of the weights in `phases`."""

    split: str
    samples: int
    parts: tuple[SourcePart, ...]
    phases: tuple[MixPhase, ...]

    def sampled(self, consumed_samples: int) -> dict[str, int]:
        """Samples of each source among the first `consumed_samples`."""
        counts = Mix(self.phases).counts(consumed_samples).tolist()
        return {part.name: count for part, count in zip(self.parts, counts, strict=True)}


@dataclass(frozen=True)
class SourceInfo:
    """The size of one source of the run."""

    name: str
    files: int
    documents: int
    tokens: int


@dataclass(frozen=True)
class Corpus:
    """The checked data of a run; small, for one process to send to the others."""

    sources: tuple[SourceInfo, ...]
    blends: dict[str, Blend]
    valid_by_source: dict[str, Blend]
    eod_id: int | None
    tokenizer_sha256: str | None
    cache_dir: str

    def fingerprint(self, consumed_samples: int) -> str:
        """Names the samples of training up to a position, and their order.

        It does not change with what comes later: a longer run, or a phase that has not begun.
        """
        train = self.blends["train"]
        begun = [phase for phase in train.phases if phase.first_sample < max(1, consumed_samples)]
        parts = [
            [
                p.name,
                p.content_sha256,
                p.first_document,
                p.documents,
                p.sequence_tokens,
                p.seed,
                weights,
                *p.key,
            ]
            for p, *weights in zip(train.parts, *(phase.weights for phase in begun), strict=True)
            if any(weights)
        ]
        starts = [phase.first_sample for phase in begun]
        return hashlib.sha256(json.dumps([VERSION, parts, starts, self.eod_id]).encode()).hexdigest()[:16]


def plan_corpus(config: Config, samples: SampleCounts) -> Corpus:
    """Check every dataset and lay out the blends of the splits that `samples` asks for.

    Raises ConfigError and DataError as `blend.build_datasets` says.
    """
    names, starts, shares = training_shares(config)
    groups = open_sources(config, names)
    eod_id, sha256 = end_of_document(config, [info for group in groups.values() for info in group.shards])
    _check_conversations(config, [name for name, group in groups.items() if group.has_loss_masks])
    layout = _SplitLayout(config, groups)
    parts = tuple(layout.part(name, "train") for name in names)
    phases = phases_within_caps(names, starts, shares, samples.train, _most_samples(config, parts))
    blends = {"train": Blend("train", samples.train, parts, phases)}
    held_out = _held_out_shares(config, names, shares)
    for split, count in (("valid", samples.valid), ("test", samples.test)):
        if count > 0:
            blends[split] = _held_out(layout, split, count, held_out)
    by_source = {}
    for name in names if samples.valid_per_source > 0 else ():
        # A source that is too small for a validation set was named when the blend left it out.
        with contextlib.suppress(DataError):
            part = layout.part(name, "valid")
            by_source[name] = Blend("valid", samples.valid_per_source, (part,), (MixPhase(0, (1.0,)),))
    infos = tuple(
        SourceInfo(name, len(group.shards), len(group), group.tokens()) for name, group in groups.items()
    )
    return Corpus(infos, blends, by_source, eod_id, sha256, config.data.cache_dir)


def build_index(corpus: Corpus, workers: int = 1) -> int:
    """Make the index files that the blends of a run lack, on so many processes; returns how many."""
    directory = index_directory(corpus.cache_dir)
    epochs: dict[SourcePart, int] = {}
    for blend in [*corpus.blends.values(), *corpus.valid_by_source.values()]:
        for part, count in epochs_needed(blend):
            epochs[part] = max(count, epochs.get(part, 0))
    indexes = {part: EpochIndex(part, directory) for part in epochs}
    missing = [(part, block) for part, index in indexes.items() for block in index.missing(epochs[part])]
    if workers == 1 or len(missing) < 2:
        for part, block in missing:
            indexes[part].build_block(block)
        return len(missing)
    missing.sort(key=lambda job: -job[0].documents)  # the longest first, so that none is left to the end
    with ProcessPoolExecutor(min(workers, len(missing)), initializer=start_helper_process) as pool:
        for _ in pool.map(_build_block, *zip(*missing, strict=True), [directory] * len(missing)):
            pass
    return len(missing)


def _build_block(part: SourcePart, block: int, directory: Path) -> None:
    EpochIndex(part, directory).build_block(block)


def epochs_needed(blend: Blend) -> Iterator[tuple[SourcePart, int]]:
    """Each part that the blend takes samples of, and how many of its epochs they lie in."""
    for part, count in zip(blend.parts, blend.sampled(blend.samples).values(), strict=True):
        if count:
            yield part, -(-count // part.samples_per_epoch)


def training_shares(config: Config) -> tuple[list[str], list[int], list[dict[str, float]]]:
    """(sources, first sample of each phase, shares in each phase): weight^temperature, normalized.

    A phase begins with the first sample whose first token is not before `from_tokens`. Sources that no
    phase reads are left out.
    """
    data, tokens = config.data, config.training.seq_length
    if len({source.name for source in data.sources}) < len(data.sources):
        raise ConfigError("data.sources: two sources have the same name; give each its own.")
    weights = [phase.weights for phase in data.phases]
    weights = weights or [{source.name: source.weight for source in data.sources}]
    shares = [normalized(phase, data.mixing_temperature) for phase in weights]
    if not all(shares):
        raise ConfigError("data.sources has no source with a weight above 0: there is nothing to train on.")
    starts = [-(-phase.from_tokens // tokens) for phase in data.phases] or [0]
    names = [source.name for source in data.sources if any(source.name in share for share in shares)]
    return names, starts, shares


def _check_conversations(config: Config, names: list[str]) -> None:
    """Conversations share sequences, so they must be kept apart, and nothing may cut the sequences again."""
    data = config.data
    off = [name for name in ("document_mask", "reset_position_ids") if not getattr(data, name)]
    if names and off:
        raise ConfigError(
            f"data.sources, {names[0]!r}: holds conversations, several of which share a sequence. Set "
            f"{' and '.join(f'data.{name}' for name in off)} to true, which keeps them apart."
        )
    if names and config.training.seq_length_phases:
        raise ConfigError(
            f"data.sources, {names[0]!r}: holds conversations, which are not cut: training.seq_length_phases "
            "cannot shorten the sequences they are packed into. Leave it out."
        )


class _SplitLayout:
    """Documents and tokens of each source in each split."""

    def __init__(self, config: Config, groups: dict[str, ShardGroup]) -> None:
        self.data = config.data
        self.text = config.data.split
        self.sequence_tokens = config.training.seq_length
        seed = config.data.preprocessing.shuffle_seed
        self.seed = config.seed if seed is None else seed
        self.bounds = split_bounds(self.text)
        self.index_directory = index_directory(config.data.cache_dir)
        self.groups = groups

    def documents(self, name: str, split: str) -> tuple[int, int]:
        if (bounds := self.bounds[split]) is None:
            return 0, 0
        documents = len(self.groups[name])
        return round(bounds[0] * float(documents)), round(bounds[1] * float(documents))

    def tokens(self, name: str, split: str) -> int:
        return self.groups[name].tokens(*self.documents(name, split))

    def part(self, name: str, split: str) -> SourcePart:
        """The part of a source; it holds at least one sequence.

        Raises DataError when it would not, ConfigError when the split has no share at all.
        """
        if self.bounds[split] is None:
            raise ConfigError(
                f"data.split {self.text!r} leaves nothing for {SPLIT_NAMES[split]}; give it a share."
            )
        group, (first, end) = self.groups[name], self.documents(name, split)
        tokens = group.tokens(first, end)
        order = self._score_order(name) if split == "train" else None
        packing = self._packing(group, first, end - first, order) if group.has_loss_masks else None
        part = SourcePart(
            name, split, group.path, group.sha256, first, end - first, tokens, self.sequence_tokens,
            self.seed, packing, order,
        )  # fmt: skip
        if part.samples_per_epoch == 0:
            raise DataError(
                f"Source {name!r}: its {SPLIT_NAMES[split]} split (data.split {self.text!r}) has {tokens:,} "
                f"tokens in {part.documents:,} documents, and one sequence takes "
                f"{self.sequence_tokens + 1:,}. Give it more data or a larger share, or use a shorter "
                "training.seq_length."
            )
        return part

    def _score_order(self, name: str) -> ScoreOrder | None:
        """The curriculum of a source; DataError where it lacks the scores and the settings insist."""
        curriculum, group = self.data.curriculum, self.groups[name]
        if curriculum is None:
            return None
        if (missing := missing_scores(group)) is not None:
            if curriculum.without_scores == "shuffle":
                return None
            raise DataError(
                f"{missing}: no such file, and data.curriculum orders the documents of {name!r} by it. "
                'Preprocess with --score-field, or set data.curriculum.without_scores to "shuffle".'
            )
        return ScoreOrder(curriculum.order, curriculum.levels, curriculum.epochs, scores_sha256(group))

    def _packing(
        self, group: ShardGroup, first_document: int, documents: int, order: ScoreOrder | None
    ) -> Packing:
        levels = None
        if order is not None:
            levels = order.key, document_levels(group, first_document, documents, order)
        return plan_packing(
            group, first_document, documents, self.sequence_tokens, self.data.long_conversations,
            self.index_directory, levels,
        )  # fmt: skip


def split_bounds(text: str) -> dict[str, tuple[float, float] | None]:
    """Where each split begins and ends in a source, as shares; None: it has no share.

    Raises ConfigError for what is not three shares.
    """
    if not SPLIT_PATTERN.fullmatch(text) or not any(map(float, text.split(","))):
        raise ConfigError(f'data.split is {text!r}; give shares as in "98,1,1".')
    shares = [float(share) for share in text.split(",")]
    shares += [0.0] * (len(SPLIT_NAMES) - len(shares))
    total = sum(shares)
    ends = list(accumulate(share / total for share in shares))
    return {
        split: (begin, end) if end > begin else None
        for split, begin, end in zip(SPLIT_NAMES, [0.0, *ends], ends, strict=False)
    }


def _most_samples(config: Config, parts: tuple[SourcePart, ...]) -> dict[str, int]:
    """Samples that each source with `max_epochs` may give at most."""
    caps = {source.name: source.max_epochs for source in config.data.sources}
    return {
        part.name: int(cap * part.samples_per_epoch) for part in parts if (cap := caps[part.name]) is not None
    }


def _held_out_shares(config: Config, names: list[str], shares: list[dict[str, float]]) -> dict[str, float]:
    """Validation and test have one mix throughout: by `weight`, or the first phase's where all are 0."""
    weights = {source.name: source.weight for source in config.data.sources if source.name in names}
    return normalized(weights, config.data.mixing_temperature) or shares[0]


def _held_out(layout: _SplitLayout, split: str, samples: int, shares: dict[str, float]) -> Blend:
    """The sources by their shares, without those that are too small for this split."""
    parts: list[SourcePart] = []
    too_small: list[DataError] = []
    for name in shares:
        try:
            parts.append(layout.part(name, split))
        except DataError as error:
            too_small.append(error)
    if not parts:
        raise too_small[0]
    for reason in too_small:
        logger.warning("Left out of %s: %s", SPLIT_NAMES[split], reason)
    kept = sum(shares[part.name] for part in parts)
    weights = tuple(shares[part.name] / kept for part in parts)
    return Blend(split, samples, tuple(parts), (MixPhase(0, weights),))
