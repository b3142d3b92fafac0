"""What forward keeps for backward, in closed form, tensor by tensor as `megads.model` saves them.

One micro-batch on one process. `tests/dist/test_plan_memory.py` compares it with what autograd's
saved-tensor hooks see in real forward passes. Routing is taken to be even: the tokens of an expert are
K / E of all. Left out is what stays below a thousandth: single scalars, counters, offsets.

On CUDA, attention is torch's fused kernel, which keeps its output and the values' whole projection; on
the CPU it is `model/functional.py`, which keeps contiguous queries, keys and values, and with a mask torch's
unfused one, unless queries and values have the same width. With
`gradient_checkpointing` "selective" Transformer Engine lets norms be recomputed too; a CUDA run is taken
to have it, and the fused kernels of `mcore/fusions.py`.

With `use_fp8` inputs of FFN products are kept in FP8 with an FP32 scale per 128 numbers (DeepSeek-V3, section
3.3.3). Inputs of SwiGLU, which V3 has in FP8 too, are in BF16 here.

Letters: T tokens of a rank, K keys, b bytes of an activation.
"""

from collections import Counter
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate

from megads.config.resolve import Resolved
from megads.config.schema import Config, RecomputeModule
from megads.config.validate_kernels import fused_rope_fits

Parts = Counter[str]
"""Bytes by part: `attention`, `ffn`, `dispatch` (routing and routed tokens), `mtp`, `logits`."""


@lru_cache(maxsize=1024)
def layer_kinds(layout: tuple[int, ...], is_moe: tuple[bool, ...]) -> tuple[Counter[bool], ...]:
    """For each virtual stage of `layout`, how many of its layers are MoE (True) and dense (False)."""
    ends = list(accumulate(layout))
    return tuple(Counter(is_moe[end - size : end]) for size, end in zip(layout, ends, strict=True))


