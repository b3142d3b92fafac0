"""The one map between our Megatron-side state dict and the Hugging Face DeepSeek-V3 checkpoint's.

The tables below say it all: our name, the checkpoint's name(s), our shape and how one becomes the
other. Both directions, the check of names and the check of shapes are computed from them. Our side
is the whole model on one rank (TP = PP = EP = 1); tensors keep their type and device. RoPE turns the
same pairs of dimensions on both sides, so attention weights move unchanged.

The published MTP layer (`model.layers.61` of DeepSeek-V3) repeats embedding and output head: they are
written on export, and on import checked to be equal and dropped. Not handled: FP8 weights with
`weight_scale_inv`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megads.config.schema import Config
from megads.config.shape import ModelShape, model_shape
from megads.errors import CheckpointError

SHOWN_FAULTS = 8
NamedShape = tuple[str, tuple[int, ...]]


@dataclass(frozen=True)
class Form:
    """How one tensor of ours becomes the checkpoint's tensors, and back."""

    split: Callable[[Tensor], Sequence[Tensor]]
    join: Callable[[Sequence[Tensor]], Tensor]


def stack_gate_up(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack([torch.stack(pair) for pair in zip(parts[0::2], parts[1::2], strict=True)])


SAME = Form(lambda w: [w], lambda parts: parts[0])
GATE_UP = Form(lambda w: w.chunk(2), lambda parts: torch.cat(list(parts)))  # [2I, H]: gate above up
EXPERTS_GATE_UP = Form(lambda w: w.flatten(0, 1).unbind(), stack_gate_up)  # [E, 2, I, H]
EXPERTS_DOWN = Form(lambda w: w.unbind(), lambda parts: torch.stack(list(parts)))  # [E, H, I]


@dataclass(frozen=True)
class Entry:
    """One tensor of ours: its name, the checkpoint's names, our shape and the form of the change."""

    ours: str
    theirs: tuple[str, ...]
    shape: tuple[int, ...]
    form: Form = SAME

    def their_shapes(self) -> list[tuple[int, ...]]:
        parts = self.form.split(torch.empty(self.shape, device="meta"))
        return [tuple(part.shape) for part in parts]

    def under(self, our_prefix: str, their_prefix: str) -> "Entry":
        return Entry(
            our_prefix + self.ours, tuple(their_prefix + name for name in self.theirs), self.shape, self.form
        )


# --- the tables -------------------------------------------------------------------------------


def outer_entries(config: Config) -> Iterator[Entry]:
    """Embedding, final norm, output head."""
    w, d = config.model.vocab_size, config.model.mla.d_model
    yield Entry("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), (w, d))
    yield from norm_entries(config, "decoder.final_layernorm", "model.norm", d)
    if not config.model.tie_word_embeddings:
        yield Entry("output_layer.weight", ("lm_head.weight",), (w, d))


def norm_entries(config: Config, ours: str, theirs: str, width: int) -> Iterator[Entry]:
    """RMSNorm has a weight, LayerNorm a bias as well."""
    for part in ("weight", "bias") if config.model.norm_type == "layernorm" else ("weight",):
        yield Entry(f"{ours}.{part}", (f"{theirs}.{part}",), (width,))


def layer_entries(config: Config, shape: ModelShape, is_moe: bool) -> Iterator[Entry]:
    """One decoder layer, names below `decoder.layers.N.` and `model.layers.N.`."""
    d = config.model.mla.d_model
    yield from norm_entries(config, "input_layernorm", "input_layernorm", d)
    for entry in attention_entries(config, shape):
        yield entry.under("self_attention.", "self_attn.")
    yield from norm_entries(config, "pre_mlp_layernorm", "post_attention_layernorm", d)
    feed_forward = moe_entries(config, shape) if is_moe else swiglu_entries(d, shape.intermediate_size)
    for entry in feed_forward:
        yield entry.under("mlp.", "mlp.")


def attention_entries(config: Config, shape: ModelShape) -> Iterator[Entry]:
    mla = config.model.mla
    d, n, q, c = mla.d_model, mla.num_heads, mla.q_lora_rank, mla.d_latent
    nope, rope, value = shape.qk_nope_head_dim, shape.qk_rope_head_dim, shape.v_head_dim
    if q is None:
        yield Entry("linear_q_proj.weight", ("q_proj.weight",), (n * (nope + rope), d))
    else:
        yield Entry("linear_q_down_proj.weight", ("q_a_proj.weight",), (q, d))
        yield from norm_entries(config, "q_layernorm", "q_a_layernorm", q)
        yield Entry("linear_q_up_proj.weight", ("q_b_proj.weight",), (n * (nope + rope), q))
    yield Entry("linear_kv_down_proj.weight", ("kv_a_proj_with_mqa.weight",), (c + rope, d))
    yield from norm_entries(config, "kv_layernorm", "kv_a_layernorm", c)
    yield Entry("linear_kv_up_proj.weight", ("kv_b_proj.weight",), (n * (nope + value), c))
    yield Entry("linear_proj.weight", ("o_proj.weight",), (d, n * value))


def swiglu_entries(d: int, width: int) -> Iterator[Entry]:
    """A dense layer, or all shared experts together."""
    yield Entry("linear_fc1.weight", ("gate_proj.weight", "up_proj.weight"), (2 * width, d), GATE_UP)
    yield Entry("linear_fc2.weight", ("down_proj.weight",), (d, width))


def moe_entries(config: Config, shape: ModelShape) -> Iterator[Entry]:
    moe, d = config.model.moe, config.model.mla.d_model
    e, i = moe.num_experts, moe.expert_intermediate_size
    gate_up = tuple(f"experts.{k}.{part}_proj.weight" for k in range(e) for part in ("gate", "up"))
    down = tuple(f"experts.{k}.down_proj.weight" for k in range(e))
    yield Entry("router.weight", ("gate.weight",), (e, d))
    if moe.use_aux_loss_free:
        yield Entry("router.expert_bias", ("gate.e_score_correction_bias",), (e,))
    yield Entry("experts.weight1", gate_up, (e, 2, i, d), EXPERTS_GATE_UP)
    yield Entry("experts.weight2", down, (e, d, i), EXPERTS_DOWN)
    if shape.shared_intermediate_size:
        for entry in swiglu_entries(d, shape.shared_intermediate_size):
            yield entry.under("shared_experts.", "shared_experts.")


def mtp_entries(config: Config, shape: ModelShape) -> Iterator[Entry]:
    """One MTP module, names below `mtp.layers.N.` and `model.layers.N.`; its layer is as the last one."""
    d = config.model.mla.d_model
    yield from norm_entries(config, "enorm", "enorm", d)
    yield from norm_entries(config, "hnorm", "hnorm", d)
    yield Entry("eh_proj.weight", ("eh_proj.weight",), (d, 2 * d))
    for entry in layer_entries(config, shape, shape.mtp_is_moe):
        yield entry.under("mtp_model_layer.", "")
    yield from norm_entries(config, "final_layernorm", "shared_head.norm", d)


def name_map(config: Config) -> tuple[Entry, ...]:
    """Every tensor of the model, in order."""
    shape = model_shape(config)
    entries = list(outer_entries(config))
    for i, is_moe in enumerate(shape.is_moe):
        layer = layer_entries(config, shape, is_moe)
        entries += (entry.under(f"decoder.layers.{i}.", f"model.layers.{i}.") for entry in layer)
    for depth in range(shape.mtp_depth):
        ours, theirs = f"mtp.layers.{depth}.", f"model.layers.{len(shape.is_moe) + depth}."
        entries += (entry.under(ours, theirs) for entry in mtp_entries(config, shape))
    return tuple(entries)


def duplicates(config: Config) -> dict[str, str]:
    """Names that a checkpoint may hold a second time, and the name each is a copy of."""
    shape = model_shape(config)
    tied = config.model.tie_word_embeddings
    copies = {"lm_head.weight": "model.embed_tokens.weight"} if tied else {}
    for depth in range(shape.mtp_depth):
        layer = f"model.layers.{len(shape.is_moe) + depth}"
        copies[f"{layer}.embed_tokens.weight"] = "model.embed_tokens.weight"
        copies[f"{layer}.shared_head.head.weight"] = "model.embed_tokens.weight" if tied else "lm_head.weight"
    return copies


# --- the two directions -----------------------------------------------------------------------


def to_huggingface(state: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """The published checkpoint's tensors; some share memory with `state` and, for MTP, with each other.

    `_extra_state` entries, which Megatron-Core's modules add and the checkpoint has no place for, are
    passed over.

    Raises:
        CheckpointError: names are missing or unexpected, or shapes differ; the first of each are listed.
    """
    state = {name: tensor for name, tensor in state.items() if not name.endswith("_extra_state")}
    entries = name_map(config)
    check_state("model state", state, ((entry.ours, entry.shape) for entry in entries))
    out: dict[str, Tensor] = {}
    for entry in entries:
        out.update(zip(entry.theirs, entry.form.split(state[entry.ours]), strict=True))
    for copy, original in duplicates(config).items():
        # A tied checkpoint holds no output head at all; everything else is repeated as published.
        if not (config.model.tie_word_embeddings and copy.endswith("head.weight")):
            out[copy] = out[original]
    return out


def from_huggingface(state: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Our tensors from the published checkpoint's; the exact inverse of `to_huggingface`.

    Raises:
        CheckpointError: names are missing or unexpected, shapes differ, or a repeated embedding or
            head is not equal to the main one; the first of each are listed.
    """
    entries, copies = name_map(config), duplicates(config)
    wanted = [named for entry in entries for named in zip(entry.theirs, entry.their_shapes(), strict=True)]
    own = {name: tensor for name, tensor in state.items() if name not in copies}
    check_state("checkpoint", own, wanted)
    unequal = [
        f"{name}, which must be a copy of {original}"
        for name, original in copies.items()
        if name in state and not torch.equal(state[name], own[original])
    ]
    refuse("checkpoint", {"repeated with other values": unequal})
    return {entry.ours: entry.form.join([own[name] for name in entry.theirs]) for entry in entries}


def check_state(what: str, state: Mapping[str, Tensor], wanted: Iterable[NamedShape]) -> None:
    """Raises CheckpointError unless `state` has exactly the wanted names with the wanted shapes."""
    shapes = dict(wanted)
    missing = [name for name in shapes if name not in state]
    unexpected = [name for name in state if name not in shapes]
    misshapen = [
        f"{name}: {tuple(state[name].shape)}, the configuration gives {shape}"
        for name, shape in shapes.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    refuse(what, {"missing": missing, "unknown": unexpected, "of another shape": misshapen})


def refuse(what: str, faults: Mapping[str, Sequence[str]]) -> None:
    """Raises CheckpointError with the first faults of each kind, if there are any."""
    lines = []
    for kind, names in faults.items():
        if names:
            lines.append(f"{len(names)} {kind}:")
            lines += [f"  {name}" for name in names[:SHOWN_FAULTS]]
            if len(names) > SHOWN_FAULTS:
                lines.append(f"  ... and {len(names) - SHOWN_FAULTS} more")
    if lines:
        head = f"the {what} is not of the configured model; compare the configuration it was made with"
        raise CheckpointError("\n".join((head, *lines)))
