"""Errors of kernels that a run asks for by name: flash attention and DeepEP, and what each needs.

What only the GPU itself can tell is found when the model is built.
"""

from collections.abc import Iterator
from importlib.util import find_spec

from megads.config.resolve import uses_device
from megads.config.schema import Config
from megads.config.shape import model_shape

# Sizes of the group of ranks that DeepEP has tables for (`Buffer.get_dispatch_config`).
DEEP_EP_RANKS = (2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 144, 160)
FLASH_LARGEST_WIDTH = 256


def kernel_problems(config: Config, cuda: bool) -> Iterator[str]:
    """Each problem as one sentence with what to do."""
    yield from _flash_attention(config, cuda)
    yield from _deep_ep(config, cuda)


def flash_attention_problem(config: Config, device: str) -> str | None:
    """Why no flash kernel can do what the configuration asks for on this device; None: one may."""
    mla, training, shape = config.model.mla, config.training, model_shape(config)
    if device == "cpu":
        return "this run is on the CPU"
    if not training.use_bf16 and not training.use_fp16:
        return "flash kernels compute in 16 bits, and this run is in FP32"
    if mla.attn_dropout:
        return "model.mla.attn_dropout is on"
    if max(shape.qk_nope_head_dim + shape.qk_rope_head_dim, shape.v_head_dim) > FLASH_LARGEST_WIDTH:
        return f"heads are wider than {FLASH_LARGEST_WIDTH}"
    return None


def fused_rope_fits(config: Config) -> bool:
    """Whether Megatron-Core's kernels for MLA's rotary part can do these heads, and repeatably if asked to.

    Their blocks are as wide as the parts of a head, in powers of two. Triton chooses among sizes of blocks by
    timing them, and these sum the rotary key's gradient over heads in different orders.
    """
    shape = model_shape(config)
    widths = shape.qk_nope_head_dim, shape.v_head_dim, shape.qk_rope_head_dim
    powers = all(width & (width - 1) == 0 for width in widths)
    return powers and shape.qk_rope_head_dim >= 4 and not config.training.deterministic


def _flash_attention(config: Config, cuda: bool) -> Iterator[str]:
    mla = config.model.mla
    if mla.flash_mla_backend == "sparse":
        yield (
            "model.mla.flash_mla_backend = sparse: sparse attention (DeepSeek-V3.2) is another model, whose "
            "layers have an indexer with weights and a loss of its own, and which Megatron-Core trains in an "
            "attention module of its own only; nearest: auto, and model.mla.sliding_window"
        )
    elif mla.flash_mla_backend == "dense" and not mla.use_flash_mla:
        yield "model.mla.flash_mla_backend = dense cannot act while use_flash_mla is false: leave it at auto"
    strict = mla.use_flash_mla and not mla.fallback_to_dense
    if strict and (problem := flash_attention_problem(config, uses_device(config, cuda))):
        yield (
            f"model.mla.use_flash_mla: no flash kernel works, since {problem}: change that, or set "
            "fallback_to_dense to true for torch's dense kernel"
        )


def _deep_ep(config: Config, cuda: bool) -> Iterator[str]:
    moe, training, distributed = config.model.moe, config.training, config.distributed
    instead = "false: the all-to-all dispatcher"
    if not moe.use_deep_ep:
        asked = {"deep_ep_fp8": moe.deep_ep_fp8, "deep_ep_async": moe.deep_ep_async}
        for name in (name for name, on in asked.items() if on):
            yield f"model.moe.{name} cannot act while use_deep_ep is false: set it to false"
        return
    ranks = distributed.expert_parallel_size * distributed.expert_tensor_parallel_size
    if uses_device(config, cuda) == "cpu":
        yield f"model.moe.use_deep_ep needs CUDA, and this run is on the CPU; nearest: {instead}"
    elif not training.use_bf16:
        yield f"model.moe.use_deep_ep sends BF16, which this run is not in: set use_bf16, or it to {instead}"
    if ranks == 1:
        yield (
            "model.moe.use_deep_ep with expert_parallel_size = 1: tokens stay where they are, and DeepEP has "
            f"nothing to send: raise it, or set it to {instead}"
        )
    elif ranks not in DEEP_EP_RANKS:
        yield (
            f"model.moe.use_deep_ep with expert_parallel_size x expert_tensor_parallel_size = {ranks}: use a "
            f"size of DeepEP's, {', '.join(map(str, DEEP_EP_RANKS))}, or set it to {instead}"
        )
    # A token travels in words of 16 bytes, in FP8 in blocks with a scale each.
    multiple = 128 if moe.deep_ep_fp8 else 8
    if config.model.mla.d_model % multiple:
        yield (
            f"model.moe.use_deep_ep with model.mla.d_model = {config.model.mla.d_model}: make it a multiple "
            f"of {multiple}{' (FP8)' if moe.deep_ep_fp8 else ''}"
        )
    if find_spec("deep_ep") is None:
        yield (
            "model.moe.use_deep_ep needs the deep_ep package, which is not installed: build it from "
            f"github.com/deepseek-ai/DeepEP, or set it to {instead}"
        )
