"""Memory of every pipeline stage by part: what lies there always, and what is in flight at the peak.

Weights, gradients and optimizer state are `config.memory`'s, activations `plan.activations`', times the
micro-batches that the schedule has in flight: 1F1B (PipeDream-Flush, arXiv:2006.09503) or interleaved
(arXiv:2104.04473, section 2.2), as Megatron-Core runs them. On a GPU come in addition the temporaries of
backward, CUDA's context with NCCL's buffers, and a margin for what the allocator cannot use.
"""

from collections import Counter
from dataclasses import dataclass, fields
from functools import lru_cache

from megads.config.flops import ParameterCounts, count_parameters
from megads.config.memory import largest_layer, stage_memory, user_buffer_bytes
from megads.config.resolve import Resolved
from megads.config.schema import Config
from megads.plan.activations import Parts, SavedActivations

# CUDA's context, cuBLAS's workspaces and NCCL's buffers of a few communicators: 1.5 to 3 GiB are usual.
RUNTIME_BYTES = 5 * 2**29
# Of what is allocated and freed all the time. PyTorch's allocator splits blocks; routing is not even.
MARGIN_SHARE = 0.08


@dataclass(frozen=True)
class StageBytes:
    """Bytes of one process of pipeline rank `stage`, by part; `micro_batches` are those in flight.

    `activations` leaves out routed tokens (`dispatch`), MTP modules and logits; `workspace` is what
    backward makes for a while, recomputed layers included; `runtime`, with user buffers, and `margin` are 0
    on the CPU.
    """

    stage: int
    layers: int
    micro_batches: float
    weights: int
    gradients: int
    optimizer: int
    activations: int
    dispatch: int
    mtp: int
    logits: int
    workspace: int
    runtime: int
    margin: int

    @property
    def total(self) -> int:
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        return {part.name: getattr(self, part.name) for part in fields(self)[3:]}


def memory_by_stage(config: Config, resolved: Resolved) -> list[StageBytes]:
    """Every pipeline rank's, for the final batch size."""
    saved, counts = SavedActivations(config, resolved), count_parameters(config)
    return [memory_of_stage(saved, stage, counts) for stage in range(resolved.pp)]


def memory_of_stage(saved: SavedActivations, stage: int, counts: ParameterCounts) -> StageBytes:
    """One pipeline rank's, of the configuration and layout of `saved`; `counts`: the model's parameters."""
    config, resolved = saved.config, saved.resolved
    static = stage_memory(config, resolved, stage, counts)
    chunks = range(stage, len(resolved.pipeline_layout), resolved.pp)
    flying, in_flight = _peak(saved, stage, micro_batches_per_step(config, resolved))
    workspace = _workspace(saved, stage)
    cuda = resolved.device == "cuda"
    changing = sum(flying.values()) + workspace
    return StageBytes(
        stage=stage,
        layers=sum(resolved.pipeline_layout[chunk] for chunk in chunks),
        micro_batches=in_flight,
        weights=static.weights_bytes,
        gradients=static.gradients_bytes,
        optimizer=static.optimizer_bytes,
        activations=flying["attention"] + flying["ffn"],
        dispatch=flying["dispatch"],
        mtp=flying["mtp"],
        logits=flying["logits"],
        workspace=workspace,
        runtime=RUNTIME_BYTES + user_buffer_bytes(config, resolved) if cuda else 0,
        margin=round(MARGIN_SHARE * changing) if cuda else 0,
    )


def micro_batches_per_step(config: Config, resolved: Resolved) -> int:
    """Micro-batches of one replica at the final batch size."""
    return config.training.global_batch_size // (config.training.micro_batch_size * resolved.dp)


@lru_cache(maxsize=4096)
def in_flight(
    rank: int, pp: int, vpp: int, micro_batches: int, combined: bool = False
) -> tuple[tuple[int, ...], ...]:
    """Micro-batches of each model chunk of a rank whose backward has not run, at every peak that occurs.

    Megatron-Core's schedules: without interleaving pp - rank - 1 forward passes before the first
    backward, with it 2 (pp - rank - 1) + (vpp - 1) pp of chunks, taken pp micro-batches at a time. The
    `combined` schedule (`overlap_expert_parallel`) takes one more, to have two that are independent.
    """
    total = micro_batches * vpp
    warmup = pp - rank - 1 if vpp == 1 else 2 * (pp - rank - 1) + (vpp - 1) * pp + combined
    warmup = min(warmup, total)

    def chunk(position: int) -> int:
        return position % (pp * vpp) // pp if vpp > 1 else 0

    counts = Counter(chunk(position) for position in range(warmup))
    peaks = {tuple(counts[c] for c in range(vpp))} if warmup == total else set()
    # After one round of all chunks the pattern repeats.
    for step in range(min(total - warmup, 2 * pp * vpp)):
        counts[chunk(warmup + step)] += 1
        peaks.add(tuple(counts[c] for c in range(vpp)))
        counts[vpp - 1 - chunk(step) if vpp > 1 else 0] -= 1
    return tuple(sorted(peaks))


def _peak(saved: SavedActivations, stage: int, micro_batches: int) -> tuple[Parts, float]:
    """Bytes in flight at the worst moment, and how many micro-batches of the whole rank they are."""
    resolved = saved.resolved
    vpp = resolved.vpp or 1
    of_chunk = [saved.chunk(stage + resolved.pp * index) for index in range(vpp)]
    for index, parts in enumerate(of_chunk):
        if stage + resolved.pp * index < len(resolved.pipeline_layout) - 1:
            parts["attention"] += saved.hidden_bytes  # what was sent on is kept until its gradient comes
    sizes = [sum(parts.values()) for parts in of_chunk]
    counts = max(
        in_flight(stage, resolved.pp, vpp, micro_batches, saved.config.distributed.overlap_expert_parallel),
        key=lambda counts: sum(count * size for count, size in zip(counts, sizes, strict=True)),
    )
    flying: Parts = Counter()
    for count, parts in zip(counts, of_chunk, strict=True):
        flying.update({part: count * size for part, size in parts.items()})
    return flying, sum(counts) / vpp


def _workspace(saved: SavedActivations, stage: int) -> int:
    """What backward needs for a while: one layer recomputed and its gradients, or those of the logits."""
    kinds = saved.kinds_of_stage(stage)
    layers = [saved.recomputed_bytes(is_moe) + saved.layer_gradients(is_moe) for is_moe in kinds]
    last = stage == saved.resolved.pp - 1
    workspace = max([*layers, saved.logit_gradients() if last else 0], default=0)
    return workspace + _fully_sharded_workspace(saved)


def _fully_sharded_workspace(saved: SavedActivations) -> int:
    """Whole layers of ZeRO-2 and ZeRO-3: gradients of three on their way, weights of two in use or next."""
    zero, config = saved.config.distributed.zero_stage, saved.config
    if zero < 2:
        return 0
    weight_bytes = 4 if saved.resolved.precision == "fp32" else 2
    return largest_layer(config, saved.resolved) * (3 * 4 + (2 * weight_bytes if zero == 3 else 0))
