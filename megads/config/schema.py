"""Every setting of MegaDS: name, type, default, unit and source, each written once.

The tree is the same in JSON, on the command line (`--training.learning_rate 3e-4`) and in the
code (`config.training.learning_rate`). Names are those of the configuration guide; DeepSeek's
published names (`q_lora_rank`, `n_group`, ...) fill what it lacks, and are accepted as aliases
where the guide has a name of its own. Values that follow from others (data-parallel size, steps,
head dimensions left open) live in `config.resolve`, never here.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

V3 = "DeepSeek-V3, arXiv:2412.19437"
MOONLIGHT = "Moonlight, arXiv:2502.16982"
LLM = "DeepSeek LLM, arXiv:2401.02954"


class Section(BaseModel):
    """A frozen group of settings; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def setting(
    default: Any,
    doc: str,
    *,
    unit: str = "",
    source: str = "",
    aliases: tuple[str, ...] = (),
    flags: tuple[str, ...] = (),
    **limits: Any,
) -> Any:
    """A leaf of the tree.

    `aliases` are further JSON keys (the loader renames them), `flags` are Megatron-LM's names of
    the same thing on the command line; `limits` (`ge`, `gt`, `le`, ...) go to pydantic.
    """
    extra: dict[str, Any] = {"unit": unit, "source": source, "aliases": list(aliases), "flags": list(flags)}
    return Field(default, description=doc, json_schema_extra={k: v for k, v in extra.items() if v}, **limits)


class SchedulePhase(Section):
    """One piece of a schedule: from where the last one ended to `to`, reached at `until_tokens`."""

    until_tokens: int = setting(..., "end of the phase, in tokens since the start", unit="tokens", gt=0)
    to: float = setting(..., "value at the end of the phase", ge=0)
    shape: Literal["constant", "linear", "cosine"] = setting(
        "constant", "constant: `to` throughout; linear, cosine: from the previous value to `to`"
    )


class RopeScaling(Section):
    """YaRN (arXiv:2309.00071); leave `model.mla.rope_scaling` null for plain RoPE, as V3's 4K phase."""

    type: Literal["yarn"] = setting("yarn", "scaling rule", aliases=("rope_type",))
    factor: float = setting(40.0, "context length over the original one", source=V3, gt=1)
    original_max_position_embeddings: int = setting(
        4096, "context length of the plain RoPE phase", unit="tokens", gt=0
    )
    beta_fast: float = setting(32.0, "rotations above which a frequency is kept", gt=0)
    beta_slow: float = setting(1.0, "rotations below which a frequency is divided by factor", gt=0)
    mscale: float = setting(1.0, "coefficient of the cos/sin magnitude correction")
    mscale_all_dim: float = setting(1.0, "coefficient of the softmax-scale correction")


class MLA(Section):
    """Multi-head Latent Attention (DeepSeek-V2, arXiv:2405.04434, section 2.1)."""

    d_model: int = setting(1024, "hidden size", aliases=("hidden_size",), flags=("--hidden-size",), gt=0)
    d_latent: int = setting(
        256,
        "width of the compressed key-value latent",
        source="paper: d_c",
        gt=0,
        aliases=("kv_lora_rank",),
        flags=("--kv-lora-rank",),
    )
    q_lora_rank: int | None = setting(
        None,
        "width of the compressed query latent; null: full-rank query projection",
        source="paper: d_c'",
        gt=0,
        flags=("--q-lora-rank",),
    )
    num_heads: int = setting(
        16, "attention heads", aliases=("num_attention_heads",), flags=("--num-attention-heads",), gt=0
    )
    num_kv_heads: int | None = setting(
        None,
        "must equal num_heads: MLA compresses keys and values instead of sharing heads",
        aliases=("num_key_value_heads",),
    )
    qk_nope_head_dim: int | None = setting(
        None,
        "query/key width per head without RoPE; null: d_model / num_heads",
        gt=0,
        flags=("--qk-head-dim",),
    )
    qk_rope_head_dim: int | None = setting(
        None,
        "width of the decoupled RoPE part; null: half of qk_nope_head_dim",
        gt=0,
        flags=("--qk-pos-emb-head-dim",),
    )
    v_head_dim: int | None = setting(
        None, "value width per head; null: qk_nope_head_dim", gt=0, flags=("--v-head-dim",)
    )
    max_context_length: int = setting(
        4096,
        "longest sequence the model is built for",
        unit="tokens",
        gt=0,
        aliases=("max_position_embeddings",),
        flags=("--max-position-embeddings",),
    )
    use_rope: bool = setting(True, "decoupled rotary position embedding; false is refused")
    rope_theta: float = setting(10000.0, "RoPE base", gt=1, flags=("--rotary-base",))
    rope_scaling: RopeScaling | None = setting(None, "YaRN; null: plain RoPE")
    sliding_window: int | None = setting(
        None,
        "each token sees itself and the window - 1 tokens before it; null: all before it",
        unit="tokens",
        gt=0,
    )
    attn_dropout: float = setting(
        0.0,
        "dropout on attention probabilities",
        ge=0,
        lt=1,
        aliases=("attention_dropout",),
        flags=("--attention-dropout",),
    )
    use_flash_mla: bool = setting(False, "attention by a flash kernel, on CUDA in 16 bits: docs/attention.md")
    flash_mla_backend: Literal["auto", "sparse", "dense"] = setting(
        "auto", "auto and dense: attention to all keys; sparse is refused"
    )
    fallback_to_dense: bool = setting(
        True, "where no flash kernel works: torch's dense one and a warning; false: an error"
    )
    use_fp8_kv: bool = setting(False, "FP8 latent cache when decoding")


