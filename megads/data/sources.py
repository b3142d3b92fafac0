"""From the `data` section to a plan: which files, with which weights, with how many tokens.

Everything that can be wrong with the data of a run is found here, before the first step.
"""

import contextlib
import glob
import hashlib
import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path

from megads.config.schema import Config, DataSource
from megads.data.indexed import data_files
from megads.data.manifest import DatasetInfo, check_dataset, sequence_lengths
from megads.data.tokenizer import load_tokenizer, tokenizer_sha256
from megads.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

SPLIT_NAMES = {"train": "training", "valid": "validation", "test": "test"}
SPLIT_PATTERN = re.compile(r"\s*\d+(\.\d+)?\s*(,\s*\d+(\.\d+)?\s*){0,2}")
MAX_SEED = 2**32 - 1  # of numpy's RandomState


@dataclass(frozen=True)
class SourceInfo:
    """One source of the run: its share, its size, and how often training reads it."""

    name: str
    share: float
    documents: int
    tokens: int
    train_tokens: int
    train_epochs: float


@dataclass(frozen=True)
class Blend:
    """Prefixes and their weights (sum 1) in one split, and the samples wanted of it."""

    split: str
    samples: int
    prefixes: tuple[str, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True)
class Corpus:
    """The checked data of a run."""

    sources: tuple[SourceInfo, ...]
    blends: dict[str, Blend]
    valid_by_source: dict[str, Blend]
    eod_id: int | None
    tokenizer_sha256: str | None
    seed: int
    fingerprint: str


def plan_corpus(config: Config, samples: dict[str, int], valid_samples_per_source: int) -> Corpus:
    """Check every dataset and lay out the blends of the splits in `samples` that are not 0.

    Raises ConfigError and DataError as `blend.build_datasets` says.
    """
    shares = source_shares(config.data.sources, config.data.mixing_temperature)
    infos = _check_sources(config, shares)
    eod_id, sha256 = _end_of_document(config, [info for part in infos.values() for info in part])
    layout = _SplitLayout(config, infos)
    blends = {split: _blend(layout, split, count, shares) for split, count in samples.items() if count > 0}
    by_source = {}
    for name in shares if valid_samples_per_source > 0 else ():
        # A source that is too small for a validation set was named when the blend left it out.
        with contextlib.suppress(DataError):
            by_source[name] = _blend(layout, "valid", valid_samples_per_source, {name: 1.0})
    sources = tuple(
        _source_info(name, share, infos[name], layout, samples["train"] * config.training.seq_length)
        for name, share in shares.items()
    )
    seed = config.data.preprocessing.shuffle_seed
    seed = config.seed if seed is None else seed
    if not 0 <= seed <= MAX_SEED:
        raise ConfigError(f"The seed of the sample order is {seed}; it must be from 0 to {MAX_SEED:,}.")
    fingerprint = _fingerprint(config, infos, [*blends.values(), *by_source.values()], seed, eod_id)
    return Corpus(sources, blends, by_source, eod_id, sha256, seed, fingerprint)


def source_shares(sources: tuple[DataSource, ...], temperature: float) -> dict[str, float]:
    """Share of the samples of each source, w^temperature normalized; sources of weight 0 are left out."""
    powered = {source.name: source.weight**temperature for source in sources if source.weight > 0}
    if not powered:
        raise ConfigError("data.sources has no source with a weight above 0: there is nothing to train on.")
    if len({source.name for source in sources}) < len(sources):
        raise ConfigError("data.sources: two sources have the same name; give each its own.")
    total = sum(powered.values())
    return {name: value / total for name, value in powered.items()}


def source_prefixes(source: DataSource, cache_dir: str) -> tuple[str, ...]:
    """Prefixes of a source: as given, a directory for all the datasets in it, sorted.

    Raises ConfigError when the source says neither path nor subset, DataError for a directory without
    datasets.
    """
    if source.path is None and source.subset is None:
        raise ConfigError(f"data.sources, {source.name!r}: give it a path or a subset.")
    paths = (str(Path(cache_dir) / (source.subset or "")),) if source.path is None else source.path
    prefixes: list[str] = []
    for path in (paths,) if isinstance(paths, str) else paths:
        if data_files(path)[1].exists() or not Path(path).is_dir():
            prefixes.append(path)
            continue
        inside = sorted(glob.glob(glob.escape(path) + "/*.idx"))
        if not inside:
            raise DataError(f"{path}: no dataset (.idx) for source {source.name!r} in this directory.")
        prefixes += [name.removesuffix(".idx") for name in inside]
    return tuple(prefixes)


def _check_sources(config: Config, shares: dict[str, float]) -> dict[str, tuple[DatasetInfo, ...]]:
    """Check the datasets of all sources against the model's vocabulary and one tokenizer."""
    sha256 = tokenizer_sha256(config.data.tokenizer_path) if config.data.tokenizer_path else None
    infos: dict[str, tuple[DatasetInfo, ...]] = {}
    for source in config.data.sources:
        if source.name not in shares:
            continue
        checked = []
        for prefix in source_prefixes(source, config.data.cache_dir):
            info = check_dataset(prefix, config.model.vocab_size, sha256)
            sha256 = sha256 or info.tokenizer_sha256  # the first one binds the others
            checked.append(info)
            if info.tokenizer_sha256 is None:
                logger.warning("%s has no .json record: its tokenizer cannot be checked.", prefix)
        infos[source.name] = tuple(checked)
    return infos


