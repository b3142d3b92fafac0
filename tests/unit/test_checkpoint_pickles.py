"""Crafted pickles are refused before anything in them runs."""

import collections
import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megads.checkpoint.pickles import check_object, check_pickles, refuse_unsafe_environment
from megads.errors import CheckpointError

FILES = {".metadata", "__0_0.distcp", "metadata.json"}


class Calls:
    """Pickles to a call of any function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def saved(value: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def write_checkpoint(path: Path, objects: bytes, **storage: Any) -> None:
    """A `.metadata` with one tensor and one object, the object's bytes at an offset."""
    chunk = ChunkStorageMetadata(torch.Size([0]), torch.Size([2]))
    tensor = TensorStorageMetadata(TensorProperties(torch.bfloat16), torch.Size([2]), [chunk])
    place = {"relative_path": "__0_0.distcp", "offset": 7, "length": len(objects)} | storage
    storage_data = {
        MetadataIndex("weight", [0]): _StorageInfo("__0_0.distcp", 0, 7),
        MetadataIndex("rng"): _StorageInfo(**place),
    }
    content = Metadata({"weight": tensor, "rng": BytesStorageMetadata()}, storage_data=storage_data)
    (path / ".metadata").write_bytes(pickle.dumps(content))
    (path / "__0_0.distcp").write_bytes(b"tensor." + objects)


def test_what_training_stores_is_accepted(tmp_path: Path) -> None:
    state = {
        "python": (3, (1, 2, 3), None), "numpy": np.random.get_state(), "torch": torch.get_rng_state(),
        "set": {1, 2}, "order": collections.OrderedDict(a=torch.nn.Parameter(torch.ones(2))),
        "dtype": torch.bfloat16, "bytes": b"\x00\xff", "buffer": io.BytesIO(b"x"), "scalar": np.float64(0.5),
        "size": torch.Size([1]), "half": torch.ones(2, dtype=torch.float16), "device": torch.device("cpu"),
    }  # fmt: skip
    write_checkpoint(tmp_path, saved([state]))
    check_pickles(tmp_path, FILES)


ATTACKS: dict[str, Callable[[Path], Any]] = {
    "os.system": lambda mark: Calls(os.system, f"touch {mark}"),
    "builtins.exec": lambda mark: Calls(exec, f"open({str(mark)!r}, 'w')"),
    "builtins.getattr": lambda mark: Calls(getattr, "text", "upper"),
    "torch.load": lambda mark: Calls(torch.load, str(mark)),
    "nested": lambda mark: {"deep": [collections.OrderedDict(a=Calls(os.mkdir, str(mark)))]},
    "in an object array": lambda mark: np.array([Calls(os.mkdir, str(mark))], dtype=object),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_object_that_calls_is_refused_and_not_run(tmp_path: Path, attack: str) -> None:
    mark = tmp_path / "executed"
    write_checkpoint(tmp_path, saved([ATTACKS[attack](mark)]))
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp, object 'rng': refused: it names"):
        check_pickles(tmp_path, FILES)
    assert not mark.exists()


@pytest.mark.parametrize("attack", ATTACKS)
def test_metadata_that_calls_is_refused_and_not_run(tmp_path: Path, attack: str) -> None:
    mark = tmp_path / "executed"
    write_checkpoint(tmp_path, saved([1]))
    (tmp_path / ".metadata").write_bytes(pickle.dumps({"x": ATTACKS[attack](mark)}))
    with pytest.raises(CheckpointError, match=r"\.metadata: refused: it names"):
        check_pickles(tmp_path, FILES)
    assert not mark.exists()


def test_the_attack_works_where_nothing_checks(tmp_path: Path) -> None:
    """Or the tests above would prove nothing."""
    mark = tmp_path / "executed"
    torch.load(io.BytesIO(saved([ATTACKS["os.system"](mark)])), weights_only=False)
    assert mark.exists()


def test_a_pickle_must_not_change_a_class(tmp_path: Path) -> None:
    # GLOBAL torch.Size, then BUILD with (None, {"numel": 1}): sets an attribute of the class itself.
    code = b"\x80\x02ctorch\nSize\n(N}X\x05\x00\x00\x00numelK\x01stb."
    write_checkpoint(tmp_path, saved([1]))
    (tmp_path / ".metadata").write_bytes(code)
    with pytest.raises(CheckpointError, match="metadata: refused"):
        check_pickles(tmp_path, FILES)


@pytest.mark.parametrize(
    "storage",
    [{"relative_path": "../outside"}, {"relative_path": "/etc/hostname"}, {"transform_descriptors": ["x"]}],
)
def test_data_outside_the_listed_files_is_refused(tmp_path: Path, storage: dict) -> None:
    write_checkpoint(tmp_path, saved([1]), **storage)
    with pytest.raises(CheckpointError, match=r"\.metadata: refused: 'rng' lies in"):
        check_pickles(tmp_path, FILES)


def test_other_formats_that_torch_would_load_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not in torch's zip format"):
        check_object(io.BytesIO(saved([1], _use_new_zipfile_serialization=False)), "legacy")
    script = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), script)
    with pytest.raises(CheckpointError, match="TorchScript"):
        check_object(io.BytesIO(script.getvalue()), "script")


@pytest.mark.parametrize("name", ["common.pt", "weights.pkl", "sub/x.py"])
def test_files_that_do_not_belong_are_refused(tmp_path: Path, name: str) -> None:
    write_checkpoint(tmp_path, saved([1]))
    with pytest.raises(CheckpointError, match=name):
        check_pickles(tmp_path, FILES | {name})


@pytest.mark.parametrize("garbage", [b"", b"\x80", b"not a pickle", pickle.dumps([1]), pickle.dumps(None)])
def test_garbage_metadata_is_refused(tmp_path: Path, garbage: bytes) -> None:
    (tmp_path / ".metadata").write_bytes(garbage)
    with pytest.raises(CheckpointError, match="metadata: refused"):
        check_pickles(tmp_path, FILES)


def test_switching_torchs_protection_off_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_unsafe_environment()
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "0")
    refuse_unsafe_environment()
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(CheckpointError, match="TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"):
        refuse_unsafe_environment()
