"""Worker processes that convert whole shards; between them and their parent go no texts and no tokens.

They are forks of a process that has loaded the tokenizer: its start, of a second and more, is paid once, and
its memory shared. A worker takes a shard, tells how far it is, and gets the next. The first error ends
them all: what they were writing is discarded, what they had finished stays.
"""

import os
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from typing import Any, cast

from megads.data.encoding import Encoder
from megads.data.indexed import unfinished_files
from megads.data.recipe import Recipe
from megads.data.shards import Shard, convert_shard
from megads.data.workers import start_helper_process
from megads.errors import DataError, MegadsError
from megads.resident import peak_resident_bytes

TELL_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Converted:
    """A shard that is done."""

    shard: Shard
    record: dict[str, Any]
    seconds: float
    peak_memory_bytes: int
    """Of the process, over all shards it has converted."""


OnReady = Callable[[], None]
"""Called when all processes have been made, so that no fork copies the threads of a progress bar."""
OnAdvance = Callable[[Shard, int, int], None]
"""Called with a shard, and bytes of its input read and of its text tokenized so far."""
OnConverted = Callable[[Converted], None]


def convert_shards(
    shards: Sequence[Shard],
    recipe: Recipe,
    workers: int,
    on_ready: OnReady,
    on_advance: OnAdvance,
    on_converted: OnConverted,
) -> None:
    """Convert shards, in order, on `workers` processes or, where one is enough, in this one.

    Raises the first error that any shard has, or that a callback raises, and DataError for a process
    that was killed; then no process and no file of an unfinished shard is left.
    """
    if not shards:
        on_ready()
        return
    encoder = Encoder(recipe)
    if min(workers, len(shards)) > 1:
        pool = _Pool(encoder, min(workers, len(shards)))
        try:
            on_ready()
            pool.run(shards, on_advance, on_converted)
        finally:
            pool.close()
    else:
        on_ready()
        for shard in shards:
            on_converted(_timed(shard, encoder, lambda *done, shard=shard: on_advance(shard, *done)))


def _timed(shard: Shard, encoder: Encoder, on_progress: Callable[[int, int], None]) -> Converted:
    begun = time.monotonic()
    told = [begun]

    def tell(input_bytes: int, text_bytes: int) -> None:
        if (now := time.monotonic()) - told[0] >= TELL_SECONDS:
            told[0] = now
            on_progress(input_bytes, text_bytes)

    record = convert_shard(shard, encoder, tell)
    return Converted(shard, record, time.monotonic() - begun, peak_resident_bytes())


class _Pool:
    """Processes with a pipe to each: (shard) down; ("advance", ...), ("done", ...), ("error", ...) up."""

    def __init__(self, encoder: Encoder, workers: int) -> None:
        context = get_context("fork")
        self._processes: dict[Connection, ForkProcess] = {}
        self._working_on: dict[Connection, Shard] = {}
        for _ in range(workers):
            mine, theirs = context.Pipe()
            parents_ends = [*self._processes, mine]
            process = context.Process(target=_serve, args=(theirs, encoder, parents_ends), daemon=True)
            process.start()
            theirs.close()  # so that the end of the process is the end of the pipe
            self._processes[mine] = process

    def run(self, shards: Sequence[Shard], on_advance: OnAdvance, on_converted: OnConverted) -> None:
        waiting = deque(shards)
        for pipe in self._processes:
            self._give(pipe, waiting)
        while self._working_on:
            for ready in connection.wait(list(self._working_on)):
                pipe = cast(Connection, ready)
                shard = self._working_on[pipe]
                kind, *content = self._hear(pipe, shard)
                if kind == "advance":
                    on_advance(shard, *content)
                elif kind == "done":
                    del self._working_on[pipe]
                    self._give(pipe, waiting)
                    on_converted(*content)
                elif kind == "error":
                    raise content[0]
                else:  # a bug: the traceback is the other process's
                    raise RuntimeError(f"converting {shard.input.path} failed:\n{content[0]}")

    def _give(self, pipe: Connection, waiting: deque[Shard]) -> None:
        if waiting:
            self._working_on[pipe] = waiting.popleft()
            try:
                pipe.send(self._working_on[pipe])
            except OSError:
                self._fail(pipe, self._working_on[pipe])

    def _hear(self, pipe: Connection, shard: Shard) -> tuple[Any, ...]:
        try:
            message: tuple[Any, ...] = pipe.recv()
        except (EOFError, OSError):
            self._fail(pipe, shard)
        return message

    def _fail(self, pipe: Connection, shard: Shard) -> None:
        raise DataError(
            f"{shard.input.path}: the process that converted it was killed "
            f"({_exit(self._processes[pipe])}), perhaps for want of memory. Run again with fewer --workers; "
            "finished shards are kept."
        )

    def close(self) -> None:
        """End all processes at once, and remove what they were writing."""
        for process in self._processes.values():
            process.kill()
        for pipe, process in self._processes.items():
            process.join()
            pipe.close()
        for shard in self._working_on.values():
            for partial in unfinished_files(shard.prefix):
                partial.unlink(missing_ok=True)


def _exit(process: ForkProcess) -> str:
    process.join(1.0)
    return f"exit code {process.exitcode}"


def _serve(pipe: Connection, encoder: Encoder, parents_ends: Sequence[Connection]) -> None:
    """What a worker does: convert the shards that come, until it is killed or its parent is gone."""
    start_helper_process()
    for inherited in parents_ends:
        inherited.close()
    while True:
        try:
            shard = pipe.recv()
        except EOFError:
            os._exit(0)
        try:
            message = ("done", _timed(shard, encoder, lambda *done: pipe.send(("advance", *done))))
        except MegadsError as error:
            # By its text: not every subclass can be made again from its arguments.
            pipe.send(("error", _plain(error)))
        except Exception:
            pipe.send(("bug", traceback.format_exc()))
        else:
            pipe.send(message)


def _plain(error: MegadsError) -> MegadsError:
    """The nearest class of megads.errors with the same message."""
    base = next(kind for kind in type(error).__mro__ if kind.__module__ == "megads.errors")
    plain: MegadsError = base(str(error))
    return plain
