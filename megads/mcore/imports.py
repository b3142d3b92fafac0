"""Importing what is large: torch and Megatron-Core, without what no run uses. Imports neither by itself."""

import contextlib
import gc
import sys
from collections.abc import Iterator

# Imported by Megatron-Core where they are installed: by its timers, which we do not use, and for indexed
# datasets in S3, which we fetch ourselves. Together they take half as long as all else it imports.
UNUSED_PACKAGES = ("wandb", "torch.utils.tensorboard", "boto3")


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
    """For imports: they make a million objects of which none is garbage, and looking for it takes a tenth.

    What exists at the end is exempt from later collections too, which makes those of training shorter.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextlib.contextmanager
def without_packages(*names: str) -> Iterator[None]:
    """Make imports of `names` fail as if they were not installed, unless they have been imported already.

    By None in `sys.modules`, as Python's reference has it (5.3.1, The module cache).
    """
    hidden = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


def import_megatron() -> None:
    """Import what a run uses of Megatron-Core. A CPU run has more to do before: see `mcore.cpu`."""
    with without_packages(*UNUSED_PACKAGES):
        import megatron.core
        import megatron.core.datasets.gpt_dataset  # noqa: F401