class MoE(Section):
    """Mixture of experts: DeepSeekMoE with auxiliary-loss-free balancing."""

    num_experts: int = setting(
        8, "routed experts; 0: a dense model", aliases=("n_routed_experts",), flags=("--num-experts",), ge=0
    )
    num_experts_per_token: int = setting(
        2,
        "experts chosen per token (K)",
        aliases=("num_experts_per_tok",),
        flags=("--moe-router-topk",),
        gt=0,
    )
    expert_intermediate_size: int = setting(
        2048,
        "SwiGLU width of one routed expert",
        aliases=("expert_dim", "moe_intermediate_size"),
        flags=("--moe-ffn-hidden-size",),
        gt=0,
    )
    num_shared_experts: int = setting(0, "experts every token passes", aliases=("n_shared_experts",), ge=0)
    shared_intermediate_size: int = setting(
        0, "SwiGLU width of one shared expert; 0: expert_intermediate_size", ge=0
    )
    dropout: float = setting(0.0, "dropout on the output of the MoE layer", ge=0, lt=1)
    scoring_func: Literal["sigmoid", "softmax"] = setting(
        "sigmoid",
        "affinity of a token to an expert",
        source=f"{V3}, eq. 15",
        flags=("--moe-router-score-function",),
    )
    norm_topk_prob: bool = setting(True, "gates of the chosen experts sum to 1", source=f"{V3}, eq. 13")
    routed_scaling_factor: float = setting(
        1.0,
        "factor on the gates",
        source="DeepSeek-V3 config: 2.5",
        gt=0,
        flags=("--moe-router-topk-scaling-factor",),
    )
    n_group: int = setting(
        1, "expert groups for node-limited routing", flags=("--moe-router-num-groups",), gt=0
    )
    topk_group: int = setting(1, "groups a token may use", flags=("--moe-router-group-topk",), gt=0)
    use_aux_loss_free: bool = setting(
        False,
        "balance by a bias on the scores that choose experts",
        source=f"{V3}, eq. 16",
        flags=("--moe-router-enable-expert-bias",),
    )
    bias_update_rate: float = setting(
        0.001,
        "step of the balancing bias (gamma)",
        source=V3,
        ge=0,
        flags=("--moe-router-bias-update-rate",),
    )
    bias_update_rate_phases: tuple[SchedulePhase, ...] = setting(
        (), "the rate over the run", source=f"{V3}, section 4.2: 0.001 to 14.3T tokens, then 0"
    )
    bias_update_centered: bool = setting(
        False, "subtract the mean of the updates, so that biases keep their mean", source=MOONLIGHT
    )
    balance_loss_type: Literal["sequence", "load", "entropy", "none"] = setting(
        "sequence",
        "auxiliary loss: sequence (V3 eq. 17-20), load (Switch, over the micro-batch), "
        "entropy (log E - entropy of the mean routing probability), none",
    )
    router_aux_loss_weight: float = setting(
        0.0001,
        "weight of the auxiliary loss (alpha)",
        source=V3,
        ge=0,
        aliases=("aux_loss_alpha",),
        flags=("--moe-aux-loss-coeff",),
    )
    router_aux_loss_weight_phases: tuple[SchedulePhase, ...] = setting((), "the weight over the run")
    router_z_loss_weight: float = setting(
        0.0,
        "weight of the router z-loss",
        source="ST-MoE, arXiv:2202.08906, eq. 5",
        ge=0,
        flags=("--moe-z-loss-coeff",),
    )
    router_temperature: float = setting(1.0, "router logits are divided by it", gt=0)
    router_temperature_phases: tuple[SchedulePhase, ...] = setting((), "the temperature over the run")
    router_noise_std: float = setting(
        0.0,
        "std of Gaussian noise on the logits that choose experts; without phases it falls linearly to 0 "
        "over the run",
        ge=0,
    )
    router_noise_std_phases: tuple[SchedulePhase, ...] = setting((), "the noise over the run")
    capacity_factor: float | None = setting(
        None,
        "tokens an expert takes at most, over the mean; null: no token is dropped",
        gt=0,
        flags=("--moe-expert-capacity-factor",),
    )
    min_expert_capacity: int = setting(4, "least capacity of an expert", unit="tokens", ge=0)
    use_deep_ep: bool = setting(False, "DeepEP dispatcher (CUDA only)")
    deep_ep_fp8: bool = setting(False, "FP8 dispatch in DeepEP")
    deep_ep_async: bool = setting(False, "asynchronous DeepEP")


