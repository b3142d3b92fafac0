"""Sharded state dicts to and from Megatron-Core's `torch_dist` files.

What Megatron-Core defines is used as it is: the mapping of local shards to global tensors, its save
planner, the format, and `dist_checkpointing.load`, so a checkpoint loads in any layout and with
Megatron-Core's own tools. What happens between plan and disk is ours, because Megatron-Core 0.19.2
writes in a process of its own, which does not fit here: the persistent worker divides by the number
of CUDA devices, the temporary one forks a process that runs gloo and OpenMP threads, both collect
results through a `multiprocessing.Manager`, and a disk error while rank 0 writes `.metadata` leaves
the other ranks waiting in a broadcast. A save is split in three:

1. `plan_save`, main thread, collective: plan, and copy of the tensors to host memory.
2. `PlannedSave.write`, any thread, no collectives: torch's own `FileSystemWriter`, flush, hash.
3. `PlannedSave.write_metadata`, rank 0, once all ranks have written.
"""

import io
import pickle
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, CheckpointingException, save_config
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from megads.checkpoint.manifest import FileEntry, seal_files
from megads.checkpoint.pickles import check_object
from megads.checkpoint.ranks import Ranks
from megads.errors import CheckpointError

COMMON_STATE_KEY = "common_state"  # where dist_checkpointing.load looks for what is not sharded
_LOAD_ERRORS = (
    CheckpointException, CheckpointingException, KeyError, ValueError, TypeError, RuntimeError,
    AssertionError, OSError, EOFError, pickle.UnpicklingError,
)  # fmt: skip


class _Writer(FileSystemWriter):
    """torch's writer without `storage_meta`, which would store the directory's path."""

    def storage_meta(self) -> None:
        return None


class _StagedPlanner(MCoreSavePlanner):  # type: ignore[misc]
    """A planner that hands out host copies taken at planning time, not the live tensors."""

    staged: dict[MetadataIndex, torch.Tensor | io.BytesIO]
    state_dict: dict[str, Any]

    def stage(self, plan: SavePlan, copy: bool) -> None:
        """Takes every item to host memory; `copy`: host tensors too, as training goes on with them."""
        live = [(item, super(_StagedPlanner, self).resolve_data(item)) for item in plan.items]
        self.staged = {item.index: _to_host(data, copy) for item, data in live}
        if any(isinstance(data, torch.Tensor) and data.is_cuda for _, data in live):
            torch.cuda.synchronize()  # the copies above do not block
        self.state_dict = {}  # a pending save keeps no device memory alive

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        return self.staged[write_item.index]


def _to_host(data: torch.Tensor | io.BytesIO, copy: bool) -> torch.Tensor | io.BytesIO:
    if not isinstance(data, torch.Tensor):
        return data
    tensor = data.detach()
    if "dequantize" in type(tensor).__dict__:  # Transformer Engine's FP8 tensors
        tensor = tensor.dequantize()
    if tensor.is_cuda:
        return tensor.to("cpu", non_blocking=True)
    return tensor.clone() if copy else tensor


@dataclass
class PlannedSave:
    """One rank's part of a save, its tensors in host memory."""

    directory: Path
    _writer: FileSystemWriter
    _planner: _StagedPlanner
    _plan: SavePlan
    _metadata: Metadata | None

    def write(self) -> tuple[list[WriteResult], dict[str, FileEntry]]:
        """Writes this rank's file, flushes it, and reads it back for its SHA-256; not a collective."""
        results: list[WriteResult] = []
        if self._plan.items:
            results = self._writer.write_data(self._plan, self._planner).wait()
        assert len(results) == len(self._plan.items), "the writer lost items"
        names = sorted({result.storage_data.relative_path for result in results})
        self._planner.staged.clear()
        return results, seal_files(self.directory, names)

    def write_metadata(self, results: list[list[WriteResult]]) -> dict[str, FileEntry]:
        """Rank 0: writes `.metadata` and `metadata.json` from all ranks' results."""
        assert self._metadata is not None, "only rank 0 holds the global plan"
        self._writer.finish(self._metadata, results)
        save_config(CheckpointingConfig("torch_dist", 1), str(self.directory))
        return seal_files(self.directory, [".metadata", "metadata.json"])


