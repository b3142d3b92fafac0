"""Micro-batches in an order that depends on one integer: the number of samples consumed.

Samples are taken consecutively. The next `micro_batch_size x dp_size` form a round, of which
data-parallel rank r takes its r-th slice; so a global batch holds the same samples for every
data-parallel size and number of workers, and a run resumes exactly from `consumed_samples`.

Workers are forked. They inherit the mapped index arrays, which other start methods would copy into
each worker by pickling, and start in milliseconds where a fresh interpreter imports torch for
seconds. The known risks of fork, and what is done here: threads of gloo, NCCL or a logger do not
exist in the child, which is no matter since a worker only reads files and never talks to a process
group or a device; inherited sockets would keep a dead rank's connections open, so workers die with
their parent; inherited signal handlers are reset (`workers.start_helper_process`).
"""

import math
import signal
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from megads.data.workers import start_helper_process
from megads.errors import TrainingError

ALIGNMENT_BYTES = 64


class MicroBatchSampler(Sampler[list[int]]):
    """Indices of one data-parallel rank's micro-batches, from `consumed_samples` on.

    A last round that is not full is left out.
    """

    def __init__(
        self, total_samples: int, micro_batch_size: int, dp_rank: int, dp_size: int, consumed_samples: int
    ) -> None:
        assert 0 <= dp_rank < dp_size
        assert micro_batch_size > 0
        assert consumed_samples >= 0
        self.total_samples = total_samples
        self.micro_batch_size = micro_batch_size
        self.dp_rank = dp_rank
        self.dp_size = dp_size
        self.consumed_samples = consumed_samples

    def __iter__(self) -> Iterator[list[int]]:
        round_samples = self.micro_batch_size * self.dp_size
        first = self.consumed_samples + self.dp_rank * self.micro_batch_size
        for _ in range(len(self)):
            yield list(range(first, first + self.micro_batch_size))
            first += round_samples

    def __len__(self) -> int:
        return max(0, self.total_samples - self.consumed_samples) // (self.micro_batch_size * self.dp_size)


@dataclass(frozen=True)
class OneTensor:
    """A micro-batch as a single tensor, for its way from a worker.

    Every tensor that a worker sends is a piece of shared memory with a file descriptor of its own, which
    costs more than the numbers in it.
    """

    content: Tensor
    layout: tuple[tuple[str, torch.dtype, torch.Size, int], ...]

    @classmethod
    def pack(cls, samples: list[dict[str, Tensor]]) -> Self:
        """Samples stacked, then laid end to end."""
        batch: dict[str, Tensor] = default_collate(samples)
        layout, offset_bytes = [], 0
        for name, tensor in batch.items():
            layout.append((name, tensor.dtype, tensor.shape, offset_bytes))
            offset_bytes += math.ceil(tensor.nbytes / ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        # Storage that is shared from the start need not be copied when it is sent.
        storage = torch.UntypedStorage._new_shared(offset_bytes)
        content = torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[call-overload]
        packed = cls(content, tuple(layout))
        for name, tensor in packed.unpack().items():
            tensor.copy_(batch[name])
        return packed

    def unpack(self) -> dict[str, Tensor]:
        """The values of the samples by name, as parts of `content`."""
        return {
            name: self.content[offset : offset + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
            for name, dtype, shape, offset in self.layout
        }

    def pin_memory(self) -> "OneTensor":
        """What DataLoader's pinning thread calls."""
        return OneTensor(self.content.pin_memory(), self.layout)


class Loader(Iterator[dict[str, Tensor]]):
    """Micro-batches, one after the other; `close` ends the workers.

    StopIteration when no full round is left; TrainingError when a worker was killed; an error that a
    worker raised keeps its type.
    """

    def __init__(self, loader: DataLoader[dict[str, Tensor]]) -> None:
        self._loader = loader
        self._batches: Any = None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> dict[str, Tensor]:
        if self._batches is None:
            with warnings.catch_warnings():
                # Python warns of every fork beside threads; the module's docstring says why it is sound.
                warnings.filterwarnings("ignore", message=".*fork", category=DeprecationWarning)
                self._batches = iter(self._loader)
        try:
            batch = next(self._batches)
            return batch.unpack() if isinstance(batch, OneTensor) else batch
        except (RuntimeError, ConnectionError, EOFError) as error:
            # torch notices the death in one of two places: its watchdog, or a socket to the worker.
            of_watchdog = isinstance(error, RuntimeError)
            if self._loader.num_workers == 0 or (of_watchdog and "DataLoader worker (pid" not in str(error)):
                raise
            raise TrainingError(
                f"A loader process was killed, perhaps for want of memory ({error or type(error).__name__}). "
                "Resume from the last checkpoint: the order of samples will be the same. Fewer "
                "data.num_workers need less memory."
            ) from error

    def close(self) -> None:
        """End the worker processes now; otherwise they end with this object."""
        batches, self._batches = self._batches, None
        if batches is None or self._loader.num_workers == 0:
            return
        # Not when its last reference goes: an error on its way up holds one.
        batches._shutdown_workers()
        # It asks them to end, waits five seconds for each, and sends a SIGTERM, which they ignore.
        for worker in batches._workers:
            worker.kill()
            worker.join()


def build_loader(
    dataset: Dataset[dict[str, Tensor]],
    *,
    micro_batch_size: int,
    dp_rank: int,
    dp_size: int,
    consumed_samples: int,
    num_workers: int,
    prefetch_factor: int,
    pin_memory: bool,
) -> Loader:
    """Micro-batches of `dataset` for one data-parallel rank: each value of a sample, stacked [B, S].

    `pin_memory` needs CUDA: pass False on CPU. Create it in the main thread: workers start at the first
    batch and live no longer than the thread that asks for it.
    """
    sampler = MicroBatchSampler(len(dataset), micro_batch_size, dp_rank, dp_size, consumed_samples)  # type: ignore[arg-type]
    of_workers: dict[str, Any] = {}
    if num_workers > 0:
        of_workers = {
            "prefetch_factor": prefetch_factor,
            "worker_init_fn": _start_worker,
            "multiprocessing_context": "fork",
            "collate_fn": OneTensor.pack,
        }
    loader: DataLoader[dict[str, Tensor]] = DataLoader(
        dataset, batch_sampler=sampler, num_workers=num_workers, pin_memory=pin_memory, **of_workers
    )
    return Loader(loader)


def _start_worker(worker_id: int) -> None:
    start_helper_process()
    # A scheduler's SIGTERM goes to all processes of a job; the run needs its loader until it has saved.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
