"""A DeepSeek-V3-shaped model of a few thousand parameters, and what tests do with it in a process.

Everything here runs inside a worker of `harness.run_distributed`, except `LAYOUTS`, `assemble` and
`merge`, which prepare and read the workers' results.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from megads.config.scalars import Scalars

if TYPE_CHECKING:
    from megads.config.resolve import Resolved
    from megads.config.schema import Config
    from megads.train.step import TrainingStep

VOCABULARY, SEQ_LENGTH, GLOBAL_BATCH, MICRO_BATCH = 96, 16, 8, 4

BASE: dict[str, Any] = {
    "model.num_layers": 4,
    "model.vocab_size": VOCABULARY,
    "model.first_k_dense_replace": 1,
    # Large weights: scores of different experts lie far apart, so that rounding changes no choice.
    "model.init_method_std": 0.15,
    "model.mla.d_model": 32,
    "model.mla.d_latent": 16,
    "model.mla.q_lora_rank": 24,
    "model.mla.num_heads": 4,
    "model.mla.qk_nope_head_dim": 8,
    "model.mla.qk_rope_head_dim": 4,
    "model.mla.v_head_dim": 12,
    "model.mla.max_context_length": SEQ_LENGTH,
    "model.moe.num_experts": 8,
    "model.moe.expert_intermediate_size": 16,
    "model.moe.num_shared_experts": 1,
    "model.moe.use_aux_loss_free": True,
    "model.moe.bias_update_rate": 0.01,
    "model.moe.n_group": 2,
    "model.moe.topk_group": 1,
    "model.moe.routed_scaling_factor": 2.5,
    "model.moe.router_aux_loss_weight": 0.02,
    "training.seq_length": SEQ_LENGTH,
    "training.global_batch_size": GLOBAL_BATCH,
    "training.micro_batch_size": MICRO_BATCH,
    "training.use_mtp": True,
    "training.num_predict_tokens": 3,
    "training.train_steps": 20,
    "training.lr_warmup_steps": 0,
    "training.learning_rate": 2e-3,
    "distributed.device": "cpu",
    "data.sources": [{"name": "random", "path": "random"}],
}

_TP, _PP = "distributed.tensor_parallel_size", "distributed.pipeline_parallel_size"
_VPP, _LAYOUT = "distributed.virtual_pipeline_parallel_size", "distributed.pipeline_layout"
_EP, _ETP = "distributed.expert_parallel_size", "distributed.expert_tensor_parallel_size"
_CP, _ZERO = "distributed.context_parallel_size", "distributed.zero_stage"


class Layout(NamedTuple):
    """Processes, and the settings that say what each does."""

    processes: int
    settings: dict[str, Any]


# Micro-batches are no part of what a step computes (the sequence loss is per sequence), so each layout has
# as many as make it accumulate gradients and fill its pipeline. With many collectives fewer are faster.
_SMALL = {"training.micro_batch_size": MICRO_BATCH // 2}
_WHOLE = {"training.micro_batch_size": GLOBAL_BATCH}

LAYOUTS = {
    "single": Layout(1, {}),
    "single-zero0": Layout(1, {_ZERO: 0}),
    "dp2": Layout(2, _SMALL),
    "dp2-zero0": Layout(2, _SMALL | {_ZERO: 0}),
    "dp2-no-overlap": Layout(
        2, _SMALL | {"distributed.overlap_grad_reduce": False, "distributed.overlap_param_gather": False}
    ),
    "tp2": Layout(2, {_TP: 2}),
    "pp2": Layout(2, _SMALL | {_PP: 2}),
    "pp2-uneven": Layout(2, _SMALL | {_PP: 2, _LAYOUT: [3, 1]}),
    "pp2-empty-last": Layout(2, {_PP: 2, _LAYOUT: [4, 0]}),
    "pp2-vpp2": Layout(2, _SMALL | {_PP: 2, _VPP: 2}),
    "ep2": Layout(2, _SMALL | {_EP: 2}),
    "etp2": Layout(2, _SMALL | {_ETP: 2}),
    "tp2-etp2": Layout(2, _WHOLE | {_TP: 2, _ETP: 2}),
    "cp2": Layout(2, {_CP: 2}),
    "tp2-ep2": Layout(2, _WHOLE | {_TP: 2, _EP: 2}),
    "dp2-zero2": Layout(2, _SMALL | {_ZERO: 2}),
    "dp2-zero3": Layout(2, _SMALL | {_ZERO: 3}),
    "cp2-zero3": Layout(2, {_CP: 2, _ZERO: 3}),
    "etp2-zero2": Layout(2, _SMALL | {_ETP: 2, _ZERO: 2}),
    "tp2-pp2": Layout(4, {_TP: 2, _PP: 2}),
    "pp2-ep2": Layout(4, _SMALL | {_PP: 2, _EP: 2}),
    "tp2-ep2-zero3": Layout(4, {_TP: 2, _EP: 2, _ZERO: 3}),
    "tp2-cp2": Layout(4, _WHOLE | {_TP: 2, _CP: 2}),
}


# --- in a worker ------------------------------------------------------------------------------


def configure(settings: dict[str, Any]) -> tuple["Config", "Resolved"]:
    """The configuration of `BASE` with `settings` on top, checked, for this job's processes."""
    from megads.config import validate
    from megads.config.loader import load_config
    from megads.config.resolve import resolve
    from megads.mcore.groups import world_size_from_environment

    config, world_size = load_config(None, BASE | settings), world_size_from_environment()
    cuda = config.distributed.device == "cuda"
    validate.check(config, world_size, cuda)
    return config, resolve(config, world_size, cuda)


