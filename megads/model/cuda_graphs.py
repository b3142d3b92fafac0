"""CUDA graphs of parts of layers (`training.cuda_graphs`): many kernels, launched by one call.

Capture and replay are Megatron-Core's and Transformer Engine's (`make_graphed_callables`): one graph of the
forward pass and one of the backward pass for each layer, of whichever parts are asked for; in a pipeline for
each micro-batch of a step too. The rest of a layer runs between them, above all its experts, whose shapes
change with the routing. Evaluation has none.
"""

import contextlib
import functools
import logging
import os
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.num_microbatches_calculator import (
    destroy_num_microbatches_calculator,
    reconfigure_num_microbatches_calculator,
)
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel import random
from megatron.core.transformer.cuda_graphs import TECudaGraphHelper
from megatron.core.utils import get_model_config

from megads.config.resolve import Resolved
from megads.config.schema import Config
from megads.errors import EnvironmentSetupError, TrainingError
from megads.mcore.backend import Choice
from megads.mcore.translate import WARM_UP_STEPS

logger = logging.getLogger(__name__)


def check_cuda_graphs(config: Config, choice: Choice) -> None:
    """Raises EnvironmentSetupError where this machine cannot capture what the configuration asks for."""
    if not config.training.cuda_graphs:
        return
    if choice.name != "transformer_engine":
        raise EnvironmentSetupError(
            "training.cuda_graphs: Transformer Engine captures them, and layers are native here "
            f"({choice.why}): set it to []"
        )
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        expandable = "expandable_segments:True" in os.environ.get(name, "")
        if expandable and os.environ.get("NCCL_GRAPH_REGISTER") != "0":
            raise EnvironmentSetupError(
                f"training.cuda_graphs: with {name}=expandable_segments:True NCCL would register memory that "
                "moves: set NCCL_GRAPH_REGISTER=0"
            )


class GraphCapture:
    """Captures the graphs of a process once its first steps have run without; layers then replay them."""

    def __init__(
        self,
        config: Config,
        resolved: Resolved,
        chunks: list[torch.nn.Module],
        optimizer: MegatronOptimizer,
    ) -> None:
        self._config, self._resolved = config, resolved
        self._chunks, self._optimizer = chunks, optimizer
        self._helper: TECudaGraphHelper | None = None
        self._steps_until_capture = WARM_UP_STEPS if config.training.cuda_graphs else -1

    def before_step(self, micro_batches: int) -> None:
        """To be called before each step, with the model in training mode; collective when it captures.

        Gradients and what routers count are garbage afterwards.

        Raises:
            TrainingError: something in the captured parts cannot be captured.
        """
        if self._steps_until_capture == 0:
            self._capture(micro_batches)
        self._steps_until_capture -= 1

    def release(self) -> None:
        """Give up the graphs, which use the process groups' communicators: before these are undone."""
        if self._helper is not None and self._helper.graphs_created():
            self._helper.delete_cuda_graphs()
        self._helper = None

    def _capture(self, micro_batches: int) -> None:
        training, dp = self._config.training, self._resolved.dp
        helper = self._helper = TECudaGraphHelper(
            self._chunks,
            get_model_config(self._chunks[0]),
            training.seq_length,
            training.micro_batch_size,
            optimizers=[self._optimizer],
        )
        # From here Megatron-Core takes the micro-batches of a step.
        reconfigure_num_microbatches_calculator(
            dist.get_rank(),
            global_batch_size=micro_batches * training.micro_batch_size * dp,
            micro_batch_size=training.micro_batch_size,
            data_parallel_size=dp,
        )
        began, reserved = time.monotonic(), torch.cuda.memory_reserved()
        hooked = [
            chunk
            for chunk in self._chunks
            if isinstance(chunk, DistributedDataParallel) and chunk.ddp_config.overlap_param_gather
        ]
        for chunk in hooked:
            chunk.disable_forward_pre_hook()  # which would wait for weights inside the graphs
        try:
            with _other_threads_unhindered(), _no_random_states():
                helper.create_cudagraphs()
        except RuntimeError as error:
            parts = ", ".join(training.cuda_graphs)
            raise TrainingError(
                f"training.cuda_graphs: {parts} cannot be captured here: {error}; leave parts out, or set it "
                "to []"
            ) from error
        finally:
            destroy_num_microbatches_calculator()
        for chunk in hooked:
            chunk.enable_forward_pre_hook()
        if hooked:
            helper.cuda_graph_set_manual_hooks()  # a replay calls no modules, whose hooks would wait
        logger.info(
            "CUDA graphs: %s of %d layers captured in %.1f s, %.2f GiB",
            ", ".join(training.cuda_graphs),
            len(helper.flattened_callables),
            time.monotonic() - began,
            (torch.cuda.memory_reserved() - reserved) / 2**30,
        )


@contextlib.contextmanager
def _other_threads_unhindered() -> Iterator[None]:
    """Capture so that CUDA calls of other threads do not break it: one may be pinning the next batches."""
    graph = torch.cuda.graph
    torch.cuda.graph = functools.partial(graph, capture_error_mode="thread_local")  # type: ignore[misc,assignment]
    try:
        yield
    finally:
        torch.cuda.graph = graph  # type: ignore[misc]


@contextlib.contextmanager
def _no_random_states() -> Iterator[None]:
    """Have Megatron-Core recompute without the states of random number generators.

    They cannot be read while graphs are captured, and no captured part draws random numbers: see
    `config/validate_cuda_graphs.py`.
    """
    read, write = random._get_all_rng_states, random._set_all_rng_states
    random._get_all_rng_states, random._set_all_rng_states = lambda: (), lambda *states: None
    try:
        yield
    finally:
        random._get_all_rng_states, random._set_all_rng_states = read, write