class Model(Section):
    """Architecture. `mla` and `moe` hold the parts."""

    num_layers: int = setting(
        12,
        "transformer layers, MTP not counted",
        aliases=("num_hidden_layers",),
        flags=("--num-layers",),
        gt=0,
    )
    vocab_size: int = setting(128000, "rows of the embedding table", flags=("--vocab-size",), gt=0)
    norm_type: Literal["rmsnorm", "layernorm"] = setting("rmsnorm", "normalization")
    norm_eps: float = setting(
        1e-6, "epsilon of the norms", aliases=("rms_norm_eps",), flags=("--norm-epsilon",), gt=0
    )
    tie_word_embeddings: bool = setting(False, "output head shares the embedding table")
    init_method_std: float = setting(
        0.006,
        "std of the initial weights",
        source=V3,
        aliases=("initializer_range",),
        flags=("--init-method-std",),
        gt=0,
    )
    intermediate_size: int | None = setting(
        None,
        "SwiGLU width of a dense layer; null: the active width of a MoE layer, as V3's 18432 = 9 x 2048",
        flags=("--ffn-hidden-size",),
        gt=0,
    )
    hidden_dropout: float = setting(
        0.0, "dropout on the output of attention and FFN", ge=0, lt=1, flags=("--hidden-dropout",)
    )
    first_k_dense_replace: int | None = setting(None, "the first k layers are dense", source="V3: 3", ge=0)
    dense_layer_interval: int | None = setting(
        None, "every n-th layer, from the first on, is dense", source="configuration guide", gt=0
    )
    dense_layers: tuple[int, ...] | None = setting(
        None, "the dense layers by number, from 0; excludes the two rules above"
    )
    backend: Literal["auto", "native", "transformer_engine"] = setting(
        "auto",
        "what computes the layers: torch itself, or Transformer Engine (CUDA only); auto: Transformer Engine "
        "on CUDA in 16 bits where it is installed. Checkpoints are the same",
    )
    mla: MLA = MLA()
    moe: MoE = MoE()


class Stability(Section):
    """Steps that go wrong: gradients that are not finite, and spikes of the loss."""

    max_skipped_steps: int = setting(10, "steps skipped in a row that end the run", unit="steps", gt=0)
    spike_policy: Literal["warn", "skip", "rollback"] = setting(
        "warn",
        "warn; skip the update of the batch; rollback to the last checkpoint before the spike, leave out the "
        "data read since, and lower the learning rate",
    )
    spike_window: int = setting(64, "accepted losses that a new one is compared with", unit="steps", ge=16)
    spike_threshold: float = setting(
        8.0, "a spike is this far above their median, in robust standard deviations", gt=0
    )
    spike_least_increase: float = setting(
        0.2, "and at least so far, whatever the deviation", unit="nats per token", ge=0
    )
    spike_patience: int = setting(3, "spikes in a row before a rollback", unit="steps", gt=0)
    rollback_lr_factor: float = setting(0.5, "factor on the learning rate from each rollback on", gt=0, le=1)
    max_rollbacks: int = setting(3, "rollbacks of a run; one more ends it", ge=0)


class FP16(Section):
    """Loss scaling of FP16 (arXiv:1710.03740): gradients are scaled up, out of FP16's underflow."""

    loss_scale: float | None = setting(None, "a fixed scale; null: dynamic", flags=("--loss-scale",), gt=0)
    initial_loss_scale: float = setting(
        65536.0, "dynamic scale of the first step", flags=("--initial-loss-scale",), gt=0
    )
    min_loss_scale: float = setting(1.0, "below which it does not fall", flags=("--min-loss-scale",), gt=0)
    loss_scale_window: int = setting(
        1000,
        "steps without an overflow after which it is doubled",
        unit="steps",
        flags=("--loss-scale-window",),
        gt=0,
    )
    hysteresis: int = setting(
        2, "overflows from which on each one halves it", unit="steps", flags=("--hysteresis",), gt=0
    )


class FP8(Section):
    """What `use_fp8` rounds, and how (DeepSeek-V3, section 3.3).

    Embedding, output head, router, norms and core attention are never in FP8.
    """

    recipe: Literal["auto", "blockwise", "tensorwise", "delayed", "mxfp8"] = setting(
        "auto",
        "scales per 1x128 and 128x128 block, per tensor, per tensor from earlier steps, per 1x32 block; "
        "auto: mxfp8 on Blackwell, else blockwise",
        source=f"{V3}, section 3.3.2: blockwise",
        flags=("--fp8-recipe",),
    )
    format: Literal["e4m3", "hybrid"] = setting(
        "e4m3",
        "hybrid: gradients in E5M2",
        source=f"{V3}, section 3.3.2: e4m3",
        flags=("--fp8-format",),
    )
    amax_history_len: int = setting(
        1024,
        "steps whose largest values make the scale (delayed only)",
        unit="steps",
        flags=("--fp8-amax-history-len",),
        gt=0,
    )
    amax_compute_algo: Literal["max", "most_recent"] = setting(
        "max", "which of them (delayed only)", flags=("--fp8-amax-compute-algo",)
    )
    bf16_first_layers: int = setting(
        0, "decoder layers at the start without FP8", flags=("--num-layers-at-start-in-bf16",), ge=0
    )
    bf16_last_layers: int = setting(
        0, "decoder layers at the end without FP8", flags=("--num-layers-at-end-in-bf16",), ge=0
    )
    bf16_mtp: bool = setting(False, "no FP8 in MTP")
    param_gather: bool = setting(
        False,
        "keep the weights of FP8 products in FP8 and gather them so over data parallelism (CUDA only)",
        flags=("--fp8-param-gather",),
    )


