"""Training a sentencepiece BPE vocabulary that can spell, and give back, any text.

Byte fallback as in Llama (arXiv:2302.13971): what the vocabulary lacks is spelled in UTF-8 bytes.
Digits are split as there; normalization is off, so that `decode(encode(text)) == text`.
"""

import io
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megads.data.documents import read_texts
from megads.data.inputs import InputShard
from megads.errors import DataError, MegadsError
from megads.publish import publish_file

# Reserved now, so that fill-in-the-middle (DeepSeek-Coder, arXiv:2401.14196) needs no new vocabulary.
FIM_TOKENS = ("<|fim_begin|>", "<|fim_hole|>", "<|fim_end|>")
# Tokens of their own: sentencepiece would otherwise spell them as bytes.
LINE_TOKENS = ("\n", "\t")

MAX_SENTENCE_CHARACTERS = 1024
MAX_SENTENCE_BYTES = 4 * MAX_SENTENCE_CHARACTERS


@dataclass(frozen=True)
class TrainedTokenizer:
    """Where the model is, and how much text it was fitted on."""

    path: Path
    vocab_size: int
    text_bytes: int


def sample_texts(files: Iterable[InputShard], max_bytes: int, text_field: str = "text") -> Iterator[str]:
    """Texts of at most about `max_bytes` in all, spread over the files, from the start of each.

    Files take their share in order of size, so that what small ones leave goes to larger ones.
    """
    ordered = sorted(files, key=lambda file: (file.bytes, file.path))
    left_bytes = max_bytes
    for position, file in enumerate(ordered):
        share_bytes = left_bytes // (len(ordered) - position)
        taken_bytes = 0
        for text in read_texts([file.path], text_field):
            if taken_bytes >= share_bytes:
                break
            taken_bytes += len(text.encode())
            yield text
        left_bytes -= taken_bytes


def train_sentencepiece(
    texts: Iterable[str],
    output: str | os.PathLike[str],
    vocab_size: int,
    *,
    character_coverage: float = 0.9995,
) -> TrainedTokenizer:
    """Fit a BPE model of `vocab_size` pieces to `texts` and publish it at `output`, atomically.

    The result depends on texts and arguments only. The trainer holds the texts in memory.
    Raises DataError when there is too little text for the vocabulary, or the vocabulary is too small
    for the bytes and characters it must hold; and what `texts` raises.
    """
    import sentencepiece

    text_bytes = 0
    of_texts: list[MegadsError] = []

    def sentences() -> Iterator[str]:
        nonlocal text_bytes
        try:
            for text in texts:
                for sentence in _sentences(text):
                    text_bytes += len(sentence.encode())
                    yield sentence
        except MegadsError as error:  # sentencepiece would make a RuntimeError of it, with a traceback
            of_texts.append(error)
            raise

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences(),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=character_coverage,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=MAX_SENTENCE_BYTES,
            user_defined_symbols=list(LINE_TOKENS),
            control_symbols=list(FIM_TOKENS),
            # The number of threads is written into the model: a constant keeps its bytes the same.
            num_threads=2,
            minloglevel=2,
        )
    except RuntimeError as error:
        if of_texts:
            raise of_texts[0] from error
        reason = str(error).rsplit("] ", 1)[-1]  # after sentencepiece's own file and line
        raise DataError(
            f"No vocabulary of {vocab_size:,} from {text_bytes:,} bytes of text: {reason}"
        ) from error
    publish_file(Path(output), model.getvalue())
    return TrainedTokenizer(Path(output), vocab_size, text_bytes)


def _sentences(text: str) -> Iterator[str]:
    """Lines, cut where they are long: the trainer drops, without a word, what exceeds its limit."""
    for line in text.split("\n"):
        for start in range(0, len(line), MAX_SENTENCE_CHARACTERS):
            if piece := line[start : start + MAX_SENTENCE_CHARACTERS].replace("\0", ""):
                yield piece