def _end_of_document(config: Config, infos: list[DatasetInfo]) -> tuple[int | None, str | None]:
    """The end-of-document id of the records, else of the tokenizer; and the tokenizer's hash."""
    recorded = {info.eod_id for info in infos if info.eod_id is not None}
    if len(recorded) > 1:
        raise DataError(
            f"The datasets end their documents with different ids {sorted(recorded)}; preprocess them alike."
        )
    sha256 = next((info.tokenizer_sha256 for info in infos if info.tokenizer_sha256), None)
    if recorded:
        return recorded.pop(), sha256
    if config.data.tokenizer_path:
        tokenizer = load_tokenizer(config.data.tokenizer_path)
        return tokenizer.eod_id, tokenizer.sha256
    needed_by = [
        name
        for name in ("reset_position_ids", "document_mask", "eod_mask_loss")
        if getattr(config.data, name)
    ]
    if needed_by:
        raise DataError(
            f"data.{needed_by[0]} needs the end-of-document id, which datasets without a .json record do not "
            "tell: set data.tokenizer_path."
        )
    return None, None


class _SplitLayout:
    """Documents and tokens of each prefix in each split, by Megatron-Core's own division."""

    def __init__(self, config: Config, infos: dict[str, tuple[DatasetInfo, ...]]) -> None:
        from megatron.core.datasets.blended_megatron_dataset_config import (
            convert_split_vector_to_split_matrix,
            parse_and_normalize_split,
        )

        self.text = config.data.split
        self.sequence_tokens = config.training.seq_length + 1
        if not SPLIT_PATTERN.fullmatch(self.text) or not any(map(float, self.text.split(","))):
            raise ConfigError(f'data.split is {self.text!r}; give shares as in "98,1,1".')
        bounds = convert_split_vector_to_split_matrix(parse_and_normalize_split(self.text))
        self.bounds = dict(zip(SPLIT_NAMES, bounds, strict=True))
        self.infos = infos
        self._tokens = {
            (info.prefix, split): self._count_tokens(info, split)
            for part in infos.values()
            for info in part
            for split in SPLIT_NAMES
        }

    def documents(self, info: DatasetInfo, split: str) -> slice:
        if (bounds := self.bounds[split]) is None:
            return slice(0, 0)
        return slice(*(round(bound * float(info.documents)) for bound in bounds))

    def _count_tokens(self, info: DatasetInfo, split: str) -> int:
        return int(sequence_lengths(info.prefix)[self.documents(info, split)].sum(dtype="int64"))

    def tokens(self, info: DatasetInfo, split: str) -> int:
        return self._tokens[info.prefix, split]

    def usable(self, name: str, split: str) -> dict[str, int]:
        """Tokens of each prefix of a source that holds at least one sequence of this split.

        Raises DataError when none does, ConfigError when the split has no share at all.
        """
        if self.bounds[split] is None:
            raise ConfigError(
                f"data.split {self.text!r} leaves nothing for {SPLIT_NAMES[split]}; give it a share."
            )
        tokens = {info.prefix: self.tokens(info, split) for info in self.infos[name]}
        usable = {prefix: count for prefix, count in tokens.items() if count >= self.sequence_tokens}
        if not usable:
            ranges = [self.documents(info, split) for info in self.infos[name]]
            documents = sum(part.stop - part.start for part in ranges)
            raise DataError(
                f"Source {name!r}: its {SPLIT_NAMES[split]} split (data.split {self.text!r}) has "
                f"{sum(tokens.values()):,} tokens in {documents:,} documents, and "
                f"one sequence takes {self.sequence_tokens:,} from one file. Give it more data or a larger "
                "share, or use a shorter training.seq_length."
            )
        for prefix, count in tokens.items():
            if prefix not in usable:
                logger.warning(
                    "%s is left out of %s: %d tokens are less than a sequence.", prefix, split, count
                )
        return usable


def _blend(layout: _SplitLayout, split: str, samples: int, shares: dict[str, float]) -> Blend:
    """The sources by their shares. Held-out splits do without sources that are too small for them."""
    usable: dict[str, dict[str, int]] = {}
    too_small: list[DataError] = []
    for name in shares:
        try:
            usable[name] = layout.usable(name, split)
        except DataError as error:
            too_small.append(error)
    if too_small and (split == "train" or not usable):
        raise too_small[0]
    for reason in too_small:
        logger.warning("Left out of %s: %s", SPLIT_NAMES[split], reason)
    kept = sum(shares[name] for name in usable)
    prefixes = [prefix for tokens in usable.values() for prefix in tokens]
    weights = [
        shares[name] / kept * count / sum(tokens.values())
        for name, tokens in usable.items()
        for count in tokens.values()
    ]
    return Blend(split, samples, tuple(prefixes), tuple(weights))


def _source_info(
    name: str, share: float, infos: tuple[DatasetInfo, ...], layout: _SplitLayout, run_tokens: int
) -> SourceInfo:
    train_tokens = sum(layout.tokens(info, "train") for info in infos)
    return SourceInfo(
        name,
        share,
        sum(info.documents for info in infos),
        sum(info.tokens for info in infos),
        train_tokens,
        share * run_tokens / train_tokens if train_tokens else 0.0,
    )


def _fingerprint(
    config: Config,
    infos: dict[str, tuple[DatasetInfo, ...]],
    blends: list[Blend],
    seed: int,
    eod_id: int | None,
) -> str:
    """Names the index of samples by all that it depends on: contents, blends, splits, length, seed."""
    from megatron.core import __version__

    contents = {info.prefix: info.idx_sha256 for part in infos.values() for info in part}
    described = [[blend.split, blend.samples, blend.prefixes, blend.weights] for blend in blends]
    settings = [__version__, contents, described, config.data.split, config.training.seq_length, seed, eod_id]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