RecomputeModule = Literal["mla_up_proj", "layernorm", "moe_act", "mlp", "shared_experts", "moe"]
CudaGraphPart = Literal["attn", "mlp", "moe_router", "moe_preprocess"]


class Training(Section):
    """Batches, length of the run, optimizer, schedules, precision, objective."""

    global_batch_size: int = setting(64, "sequences per optimizer step", flags=("--global-batch-size",), gt=0)
    micro_batch_size: int = setting(
        2, "sequences per forward pass of one model replica", flags=("--micro-batch-size",), gt=0
    )
    batch_size_rampup_tokens: int = setting(
        0,
        "tokens over which the batch grows from rampup_start to global_batch_size",
        unit="tokens",
        source="V3: 469B",
        ge=0,
    )
    batch_size_rampup_start: int | None = setting(
        None, "sequences per step at the start of the ramp", source="V3: 3072", gt=0
    )
    seq_length: int = setting(2048, "tokens per sequence", unit="tokens", flags=("--seq-length",), gt=1)
    seq_length_phases: tuple[SchedulePhase, ...] = setting(
        (),
        "curriculum of sequence lengths, constant in each phase; each divides seq_length, of which every "
        "sample is cut into that many shorter ones, so that tokens per step stay the same",
        unit="tokens",
    )
    total_training_tokens: int | None = setting(
        None,
        "length of the run; null: from train_steps, else from tokens_per_parameter_ratio",
        unit="tokens",
        gt=0,
    )
    train_steps: int | None = setting(
        None, "length of the run in optimizer steps", unit="steps", flags=("--train-iters",), gt=0
    )
    tokens_per_parameter_ratio: float = setting(
        20.0,
        "tokens per active parameter, where neither tokens nor steps are given",
        source="Chinchilla, arXiv:2203.15556, fitted on dense models",
        gt=0,
    )
    learning_rate: float = setting(3e-4, "peak learning rate", flags=("--lr",), gt=0)
    min_learning_rate: float = setting(3e-5, "learning rate after decay", flags=("--min-lr",), ge=0)
    lr_warmup_steps: int = setting(
        2000, "linear warm-up from 0", unit="steps", flags=("--lr-warmup-iters",), ge=0
    )
    lr_decay_style: Literal["cosine", "linear", "constant", "wsd", "multistep", "phases"] = setting(
        "cosine", "multistep: DeepSeek LLM; phases: lr_phases", flags=("--lr-decay-style",)
    )
    lr_wsd_decay_fraction: float = setting(
        0.1, "share of the run that WSD decays in", source="MiniCPM, arXiv:2404.06395", gt=0, le=1
    )
    lr_wsd_decay_style: Literal["linear", "cosine"] = setting(
        "linear", "shape of WSD's decay", flags=("--lr-wsd-decay-style",)
    )
    lr_multistep: tuple[tuple[float, float], ...] = setting(
        ((0.8, 0.316), (0.9, 0.1)), "(share of the run, factor on the peak) pairs", source=LLM
    )
    lr_phases: tuple[SchedulePhase, ...] = setting(
        (), "the whole learning-rate schedule, warm-up included, in tokens", source=f"{V3}, section 4.2"
    )
    weight_decay: float = setting(
        0.1, "decoupled weight decay; not on norms and biases", flags=("--weight-decay",), ge=0
    )
    grad_clip: float = setting(1.0, "largest gradient norm; 0: no clipping", flags=("--clip-grad",), ge=0)
    optimizer: Literal["adamw", "adam", "sgd"] = setting("adamw", "optimizer", flags=("--optimizer",))
    adam_beta1: float = setting(0.9, "Adam beta1", flags=("--adam-beta1",), ge=0, lt=1)
    adam_beta2: float = setting(0.95, "Adam beta2", flags=("--adam-beta2",), ge=0, lt=1)
    adam_eps: float = setting(1e-8, "Adam epsilon", flags=("--adam-eps",), gt=0)
    sgd_momentum: float = setting(0.9, "momentum of SGD", flags=("--sgd-momentum",), ge=0, lt=1)
    adam_exp_avg_dtype: Literal["fp32", "bf16"] = setting(
        "fp32", "Adam's first moment", source=f"{V3}, section 3.3.3: bf16", flags=("--exp-avg-dtype",)
    )
    adam_exp_avg_sq_dtype: Literal["fp32", "bf16"] = setting(
        "fp32", "Adam's second moment", source=f"{V3}, section 3.3.3: bf16", flags=("--exp-avg-sq-dtype",)
    )
    deterministic: bool = setting(
        False, "results that repeat bit by bit on GPUs too, at lower speed", flags=("--deterministic-mode",)
    )
    use_fp16: bool = setting(False, "FP16 with loss scaling (CUDA only)", flags=("--fp16",))
    use_bf16: bool = setting(True, "BF16 with FP32 master weights; a CPU run uses FP32", flags=("--bf16",))
    use_fp8: bool = setting(
        False,
        "FP8 matrix products, through Transformer Engine on CUDA; a CPU run emulates them in FP32, slowly",
    )
    fp16: FP16 = FP16()
    fp8: FP8 = FP8()
    use_mtp: bool = setting(False, "multi-token prediction", source=f"{V3}, section 2.2")
    num_predict_tokens: int = setting(
        2,
        "future tokens each position predicts, the next one included: MTP depth + 1",
        source="V3: 2 (depth 1)",
        aliases=("mtp_tokens",),
        ge=2,
    )
    mtp_loss_weight: float = setting(
        0.3,
        "weight of the MTP loss (lambda)",
        source=f"{V3}, eq. 25",
        ge=0,
        flags=("--mtp-loss-scaling-factor",),
    )
    mtp_loss_weight_phases: tuple[SchedulePhase, ...] = setting(
        (), "the weight over the run", source=f"{V3}, section 4.2: 0.3 to 10T tokens, then 0.1"
    )
    gradient_checkpointing: Literal[False, True, "full", "selective"] = setting(
        False, "recompute activations: full (each layer), selective (recompute_modules)"
    )
    recompute_modules: tuple[RecomputeModule, ...] = setting(
        ("mla_up_proj", "layernorm"),
        "what selective recomputes: mla_up_proj (with RoPE), layernorm (before attention and FFN; with "
        "Transformer Engine only), moe_act (the routed experts' SwiGLU), mlp (dense FFNs), shared_experts, "
        "moe (whole MoE layers, their exchange of tokens included)",
        source=f"{V3}, section 3.2.3: mla_up_proj, layernorm; 3.3.3: moe_act",
        flags=("--recompute-modules",),
    )
    cuda_graphs: tuple[CudaGraphPart, ...] = setting(
        (),
        "parts of layers that are captured as CUDA graphs and replayed: attn (with its norm), mlp (dense "
        "FFNs), moe_router (norm, router, shared experts), moe_preprocess (sorting tokens by expert); needs "
        "Transformer Engine and BF16",
        source="Megatron-Core: cuda_graph_modules",
        flags=("--cuda-graph-modules", "--cuda-graph-scope"),
    )
    loss_chunk_tokens: int | None = setting(
        None,
        "tokens whose logits exist at a time; backward computes them again. null: all of a micro-batch, kept",
        unit="tokens",
        source="Cut Cross-Entropy, arXiv:2411.09009; Liger Kernel, arXiv:2410.10989",
        gt=0,
    )
    stability: Stability = Stability()
    average_decay: float | None = setting(
        None,
        "decay of a moving average (EMA) of the weights in host memory, saved and evaluated; null: none",
        source=f"{V3}, section 3.2.2",
        gt=0,
        lt=1,
    )
    average_interval: int = setting(1, "steps between updates of the average", unit="steps", gt=0)
    log_interval: int = setting(10, "steps between log lines", unit="steps", flags=("--log-interval",), gt=0)
    eval_interval: int = setting(
        1000, "steps between evaluations; 0: never", unit="steps", flags=("--eval-interval",), ge=0
    )
    save_interval: int = setting(
        5000, "steps between checkpoints; 0: only at the end", unit="steps", flags=("--save-interval",), ge=0
    )
    exit_step: int | None = setting(
        None,
        "stop after this step, with a checkpoint, as if the job had been cut here",
        unit="steps",
        gt=0,
    )