def start(settings: dict[str, Any]) -> "TrainingStep":
    """The model and optimizer of `BASE` with `settings` on top, in this process's layout, freshly seeded.

    In a job of one process it can be called again.
    """
    import torch.distributed as dist

    from megads.mcore.groups import destroy_process_groups, initialize_device, initialize_process_groups

    config, resolved = configure(settings)
    initialize_device(resolved.device, config.training.deterministic)
    if dist.is_initialized():
        destroy_process_groups()
    initialize_process_groups(resolved, timeout_minutes=4, seed=config.seed)
    from megads.train.step import TrainingStep

    return TrainingStep(config, resolved)


def scalars(step: "TrainingStep", **changes: float) -> Scalars:
    """Constant schedules: the values of the configuration."""
    training, moe = step.config.training, step.config.model.moe
    constant = Scalars(
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        mtp_loss_weight=training.mtp_loss_weight,
        bias_update_rate=moe.bias_update_rate,
        aux_loss_weight=moe.router_aux_loss_weight,
        router_temperature=moe.router_temperature,
        router_noise_std=moe.router_noise_std,
        seq_length=training.seq_length,
    )
    return replace(constant, **changes)


def global_batch(
    index: int, *, masked: bool = False, documents: bool = False, seq_length: int = SEQ_LENGTH
) -> dict[str, Tensor]:
    """Batch number `index` of the run [GLOBAL_BATCH, seq_length], the same in every layout.

    `masked` takes the loss off a fifth of the tokens, `documents` cuts each sequence in two or three.
    """
    generator = torch.Generator().manual_seed(1000 + index)
    shape = (GLOBAL_BATCH, seq_length)
    text = torch.randint(0, VOCABULARY, (GLOBAL_BATCH, seq_length + 1), generator=generator)
    mask = torch.rand(shape, generator=generator) > (0.2 if masked else -1.0)
    starts = torch.rand(shape, generator=generator) < (0.1 if documents else -1.0)
    starts[:, 0] = False
    places = torch.arange(seq_length).expand(shape)
    last_start = torch.where(starts, places, 0).cummax(dim=1).values
    return {
        "tokens": text[:, :-1],
        "labels": text[:, 1:],
        "loss_mask": mask.float(),
        "position_ids": places - last_start,
        "document_ids": starts.cumsum(dim=1),
    }


