"""Errors between the model, the batch and the parallel layout on a number of processes."""

from collections.abc import Iterator

from megads.config.resolve import pipeline_layout
from megads.config.schema import Config
from megads.config.shape import model_shape


def layout_problems(config: Config, world_size: int) -> Iterator[str]:
    """Each problem of `config.distributed` as one sentence with what to do."""
    yield from _world(config, world_size)
    yield from _tensor(config)
    yield from _pipeline(config)
    yield from _experts(config, world_size)
    yield from _context(config)
    yield from _batch(config, world_size)


def data_parallel_size(config: Config, world_size: int) -> int | None:
    """Model replicas on this many processes; None where the layout does not fit them."""
    replica = _replica(config)
    return world_size // replica if world_size % replica == 0 and world_size > 0 else None


def accumulation_steps(config: Config, world_size: int) -> int | None:
    """Micro-batches per optimizer step at the final batch size; None where nothing fits."""
    dp, training = data_parallel_size(config, world_size), config.training
    if dp is None or training.global_batch_size % (training.micro_batch_size * dp):
        return None
    return training.global_batch_size // (training.micro_batch_size * dp)


def _replica(config: Config) -> int:
    distributed = config.distributed
    model = distributed.tensor_parallel_size * distributed.pipeline_parallel_size
    return model * distributed.context_parallel_size