class Preprocessing(Section):
    """Settings of the offline tools and of sample order."""

    num_workers: int = setting(4, "processes of the offline tools: tokenizing, building the index", gt=0)
    shuffle: bool = setting(True, "shuffle documents and samples; false is refused")
    shuffle_seed: int | None = setting(None, "seed of the sample order; null: the run's seed")


class DataSource(Section):
    """One source of the blend."""

    name: str = setting(..., "name in logs and tables")
    weight: float = setting(1.0, "share of the training tokens, normalized over the sources", ge=0)
    subset: str | None = setting(None, "Dolma subset id; the default path is cache_dir/subset")
    description: str = setting("", "for people")
    path: tuple[str, ...] | str | None = setting(
        None, "prefixes of .bin/.idx pairs, directories of them, or fsspec URLs; null: cache_dir/subset"
    )
    max_epochs: float | None = setting(
        None,
        "training reads the source at most this often, the others take over its share; null: no limit",
        unit="epochs",
        source="repetition: arXiv:2305.16264",
        gt=0,
    )


class DataPhase(Section):
    """A mix of the sources that holds from some point of the run on."""

    from_tokens: int = setting(
        ..., "start of the phase, in tokens since the start of the run", unit="tokens", ge=0
    )
    weights: dict[str, float] = setting(
        ..., "source name to share of the training tokens; normalized; what is not named is not read"
    )


class Curriculum(Section):
    """Documents of a source from one end of their scores to the other, before they come in any order."""

    order: Literal["ascending", "descending"] = setting("ascending", "which scores come first")
    levels: int = setting(10, "parts of equal numbers of documents; the order within one is random", gt=0)
    epochs: int = setting(1, "of each source, that are ordered; later ones are not", unit="epochs", gt=0)
    without_scores: Literal["error", "shuffle"] = setting(
        "error", "what happens to sources without scores; shuffle: they come in random order"
    )


