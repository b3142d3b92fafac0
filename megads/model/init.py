"""Initial weights that do not depend on the parallel layout.

Each weight is drawn as a whole from a generator seeded by the run's seed and the weight's name, and
each rank keeps its slice. A run therefore starts from the same model under every TP, PP, EP and DP, on
CPU and on GPU. All weights have the same standard deviation (DeepSeek-V3, section 4.2: 0.006); norms
start at one.
"""

import hashlib
from collections.abc import Iterator

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megads.model.experts import Experts
from megads.model.language_model import LanguageModel


def canonical_name(model: LanguageModel, name: str) -> str:
    """The name in the whole model of a parameter or module of this stage: layers counted over all stages."""
    if name.startswith("decoder.layers."):
        _, _, index, rest = name.split(".", 3)
        return f"decoder.layers.{int(index) + model.decoder.layers[0].layer_number - 1}.{rest}"
    if name == "output_layer.weight" and model.share_embeddings_and_output_weights:
        return "embedding.word_embeddings.weight"  # the last stage's copy of a tied embedding
    return name


def canonical_names(model: LanguageModel) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """This stage's parameters under their names in the whole model."""
    for name, parameter in model.named_parameters():
        yield canonical_name(model, name), parameter


def draw_whole(name: str, shape: tuple[int, ...], std: float, seed: int) -> Tensor:
    """The whole weight, float32 on the CPU: a function of name, shape and seed alone."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(shape, device="cpu").normal_(0.0, std, generator=generator)


def local_slice(whole: Tensor, parameter: Tensor, tp_rank: int, tp_size: int) -> Tensor:
    """The part of a whole weight that a tensor-parallel rank holds, by the parameter's attributes."""
    if tp_size == 1 or not getattr(parameter, "tensor_model_parallel", False):
        return whole
    dim, stride = parameter.partition_dim, parameter.partition_stride  # type: ignore[attr-defined]
    # Stride 2: gate and up projections are stacked, and each is split.
    parts = [part.chunk(tp_size, dim)[tp_rank] for part in whole.chunk(stride, dim)]
    return torch.cat(parts, dim)


def _draw_experts(prefix: str, experts: Experts, std: float, seed: int) -> None:
    """Expert by expert, so that no rank draws more than it holds (times expert TP)."""
    etp, first = experts.groups.expt_tp, experts.groups.ep.rank() * experts.num_local_experts
    for name in ("weight1", "weight2"):
        shape = list(experts.expert_shapes[name])
        shape[1] *= etp.size()  # the width, in both
        for local, weight in enumerate(experts.expert_weights(name)):
            whole = draw_whole(f"{prefix}.{name}.{first + local}", tuple(shape), std, seed)
            _fill(weight, whole.chunk(etp.size(), dim=1)[etp.rank()].reshape(weight.shape))


def _fill(weight: Tensor, values: Tensor) -> None:
    """Set a weight; also the copy of an FP8 one that the optimizer's master weight will be taken from."""
    weight.copy_(values)
    if hasattr(weight, "get_high_precision_init_val"):
        weight.get_high_precision_init_val().copy_(values)


@torch.no_grad()
def initialize_weights(model: LanguageModel, groups: ProcessGroupCollection, std: float, seed: int) -> None:
    """Fill every parameter of a stage in place."""
    of_experts: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, Experts):
            of_experts.update(map(id, module.parameters()))
            _draw_experts(canonical_name(model, name), module, std, seed)
    tp = groups.tp
    for name, parameter in canonical_names(model):
        if parameter.dim() == 1 or id(parameter) in of_experts:
            continue  # norms are built as ones and zeros
        shape = list(parameter.shape)
        if getattr(parameter, "tensor_model_parallel", False):
            shape[parameter.partition_dim] *= tp.size()  # type: ignore[attr-defined]
        whole = draw_whole(name, tuple(shape), std, seed)
        _fill(parameter, local_slice(whole, parameter, tp.rank(), tp.size()))