def _world(config: Config, world_size: int) -> Iterator[str]:
    distributed, replica = config.distributed, _replica(config)
    layout = (
        f"TP {distributed.tensor_parallel_size} x PP {distributed.pipeline_parallel_size} x "
        f"CP {distributed.context_parallel_size} = {replica}"
    )
    if world_size % replica:
        processes = "1 process is" if world_size == 1 else f"{world_size} processes are"
        yield (
            f"{processes} not a multiple of {layout}: start {replica} or a multiple of it, or "
            "lower "
            "tensor_parallel_size, pipeline_parallel_size or context_parallel_size"
        )
    elif distributed.data_parallel_size not in (-1, world_size // replica):
        yield (
            f"distributed.data_parallel_size = {distributed.data_parallel_size}, but {world_size} processes "
            "/ "
            f"({layout}) = {world_size // replica}: set it to -1 (automatic), or start "
            f"{max(distributed.data_parallel_size, 1) * replica} processes"
        )


def _tensor(config: Config) -> Iterator[str]:
    distributed, model, shape = config.distributed, config.model, model_shape(config)
    tp = distributed.tensor_parallel_size
    divided = {"model.mla.num_heads": model.mla.num_heads, "model.vocab_size": model.vocab_size}
    if not all(shape.is_moe):
        divided["model.intermediate_size"] = shape.intermediate_size
    if shape.shared_intermediate_size and any(shape.is_moe):
        divided["the width of the shared experts"] = shape.shared_intermediate_size
    for name, size in divided.items():
        if size % tp:
            yield (
                f"{name} = {size} is not divisible by tensor_parallel_size = {tp}: use "
                f"{-(-size // tp) * tp}, or another TP"
            )
    explicit = distributed.sequence_parallel
    if tp > 1 and explicit is False and any(shape.is_moe):
        yield (
            f"distributed.sequence_parallel = false with tensor_parallel_size = {tp} and experts: "
            "Megatron-Core "
            "trains MoE under TP with sequence parallelism only; set it to null or true"
        )
    ranks = tp * distributed.context_parallel_size
    if tp > 1 and explicit is not False and config.training.seq_length % ranks:
        yield (
            f"training.seq_length = {config.training.seq_length} is not divisible by TP x CP = {ranks}, over "
            "which "
            "sequence parallelism splits it: change the length or the layout"
        )


def _pipeline(config: Config) -> Iterator[str]:
    distributed, layers = config.distributed, config.model.num_layers
    pp, vpp = distributed.pipeline_parallel_size, distributed.virtual_pipeline_parallel_size
    given, stages = distributed.pipeline_layout, pp * (vpp or 1)
    if vpp is not None and pp == 1:
        yield (
            f"distributed.virtual_pipeline_parallel_size = {vpp} needs pipeline_parallel_size > 1: set it to "
            "null, "
            "or use pipeline stages"
        )
        return
    times = f"{pp} x {vpp} virtual" if vpp else str(pp)
    if given is not None and pp == 1:
        yield "distributed.pipeline_layout cannot act with pipeline_parallel_size = 1: leave it out"
    elif given == "balanced":
        if layers < stages - 2:
            yield f"model.num_layers = {layers} cannot fill {times} pipeline stages: use fewer stages"
    elif given is None:
        if layers < stages:
            yield f"model.num_layers = {layers} cannot fill {times} pipeline stages: use fewer stages"
        elif layers % stages:
            even = list(pipeline_layout(config))
            yield (
                f"model.num_layers = {layers} is not divisible by {times} pipeline stages: say how many "
                "layers "
                f'each stage has, for instance distributed.pipeline_layout = {even}, or "balanced"'
            )
    elif len(given) != stages:
        yield f"distributed.pipeline_layout has {len(given)} entries for {times} stages: give one per stage"
    elif sum(given) != layers:
        yield (
            f"distributed.pipeline_layout places {sum(given)} layers, model.num_layers is {layers}: make "
            "them equal"
        )
    elif min(given) < 0 or 0 in given[1:-1]:
        yield (
            f"distributed.pipeline_layout = {list(given)}: only the first stage (embedding) and the last one "
            "(MTP, head) may have no decoder layer"
        )


def _experts(config: Config, world_size: int) -> Iterator[str]:
    distributed, moe = config.distributed, config.model.moe
    ep, etp = distributed.expert_parallel_size, distributed.expert_tensor_parallel_size
    pp = distributed.pipeline_parallel_size
    if not any(model_shape(config).is_moe):
        if ep > 1 or etp > 1:
            yield (
                f"expert_parallel_size = {ep}, expert_tensor_parallel_size = {etp}: the model has no MoE "
                "layer "
                "to spread; set both to 1"
            )
        return
    if moe.num_experts % ep:
        yield (
            f"model.moe.num_experts = {moe.num_experts} is not divisible by expert_parallel_size = {ep}: "
            "change one"
        )
    if moe.expert_intermediate_size % etp:
        yield (
            f"model.moe.expert_intermediate_size = {moe.expert_intermediate_size} is not divisible by "
            f"expert_tensor_parallel_size = {etp}: change one"
        )
    if world_size % _replica(config) == 0 and (world_size // pp) % (ep * etp):
        yield (
            f"{world_size} processes / PP {pp} = {world_size // pp} are not a multiple of EP {ep} x ETP "
            f"{etp} = "
            f"{ep * etp}: lower expert_parallel_size or expert_tensor_parallel_size, or start more processes"
        )


def _context(config: Config) -> Iterator[str]:
    cp, length = config.distributed.context_parallel_size, config.training.seq_length
    if cp == 1:
        return
    if length % (2 * cp):
        yield (
            f"training.seq_length = {length} is not divisible by 2 x context_parallel_size = {2 * cp} (each "
            "rank "
            "takes one chunk from the front and one from the back, to share causal work evenly): change one"
        )


def _batch(config: Config, world_size: int) -> Iterator[str]:
    training, distributed = config.training, config.distributed
    dp = data_parallel_size(config, world_size)
    if dp is None:
        return
    at_once = training.micro_batch_size * dp
    sizes = {"training.global_batch_size": training.global_batch_size}
    if training.batch_size_rampup_start is not None:
        sizes["training.batch_size_rampup_start"] = training.batch_size_rampup_start
    for name, size in sizes.items():
        if size % at_once:
            yield (
                f"{name} = {size} is not a multiple of micro_batch_size {training.micro_batch_size} x data "
                f"parallelism {dp} = {at_once}: use {-(-size // at_once) * at_once}, or smaller micro-batches"
            )
        elif (
            distributed.virtual_pipeline_parallel_size
            and (size // at_once) % distributed.pipeline_parallel_size
        ):
            yield (
                f"{name} = {size} makes {size // at_once} micro-batches, no multiple of the "
                f"{distributed.pipeline_parallel_size} pipeline stages that the interleaved schedule takes "
                "turns on"
            )