class Data(Section):
    """Indexed datasets, their blend and the loader."""

    dataset_name: str = setting("allenai/dolma", "for the record")
    dataset_version: str = setting("v1_6", "for the record")
    cache_dir: str = setting("./data/cache", "where preprocessed sources and index caches lie")
    tokenizer_path: str | None = setting(
        None, "tokenizer.json or sentencepiece .model the data was made with", flags=("--tokenizer-model",)
    )
    preprocessing: Preprocessing = Preprocessing()
    sources: tuple[DataSource, ...] = setting((), "the blend", flags=("--data-path",))
    mixing_temperature: float = setting(1.0, "weights are raised to this power, then normalized", ge=0)
    phases: tuple[DataPhase, ...] = setting(
        (),
        "mixes over the run, instead of the sources' weights in training",
        source="OLMo 2, arXiv:2501.00656: another mix for the last part of a run",
    )
    curriculum: Curriculum | None = setting(
        None,
        "order documents by the scores that preprocessing stored; null: random order",
        source="Bengio et al., ICML 2009",
    )
    long_conversations: Literal["cut", "drop"] = setting(
        "cut", "conversations of more than seq_length tokens lose their end, or are left out"
    )
    split: str = setting("98,1,1", "shares of train, validation, test", flags=("--split",))
    num_workers: int = setting(
        2, "loader processes per rank; 0: in the training process", flags=("--num-workers",), ge=0
    )
    prefetch_factor: int = setting(2, "batches each worker keeps ready", gt=0)
    pin_memory: bool = setting(True, "page-locked host memory (CUDA only)")
    persistent_workers: bool = setting(
        True, "has no effect: loader processes live as long as the run, and validation needs none"
    )
    reset_position_ids: bool = setting(
        False, "positions restart at each document", flags=("--reset-position-ids",)
    )
    document_mask: bool = setting(
        False, "tokens do not attend across documents", source="V3: off", flags=("--reset-attention-mask",)
    )
    eod_mask_loss: bool = setting(False, "no loss on end-of-document tokens", flags=("--eod-mask-loss",))


class Slurm(Section):
    """The guide's SLURM block, and what a job does about its time limit (tools/run_training.py)."""

    enabled: bool = setting(False, "launch through SLURM")
    partition: str = setting("gpu", "partition")
    nodes: int = setting(1, "nodes", gt=0)
    ntasks_per_node: int = setting(
        1,
        "tasks per node that resources are asked for; processes: one per GPU, without GPUs one per task",
        gt=0,
    )
    gpus_per_node: int = setting(1, "GPUs per node, each with a process", ge=0)
    cpus_per_task: int = setting(8, "CPUs per task; the processes of a node share those of its tasks", gt=0)
    time: str = setting("24:00:00", "time limit, as sbatch takes it")
    mem: str = setting("64G", "memory per node; 0: all of it")
    job_name: str = setting("deepseek_v3_train", "job name")
    output: str = setting("logs/slurm-%j.out", "stdout path")
    error: str = setting("logs/slurm-%j.err", "stderr path")
    account: str | None = setting(None, "account")
    qos: str | None = setting(None, "quality of service")
    extra_args: tuple[str, ...] = setting((), 'further #SBATCH arguments: "--constraint=h100"')
    signal_seconds: int = setting(
        300, "the run is told to save and stop this long before the time limit", unit="seconds", gt=0
    )
    requeue: bool = setting(True, "a job that ends before the run does goes back into the queue and resumes")
    max_tries_without_progress: int = setting(
        3, "a job that ends this often in a row without a new checkpoint is given up", unit="tries", gt=0
    )
    container_image: str | None = setting(
        None, "image that the processes run in, through pyxis", flags=("--container-image",)
    )
    container_mounts: tuple[str, ...] = setting((), 'mounts of the container: "/data:/data"')


class DeepSpeed(Section):
    """DeepSpeed's own settings; where enabled, they must agree with the rest (see `config.deepspeed`)."""

    enabled: bool = setting(False, "compare the settings of this block and its file with the rest")
    config_file: str | None = setting(None, "DeepSpeed JSON")
    fp16: dict[str, Any] = setting({}, "as DeepSpeed's")
    bf16: dict[str, Any] = setting({}, "as DeepSpeed's")
    zero_optimization: dict[str, Any] = setting({}, "as DeepSpeed's")
    gradient_accumulation_steps: int | None = setting(None, "as DeepSpeed's")
    gradient_clipping: float | None = setting(None, "as DeepSpeed's")


class Preflight(Section):
    """Checks of the job's machines before the first step; docs/preflight.md says what is checked."""

    policy: Literal["off", "warn", "stop"] = setting(
        "stop", "what a finding leads to; slow machines of a CPU run are warned of and no more"
    )
    speed_test: bool = setting(True, "time matrix products on every device, and transfers between hosts")
    slow_factor: float = setting(
        1.5, "a device or link is slow when it takes this many times as long as the median", gt=1
    )
    max_clock_skew_seconds: float = setting(
        5.0, "how far the clock of a host may be from the median", unit="seconds", gt=0
    )


