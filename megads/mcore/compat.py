"""The Megatron-Core version MegaDS is built on, and quiet imports of it."""

import importlib.metadata
import logging
import warnings

from megads.errors import EnvironmentSetupError

SUPPORTED_VERSION = "0.19.2"


def check_megatron_version() -> None:
    """Refuse a Megatron-Core that the code has not been tested with.

    Raises:
        EnvironmentSetupError: it is missing, or another version.
    """
    try:
        found = importlib.metadata.version("megatron-core")
    except importlib.metadata.PackageNotFoundError:
        raise EnvironmentSetupError(
            f"megatron-core is not installed: pip install megatron-core=={SUPPORTED_VERSION}"
        ) from None
    if found != SUPPORTED_VERSION:
        raise EnvironmentSetupError(
            f"megatron-core {found} is installed, MegaDS needs {SUPPORTED_VERSION}: "
            f"pip install megatron-core=={SUPPORTED_VERSION}"
        )


def quiet_megatron() -> None:
    """Drop Megatron-Core's notices about optional packages; its errors stay."""
    warnings.filterwarnings("ignore", module=r"megatron\..*")
    warnings.filterwarnings("ignore", message=r".*(Transformer Engine|Apex|Triton|modelopt).*")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    # Without a driver, a CUDA toolkit on the machine is no reason for a warning on a CPU run.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
