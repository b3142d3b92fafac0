"""Refuses checkpoints whose pickles name anything but plain data.

The `torch_dist` format holds pickles: `.metadata` is read with `pickle.load`, and every object that
is not a tensor lies in a `.distcp` file and is read with `torch.load(weights_only=False)`; both run
code of the checkpoint's maker. Here each of them is read first with an unpickler in which every
name resolves to an inert stand-in, so that the check itself can execute nothing, and a name off the
list is a CheckpointError. Tensors need no check: torch reads them with `weights_only=True`.

Source of the attack: Megatron CVE-2026-24150 and CVE-2026-24152; Python's `pickle` documentation,
"Restricting Globals".
"""

import io
import os
import pickle
from pathlib import Path
from typing import IO, Any, Self

import torch

from megads.errors import CheckpointError

_DTYPES = {name for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
_STORAGES = {f"{kind}Storage" for kind in (
    "Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool",
    "ComplexFloat", "ComplexDouble", "Untyped",
)}  # fmt: skip
_BUILTINS = {"set", "frozenset", "bytearray", "complex", "slice", "range", "xrange"}
_DCP = "torch.distributed.checkpoint.metadata"

METADATA_NAMES: dict[str, set[str]] = {
    _DCP: {
        "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties",
        "ChunkStorageMetadata", "StorageMeta", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch": _DTYPES | {"Size"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
}  # fmt: skip
"""What `.metadata` may name, by module."""

OBJECT_NAMES: dict[str, set[str]] = {
    **dict.fromkeys(("builtins", "__builtin__"), _BUILTINS),  # the second in pickle protocol 2
    "collections": {"OrderedDict", "deque"},
    "_codecs": {"encode"},  # bytes in pickle protocol 2
    "_io": {"BytesIO"},
    "torch": _DTYPES | _STORAGES | {"Size", "device"},
    "torch.storage": {"UntypedStorage", "TypedStorage"},
    "torch._utils": {"_rebuild_tensor_v2", "_rebuild_parameter"},
    "torch.serialization": {"_get_layout"},
    "numpy": {"ndarray", "dtype"},
    "numpy._core.multiarray": {"_reconstruct", "scalar"},
    "numpy.core.multiarray": {"_reconstruct", "scalar"},  # numpy 1
    "numpy._core.numeric": {"_frombuffer"},
}
"""What an object in a checkpoint may name: containers, tensors, arrays, generator states."""

_UNSAFE_VARIABLE = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


class _Frozen(type):
    """Class of the stand-ins: a pickle's BUILD must not set attributes on a name it looked up."""

    def __setattr__(cls, name: str, value: Any) -> None:
        raise pickle.UnpicklingError(f"the pickle changes {cls.__name__}")


class _StandIn(metaclass=_Frozen):
    """An object of any allowed class: remembers how it was made and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        self = super().__new__(cls)
        self.state = {}
        return self

    state: Any

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass

    def extend(self, values: Any) -> None:
        pass

    def add(self, value: Any) -> None:
        pass


class _InertUnpickler(pickle.Unpickler):
    """Rebuilds the skeleton of a pickle out of stand-ins."""

    def __init__(self, file: IO[bytes], allowed: dict[str, set[str]]) -> None:
        super().__init__(file)
        self._allowed = allowed

    def find_class(self, module: str, name: str) -> Any:
        if name not in self._allowed.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which a checkpoint has no use for")
        return _Frozen(name, (_StandIn,), {"__module__": module})

    def persistent_load(self, pid: Any) -> Any:
        return _StandIn()


def refuse_unsafe_environment() -> None:
    """Refuses the environment variable that turns torch's own protection off."""
    if os.environ.get(_UNSAFE_VARIABLE, "").lower() not in ("", "0", "n", "no", "false"):
        raise CheckpointError(
            f"{_UNSAFE_VARIABLE} is set: with it torch runs any code that a checkpoint holds; unset it"
        )


def check_object(data: IO[bytes], what: str) -> None:
    """Checks one object written by `torch.save`; `what` names it in the CheckpointError."""
    try:
        if data.read(4) != b"PK\x03\x04":
            raise pickle.UnpicklingError("it is not in torch's zip format")
        data.seek(0)
        reader = torch._C.PyTorchFileReader(data)  # the parser that torch.load uses, no second opinion
        if "constants.pkl" in reader.get_all_records():
            raise pickle.UnpicklingError("it is a TorchScript archive")
        _InertUnpickler(io.BytesIO(reader.get_record("data.pkl")), OBJECT_NAMES).load()
    except Exception as error:  # a hostile pickle can make the unpickler raise anything
        raise CheckpointError(f"{what}: refused: {error}") from error


def check_pickles(path: Path, files: set[str]) -> None:
    """Checks every pickle of the checkpoint at `path`, whose manifest lists `files`.

    Raises CheckpointError naming the file: at names off the lists, at data that would be read from
    outside the listed files, at a `common.pt` (which this package never writes).
    """
    for name in files:
        if name != ".metadata" and not name.endswith((".distcp", ".json")):
            raise CheckpointError(f"{path / name}: no such file belongs to a torch_dist checkpoint")
    objects = _object_locations(path / ".metadata", files)
    for key, (name, offset, length) in sorted(objects.items()):
        with open(path / name, "rb") as file:
            file.seek(offset)
            check_object(io.BytesIO(file.read(length)), f"{path / name}, object {key!r}")


def _object_locations(metadata: Path, files: set[str]) -> dict[str, tuple[str, int, int]]:
    """(file, offset, length in bytes) of each object that is not a tensor, from a checked `.metadata`."""
    try:
        with open(metadata, "rb") as file:
            content = _InertUnpickler(file, METADATA_NAMES).load().state
        kinds = {key: type(value).__name__ for key, value in content["state_dict_metadata"].items()}
        objects: dict[str, tuple[str, int, int]] = {}
        for index, info in content["storage_data"].items():
            key, place = index.state["fqn"], info.state
            if place["relative_path"] not in files or place.get("transform_descriptors"):
                raise pickle.UnpicklingError(f"{key!r} lies in {place['relative_path']!r}")
            if kinds[key] != "TensorStorageMetadata":
                if key in objects:
                    raise pickle.UnpicklingError(f"object {key!r} is there twice")
                objects[key] = (place["relative_path"], int(place["offset"]), int(place["length"]))
        return objects
    except Exception as error:  # as above
        raise CheckpointError(f"{metadata}: refused: {error}") from error