class Distributed(Section):
    """Processes, devices and parallel layout."""

    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto: CUDA where it is, else CPU")
    backend: Literal["auto", "nccl", "gloo", "deepspeed"] = setting(
        "auto",
        "auto (and deepspeed, the guide's name): nccl on CUDA, gloo on CPU",
        flags=("--distributed-backend",),
    )
    launcher: Literal["torchrun", "slurm", "deepspeed"] = setting(
        "torchrun", "what tools/run_training.py starts the processes with"
    )
    tensor_parallel_size: int = setting(
        1, "tensor parallelism (TP)", flags=("--tensor-model-parallel-size",), gt=0
    )
    sequence_parallel: bool | None = setting(
        None,
        "split activations outside attention and FFN over TP; null: on when TP > 1",
        flags=("--sequence-parallel",),
    )
    pipeline_parallel_size: int = setting(
        1, "pipeline stages (PP)", flags=("--pipeline-model-parallel-size",), gt=0
    )
    virtual_pipeline_parallel_size: int | None = setting(
        None,
        "interleaved model chunks per stage (VPP)",
        flags=("--num-virtual-stages-per-pipeline-rank",),
        gt=1,
    )
    pipeline_layout: tuple[int, ...] | Literal["balanced"] | None = setting(
        None,
        "decoder layers of each (virtual) stage, in order of execution; null: the same for all; balanced: so "
        "that the busiest one, with MTP and head on the last, has as little to do as can be",
    )
    expert_parallel_size: int = setting(
        1, "ranks the experts are spread over (EP)", flags=("--expert-model-parallel-size",), gt=0
    )
    expert_tensor_parallel_size: int = setting(
        1, "tensor parallelism inside an expert (ETP)", flags=("--expert-tensor-parallel-size",), gt=0
    )
    context_parallel_size: int = setting(
        1, "ranks one sequence is split over (CP)", flags=("--context-parallel-size",), gt=0
    )
    data_parallel_size: int = setting(-1, "model replicas; -1: world size / (TP x PP x CP)", ge=-1)
    zero_stage: Literal[0, 1, 2, 3] = setting(
        1,
        "what data parallelism divides: 0: nothing; 1: optimizer state; 2: gradients too; 3: weights too "
        "(2, 3: Megatron-FSDP)",
        source="arXiv:1910.02054",
    )
    zero_offload: bool = setting(
        False,
        "Adam's moments in host memory, fetched by every step (CUDA only)",
        source="arXiv:2101.06840",
        flags=("--optimizer-cpu-offload",),
    )
    zero_offload_fraction: float = setting(
        1.0, "of the moments that are in host memory", gt=0, le=1, flags=("--optimizer-offload-fraction",)
    )
    overlap_grad_reduce: bool = setting(
        True, "reduce gradients during backward", flags=("--overlap-grad-reduce",)
    )
    overlap_param_gather: bool = setting(
        True, "gather parameters during forward", flags=("--overlap-param-gather",)
    )
    tp_comm_overlap: bool = setting(
        False,
        "gather and scatter hidden states over TP in pieces, beside the products that need them (CUDA, BF16, "
        "through Transformer Engine's user buffers)",
        source="Wang et al., doi:10.1145/3567955.3567959",
        flags=("--tp-comm-overlap",),
    )
    overlap_expert_parallel: bool = setting(
        False,
        "exchange the tokens of one micro-batch during the computation of another (CUDA only)",
        source=f"{V3}, section 3.2.1: DualPipe, another schedule to the same end",
        flags=("--overlap-moe-expert-parallel-comm",),
    )
    overlap_shared_experts: bool = setting(
        False,
        "compute the shared experts during the exchange of tokens",
        flags=("--moe-shared-expert-overlap",),
    )
    delay_wgrad_compute: bool = setting(
        False,
        "compute a layer's weight gradients after the gradients that other ranks wait for (with "
        "overlap_expert_parallel, through Transformer Engine)",
        source=f"Zero Bubble, arXiv:2401.10241; {V3}, section 3.2.1",
        flags=("--delay-wgrad-compute",),
    )
    timeout_minutes: float = setting(
        10.0,
        "a collective that takes longer ends the job",
        unit="minutes",
        gt=0,
        flags=("--distributed-timeout-minutes",),
    )
    preflight: Preflight = Preflight()
    deepspeed: DeepSpeed = DeepSpeed()
    slurm: Slurm = Slurm()


class Mirror(Section):
    """Copies of the checkpoints in an object store, for machines that come and go; see docs/spot.md."""

    url: str | None = setting(
        None, "where: s3://bucket/run (`pip install megads[s3]`) or another URL of fsspec's; one for each run"
    )
    keep_last_n: int = setting(2, "newest checkpoints kept there; 0: all", ge=0)
    keep_best: bool = setting(True, "also keep the one with the lowest validation loss there")
    wait_seconds: float = setting(
        600.0, "how long the end of a run waits for what is not sent yet", unit="seconds", ge=0, le=3000
    )


class Preemption(Section):
    """Notices that this machine will be taken away: the run saves and stops; see docs/spot.md."""

    notice: str | None = setting(
        None, "what to ask: aws, gcp, azure (their metadata services), or a URL that answers 200 on notice"
    )
    command: tuple[str, ...] = setting((), "program and arguments that exit with 0 on notice")
    interval_seconds: float = setting(5.0, "time between two questions", unit="seconds", gt=0)


