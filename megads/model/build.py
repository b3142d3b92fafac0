"""From a configuration to this rank's model chunks."""

import logging
from dataclasses import replace

import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import Float16Module

from megads.config.resolve import Resolved
from megads.config.schema import Config
from megads.mcore.backend import choose_backend
from megads.mcore.fusions import choose_fusions
from megads.mcore.precision import plan_fp8
from megads.mcore.translate import transformer_config
from megads.mcore.user_buffers import initialize_user_buffers
from megads.model.backends import backend_modules
from megads.model.cuda_graphs import check_cuda_graphs
from megads.model.flash_attention import choose_core_attention
from megads.model.fp8_emulation import emulated_backend
from megads.model.init import initialize_weights
from megads.model.language_model import LanguageModel

logger = logging.getLogger(__name__)


def build_model(config: Config, resolved: Resolved) -> list[torch.nn.Module]:
    """This rank's model chunks, initialized: one, or one per virtual pipeline stage.

    The process groups must exist. 16-bit models come wrapped in Megatron-Core's `Float16Module`.
    """
    groups = ProcessGroupCollection.use_mpu_process_groups()
    choice = choose_backend(config, resolved)
    logger.info("layers: %s (%s)", choice.name.replace("_", " "), choice.why)
    core_attention = choose_core_attention(config, resolved, choice.name == "transformer_engine")
    fusions = choose_fusions(config, resolved)
    if resolved.device == "cuda":
        logger.info("fused kernels: %s", fusions.describe())
    check_cuda_graphs(config, choice)
    backend = replace(backend_modules(choice.name), core_attention=core_attention, fusions=fusions)
    if (fp8 := plan_fp8(config, resolved)) is not None:
        logger.info("%s", fp8.describe())
        if fp8.emulated:
            backend = emulated_backend(backend, config.training.fp8, fp8.recipe)
            if config.training.fp8.param_gather:
                logger.warning("training.fp8.param_gather has no effect: FP8 is emulated")
    if config.distributed.tp_comm_overlap:
        initialize_user_buffers(config, resolved)
    transformer = transformer_config(config, resolved)
    chunks: list[torch.nn.Module] = []
    for chunk in range(resolved.vpp or 1):
        vp_stage = chunk if resolved.vpp else None
        model = LanguageModel(
            config,
            resolved,
            transformer,
            groups,
            backend,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            vp_stage=vp_stage,
        )
        initialize_weights(model, groups, config.model.init_method_std, config.seed)
        if resolved.device == "cuda":
            model.cuda()
        chunks.append(model if resolved.precision == "fp32" else Float16Module(transformer, model))
    return chunks


def unwrap(chunk: torch.nn.Module) -> LanguageModel:
    """The model inside data-parallel and 16-bit wrappers."""
    while not isinstance(chunk, LanguageModel):
        chunk = chunk.module  # type: ignore[assignment]
    return chunk
