"""FP8, FP16 and BF16 moments in Megatron-Core's terms: what `training.fp8` and `training.fp16` become.

On CUDA FP8 is Transformer Engine's: Megatron-Core opens its context around each layer of `TransformerBlock`
and of MTP, and the modules of `model/transformer_engine.py` quantize inside it. Embedding, output head,
router, norms and core attention have no FP8 there. Everywhere else products are emulated, which needs
nothing of Megatron-Core: see `model/fp8_emulation.py`.
"""

import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from megatron.core.transformer.transformer_config import MLATransformerConfig

from megads.config.resolve import Resolved
from megads.config.schema import Config
from megads.errors import EnvironmentSetupError
from megads.mcore.backend import INSTALL, choose_backend

RecipeName = Literal["blockwise", "tensorwise", "delayed", "mxfp8"]
_HOPPER, _BLACKWELL = (9, 0), (10, 0)


@dataclass(frozen=True)
class FP8Plan:
    """FP8 of a run: `emulated` by rounding operands and multiplying in FP32, or by Transformer Engine."""

    recipe: RecipeName
    emulated: bool

    def describe(self) -> str:
        """One line for the log."""
        if self.emulated:
            return f"FP8 ({self.recipe}) is emulated: operands are rounded, products are FP32, and it is slow"
        return f"FP8 ({self.recipe}) by Transformer Engine"


def plan_fp8(config: Config, resolved: Resolved) -> FP8Plan | None:
    """How this run does FP8; None without `training.use_fp8`.

    Raises:
        EnvironmentSetupError: this GPU cannot do the recipe, or Transformer Engine is missing.
    """
    if not config.training.use_fp8:
        return None
    asked = config.training.fp8.recipe
    if resolved.device == "cpu" or config.model.backend == "native":
        return FP8Plan("blockwise" if asked == "auto" else asked, emulated=True)
    choice = choose_backend(config, resolved)
    if choice.name == "native":
        raise EnvironmentSetupError(
            f"training.use_fp8 on CUDA needs Transformer Engine, and the layers would be native: "
            f"{choice.why}. Install it ({INSTALL}), set use_fp8 to false, or have FP8 emulated with "
            'model.backend = "native"'
        )
    capability = torch.cuda.get_device_capability()
    recipe: RecipeName = asked if asked != "auto" else "mxfp8" if capability >= _BLACKWELL else "blockwise"
    if problem := _hardware_problem(recipe, capability):
        raise EnvironmentSetupError(problem)
    if recipe == "mxfp8" and config.training.fp8.param_gather:
        raise EnvironmentSetupError(
            "training.fp8.param_gather does not work with the mxfp8 recipe, which this GPU gets by "
            'recipe = "auto": set param_gather to false, or recipe to "tensorwise"'
        )
    return FP8Plan(recipe, emulated=False)


def _hardware_problem(recipe: RecipeName, capability: tuple[int, int]) -> str | None:
    gpu = f"this GPU has compute capability {capability[0]}.{capability[1]}"
    if recipe == "mxfp8" and capability < _BLACKWELL:
        return f'training.fp8.recipe = "mxfp8" needs Blackwell (10.0), and {gpu}: use "auto" or "blockwise"'
    if recipe == "blockwise" and capability < _HOPPER:
        return f'training.fp8.recipe = "blockwise" needs Hopper (9.0), and {gpu}: use "tensorwise"'
    if capability < (8, 9):
        return f"training.use_fp8 needs Ada (8.9) or later, and {gpu}: set it to false"
    return None


def transformer_precision(config: Config, resolved: Resolved) -> dict[str, Any]:
    """The FP8 fields of Megatron-Core's transformer configuration; nothing where FP8 is emulated."""
    plan = plan_fp8(config, resolved)
    if plan is None or plan.emulated:
        return {}
    fp8 = config.training.fp8
    return {
        "fp8": fp8.format,
        "fp8_recipe": plan.recipe,
        "fp8_amax_history_len": fp8.amax_history_len,
        "fp8_amax_compute_algo": fp8.amax_compute_algo,
        "fp8_param": fp8.param_gather,
        "first_last_layers_bf16": fp8.bf16_first_layers + fp8.bf16_last_layers > 0,
        "num_layers_at_start_in_bf16": fp8.bf16_first_layers,
        "num_layers_at_end_in_bf16": fp8.bf16_last_layers,
    }


def mtp_config(config: Config, transformer: MLATransformerConfig) -> MLATransformerConfig:
    """The configuration of MTP, whose layers open one FP8 context of their own unless it has none."""
    if not (transformer.fp8 and config.training.fp8.bf16_mtp):
        return transformer
    without_fp8 = copy.copy(transformer)
    without_fp8.fp8, without_fp8.fp8_param = None, False
    return without_fp8


def gathers_fp8_parameters(config: Config, resolved: Resolved) -> bool:
    """Whether weights lie in FP8 and are gathered so over data parallelism."""
    plan = plan_fp8(config, resolved)
    return plan is not None and not plan.emulated and config.training.fp8.param_gather


def optimizer_precision(config: Config, resolved: Resolved) -> dict[str, Any]:
    """Loss scaling of FP16, and the FP8 recipe of the weights that the optimizer writes."""
    fields: dict[str, Any] = {}
    if resolved.precision == "fp16":
        fp16 = config.training.fp16
        fields |= {
            "loss_scale": fp16.loss_scale,
            "initial_loss_scale": fp16.initial_loss_scale,
            "min_loss_scale": fp16.min_loss_scale,
            "loss_scale_window": fp16.loss_scale_window,
            "hysteresis": fp16.hysteresis,
        }
    if gathers_fp8_parameters(config, resolved):
        plan = plan_fp8(config, resolved)
        assert plan is not None
        fields["fp8_recipe"] = plan.recipe
    return fields
