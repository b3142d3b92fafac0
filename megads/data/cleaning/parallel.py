"""The same work on many things, by processes that share what they need to know."""

import pickle
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from multiprocessing import active_children, get_context
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megads.data.workers import start_helper_process
from megads.errors import DataError


class Workers:
    """Processes for all stages of a run; a single one is this process. Use as a context manager."""

    def __init__(self, count: int) -> None:
        self._pool: ProcessPoolExecutor | None = None
        if count > 1:
            # spawn: the caller may draw a progress bar from a thread, which a fork would copy mid-way.
            self._pool = ProcessPoolExecutor(
                count, mp_context=get_context("spawn"), initializer=start_helper_process
            )

    def __enter__(self) -> Self:
        self._others = set(active_children())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is None:
            return
        if error is not None:
            # A stop must not wait for whole shards; what they had begun is done again next time.
            for process in set(active_children()) - self._others:
                process.kill()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def each[C, T, R](
        self, work: Callable[[C, T], R], context: C, tasks: Sequence[T]
    ) -> Iterator[tuple[int, R]]:
        """(number of the task, result) as tasks end; they are begun in order.

        `context` goes once to each process, through a file: it may be large, and tasks many. The first
        error of a task is raised here; one of a process that died is a DataError.
        """
        if self._pool is None:
            for number, task in enumerate(tasks):
                yield number, work(context, task)
            return
        with tempfile.NamedTemporaryFile(prefix="megads-clean-") as file:
            pickle.dump(context, file)
            file.flush()
            try:
                numbers = {
                    self._pool.submit(_work, work, file.name, task): number
                    for number, task in enumerate(tasks)
                }
                for future in as_completed(numbers):
                    yield numbers[future], future.result()
            except BrokenProcessPool as error:
                raise DataError(
                    "A cleaning process was killed, perhaps for want of memory. Run again with fewer "
                    "workers; what is finished is kept."
                ) from error


def _work(work: Callable[[Any, Any], Any], context: str, task: Any) -> Any:
    return work(_load(context), task)


@lru_cache(maxsize=1)
def _load(context: str) -> Any:
    return pickle.loads(Path(context).read_bytes())
