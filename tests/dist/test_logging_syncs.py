"""Between log intervals nothing waits for the device but what training itself needs."""

import traceback
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.dist import tiny
from tests.dist.harness import run_distributed
from tests.unit.data_files import numbered_documents, write_dataset

# On CUDA each of these waits until the device has done everything before it.
WAITING = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.is_nonzero", "aten.equal")


class Waits(TorchDispatchMode):
    """Notes the file and function that each waiting operation was called from."""

    def __init__(self) -> None:
        super().__init__()
        self.callers: list[tuple[str, ...]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(function).startswith(WAITING):
            frames = [Path(frame.filename).name for frame in traceback.extract_stack()]
            self.callers.append(tuple(frames))
        return function(*args, **(kwargs or {}))


def waits_of_a_step(directory: Path) -> list[tuple[str, ...]]:
    """The files on the way to each wait in the third step of a run, from its batches on."""
    from megads.checkpoint.store import CheckpointStore
    from megads.mcore.groups import initialize_device, initialize_process_groups
    from megads.train.loop import Run
    from megads.train.signals import StopRequest

    write_dataset(directory / "a", numbered_documents(100, 10, 90), vocab_size=tiny.VOCABULARY)
    config, resolved = tiny.configure({
        "output_dir": str(directory / "run"),
        "training.log_interval": 100,
        "training.eval_interval": 0,
        "data.cache_dir": str(directory),
        "data.num_workers": 0,
        "data.sources": [{"name": "a", "subset": "a"}],
        "logging.tensorboard.enabled": False,
    })  # fmt: skip
    initialize_device(resolved.device)
    initialize_process_groups(resolved, timeout_minutes=4, seed=config.seed)
    with CheckpointStore(resolved.checkpoint_dir, keep_last_n=1, keep_best=False, async_save=False) as store:
        run = Run(config, resolved, store)
        run.stop = StopRequest()
        run.open_loader()
        assert run.loader is not None
        # Batches are checked on the host, where there is nothing to wait for.
        run.loader = iter([next(run.loader) for _ in range(3 * tiny.GLOBAL_BATCH // tiny.MICRO_BATCH)])
        for _ in range(2):
            run._one_step()
        with Waits() as waits:
            run._one_step()
        run.reporter.close()
        run.stop.close()
    return waits.callers


def test_a_step_waits_for_its_gradient_norm_alone(tmp_path: Path) -> None:
    [waits] = run_distributed(1, waits_of_a_step, directory=tmp_path)
    assert waits, "the gradient norm is read in every step"
    assert all("clip_grads.py" in files for files in waits), waits


def test_reading_a_number_of_the_device_is_noticed() -> None:
    with Waits() as waits:
        loss = torch.ones(3)
        float(loss.sum())
        loss[0].item()
        if loss.any():
            loss.nonzero()
    assert len(waits.callers) == 4
