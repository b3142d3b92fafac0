"""What a run will read, as a table: per source and phase weight, share, tokens and epochs."""

from collections.abc import Iterator
from dataclasses import dataclass

from megads.config.schema import Config
from megads.data.epochs import SourcePart
from megads.data.mix import Mix
from megads.data.sources import Corpus

# Repeating data helps up to about 4 epochs: arXiv:2305.16264.
USEFUL_EPOCHS = 4


@dataclass(frozen=True)
class MixRow:
    """One source in one phase of a run (`phase` from 1; 0: all of them together).

    `weight` is as the configuration has it, `share` what became of it by temperature and caps.
    """

    phase: int
    source: str
    weight: float | None
    share: float
    available_tokens: int
    read_tokens: int
    epochs: float


def mix_rows(config: Config, corpus: Corpus) -> list[MixRow]:
    """All phases that the run reaches, and the whole run; tokens of the training split."""
    train, seq_length = corpus.blends["train"], config.training.seq_length
    mix = Mix(train.phases)
    weights = [phase.weights for phase in config.data.phases]
    weights = weights or [{source.name: source.weight for source in config.data.sources}]
    starts = [phase.first_sample for phase in train.phases]
    ends = [*starts[1:], train.samples]
    spans = [(number, span) for number, span in enumerate(zip(starts, ends, strict=True), 1)]
    rows = []
    for number, (start, end) in [*spans, (0, (0, train.samples))]:
        counts = (mix.counts(end) - mix.counts(start)).tolist()
        for part, count in zip(train.parts, counts, strict=True):
            weight = weights[number - 1].get(part.name, 0.0) if number else None
            share = (
                train.phases[number - 1].weights[train.parts.index(part)] if number else count / (end - start)
            )
            epochs = count / part.samples_per_epoch
            # Of conversations with the padding, which is counted as it is read.
            there = part.tokens if part.packing is None else part.samples_per_epoch * seq_length
            rows.append(MixRow(number, part.name, weight, share, there, count * seq_length, epochs))
    return rows


def mix_table(config: Config, corpus: Corpus) -> str:
    """The rows as text; the whole run only where it has more than one phase."""
    train, seq_length = corpus.blends["train"], config.training.seq_length
    rows = mix_rows(config, corpus)
    by_phase: dict[int, list[MixRow]] = {}
    for row in rows:
        by_phase.setdefault(row.phase, []).append(row)
    width = max(len("source"), *(len(row.source) for row in rows))
    tokens = train.samples * seq_length
    lines = [f"training data: {tokens:,} tokens in {train.samples:,} sequences of {seq_length:,}"]
    head = _line(width, "source", "weight", "share", "tokens there", "tokens read", "epochs")
    for number, part in by_phase.items():
        if number == 0 and len(by_phase) == 2:
            continue
        if len(by_phase) > 2:
            title = "the whole run" if number == 0 else f"phase {number}"
            start = train.phases[number - 1].first_sample * seq_length if number else 0
            lines.append(f"{title}, from token {start:,} on:" if number else f"{title}:")
        lines.append(head)
        for row in part:
            weight = "" if row.weight is None else f"{row.weight:.4g}"
            amounts = f"{row.available_tokens:,}", f"{row.read_tokens:,}", f"{row.epochs:.2f}"
            lines.append(_line(width, row.source, weight, f"{row.share:.2%}", *amounts))
        there, taken = sum(row.available_tokens for row in part), sum(row.read_tokens for row in part)
        lines.append(_line(width, "all", "", "", f"{there:,}", f"{taken:,}", f"{taken / there:.2f}"))
    lines += [line for part in train.parts for line in _remarks(part)]
    read = {part.name for part in train.parts}
    if unread := [source.name for source in config.data.sources if source.name not in read]:
        lines.append(f"not read, without a weight above 0: {', '.join(unread)}")
    return "\n".join(lines)


def _remarks(part: SourcePart) -> Iterator[str]:
    """How the sequences of a source come about, where that is not simply in random order."""
    if (packing := part.packing) is not None:
        filled = packing.positions / (packing.sequences * part.sequence_tokens)
        text = f"{part.name}: {packing.conversations:,} conversations fill {filled:.1%} of their "
        text += f"{packing.sequences:,} sequences"
        if packing.cut:
            text += f"; {packing.cut:,} are longer than a sequence and lose their end"
        if packing.dropped:
            text += f"; {packing.dropped:,} are left out, longer than a sequence or without an answer in it"
        yield text
    if (order := part.score_order) is not None:
        yield (f"{part.name}: epochs up to {order.epochs} in {order.levels} levels of {order.order} scores")


def _line(width: int, source: str, *cells: str) -> str:
    columns = zip(cells, (8, 8, 20, 20, 8), strict=True)
    return f"  {source:<{width}}" + "".join(f" {cell:>{column - 1}}" for cell, column in columns)


def repetition_warnings(config: Config, corpus: Corpus) -> Iterator[str]:
    """Sources that training reads more often than helps."""
    for row in mix_rows(config, corpus):
        if row.phase == 0 and row.epochs > USEFUL_EPOCHS:
            yield (
                f"Source {row.source} is read {row.epochs:.1f} times over: beyond about {USEFUL_EPOCHS} "
                "epochs repetition adds little (arXiv:2305.16264). Give it less weight or more data, or set "
                "its max_epochs."
            )