def micro_batches(step: "TrainingStep", batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """This replica's part of a global batch: every dp-th micro-batch."""
    from megatron.core import parallel_state

    size = step.config.training.micro_batch_size
    names, columns = list(batch), zip(*(tensor.split(size) for tensor in batch.values()), strict=True)
    whole = [dict(zip(names, column, strict=True)) for column in columns]
    return whole[parallel_state.get_data_parallel_rank() :: step.resolved.dp]


def train(step: "TrainingStep", first: int, count: int, **batch_options: bool) -> list[dict[str, Any]]:
    """Steps `first` to `first + count - 1`: what each measured, routers by their names in the whole model."""
    records, seq_length = [], step.config.training.seq_length
    for index in range(first, first + count):
        parts = micro_batches(step, global_batch(index, seq_length=seq_length, **batch_options))
        result = step.train(iter(parts) if step.needs_data else None, len(parts), scalars(step))
        assert result.applied
        names = router_names(step)
        records.append(
            {
                "losses": (result.loss_sums / result.token_counts).tolist(),
                "token_counts": result.token_counts.tolist(),
                "grad_norm": result.grad_norm,
                "loads": dict(zip(names, result.loads.tolist(), strict=True)),
                "balance": dict(zip(names, result.balance_losses.tolist(), strict=True)),
            }
        )
    return records


def router_names(step: "TrainingStep") -> list[str]:
    """Names of this stage's routers in the whole model, in the order of `step.routers`."""
    from megads.model.build import unwrap
    from megads.model.init import canonical_names

    names = {id(p): name for chunk in step.chunks for name, p in canonical_names(unwrap(chunk))}
    return [names[id(router.weight)].removesuffix(".weight") for router in step.routers]


Shard = tuple[str, tuple[int, ...], tuple[int, ...], Tensor]


def shards(step: "TrainingStep", *, optimizer: bool = True) -> list[Shard]:
    """This rank's parts of weights, biases and optimizer state: (name, whole shape, offset, part)."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories, is_main_replica

    from megads.train.snapshot import sharded_state

    step.gather_parameters()
    state = sharded_state(step, optimizer=optimizer, generators=False)
    apply_factories(state)
    parts = []
    for shard in nested_values(state):
        if isinstance(shard, ShardedTensor) and is_main_replica(shard.replica_id):
            assert shard.flattened_range is None, shard.key
            part = shard.data.detach().clone()
            part = part[(None,) * shard.prepend_axis_num]
            parts.append((shard.key, tuple(shard.global_shape), tuple(shard.global_offset), part))
    return parts


def optimizer_steps(step: "TrainingStep") -> set[float]:
    """The numbers of updates that torch's optimizer has counted, over all parameters."""
    inner = getattr(step.optimizer, "chained_optimizers", [step.optimizer])
    states = [state for one in inner for state in one.optimizer.state.values()]
    return {float(state["step"]) for state in states if "step" in state}


# --- with the workers' results ----------------------------------------------------------------


def assemble(parts_of_ranks: list[list[Shard]]) -> dict[str, Tensor]:
    """Whole tensors from all ranks' `shards`; each element must come from exactly one of them."""
    whole: dict[str, Tensor] = {}
    covered: dict[str, Tensor] = {}
    for name, shape, offset, part in (shard for parts in parts_of_ranks for shard in parts):
        if name not in whole:
            whole[name], covered[name] = torch.zeros(shape, dtype=part.dtype), torch.zeros(shape)
        place = tuple(slice(o, o + n) for o, n in zip(offset, part.shape, strict=True))
        whole[name][place] = part
        covered[name][place] += 1
    wrong = [name for name, count in covered.items() if not bool((count == 1).all())]
    assert not wrong, f"not covered exactly once: {wrong}"
    return whole


def merge(records_of_ranks: list[list[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """One record per step: what all ranks must agree on, and the routers of all stages."""
    for records in zip(*records_of_ranks, strict=True):
        merged = dict(records[0], loads={}, balance={})
        for record in records:
            for name in ("losses", "token_counts", "grad_norm"):
                assert record[name] == merged[name], f"ranks differ in {name}"
            for name in ("loads", "balance"):
                for router, value in record[name].items():
                    assert merged[name].setdefault(router, value) == value, f"ranks differ in {name}"
        yield merged
