"""Which library computes the layers: torch itself, or Transformer Engine. Chosen once for a run.

A rule, not a fallback in the middle: the choice follows from the configuration, the device and what can be
imported, is logged when the model is built, and is compared over all ranks before the first step.
"""

import functools
import importlib.metadata
import warnings
from dataclasses import dataclass
from typing import Literal

from megads.config.resolve import Resolved
from megads.config.schema import Config
from megads.errors import EnvironmentSetupError

Name = Literal["native", "transformer_engine"]
INSTALL = "pip install 'megads[gpu]'"


@dataclass(frozen=True)
class Choice:
    """`why` is for people: what led to it."""

    name: Name
    why: str


def choose_backend(config: Config, resolved: Resolved) -> Choice:
    """The backend of a run.

    "auto" is Transformer Engine on CUDA in 16 bits where it can be imported. Its products of FP32 numbers
    are rounded to TF32, so an FP32 run is native, as is one on the CPU.

    Raises:
        EnvironmentSetupError: Transformer Engine is asked for, or needed, and cannot be imported.
    """
    choice, distributed = _choose(config, resolved), config.distributed
    for setting, asked in (
        ("delay_wgrad_compute", distributed.delay_wgrad_compute),
        ("tp_comm_overlap", distributed.tp_comm_overlap),
    ):
        if asked and choice.name == "native":
            raise EnvironmentSetupError(
                f"distributed.{setting} needs Transformer Engine, and the layers would be native: "
                f"{choice.why}. Install it ({INSTALL}), or set {setting} to false"
            )
    return choice


def _choose(config: Config, resolved: Resolved) -> Choice:
    match config.model.backend:
        case "native":
            return Choice("native", "model.backend = native")
        case "transformer_engine":
            if problem := transformer_engine_problem():
                raise EnvironmentSetupError(
                    f'model.backend = "transformer_engine": {problem}; {INSTALL}, or set it to "auto"'
                )
            return Choice("transformer_engine", "model.backend = transformer_engine")
    if resolved.device == "cpu":
        return Choice("native", "on the CPU")
    if resolved.precision == "fp32":
        return Choice("native", "in FP32, which Transformer Engine would round to TF32")
    if problem := transformer_engine_problem():
        return Choice("native", problem)
    return Choice("transformer_engine", f"version {importlib.metadata.version('transformer-engine')}")


@functools.cache
def transformer_engine_problem() -> str | None:
    """Why Transformer Engine cannot be used from Megatron-Core here; None: it can."""
    import torch  # noqa: F401 (its libraries must be loaded before Transformer Engine's)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import transformer_engine.pytorch  # noqa: F401
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("transformer_engine"):
            return "Transformer Engine is not installed"
        return f"Transformer Engine cannot be imported: {error}"
    except (ImportError, OSError, RuntimeError) as error:
        return f"Transformer Engine cannot be imported: {' '.join(str(error).split())}"
    return None
