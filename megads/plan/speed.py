"""Predicted time of an optimizer step: a small model, to rank layouts and to see what limits one.

A micro-batch on a stage takes, forward and backward,
- matrix products at `PRODUCT_EFFICIENCY` of the peak, times d / (d + HALF_EFFICIENT_SIZE) for a product
  whose smallest dimension is d: small products do not fill a GPU;
- attention's scores at `ATTENTION_EFFICIENCY` of the peak;
- `MEMORY_PASSES` passes of the memory over what forward keeps, for norms, SwiGLU, permutations, residuals;
- its communication at `LINK_EFFICIENCY` of a link: tensor, expert (all-to-all of K copies of each token) and
  context parallelism. Nothing of it is taken to overlap with computation, as is so with the all-to-all
  dispatcher; DeepEP and DualPipe (DeepSeek-V3, section 3.2) hide most of it. `tp_comm_overlap` hides
  `OVERLAP` of the exchanges that have user buffers.

A step is (m - 1) t_max + sum(t) / vpp + t_max (1 - 1 / vpp) for m micro-batches over stages of times t
(arXiv:2104.04473, section 2.2), and what the optimizer and data parallelism add, of which `OVERLAP` is hidden
where the configuration overlaps. Ranks are placed as Megatron-Core does: TP, CP, DP, PP from the inside out,
experts within CP x DP. The constants are what published runs come out with within a third
(`tests/unit/test_plan_speed.py`); ratios of layouts are better than absolute times.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from megads.config.flops import (
    ParameterCounts,
    attention_flops_per_token,
    count_parameters,
    training_flops_per_token,
)
from megads.config.memory import stage_memory
from megads.config.schema import Config
from megads.plan.activations import SavedActivations
from megads.plan.hardware import Gpu
from megads.plan.memory import micro_batches_per_step

PRODUCT_EFFICIENCY = 0.72
HALF_EFFICIENT_SIZE = 128
ATTENTION_EFFICIENCY = 0.45
MEMORY_EFFICIENCY = 0.8
LINK_EFFICIENCY = 0.8
MEMORY_PASSES = 5
OVERLAP = 0.7


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by cause, for the slowest stage; `bubble` is what pipelining leaves idle."""

    products: float
    attention: float
    memory: float
    tensor_parallel: float
    expert_parallel: float
    context_parallel: float
    bubble: float
    data_parallel: float
    optimizer: float
    tokens_per_gpu: float
    flops_per_gpu: float
    peak_flops_per_second: float

    @property
    def seconds(self) -> float:
        return sum(self.by_cause().values())

    @property
    def tokens_per_second_per_gpu(self) -> float:
        return self.tokens_per_gpu / self.seconds

    @property
    def mfu(self) -> float:
        """Share of the dense BF16 peak; FLOPs of `config.flops`, attention causal."""
        return self.flops_per_gpu / self.seconds / self.peak_flops_per_second

    def by_cause(self) -> dict[str, float]:
        causes = ("products", "attention", "memory", "tensor_parallel", "expert_parallel",
                  "context_parallel", "bubble", "data_parallel", "optimizer")  # fmt: skip
        return {cause: getattr(self, cause) for cause in causes}


@dataclass(frozen=True)
class Work:
    """Seconds of one micro-batch, forward and backward, in one layer or stage."""

    products: float = 0.0
    attention: float = 0.0
    memory: float = 0.0
    tensor_parallel: float = 0.0
    expert_parallel: float = 0.0
    context_parallel: float = 0.0

    @property
    def seconds(self) -> float:
        return sum(vars(self).values())

    def __add__(self, other: "Work") -> "Work":
        return Work(
            *(mine + its for mine, its in zip(vars(self).values(), vars(other).values(), strict=True))
        )

    def __mul__(self, times: float) -> "Work":
        return Work(*(seconds * times for seconds in vars(self).values()))


@dataclass(frozen=True)
class ModelFlops:
    """What the speed model needs of a model, whatever its layout; FLOPs with causal attention."""

    counts: ParameterCounts
    training_flops_per_token: float
    attention_flops_per_token: float

    @classmethod
    def of(cls, config: Config) -> "ModelFlops":
        return cls(
            count_parameters(config), training_flops_per_token(config), attention_flops_per_token(config)
        )


