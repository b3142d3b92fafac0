"""Which layouts a number of GPUs could run: all that pass the real run's validation and fit, fastest first.

Varied are TP, PP, VPP, EP, ETP, CP, the micro-batch and recomputation; ZeRO 1 is taken wherever there is
data parallelism, since it costs no more communication than 0 (arXiv:1910.02054, section 7). TP stays inside a
node. Layers are spread so that the heaviest stage, with MTP and the head on the last one, is as light as can
be. Of recomputation the least that fits is kept: more of it is never faster in the same layout.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from megads.config.balance import balanced_layout
from megads.config.flops import ParameterCounts
from megads.config.memory import stage_memory
from megads.config.resolve import Resolved, resolve
from megads.config.schema import Config
from megads.config.validate_layout import layout_problems
from megads.plan.activations import SavedActivations, layer_kinds
from megads.plan.hardware import Gpu
from megads.plan.memory import RUNTIME_BYTES, memory_of_stage
from megads.plan.speed import ModelFlops, SpeedModel, StepTime

MICRO_BATCHES = (1, 2, 4, 8)
# Shorter pieces of a sequence than this leave a rank too little to do between exchanges.
LEAST_TOKENS_PER_CONTEXT_RANK = 4096
RECOMPUTE = (False, "selective", "full")


@dataclass(frozen=True)
class Layout:
    """A layout that fits: its settings, the memory of its heaviest stage, its predicted step."""

    settings: dict[str, Any]
    total_bytes: int
    step: StepTime


@dataclass(frozen=True)
class Search:
    """`layouts` fit, fastest first; `tried` counts those that pass validation, whether they fit or not."""

    tried: int
    layouts: tuple[Layout, ...]


def search(config: Config, world_size: int, gpu: Gpu) -> Search:
    """Every layout of `config` on `world_size` GPUs that fits, by predicted time of a step."""
    model = ModelFlops.of(config)
    plain = _with_sizes(config, {name: None if name in _OPEN else 1 for name in _SIZES})
    base = resolve(plain, world_size, True)
    trainings = [
        [
            config.training.model_copy(update={"micro_batch_size": size, "gradient_checkpointing": recompute})
            for recompute in RECOMPUTE
        ]
        for size in MICRO_BATCHES
    ]
    tried, found = 0, []
    for sizes in _sizes(config, world_size, gpu, model.counts):
        with_sizes, resolved = _with_sizes(config, sizes), _resolved(base, sizes)
        if _static_bytes(with_sizes, resolved, model.counts) > gpu.memory_bytes:
            tried += 1
            continue
        for by_recomputation in trainings:
            candidates = [with_sizes.model_copy(update={"training": one}) for one in by_recomputation]
            if next(layout_problems(candidates[0], world_size), None) is not None:
                continue
            tried += 1
            layout = _least_recomputation(candidates, sizes, resolved, gpu, model)
            if layout is None:
                break  # larger micro-batches need more
            found.append(layout)
    return Search(tried, tuple(sorted(found, key=lambda layout: layout.step.seconds)))


_TP, _PP, _VPP = "tensor_parallel_size", "pipeline_parallel_size", "virtual_pipeline_parallel_size"
_EP, _ETP, _CP = "expert_parallel_size", "expert_tensor_parallel_size", "context_parallel_size"
_SIZES = (_TP, _PP, _VPP, _EP, _ETP, _CP, "pipeline_layout")
_OPEN = (_VPP, "pipeline_layout")
_AUTOMATIC = {"data_parallel_size": -1, "sequence_parallel": None}


def _with_sizes(config: Config, sizes: dict[str, Any]) -> Config:
    return config.model_copy(update={"distributed": config.distributed.model_copy(update=_AUTOMATIC | sizes)})


def _resolved(base: Resolved, sizes: dict[str, Any]) -> Resolved:
    tp, pp, cp, ep, etp = (sizes[name] for name in (_TP, _PP, _CP, _EP, _ETP))
    return replace(
        base,
        tp=tp, pp=pp, vpp=sizes[_VPP], ep=ep, etp=etp, cp=cp,
        dp=base.world_size // (tp * pp * cp),
        edp=base.world_size // (pp * ep * etp),
        pipeline_layout=sizes["pipeline_layout"] or _even(sum(base.pipeline_layout), pp * (sizes[_VPP] or 1)),
        sequence_parallel=tp > 1,
    )  # fmt: skip


def _even(layers: int, stages: int) -> tuple[int, ...]:
    return (layers // stages,) * stages


def _sizes(config: Config, world_size: int, gpu: Gpu, counts: ParameterCounts) -> Iterator[dict[str, Any]]:
    """Layouts without micro-batch and recomputation that divide everything, each once."""
    model, training = config.model, config.training
    experts = model.moe.num_experts
    for tp in _divisors(min(gpu.per_node, world_size)):
        for cp in _divisors(max(1, training.seq_length // LEAST_TOKENS_PER_CONTEXT_RANK)):
            for pp in range(1, model.num_layers + 2):
                if world_size % (tp * cp * pp):
                    continue
                ranks = world_size // pp
                for vpp, layout in _pipelines(config, pp, counts):
                    for etp in sorted({1, tp}) if experts else (1,):
                        for ep in _divisors(experts) if experts else (1,):
                            if ranks % (ep * etp) == 0:
                                yield {
                                    _TP: tp, _PP: pp, _VPP: vpp, _EP: ep, _ETP: etp, _CP: cp,
                                    "pipeline_layout": layout,
                                    "zero_stage": 1 if ranks > tp else 0,
                                }  # fmt: skip


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _pipelines(
    config: Config, pp: int, counts: ParameterCounts
) -> Iterator[tuple[int | None, tuple[int, ...] | None]]:
    """(VPP, layers of each virtual stage; None: the same for all) for `pp` stages."""
    if pp == 1:
        yield None, None
        return
    for vpp in (None, 2, 4):
        stages = pp * (vpp or 1)
        layout = balanced_layout(config, stages, counts)
        if layout is not None:
            even = layout == _even(config.model.num_layers, stages)
            yield vpp, None if even else layout


def _static_bytes(config: Config, resolved: Resolved, counts: ParameterCounts) -> int:
    """What a GPU holds before any activation, on the heavier end of the pipeline."""
    ends = {0, resolved.pp - 1}
    return RUNTIME_BYTES + max(stage_memory(config, resolved, end, counts).total_bytes for end in ends)


def _least_recomputation(
    candidates: list[Config], sizes: dict[str, Any], resolved: Resolved, gpu: Gpu, model: ModelFlops
) -> Layout | None:
    stages = _distinct_stages(resolved.pipeline_layout, resolved.shape.is_moe, resolved.pp)
    for candidate in candidates:
        saved, heaviest = SavedActivations(candidate, resolved), 0
        for stage in stages:
            heaviest = max(heaviest, memory_of_stage(saved, stage, model.counts).total)
            if heaviest > gpu.memory_bytes:
                break
        else:
            training = candidate.training
            settings = {f"distributed.{name}": value for name, value in (_AUTOMATIC | sizes).items()}
            settings["training.micro_batch_size"] = training.micro_batch_size
            settings["training.gradient_checkpointing"] = training.gradient_checkpointing
            return Layout(settings, heaviest, SpeedModel(saved, gpu, model).step())
    return None


@lru_cache(maxsize=1024)
def _distinct_stages(layout: tuple[int, ...], is_moe: tuple[bool, ...], pp: int) -> tuple[int, ...]:
    """The first of the pipeline ranks with the same layers, which has most in flight, and both ends."""
    kinds = layer_kinds(layout, is_moe)
    first_of: dict[object, int] = {}
    for stage in range(1, pp - 1):
        first_of.setdefault(tuple((kind[False], kind[True]) for kind in kinds[stage::pp]), stage)
    return tuple(sorted({0, pp - 1, *first_of.values()}))
