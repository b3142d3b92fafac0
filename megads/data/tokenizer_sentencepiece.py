"""sentencepiece `.model` files: the library itself as reference, gigatoken for speed."""

import logging
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from megads.data.indexed import token_type
from megads.data.token_engines import GigatokenEngine, SentencePieceEngine
from megads.data.tokenizer import EOD_TOKENS, no_eod_message
from megads.data.tokenizer_two_engines import TwoEngineTokenizer
from megads.errors import DataError

logger = logging.getLogger(__name__)

SPACE_MARK = "▁"  # U+2581, what sentencepiece writes for a space


class SentencePieceTokenizer(TwoEngineTokenizer):
    """A sentencepiece model (arXiv:1808.06226), BPE or unigram.

    sentencepiece writes a space as U+2581 and so cannot tell a U+2581 in the text from a space. Models
    that can spell any byte and add no space of their own (`train_sentencepiece` makes such) get it
    spelled in bytes here, which makes `decode(encode(text)) == text` hold for every text.
    """

    kind = "sentencepiece"

    def __init__(self, path: Path, content: bytes, eod_token: str | None, *, fast: bool = True) -> None:
        import sentencepiece

        super().__init__(path, content, f"sentencepiece {version('sentencepiece')}", fast=fast)
        try:
            if not content:
                raise RuntimeError("the file is empty")
            self._model = sentencepiece.SentencePieceProcessor(model_proto=content)
            self.vocab_size = self._model.get_piece_size()
        except RuntimeError as error:
            raise DataError(
                f"{path}: neither a sentencepiece model nor a tokenizer.json ({error})."
            ) from error
        self.eod_id = self._find_eod(eod_token)
        mark_ids = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        adds_no_space = self._model.encode("a", out_type=str) == ["a"]
        self._mark_ids = mark_ids if adds_no_space and all(map(self._model.is_byte, mark_ids)) else None

    def _make_fast(self, content: bytes) -> GigatokenEngine | None:
        model, dtype = self._model, token_type(self.vocab_size)
        kinds = (model.is_control, model.is_unknown, model.is_unused, model.is_byte)
        ids = range(self.vocab_size)
        control = [model.id_to_piece(i) for i in ids if any(is_it(i) for is_it in kinds)]
        spelled = SPACE_MARK if self._mark_ids is not None else ""
        try:
            return self._checked(lambda: SentencePieceEngine(content, dtype, control, spelled), control)
        except ValueError as error:
            logger.info("%s: encoded by %s, since %s.", self.path, self.reference, error)
            return None

    def _find_eod(self, eod_token: str | None) -> int:
        if eod_token is None and self._model.eos_id() >= 0:
            return int(self._model.eos_id())
        for token in EOD_TOKENS if eod_token is None else (eod_token,):
            if (token_id := self.control_id(token)) is not None:
                return token_id
        raise DataError(no_eod_message(self.path, eod_token))

    def _encode_reference(self, texts: Sequence[str]) -> list[list[int]]:
        encoded: list[list[int]] = self._model.encode(list(texts), num_threads=1)
        if self._mark_ids is not None:
            for i, text in enumerate(texts):
                if SPACE_MARK in text:
                    encoded[i] = self._encode_around_marks(text, self._mark_ids)
        return encoded

    def _encode_around_marks(self, text: str, mark_ids: list[int]) -> list[int]:
        first, *rest = self._model.encode(text.split(SPACE_MARK), num_threads=1)
        ids: list[int] = list(first)
        for part in rest:
            ids += mark_ids
            ids += part
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._model.decode([int(i) for i in ids]))

    def control_id(self, token: str) -> int | None:
        token_id = int(self._model.piece_to_id(token))
        is_it = self._model.is_control(token_id) and self._model.id_to_piece(token_id) == token
        return token_id if is_it else None