class SpeedModel:
    """Times of the configuration and layout of `saved` on a GPU; `model` is what no layout changes."""

    def __init__(self, saved: SavedActivations, gpu: Gpu, model: ModelFlops) -> None:
        self.saved, self.config, self.resolved, self.gpu = saved, saved.config, saved.resolved, gpu
        self.model = model
        speedup = gpu.fp8_speedup if self.config.training.use_fp8 else 1.0
        self._product_rate = gpu.bf16_flops_per_second * PRODUCT_EFFICIENCY * speedup
        self._layers: dict[bool, Work] = {}

    def step(self) -> StepTime:
        """The whole optimizer step at the final batch size."""
        resolved, training = self.resolved, self.config.training
        stages = self._stages()
        slowest = max(stages, key=lambda work: work.seconds)
        vpp, micro_batches = resolved.vpp or 1, micro_batches_per_step(self.config, resolved)
        bubble = (sum(work.seconds for work in stages) - slowest.seconds) / vpp
        data_parallel, optimizer = self._update()
        tokens = training.global_batch_size * training.seq_length / resolved.world_size
        return StepTime(
            **vars(slowest * micro_batches),
            bubble=bubble,
            data_parallel=data_parallel,
            optimizer=optimizer,
            tokens_per_gpu=tokens,
            flops_per_gpu=tokens * self.model.training_flops_per_token,
            peak_flops_per_second=self.gpu.bf16_flops_per_second,
        )

    def _stages(self) -> list[Work]:
        """Each pipeline rank's; those with the same layers are worked out once."""
        saved, pp = self.saved, self.resolved.pp
        known: dict[tuple[int, int], Work] = {}
        stages = []
        for stage in range(pp):
            dense, moe = (sum(chunk[kind] for chunk in saved.kinds[stage::pp]) for kind in (False, True))
            if (dense, moe) not in known:
                of_dense = self.layer(False) * dense if dense else Work()
                known[dense, moe] = of_dense + self.layer(True) * moe if moe else of_dense
            stages.append(known[dense, moe])
        stages[-1] = stages[-1] + self._head_and_mtp()
        return stages

    def _head_and_mtp(self) -> Work:
        """The output head for every prediction depth, and the MTP modules."""
        saved, resolved = self.saved, self.resolved
        depth, width = resolved.shape.mtp_depth, self.config.model.mla.d_model
        vocabulary = self.config.model.vocab_size // resolved.tp
        products = 3 if self.config.training.loss_chunk_tokens is None else 4
        head = products * self._product(saved.tokens, width, vocabulary)
        logits = saved.tokens * vocabulary * 4 * MEMORY_PASSES
        work = Work(products=(1 + depth) * head, memory=(1 + depth) * self._memory_seconds(logits))
        if not depth:
            return work
        projection = 3 * self._product(saved.tokens, 2 * width, width // resolved.tp)
        return work + Work(products=depth * projection) + self.layer(resolved.shape.mtp_is_moe) * depth

    def layer(self, is_moe: bool) -> Work:
        """One decoder layer: backward is two forward passes, recomputation another (part of) one."""
        if is_moe not in self._layers:
            self._layers[is_moe] = self._layer(is_moe)
        return self._layers[is_moe]

    def _layer(self, is_moe: bool) -> Work:
        saved, resolved = self.saved, self.resolved
        up = sum(self._product(*shape) for shape in self._up_projections())
        rest = sum(self._product(*shape) for shape in self._other_products(is_moe))
        again = up + rest if saved.recompute == "full" else self._selectively_again(is_moe)
        scores = self.model.attention_flops_per_token * saved.tokens / resolved.tp
        passes = 4 if saved.recompute == "full" else 3
        exchanges = 4 if saved.recompute == "full" or "moe" in saved.recomputed_modules else 3
        attention = passes * scores / (self.gpu.bf16_flops_per_second * ATTENTION_EFFICIENCY)
        whole = saved.whole_layer_bytes(is_moe)
        products, memory = 3 * (up + rest) + again, self._memory_seconds(whole * MEMORY_PASSES * passes / 3)
        exchange = self._expert_parallel() * exchanges / 3 if is_moe else 0.0
        if self.config.distributed.overlap_expert_parallel:
            exchange = max(0.0, exchange - products - attention - memory)  # of the other micro-batch
        return Work(
            products=products,
            attention=attention,
            memory=memory,
            tensor_parallel=self._tensor_parallel(is_moe) * passes / 3,
            expert_parallel=exchange,
            context_parallel=self._context_parallel(),
        )

    def _selectively_again(self, is_moe: bool) -> float:
        """Seconds of the products in a layer that `training.recompute_modules` repeats."""
        modules = self.saved.recomputed_modules
        parts: list[Iterator[tuple[float, float, float, float]]] = []
        if "mla_up_proj" in modules:
            parts.append((*shape, 1) for shape in self._up_projections())
        if ("mlp" if not is_moe else "moe") in modules:
            parts.append(self._ffn_products(is_moe))
        elif is_moe and "shared_experts" in modules:
            parts.append(self._whole_ffn_products(self.resolved.shape.shared_intermediate_size))
        return sum(self._product(*shape) for part in parts for shape in part)

    def _product(self, rows: float, inner: float, columns: float, count: float = 1) -> float:
        """Seconds of one [rows, inner] x [inner, columns] product, or of `count` such ones."""
        smallest = min(rows, inner, columns)
        if smallest <= 0:
            return 0.0
        efficiency = smallest / (smallest + HALF_EFFICIENT_SIZE)
        return count * 2 * rows * inner * columns / (self._product_rate * efficiency)

    def _up_projections(self) -> Iterator[tuple[float, float, float]]:
        mla, shape, saved = self.config.model.mla, self.resolved.shape, self.saved
        heads = mla.num_heads // self.resolved.tp
        query = shape.qk_nope_head_dim + shape.qk_rope_head_dim
        yield saved.tokens, mla.q_lora_rank or mla.d_model, heads * query
        yield saved.keys, mla.d_latent, heads * (shape.qk_nope_head_dim + shape.v_head_dim)

    def _other_products(self, is_moe: bool) -> Iterator[tuple[float, float, float, float]]:
        config, resolved, saved = self.config, self.resolved, self.saved
        mla, shape, tp = config.model.mla, resolved.shape, resolved.tp
        if mla.q_lora_rank is not None:
            yield saved.split_tokens, mla.d_model, mla.q_lora_rank, 1
        yield saved.split_tokens, mla.d_model, mla.d_latent + shape.qk_rope_head_dim, 1
        yield saved.tokens, mla.num_heads // tp * shape.v_head_dim, mla.d_model, 1
        yield from self._ffn_products(is_moe)

    def _ffn_products(self, is_moe: bool) -> Iterator[tuple[float, float, float, float]]:
        moe, resolved, width = self.config.model.moe, self.resolved, self.config.model.mla.d_model
        if not is_moe:
            yield from self._whole_ffn_products(resolved.shape.intermediate_size)
            return
        yield from self._whole_ffn_products(resolved.shape.shared_intermediate_size)
        experts, inner = moe.num_experts // resolved.ep, moe.expert_intermediate_size // resolved.etp
        rows = self.saved.routed_tokens / experts
        yield rows, width, 2 * inner, experts
        yield rows, inner, width, experts

    def _whole_ffn_products(self, intermediate: int) -> Iterator[tuple[float, float, float, float]]:
        """Of an FFN that every token passes, split over tensor parallelism."""
        tokens, width, inner = (
            self.saved.tokens,
            self.config.model.mla.d_model,
            intermediate // self.resolved.tp,
        )
        yield tokens, width, 2 * inner, 1
        yield tokens, inner, width, 1

    def _memory_seconds(self, size_bytes: float) -> float:
        return size_bytes / (self.gpu.memory_bytes_per_second * MEMORY_EFFICIENCY)

    def _exchange(self, size_bytes: float, ranks: int, stride: int) -> float:
        """Seconds of a gather, a scatter or an all-to-all in which each rank ends up with `size_bytes`.

        `stride` is the distance of neighbours in the group: what does not fit a node goes over the network.
        """
        if ranks == 1:
            return 0.0
        in_node = max(1, min(ranks, self.gpu.per_node // stride))
        over_network = (ranks - in_node) / ranks * size_bytes / self.gpu.network_link_bytes_per_second
        in_the_node = (in_node - 1) / ranks * size_bytes / self.gpu.node_link_bytes_per_second
        return (over_network + in_the_node) / LINK_EFFICIENCY

    def _tensor_parallel(self, is_moe: bool) -> float:
        """Gathers of the latents and of the FFN's input, scatters of both outputs; backward mirrors them.

        Those of hidden states beside a product have user buffers: forward's gathers, and scatters both ways.
        """
        mla, shape, tp = self.config.model.mla, self.resolved.shape, self.resolved.tp
        latents = (mla.q_lora_rank or mla.d_model) + mla.d_latent + shape.qk_rope_head_dim
        has_ffn = not is_moe or shape.shared_intermediate_size > 0
        gathered = latents + (mla.d_model if has_ffn else 0)
        scattered = mla.d_model * (2 if has_ffn else 1)
        # A gathered input is gathered again for the weight gradient.
        numbers: float = 3 * gathered + 2 * scattered
        if self.config.distributed.tp_comm_overlap:
            gathered_hidden = mla.d_model * (has_ffn + (mla.q_lora_rank is None))
            numbers -= OVERLAP * (gathered_hidden + 2 * scattered)
        return self._exchange(numbers * self.saved.tokens * self.saved.element_bytes, tp, 1)

    def _expert_parallel(self) -> float:
        """Dispatch and combine, forward and backward; inside expert TP a gather and a scatter more."""
        moe, resolved, saved = self.config.model.moe, self.resolved, self.saved
        numbers = saved.split_tokens * moe.num_experts_per_token * self.config.model.mla.d_model
        dispatch = numbers * (saved.product_bytes + saved.element_bytes)  # there in FP8 if so, back in BF16
        seconds = 2 * self._exchange(dispatch, resolved.ep, resolved.etp)
        inside = 4 * numbers * resolved.etp * saved.element_bytes
        return seconds + self._exchange(inside, resolved.etp, 1)

    def _context_parallel(self) -> float:
        """Gathering the latents and rotary keys of the sequence, and scattering their gradients."""
        width = self.config.model.mla.d_latent + self.resolved.shape.qk_rope_head_dim
        gathered = self.saved.keys * width * self.saved.element_bytes
        return 2 * self._exchange(gathered, self.resolved.cp, self.resolved.tp)

    def _update(self) -> tuple[float, float]:
        """(seconds of gradient reduction and parameter gathering that show, seconds of the optimizer)."""
        config, resolved = self.config, self.resolved
        communication = optimizer = 0.0
        for stage in {0, min(1, resolved.pp - 1), resolved.pp - 1}:
            memory = stage_memory(config, resolved, stage, self.model.counts)
            exchanged = memory.parameters * self._exchanged_bytes_per_parameter()
            expert = memory.expert_parameters / max(memory.parameters, 1)
            seconds = 0.0
            for share, ranks in ((1 - expert, resolved.dp * resolved.cp), (expert, resolved.edp)):
                stride = resolved.world_size // resolved.pp // ranks
                seconds += self._exchange(exchanged * share, ranks, stride)
            touched = 2 * memory.optimizer_bytes + memory.gradients_bytes + memory.weights_bytes
            communication = max(communication, seconds)
            optimizer = max(optimizer, self._memory_seconds(touched))
        hidden = OVERLAP if config.distributed.overlap_grad_reduce else 0.0
        return communication * (1 - hidden), optimizer

    def _exchanged_bytes_per_parameter(self) -> int:
        """Reduced gradients and gathered weights; without ZeRO gradients are both scattered and gathered.

        ZeRO-2 and ZeRO-3 reduce in every micro-batch, ZeRO-3 also gathers in each, forward and backward.
        """
        zero, weight_bytes = self.config.distributed.zero_stage, 4 if self.resolved.precision == "fp32" else 2
        micro_batches = micro_batches_per_step(self.config, self.resolved)
        reduced = 4 * (micro_batches if zero >= 2 else 1)
        return reduced + (4 if zero == 0 else weight_bytes * (2 * micro_batches if zero == 3 else 1))