class Checkpointing(Section):
    """Where checkpoints go, which are kept, and what a run starts from."""

    save_dir: str | None = setting(None, "null: output_dir/checkpoints", flags=("--save",))
    load: str | None = setting(
        "latest",
        "latest (of save_dir; starts afresh when there is none), a path, or null: start afresh",
        aliases=("resume",),
        flags=("--load",),
    )
    init_from: str | None = setting(
        None,
        "checkpoint, or directory of checkpoints, of another run: start with its weights at token 0; not "
        "read once the run has a checkpoint of its own",
    )
    init_optimizer: Literal["fresh", "keep"] = setting(
        "fresh", "keep: take the optimizer's state along with the weights of init_from"
    )
    allow_changed: tuple[str, ...] = setting(
        (), "settings of the model that may differ from the checkpoint's, by dotted name"
    )
    keep_last_n: int = setting(
        5, "newest checkpoints kept; 0: all", source="training pipeline document", ge=0
    )
    keep_best: bool = setting(True, "also keep the one with the lowest validation loss")
    save_optimizer: bool = setting(True, "save the optimizer; without it a resume starts it afresh")
    save_scheduler: bool = setting(True, "save step, tokens and schedules; false is refused")
    async_save: bool = setting(True, "write in the background", flags=("--async-save",))
    mirror: Mirror = Mirror()
    preemption: Preemption = Preemption()


class Wandb(Section):
    """Weights & Biases (`pip install megads[wandb]`)."""

    enabled: bool = setting(False, "log to Weights & Biases")
    project: str = setting("megads", "project")
    entity: str | None = setting(None, "team")
    name: str | None = setting(None, "run name; null: experiment_name")
    tags: tuple[str, ...] = setting((), "tags")


class TensorBoard(Section):
    """TensorBoard event files."""

    enabled: bool = setting(True, "write event files")
    log_dir: str | None = setting(None, "null: output_dir/tensorboard", flags=("--tensorboard-dir",))


class Profile(Section):
    """torch's profiler over a window of steps; SIGUSR2 opens one at any time. Files: output_dir/profile."""

    start_step: int | None = setting(
        None, "first step of the window; null: only by signal", flags=("--profile-step-start",), gt=0
    )
    steps: int = setting(3, "length of the window", unit="steps", gt=0)
    ranks: tuple[int, ...] = setting((0,), "processes that start_step is for", flags=("--profile-ranks",))
    memory: bool = setting(False, "also allocations; on CUDA a memory snapshot")


class Health(Section):
    """When to warn about a run that goes on but not well."""

    max_vio: float = setting(4.0, "MaxVio of a MoE layer above this", gt=0)
    grad_norm_factor: float = setting(10.0, "gradient norm above this many times the usual", gt=1)
    loss_above_ignorance: float = setting(
        0.5, "loss this far above ln(vocabulary)", unit="nats per token", ge=0
    )
    stalled_intervals: int = setting(500, "log intervals without a new lowest loss", gt=0)
    memory_share: float = setting(0.9, "share of the device's memory", gt=0, le=1)


class Logging(Section):
    """Sinks of the metrics; console and `metrics.jsonl` are always on."""

    wandb: Wandb = Wandb()
    tensorboard: TensorBoard = TensorBoard()
    profile: Profile = Profile()
    health: Health = Health()
    expert_load_interval: int = setting(
        10, "how often to record the load of every expert; 0: never", unit="log intervals", ge=0
    )


class Validation(Section):
    """Evaluation on the validation split every `training.eval_interval` steps."""

    eval_steps: int = setting(10, "global batches per evaluation", flags=("--eval-iters",), gt=0)
    per_source: bool = setting(True, "also report the loss of each source")


class Budget(Section):
    """What a run (of stages: each) may cost; at a limit it saves and ends. See docs/budget.md."""

    device_hour_cost: float = setting(
        0.0, "price of a device for an hour, in any currency; without GPUs each process counts as one", ge=0
    )
    job_hour_cost: float = setting(0.0, "price of an hour of the job, whatever its devices", ge=0)
    max_cost: float | None = setting(None, "the run ends when it has cost this much; null: no limit", gt=0)
    max_hours: float | None = setting(
        None, "the run ends when its jobs have taken this long; null: no limit", unit="hours", gt=0
    )
    warn_at: tuple[float, ...] = setting((0.8, 0.9), "shares of a limit at which to warn")
    alert_command: tuple[str, ...] = setting(
        (), "program and arguments, run at each warning and at the limit with the facts in MEGADS_ALERT_*"
    )
    alert_webhook: str | None = setting(
        None, "URL that gets the facts as JSON; $NAME: the URL is in the environment variable NAME"
    )
    alert_timeout_seconds: float = setting(10.0, "time for an alert", unit="seconds", gt=0)


class Config(Section):
    """The whole tree."""

    experiment_name: str = setting("megads", "name in logs and trackers")
    output_dir: str = setting("outputs", "everything a run writes goes below it")
    seed: int = setting(42, "seed of weights, order and dropout", flags=("--seed",), ge=0)
    stages: tuple[dict[str, Any], ...] = setting(
        (),
        "runs that follow one another, each from the weights of the one before: a name, and whatever "
        "settings differ from the rest of the file",
    )
    model: Model = Model()
    training: Training = Training()
    data: Data = Data()
    distributed: Distributed = Distributed()
    checkpointing: Checkpointing = Checkpointing()
    logging: Logging = Logging()
    validation: Validation = Validation()
    budget: Budget = Budget()