def plan_save(
    sharded_state_dict: dict[str, Any], directory: Path, ranks: Ranks, copy: bool, check: bool
) -> PlannedSave:
    """Plans a save into the existing, empty `directory`; collective. Consumes `sharded_state_dict`.

    `copy`: host tensors are cloned, as the caller goes on changing them. `check`: Megatron-Core
    validates that the shards cover their tensors, and objects are checked to be loadable again
    (`pickles`); needed once per structure, as it costs a gather of all shards' descriptions.
    """
    shards, common = save_preprocess(sharded_state_dict, check)
    shards[COMMON_STATE_KEY] = ShardedObject(COMMON_STATE_KEY, common, (1,), (0,), replica_id=ranks.rank)
    by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(shards, keep_only_main_replica=True)
    state_dict = mcore_to_pyt_state_dict(by_key, is_loading=False)

    planner = _StagedPlanner(
        dedup_replicated_tensors=False, flatten_state_dict=False, flatten_sharded_tensors=False
    )
    writer = _Writer(directory, sync_files=False, thread_count=1, per_thread_copy_ahead=0, overwrite=False)
    planner.set_up_planner(state_dict, is_coordinator=ranks.rank == 0)
    writer.set_up_storage_writer(ranks.rank == 0)
    local_plan = writer.prepare_local_plan(planner.create_local_plan())
    metadata = None
    if plans := ranks.gather(local_plan):
        _, metadata = planner.create_global_plan(plans)
    # A rank's files are named by its place in the list of plans; the other plans play no part in it.
    numbered = writer.prepare_global_plan([SavePlan([])] * ranks.rank + [local_plan])
    plan = planner.finish_plan(numbered[ranks.rank])
    planner.stage(plan, copy)
    if check:
        ranks.check_all(_unloadable_object(plan, planner))
    return PlannedSave(directory, writer, planner, plan, metadata)


def _unloadable_object(plan: SavePlan, planner: _StagedPlanner) -> str | None:
    """Says which object of the plan could not be loaded again; better now than at the resume."""
    for item in plan.items:
        if item.type == WriteItemType.BYTE_IO:
            data = planner.staged[item.index]
            assert isinstance(data, io.BytesIO)
            try:
                check_object(io.BytesIO(data.getvalue()), f"state {item.index.fqn!r} cannot be saved")
                if item.index.fqn.startswith(COMMON_STATE_KEY):
                    torch.load(io.BytesIO(data.getvalue()), weights_only=True)
            except (CheckpointError, pickle.UnpicklingError) as error:
                return str(error)
    return None


def load_sharded(path: Path, sharded_state_dict: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """Loads a verified checkpoint into `sharded_state_dict`'s layout; collective.

    Tensors are filled in place where the dict holds them; the result has plain tensors and objects
    in its place. Raises CheckpointError on every rank where the checkpoint lacks something or a
    shape differs.
    """
    state: dict[str, Any] = {}
    failure = None
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"torch\.distributed\.checkpoint")
            state = dist_checkpointing.load(sharded_state_dict, str(path))
    except _LOAD_ERRORS as error:
        failure = error
    try:
        ranks.check_all(None if failure is None else _explain(path, failure))
    except CheckpointError as error:
        raise error from failure
    return state


def _explain(path: Path, error: BaseException) -> str:
    if isinstance(error, CheckpointException) and error.failures:  # torch wraps the reason by rank
        error = next(iter(error.failures.values()))[0]
    text = " ".join(str(error).split())
    if len(text) > 400:
        text = text[:400] + " ..."
    return f"{path} does not fit this model: {type(error).__name__}: {text}"
