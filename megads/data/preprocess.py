"""Documents to an indexed dataset, on as many processes as wanted, with one and the same result.

This process reads and writes; the pool parses, checks and tokenizes. What is in flight is bounded, so
memory does not grow with the corpus, and results are written in the order of the input, so the files
do not depend on the number of processes. A document becomes its tokens and an end-of-document token;
documents without text are counted and left out.
"""

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from megads import __version__
from megads.data.documents import LineBatch, parse_texts, read_line_batches
from megads.data.indexed import MAX_DOCUMENT_TOKENS, IndexedWriter, token_type
from megads.data.inputs import find_inputs
from megads.data.manifest import RECORD_FORMAT
from megads.data.tokenizer import Tokenizer, load_tokenizer
from megads.data.workers import start_helper_process
from megads.errors import DataError


@dataclass(frozen=True, slots=True)
class EncodedBatch:
    """Documents of a batch, end-of-document tokens included: all tokens, and each one's length."""

    tokens: NDArray[np.generic]
    lengths: NDArray[np.int32]
    empty_documents: int
    text_bytes: int


@dataclass(frozen=True)
class Summary:
    """What one dataset was made of, and how fast."""

    prefix: Path
    documents: int
    empty_documents: int
    tokens: int
    text_bytes: int
    seconds: float


class Encoder:
    """Tokenizes batches of lines in order, in `workers` processes (1: in this one).

    The processes start at the first batch and serve until the end of the `with` block, which several
    datasets may share. An error of a process, even its death, is raised here as a DataError.
    """

    def __init__(
        self,
        tokenizer_path: str | os.PathLike[str],
        *,
        eod_token: str | None = None,
        text_field: str = "text",
        workers: int = 1,
    ) -> None:
        self.tokenizer = load_tokenizer(Path(tokenizer_path), eod_token=eod_token)
        self.text_field = text_field
        self.workers = workers
        self._pool: ProcessPoolExecutor | None = None
        if workers > 1:
            # spawn: the caller may draw a progress bar from a thread, which a fork would copy mid-way.
            self._pool = ProcessPoolExecutor(
                workers,
                mp_context=get_context("spawn"),
                initializer=_start_worker,
                initargs=(os.fspath(tokenizer_path), eod_token, text_field),
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def encode(self, batches: Iterator[LineBatch]) -> Iterator[tuple[LineBatch, EncodedBatch]]:
        """Encode batches, in order; at most two per process are read ahead."""
        if self._pool is None:
            for batch in batches:
                yield batch, encode_batch(batch, self.tokenizer, self.text_field)
            return
        pending: deque[tuple[LineBatch, Future[EncodedBatch]]] = deque()
        try:
            for batch in batches:
                pending.append((batch, self._pool.submit(_encode_in_worker, batch)))
                if len(pending) > 2 * self.workers:
                    yield _next_result(pending)
            while pending:
                yield _next_result(pending)
        except BrokenProcessPool as error:
            where = (
                f"{pending[0][0].path}, after line {pending[0][0].first_line}" if pending else "at the start"
            )
            raise DataError(
                f"{where}: a tokenizing process was killed, perhaps for want of memory. Try fewer workers."
            ) from error


def encode_batch(batch: LineBatch, tokenizer: Tokenizer, text_field: str) -> EncodedBatch:
    """Parse and tokenize one batch; raises DataError with file and line for a bad record."""
    texts = parse_texts(batch, text_field)
    wanted = [text for text in texts if text]
    dtype = token_type(tokenizer.vocab_size)
    documents = [np.array([*ids, tokenizer.eod_id], dtype=dtype) for ids in tokenizer.encode_batch(wanted)]
    if any(document.size > MAX_DOCUMENT_TOKENS for document in documents):
        raise DataError(
            f"{batch.path}, after line {batch.first_line}: a document exceeds {MAX_DOCUMENT_TOKENS:,} tokens."
        )
    return EncodedBatch(
        tokens=np.concatenate(documents) if documents else np.empty(0, dtype),
        lengths=np.array([document.size for document in documents], dtype=np.int32),
        empty_documents=len(texts) - len(wanted),
        text_bytes=sum(len(text.encode()) for text in wanted),
    )


def preprocess(
    inputs: Sequence[str | os.PathLike[str]],
    prefix: str | os.PathLike[str],
    encoder: Encoder,
    *,
    overwrite: bool = False,
    on_progress: Callable[[int], None] | None = None,
) -> Summary:
    """Make the dataset `prefix`.bin/.idx/.json from files and directories of JSON lines.

    `on_progress` is called with the bytes of input read so far. On any error nothing is published and
    nothing is left. Raises DataError for bad input, an existing dataset, or no document with text.
    """
    begun = time.monotonic()
    files = find_inputs(inputs)
    tokenizer = encoder.tokenizer
    empty_documents = text_bytes = 0
    with IndexedWriter(prefix, tokenizer.vocab_size, overwrite=overwrite) as writer:
        for read_bytes, encoded in _encode_files(files, encoder):
            writer.add(encoded.tokens, encoded.lengths)
            empty_documents += encoded.empty_documents
            text_bytes += encoded.text_bytes
            if on_progress:
                on_progress(read_bytes)
        if writer.documents == 0:
            raise DataError(
                f"{prefix}: the input holds no document with text ({len(files)} files, {empty_documents} "
                "empty documents)."
            )
        writer.finish(
            {
                "format": RECORD_FORMAT,
                "megads_version": __version__,
                "tokenizer": {
                    "kind": tokenizer.kind,
                    "file": tokenizer.path.name,
                    "sha256": tokenizer.sha256,
                },
                "vocab_size": tokenizer.vocab_size,
                "eod_id": tokenizer.eod_id,
                "documents": writer.documents,
                "empty_documents": empty_documents,
                "tokens": writer.tokens,
                "text_bytes": text_bytes,
                "inputs": [{"file": os.fspath(file), "bytes": file.stat().st_size} for file in files],
            }
        )
        return Summary(
            Path(prefix),
            writer.documents,
            empty_documents,
            writer.tokens,
            text_bytes,
            time.monotonic() - begun,
        )


def _encode_files(files: Sequence[Path], encoder: Encoder) -> Iterator[tuple[int, EncodedBatch]]:
    """Encoded batches of all files, each with the bytes of input read up to it."""
    before = dict(
        zip(map(os.fspath, files), np.cumsum([0, *(f.stat().st_size for f in files)]).tolist(), strict=False)
    )
    batches = (batch for file in files for batch in read_line_batches(file))
    for batch, encoded in encoder.encode(batches):
        yield before[batch.path] + batch.input_bytes_read, encoded


def _next_result(pending: deque[tuple[LineBatch, "Future[EncodedBatch]"]]) -> tuple[LineBatch, EncodedBatch]:
    result = pending[0][1].result()
    return pending.popleft()[0], result


_worker_encode: Callable[[LineBatch], EncodedBatch] | None = None


def _start_worker(tokenizer_path: str, eod_token: str | None, text_field: str) -> None:
    global _worker_encode
    start_helper_process()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core per process; read at the first encoding
    tokenizer = load_tokenizer(Path(tokenizer_path), eod_token=eod_token)
    _worker_encode = partial(encode_batch, tokenizer=tokenizer, text_field=text_field)


def _encode_in_worker(batch: LineBatch) -> EncodedBatch:
    assert _worker_encode is not None
    return _worker_encode(batch)
