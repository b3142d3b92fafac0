"""Delayed scaling: largest values of earlier steps, what they make of the scale, and how both are saved.

Emulated products keep a history each. It changes once per optimizer step, when `advance_histories` takes in
the largest values of all its micro-batches on all ranks, so what is recomputed for backward is rounded alike.
(Transformer Engine advances its own with each pass.) As with every recipe but this one, the other state of
FP8 is none: histories alone have to be saved for an exact resume, those of Transformer Engine's modules too.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedObject
from megatron.core.fp8_utils import get_fp8_recipe
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_model_config
from torch import Tensor

from megads.config.schema import FP8
from megads.model.fp8_rounding import exact_scale

INPUT, WEIGHT, GRADIENT = range(3)
FORMATS = {
    "e4m3": (torch.float8_e4m3fn, torch.float8_e4m3fn, torch.float8_e4m3fn),
    "hybrid": (torch.float8_e4m3fn, torch.float8_e4m3fn, torch.float8_e5m2),
}


_WAYS = ("scaling_fwd", "scaling_bwd")


class AmaxHistory:
    """Of one product of E matrices: largest values [steps, 3, E] and scales [3, E].

    Of inputs, weights and gradients. The first row is the step under way, the others from the oldest to the
    newest, as in Transformer Engine; scales start at 1.
    """

    def __init__(self, fp8: FP8, matrices: int) -> None:
        device = torch.cuda.current_device()
        self.most_recent = fp8.amax_compute_algo == "most_recent"
        self.largest = [torch.finfo(dtype).max for dtype in FORMATS[fp8.format]]
        self.amax_history = torch.zeros(fp8.amax_history_len, 3, matrices, device=device)
        self.scale = torch.ones(3, matrices, device=device)

    def record(self, operand: int, amax_E: Tensor) -> None:
        """Take in the largest values of an operand of this step; twice the same changes nothing."""
        torch.maximum(self.amax_history[0, operand], amax_E, out=self.amax_history[0, operand])

    def advance(self) -> None:
        """End a step: new scales from the history, which loses its oldest row."""
        amax = self.amax_history[0] if self.most_recent else self.amax_history.amax(dim=0)
        for operand, largest in enumerate(self.largest):
            known = (amax[operand] > 0) & amax[operand].isfinite()
            scale = exact_scale(amax[operand], largest)
            self.scale[operand] = torch.where(known, scale, self.scale[operand])
        self.amax_history.copy_(self.amax_history.roll(-1, dims=0))
        self.amax_history[0].zero_()


def _histories(chunks: list[torch.nn.Module]) -> Iterator[tuple[str, AmaxHistory, bool]]:
    """(name, history, whether of experts) of all emulated products of a rank."""
    for index, chunk in enumerate(chunks):
        for name, module in chunk.named_modules():
            of_experts = hasattr(module, "expert_weights")
            for product, history in getattr(module, "amax_histories", {}).items():
                yield f"{index}.{name}.{product}", history, of_experts


@torch.no_grad()
def advance_histories(chunks: list[torch.nn.Module], groups: ProcessGroupCollection) -> None:
    """End a step for all emulated products with delayed scaling; collective where there are any."""
    found = list(_histories(chunks))
    for experts in (False, True):
        rows = [history.amax_history[0] for _, history, of_experts in found if of_experts == experts]
        if not rows:
            continue
        together = torch.cat([row.flatten() for row in rows])
        for group in (groups.expt_tp, groups.expt_dp) if experts else (groups.tp_dp_cp,):
            dist.all_reduce(together, op=dist.ReduceOp.MAX, group=group)
        for row, reduced in zip(rows, together.split([row.numel() for row in rows]), strict=True):
            row.copy_(reduced.view_as(row))
    for _, history, _ in found:
        history.advance()


def _engine_modules(chunks: list[torch.nn.Module]) -> Iterator[tuple[str, Any]]:
    """Transformer Engine's modules: what has its FP8 metadata."""
    for index, chunk in enumerate(chunks):
        for name, module in chunk.named_modules():
            if hasattr(module, "fp8_meta"):
                yield f"{index}.{name}", module


def _saved(history: Any) -> dict[str, Tensor]:
    return {"amax": history.amax_history.cpu(), "scale": history.scale.cpu()}


def _restore(history: Any, saved: dict[str, Tensor]) -> None:
    """Of a history of another length the newest rows that both have."""
    new, old = history.amax_history, saved["amax"]
    finished = min(len(new), len(old)) - 1
    new[0] = old[0]
    new[len(new) - finished :] = old[len(old) - finished :]
    history.scale.copy_(saved["scale"])


def sharded_histories(chunks: list[torch.nn.Module]) -> ShardedObject:
    """Histories and scales of this rank's products, as an object of a sharded checkpoint.

    Of Transformer Engine's modules too, whose own `_extra_state` is a pickle that nobody should load.
    """
    states: dict[str, dict[str, Any]] = {
        name: {"all": _saved(history)} for name, history, _ in _histories(chunks)
    }
    for name, module in _engine_modules(chunks):
        meta = module.fp8_meta
        if all(hasattr(meta.get(way), "amax_history") for way in _WAYS):
            states[name] = {way: _saved(meta[way]) for way in _WAYS} | {"num_gemms": meta["num_gemms"]}
    return ShardedObject("fp8_histories", states, (dist.get_world_size(),), (dist.get_rank(),), replica_id=0)


@torch.no_grad()
def restore_histories(chunks: list[torch.nn.Module], states: dict[str, Any]) -> bool:
    """Put loaded histories and scales back; whether each is of a product of this model, and each has one.

    Those of another library's modules are not, nor those of layers that were or are kept in BF16.
    """
    emulated = {name: history for name, history, _ in _histories(chunks)}
    engine = dict(_engine_modules(chunks))
    for name in emulated.keys() & states.keys():
        _restore(emulated[name], states[name]["all"])
    for name in engine.keys() & states.keys():
        meta = engine[name].fp8_meta
        meta["num_gemms"] = states[name]["num_gemms"]
        meta["recipe"] = get_fp8_recipe(get_model_config(chunks[0]))
        engine[name].init_fp8_meta_tensors(meta["recipe"])
        for way in _WAYS:
            _restore(meta[way], states[name][way])
    return emulated.keys() <= states.keys() <= emulated.keys() | engine.keys()
