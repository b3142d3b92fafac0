"""Errors of ZeRO: what the sharded optimizer and Megatron-FSDP cannot do, with the nearest that works."""

from collections.abc import Iterator

from megads.config.schema import Config


def zero_problems(config: Config) -> Iterator[str]:
    """Each problem as one sentence with what to do."""
    if config.training.optimizer == "sgd" and config.distributed.zero_stage > 0:
        yield (
            f'training.optimizer = "sgd" with distributed.zero_stage = {config.distributed.zero_stage}: '
            'Megatron-Core shards the state of Adam only: use "adamw", or zero_stage = 0'
        )
    if config.distributed.zero_offload:
        yield from _offload(config)
    if config.distributed.zero_stage >= 2:
        yield from _fully_sharded(config)


def _offload(config: Config) -> Iterator[str]:
    if config.distributed.zero_stage == 0:
        yield (
            "distributed.zero_offload with zero_stage = 0: every rank would keep all moments in host memory: "
            "set zero_stage to 1 or more, which divides them first"
        )
    if config.training.optimizer == "sgd":
        yield 'distributed.zero_offload is for Adam: set it to false with training.optimizer = "sgd"'


def _fully_sharded(config: Config) -> Iterator[str]:
    distributed, training = config.distributed, config.training
    stage = f"distributed.zero_stage = {distributed.zero_stage}"
    if distributed.pipeline_parallel_size > 1:
        yield (
            f"{stage} with pipeline_parallel_size = {distributed.pipeline_parallel_size}: Megatron-FSDP lays "
            "its ranks out by data, expert and tensor parallelism only: set pipeline_parallel_size to 1, or "
            "zero_stage to 1"
        )
    if training.use_fp16:
        yield (
            f"{stage} with training.use_fp16: Megatron-Core unscales gradients that a rank of Megatron-FSDP "
            "may not have: use_bf16 = true, or zero_stage = 1"
        )
    for setting, value, needed in (
        ("overlap_grad_reduce", distributed.overlap_grad_reduce, True),
        ("overlap_param_gather", distributed.overlap_param_gather, distributed.zero_stage == 3),
    ):
        if needed and not value:
            yield (
                f"distributed.{setting} = false with {stage}: Megatron-FSDP always overlaps: set it to true, "
                "or zero_stage to 1"
            )
