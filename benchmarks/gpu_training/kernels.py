"""Time of a profiled step by what it was spent on: kernels of a GPU, operators on a CPU.

A kernel's group follows from its own name where that says enough. That of a grouped product does not, since
Transformer Engine runs one through the same cuBLAS kernels as any other; there the operators that launched it
say so. Kernels overlap where streams do, so groups may add up to more than the step.
"""

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch

OTHER = "other"

_COMMUNICATION = re.compile(
    r"nccl|gloo|userbuffers|all_?reduce|all_?gather|reduce_?scatter|all_?to_?all", re.IGNORECASE
)
_ATTENTION = re.compile(r"sdpa|fmha|flash|attention|fused_?attn", re.IGNORECASE)
_GROUPED = re.compile(r"grouped_?(mm|gemm|linear)|group_?problem_?shape", re.IGNORECASE)
_PRODUCT = re.compile(r"gemm|nvjet|xmma|cublas|cutlass|matmul|splitk|::(add|b|badd)?mm$", re.IGNORECASE)
_QUANTIZATION = re.compile(r"quantiz|cast_transpose|block_scaled|amax|fp8", re.IGNORECASE)
_ROUTING = re.compile(
    r"permut|sort|topk|top_k|index|scatter|gather|router|radix|bincount|histogram|cumsum|scan|one_hot|nonzero",
    re.IGNORECASE,
)
_ELEMENTWISE = re.compile(
    r"norm|silu|swiglu|softmax|sigmoid|elementwise|vectorized|reduce|cross_entropy|fill|copy|cat|memcpy|memset|"
    r"triton|rope|rotary|::(add|mul|sub|div|sum|mean|pow|sqrt|rsqrt|exp|log|neg|where|clone|zero)_?$",
    re.IGNORECASE,
)

GROUPS = (
    "attention",
    "grouped products",
    "dense products",
    "routing",
    "quantization",
    "norms, elementwise",
    "optimizer",
    "communication",
    OTHER,
)


def group_of(name: str, callers: list[str]) -> str:
    """One of GROUPS for a kernel or operator; `callers` are the operators that it is inside of."""
    if "optimizer" in (name, *callers):
        return "optimizer"
    if _COMMUNICATION.search(name):
        return "communication"
    if _ATTENTION.search(name):
        return "attention"
    if _PRODUCT.search(name) or _GROUPED.search(name):
        if any(_GROUPED.search(text) for text in (name, *callers)):
            return "grouped products"
        return "attention" if any(_ATTENTION.search(caller) for caller in callers) else "dense products"
    for pattern, group in (
        (_QUANTIZATION, "quantization"),
        (_ROUTING, "routing"),
        (_ELEMENTWISE, "norms, elementwise"),
    ):
        if pattern.search(name):
            return group
    return OTHER


def seconds_by_group(profile: "torch.profiler.profile", steps: int) -> dict[str, float]:
    """Seconds per step of each group, from a profile of `steps` steps."""
    found = dict.fromkeys(GROUPS, 0.0)
    for name, callers, microseconds in _spent(list(profile.events() or ())):
        found[group_of(name, callers)] += microseconds / 1e6 / steps
    return found


def _spent(events: list[Any]) -> Iterator[tuple[str, list[str], float]]:
    """(name, callers from the inside out, microseconds) of every kernel, or of every operator on a CPU."""
    on_device = Counter[str]()
    for event in events:
        if event.device_type.name == "CUDA" and not event.is_user_annotation:
            on_device[event.name] += event.time_range.elapsed_us()
    cpu = not on_device
    for event in events:
        if event.device_type.name != "CPU":
            continue
        if cpu:
            yield event.name, _callers(event), event.self_cpu_time_total
        for kernel in event.kernels:
            on_device[kernel.name] -= kernel.duration
            yield kernel.name, [event.name, *_callers(event)], kernel.duration
    # What no operator launched: by its name alone.
    for name, microseconds in on_device.items():
        yield name, [], max(0.0, microseconds)


def _callers(event: Any) -> list[str]:
    names = []
    while (event := event.cpu_parent) is not None:
        names.append(event.name)
    return names