@dataclass(frozen=True)
class SavedActivations:
    """Bytes that forward keeps, for a configuration in a layout."""

    config: Config
    resolved: Resolved

    @cached_property
    def element_bytes(self) -> int:
        return 4 if self.resolved.precision == "fp32" else 2

    @cached_property
    def product_bytes(self) -> float:
        """Of a number that only waits for the weight gradient of an FFN product."""
        return 1 + 4 / 128 if self.config.training.use_fp8 else self.element_bytes

    @cached_property
    def tokens(self) -> int:
        """Tokens of a micro-batch on one rank of context parallelism."""
        training = self.config.training
        return training.micro_batch_size * training.seq_length // self.resolved.cp

    @cached_property
    def keys(self) -> int:
        """Tokens whose keys and values a rank makes: those of the whole sequence."""
        return self.tokens * self.resolved.cp

    @cached_property
    def split_tokens(self) -> int:
        """Tokens of a rank outside attention and FFN, where sequence parallelism splits them."""
        return self.tokens // self.resolved.tp if self.resolved.sequence_parallel else self.tokens

    @cached_property
    def routed_tokens(self) -> int:
        """(token, expert) pairs whose experts are on this rank, with even routing."""
        return self.split_tokens * self.config.model.moe.num_experts_per_token * self.resolved.etp

    @cached_property
    def recompute(self) -> str:
        """`none`, `selective` or `full`."""
        setting = self.config.training.gradient_checkpointing
        return "full" if setting is True else setting or "none"

    @cached_property
    def recomputed_modules(self) -> frozenset[RecomputeModule]:
        """What "selective" does not keep, as `training.recompute_modules` names it."""
        modules = set(self.config.training.recompute_modules if self.recompute == "selective" else ())
        if self.resolved.device != "cuda":
            modules.discard("layernorm")
        return frozenset(modules)

    @cached_property
    def hidden_bytes(self) -> int:
        """One hidden state of all tokens of a rank."""
        return self.split_tokens * self.config.model.mla.d_model * self.element_bytes

    def _norm(self, tokens: int, width: int, inputs: int = 1) -> int:
        """Inputs of a norm and its statistics: RMSNorm one number per token, LayerNorm two."""
        statistics = 1 if self.config.model.norm_type == "rmsnorm" else 2
        return tokens * inputs * (width * self.element_bytes + 4 * statistics)

    def _dropout(self, elements: float, probability: float) -> int:
        """A mask: bytes on CUDA, scaled numbers on the CPU."""
        if not probability:
            return 0
        return round(elements * (1 if self.resolved.device == "cuda" else self.element_bytes))

    def layer(self, is_moe: bool) -> Parts:
        """One decoder layer as the run keeps it."""
        return self._kept_layers[is_moe]

    @cached_property
    def _kept_layers(self) -> tuple[Parts, Parts]:
        """A dense layer and a MoE layer: the search asks for them very often."""
        if self.recompute == "full":
            return Parts(attention=self.hidden_bytes), Parts(attention=self.hidden_bytes)
        modules = self.recomputed_modules
        return self._whole_layer(False, modules), self._whole_layer(True, modules)

    def recomputed_bytes(self, is_moe: bool) -> int:
        """What recomputation brings back for one layer while backward is in it."""
        return self.whole_layer_bytes(is_moe) - sum(self.layer(is_moe).values())

    def whole_layer_bytes(self, is_moe: bool) -> int:
        """One layer without any recomputation: what its forward pass writes and its backward reads."""
        return self._whole_layers[is_moe]

    @cached_property
    def _whole_layers(self) -> tuple[int, int]:
        dense, moe = self._whole_layer(False, frozenset()), self._whole_layer(True, frozenset())
        return dense.total(), moe.total()

    def _whole_layer(self, is_moe: bool, discarded: frozenset[RecomputeModule]) -> Parts:
        width = self.config.model.mla.d_model
        parts = self._experts(discarded) if is_moe else Parts()
        if not is_moe and "mlp" not in discarded:
            parts += self._dense(self.resolved.shape.intermediate_size)
        parts["attention"] += self._norm(self.split_tokens, width, inputs=2)
        parts["attention"] += 2 * self._dropout(self.split_tokens * width, self.config.model.hidden_dropout)
        parts["attention"] += self._latents() + self._attention("mla_up_proj" in discarded)
        if "layernorm" not in discarded:  # the two norms' outputs
            parts["attention"] += self.hidden_bytes
            parts["ffn"] += self.hidden_bytes
        return parts

    def _latents(self) -> int:
        """Inputs and outputs of the low-rank projections' norms."""
        mla, size, tokens = self.config.model.mla, self.element_bytes, self.split_tokens
        saved = self._norm(tokens, mla.d_latent) + tokens * self.resolved.shape.qk_rope_head_dim * size
        saved += tokens * self.resolved.cp * mla.d_latent * size  # gathered over context parallelism
        if mla.q_lora_rank is not None:
            saved += self._norm(tokens, mla.q_lora_rank) + tokens * mla.q_lora_rank * size
        return saved

    def _attention(self, discard_projections: bool) -> int:
        """Queries, keys, values and what the kernel keeps besides, for this rank's heads."""
        resolved, shape, mla = self.resolved, self.resolved.shape, self.config.model.mla
        heads, value = mla.num_heads // resolved.tp, shape.v_head_dim
        query = shape.qk_nope_head_dim + shape.qk_rope_head_dim
        queries_and_keys = (self.tokens + self.keys) * heads * query
        # Keys and values are views of one projection.
        shared = self.keys * heads * (shape.qk_nope_head_dim + value)
        if resolved.device == "cuda" and fused_rope_fits(self.config):
            shared = self.keys * heads * value  # values alone: keys are copied from the projection
        context = self.tokens * heads * value  # the input of the output projection
        if resolved.device == "cpu" and not self._masked:
            values = self.keys * heads * value  # a copy, which recomputation does not discard
            discarded, kept, others = queries_and_keys, context + values, 0
        elif resolved.device == "cpu" and query != value:
            # torch has no fused kernel here: scaled copies of queries and keys, and probabilities.
            discarded, kept = shared, queries_and_keys + context
            others = self._pairs * self.config.training.micro_batch_size * heads * self.element_bytes
        else:
            # The kernel keeps its output, and logarithms of the softmax's sums in FP32.
            discarded, kept = queries_and_keys + shared, 2 * context
            others = self.tokens * heads * 4 + self._mask_bytes
        numbers = kept if discard_projections else kept + discarded
        return numbers * self.element_bytes + others

    @cached_property
    def _masked(self) -> bool:
        """Whether attention is more than causal over one run of queries, and takes a mask."""
        window, length = self.config.model.mla.sliding_window, self.config.training.seq_length
        windowed = window is not None and window < length
        return windowed or self.config.data.document_mask or self.resolved.cp > 1

    @cached_property
    def _pairs(self) -> int:
        """(query, key) pairs of one sequence that the kernel is given, on one rank."""
        length, cp = self.config.training.seq_length, self.resolved.cp
        # Of a rank's two chunks each sees the keys up to its own end: over all ranks half of the square.
        share = 1.0 if cp == 1 else 0.5 + 0.25 / cp
        return round(length // cp * length * share)

    @cached_property
    def _mask_bytes(self) -> int:
        """Numbers that the kernel adds to the scores, per sequence where documents differ."""
        copies = self.config.training.micro_batch_size if self.config.data.document_mask else 1
        return self._pairs * copies * self.element_bytes if self._masked else 0

    def _dense(self, width: int) -> Parts:
        """A SwiGLU FFN that every token passes."""
        return Parts(ffn=self._swiglu(self.tokens, width // self.resolved.tp))

    def _swiglu(self, tokens: int, width: int, *, keeps_output: bool = True) -> int:
        """Gate and up, and their product, which is the input of the second linear."""
        return round(tokens * width * (2 * self.element_bytes + keeps_output * self.product_bytes))

    def _experts(self, discarded: frozenset[RecomputeModule]) -> Parts:
        moe, resolved, tokens = self.config.model.moe, self.resolved, self.split_tokens
        dropped = self._dropout(tokens * self.config.model.mla.d_model, moe.dropout)
        if "moe" in discarded:
            return Parts(ffn=dropped)
        width = moe.expert_intermediate_size // resolved.etp
        parts = Parts(ffn=dropped)
        if "shared_experts" not in discarded:
            parts += self._dense(resolved.shape.shared_intermediate_size)
        gates = self.routed_tokens * self.element_bytes
        swiglu = self._swiglu(self.routed_tokens, width, keeps_output="moe_act" not in discarded)
        parts["ffn"] += swiglu + gates
        router = tokens * (4 * moe.num_experts + 8 * moe.num_experts_per_token)
        if moe.norm_topk_prob and moe.num_experts_per_token > 1:
            router += tokens * 4 * (moe.num_experts_per_token + 1)
        if moe.balance_loss_type != "none" and moe.router_aux_loss_weight > 0:
            router += tokens * 4
        if moe.router_z_loss_weight > 0:
            router += tokens * 4 * (moe.num_experts + 1)
        if resolved.precision != "fp32":
            router += tokens * 4 * self.config.model.mla.d_model  # the router computes in FP32
        # Megatron-Core sorts all (expert, token) pairs and keeps the permutation whole.
        permutation = tokens * 8 * (moe.num_experts + moe.num_experts_per_token)
        inputs = self.routed_tokens * self.config.model.mla.d_model * self.product_bytes
        parts["dispatch"] = router + permutation + round(inputs)
        return parts

    def ends(self, first: bool, last: bool) -> Parts:
        """What a stage keeps besides decoder layers: token ids, the rotary table, MTP, the head."""
        shape, training = self.resolved.shape, self.config.training
        table = training.seq_length * shape.qk_rope_head_dim * 4
        parts = Parts(attention=table)
        width = self.config.model.mla.d_model
        if first:
            parts["attention"] += self.tokens * 8
            parts["attention"] += self._dropout(self.split_tokens * width, self.config.model.hidden_dropout)
        if last:
            parts["logits"] += self._norm(self.split_tokens, width) + self._head()
            for _ in range(shape.mtp_depth):
                parts["mtp"] += self._mtp_module()
        return parts

    def _head(self) -> int:
        """For every prediction depth the head's inputs, and softmaxes in FP32 or two numbers of each."""
        depths, tp = 1 + self.resolved.shape.mtp_depth, self.resolved.tp
        if self.config.training.loss_chunk_tokens is not None:
            gathered = self.tokens * self.config.model.mla.d_model * self.element_bytes
            return depths * (gathered + self.tokens * (8 + 1 + 2 * 4))
        labels = self.tokens * (8 + 4)
        softmax = self.tokens * self.config.model.vocab_size // tp * (2 if self._fused_loss else 4)
        return depths * (self.hidden_bytes + softmax + labels)

    @cached_property
    def _fused_loss(self) -> bool:
        """Whether whole logits stay in 16 bits, where their gradient is made in place: Transformer Engine."""
        native = self.config.model.backend == "native"
        return self.resolved.device == "cuda" and self.resolved.precision == "bf16" and not native

    def _mtp_module(self) -> int:
        """Token ids, two norms, the projection of both, a layer, the last norm (DeepSeek-V3, eq. 21-23)."""
        width, ids = self.config.model.mla.d_model, self.tokens * 8
        if self.recompute == "full":
            return ids + 2 * self.hidden_bytes
        norms = self._norm(self.split_tokens, width, inputs=3)
        layer = sum(self.layer(self.resolved.shape.mtp_is_moe).values())
        return ids + norms + 2 * self.hidden_bytes + layer

    @cached_property
    def kinds(self) -> tuple[Counter[bool], ...]:
        """Decoder layers of each virtual stage: how many are MoE (True) and dense (False)."""
        return layer_kinds(self.resolved.pipeline_layout, self.resolved.shape.is_moe)

    def kinds_of_stage(self, stage: int) -> set[bool]:
        """The kinds of layers that a pipeline rank has, its MTP modules' included."""
        found = {kind for chunk in self.kinds[stage :: self.resolved.pp] for kind in chunk}
        if stage == self.resolved.pp - 1 and self.resolved.shape.mtp_depth:
            found.add(self.resolved.shape.mtp_is_moe)
        return found

    def chunk(self, index: int) -> Parts:
        """All that virtual stage `index`, counted in order of execution, keeps of a micro-batch."""
        parts = self.ends(index == 0, index == len(self.resolved.pipeline_layout) - 1)
        for is_moe, count in self.kinds[index].items():
            parts.update({part: count * size for part, size in self.layer(is_moe).items()})
        return parts

    def layer_gradients(self, is_moe: bool) -> int:
        """The largest gradients that exist at a time within one layer: of the FFN, or of the attention."""
        shape, tp, width = self.resolved.shape, self.resolved.tp, self.config.model.mla.d_model
        query = shape.qk_nope_head_dim + shape.qk_rope_head_dim
        heads = self.config.model.mla.num_heads // tp
        attention = self.keys * heads * (2 * query + 2 * shape.v_head_dim + shape.qk_nope_head_dim)
        if not is_moe:
            ffn = self.tokens * (3 * shape.intermediate_size // tp + width)
        else:
            inner = self.config.model.moe.expert_intermediate_size // self.resolved.etp
            # Routed tokens on their way in and out of the all-to-all, and inside the experts.
            ffn = self.routed_tokens * (2 * width + 3 * inner)
        return max(attention, ffn) * self.element_bytes

    def logit_gradients(self) -> int:
        """Logits in the run's precision beside those in FP32, of one prediction depth or of one chunk."""
        vocabulary, chunk = (
            self.config.model.vocab_size // self.resolved.tp,
            self.config.training.loss_chunk_tokens,
        )
        if chunk is None:
            return 0 if self._fused_loss else self.tokens * vocabulary * self.element_bytes
        tokens = min(chunk, self.tokens * (1 + self.resolved.shape.mtp_depth))
        return tokens * vocabulary * (4 if self.element_bytes == 4 else 4 + self.element_bytes)
