"""What the schema knows but this version or this machine cannot do: refused with the nearest thing.

A feature that arrives loses its line here, and only here.
"""

from collections.abc import Iterator
from importlib.util import find_spec

from megads.config.resolve import uses_device
from megads.config.schema import Config


def not_yet(config: Config, cuda: bool) -> Iterator[str]:
    """Requests that would otherwise be silently ignored, or fail deep inside a library."""
    yield from _missing_features(config)
    yield from _wrong_device(config, cuda)


def _missing_features(config: Config) -> Iterator[str]:
    mla = config.model.mla
    # (asked for, setting, what is missing, nearest thing that works)
    table = [
        (mla.use_fp8_kv, "model.mla.use_fp8_kv", "an FP8 latent cache", "false"),
    ]
    for asked, setting, what, nearest in table:
        if asked:
            yield f"{setting}: {what} does not work in this version yet; nearest: {nearest}"


def _wrong_device(config: Config, cuda: bool) -> Iterator[str]:
    device, backend = uses_device(config, cuda), config.distributed.backend
    if device == "cuda" and not cuda:
        yield 'distributed.device = "cuda" but no CUDA device is visible here: use "auto" or "cpu"'
    if device == "cpu" and config.training.use_fp16:
        yield "training.use_fp16 needs CUDA, and this run is on the CPU: use_bf16 = true (the CPU runs FP32)"
    if device == "cpu" and config.model.backend == "transformer_engine":
        yield 'model.backend = "transformer_engine" needs CUDA, and this run is on the CPU: use "auto"'
    if device == "cpu" and config.distributed.zero_offload:
        yield (
            "distributed.zero_offload needs CUDA: a run on the CPU has its optimizer state in host memory "
            "already: set it to false"
        )
    if device == "cpu" and backend == "nccl":
        yield 'distributed.backend = "nccl" needs CUDA, and this run is on the CPU: use "auto" or "gloo"'
    if device == "cuda" and cuda and backend == "gloo":
        yield (
            'distributed.backend = "gloo" cannot carry the collectives of a CUDA run: use "auto", or '
            'distributed.device = "cpu"'
        )


def missing_packages(config: Config) -> Iterator[str]:
    """Optional packages that an enabled setting needs and this environment lacks."""
    if config.logging.wandb.enabled and find_spec("wandb") is None:
        yield (
            "logging.wandb.enabled needs the wandb package, which is not installed: pip install "
            "'megads[wandb]', or set it to false (metrics.jsonl and TensorBoard are written anyway)"
        )
    if config.logging.tensorboard.enabled and find_spec("tensorboard") is None:
        yield (
            "logging.tensorboard.enabled needs the tensorboard package, which is not installed: "
            "pip install tensorboard, or set it to false (metrics.jsonl is written anyway)"
        )
