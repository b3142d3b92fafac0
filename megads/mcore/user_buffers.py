"""Transformer Engine's user buffers: tensor-parallel exchanges in pieces, beside the products that need them.

A gather before a product and a scatter after one are cut up: while one piece travels between the GPUs of a
host, the product of another is computed (Wang et al., doi:10.1145/3567955.3567959). The buffers are made
before the layers, have one shape, and are found by name: `qkv` and `fc1` gather, `proj` and `fc2` scatter,
and gather in backward. Where this works at all is in `megads.config.validate_overlap`.
"""

import os

import torch

from megads.config.memory import keeps_layers_in_bf16
from megads.config.resolve import Resolved
from megads.config.schema import Config
from megads.errors import EnvironmentSetupError

# Of the linears that Transformer Engine has buffers for; any other name turns Megatron-Core's overlap off.
NAMES = ("qkv", "proj", "fc1", "fc2")
_OFF = "or set distributed.tp_comm_overlap to false"
_initialized = False


def initialize_user_buffers(config: Config, resolved: Resolved) -> None:
    """Make the buffers of this job, on all its ranks at once, before any layer is built.

    A buffer holds the hidden states of a micro-batch, [tokens, H]. Schedules of the sequence length or of the
    batch size change neither: a micro-batch has the same tokens in more sequences, a batch has more of them.

    Raises:
        EnvironmentSetupError: tensor parallelism leaves the host, or its GPUs cannot share memory so.
    """
    global _initialized
    here = int(os.environ.get("LOCAL_WORLD_SIZE", torch.cuda.device_count()))
    if here % resolved.tp:
        raise EnvironmentSetupError(
            f"distributed.tp_comm_overlap works inside a host, and {here} processes on each do not divide "
            f"into groups of tensor_parallel_size = {resolved.tp}: change one of them, {_OFF}"
        )
    import transformer_engine.pytorch as te

    # A rank that waits for longer goes on with what the buffer had before: NCCL's timeout, which ends the
    # job, must come first.
    os.environ.setdefault("UB_TIMEOUT", str(round(2 * 60 * config.distributed.timeout_minutes)))
    tokens = config.training.micro_batch_size * config.training.seq_length // resolved.cp
    try:
        te.initialize_ub(
            shape=[tokens, config.model.mla.d_model],
            tp_size=resolved.tp,
            quantization_modes=_quantization_modes(config),
            dtype=torch.bfloat16,
            bootstrap_backend="nccl",  # gloo and MPI would have to find the hosts in ways of their own
        )
    except RuntimeError as error:
        te.destroy_ub()
        raise EnvironmentSetupError(
            "distributed.tp_comm_overlap: Transformer Engine cannot make its user buffers: "
            f"{' '.join(str(error).split())} (docs/parallelism.md says what they need), {_OFF}"
        ) from error
    _initialized = True


def destroy_user_buffers() -> None:
    """Free them, if there are any, before the process groups end over which they were made."""
    global _initialized
    if _initialized:
        import transformer_engine.pytorch as te

        te.destroy_ub()
    _initialized = False


def _quantization_modes(config: Config) -> list[object]:
    """Of the layers of this run: those in FP8 find their buffers under another key than those in BF16."""
    from transformer_engine.pytorch import UserBufferQuantizationMode as Mode

    if not config.training.use_fp8:
        return [Mode.NONE]
    return [Mode.FP8, Mode.NONE] if keeps_layers_in_bf16(config) else [Mode.FP8]
