"""Rules of the linter about training, layout, data and time. Each is a function of a `Run`."""

import re
from collections.abc import Callable, Iterator

from megads.config.flops import count_parameters
from megads.plan.activations import SavedActivations
from megads.plan.findings import Finding, Run, Severity
from megads.plan.memory import memory_by_stage
from megads.plan.scaling import USED_FLOPS, advise
from megads.plan.speed import ModelFlops, SpeedModel

V3 = "DeepSeek-V3, arXiv:2412.19437"
LLM = "DeepSeek LLM, arXiv:2401.02954, section 3.1"
# How far from the law is worth a note, and a warning: its optimum is flat.
LEARNING_RATE_FACTORS, BATCH_FACTORS = (2.0, 4.0), (3.0, 10.0)


def _continues(run: Run) -> bool:
    """Whether the run begins with another's weights: rules for training from scratch do not apply."""
    return run.config.checkpointing.init_from is not None


def _warmup(run: Run) -> Iterator[Finding]:
    training, steps = run.config.training, run.resolved.train_steps
    if training.lr_decay_style == "phases" or _continues(run):
        return
    if training.lr_warmup_steps == 0:
        yield Finding(
            "no-warmup",
            "warning",
            "lr_warmup_steps = 0: Adam's second moments are not settled in the first steps; V3 takes 2000",
            f"{V3}, section 4.2",
        )
    elif training.lr_warmup_steps > steps / 5:
        yield Finding(
            "long-warmup",
            "warning",
            f"lr_warmup_steps = {training.lr_warmup_steps} is {training.lr_warmup_steps / steps:.0%} of the "
            f"{steps} steps: much of the run is below the peak; 1 to 10% is usual",
            f"{V3}, section 4.2: 0.2% of the run",
        )


def peak_learning_rate(run: Run) -> float:
    """The highest learning rate that the schedule reaches."""
    training = run.config.training
    if training.lr_decay_style == "phases":
        return max((phase.to for phase in training.lr_phases), default=0.0)
    return training.learning_rate


def _far(value: float, law: float, factors: tuple[float, float]) -> tuple[Severity, str] | None:
    """(severity, how far) where a value is further from the law than its factors allow."""
    ratio = value / law
    distance = max(ratio, 1 / ratio)
    if distance <= factors[0]:
        return None
    words = f"{ratio:.2g} times" if ratio > 1 else f"1/{1 / ratio:.2g} of"
    return ("warning" if distance > factors[1] else "note"), words


def _laws(run: Run) -> Iterator[Finding]:
    if _continues(run):
        return
    advice, training = advise(run.config), run.config.training
    if not USED_FLOPS[0] <= advice.compute_flops <= 10 * USED_FLOPS[1]:
        return  # a run for trying things out: the laws do not reach so far
    dense_only = " (fitted on dense models)" if run.config.model.moe.num_experts else ""
    found = _far(peak_learning_rate(run), advice.learning_rate, LEARNING_RATE_FACTORS)
    if found:
        yield Finding(
            "learning-rate-far-from-law",
            found[0],
            f"the peak learning rate {peak_learning_rate(run):.3g} is {found[1]} what the law gives for "
            f"{advice.compute_flops:.2g} FLOPs, {advice.learning_rate:.3g}{dense_only}",
            f"{LLM}, eq. 1",
        )
    batch_tokens = training.global_batch_size * training.seq_length
    found = _far(batch_tokens, advice.batch_tokens, BATCH_FACTORS)
    if found:
        sequences = advice.batch_tokens / training.seq_length
        yield Finding(
            "batch-far-from-law",
            found[0],
            f"the batch of {training.global_batch_size} sequences is {found[1]} what the law gives for "
            f"{advice.compute_flops:.2g} FLOPs, {sequences:.0f}{dense_only}",
            f"{LLM}, eq. 1",
        )


def _tokens_per_parameter(run: Run) -> Iterator[Finding]:
    active = count_parameters(run.config).active
    ratio = run.resolved.total_tokens / active
    if ratio < 10 and not _continues(run):
        yield Finding(
            "few-tokens",
            "note",
            f"{ratio:.2g} training tokens per active parameter: for this compute a smaller model on more "
            "text is better (about 20 are compute-optimal)",
            "Chinchilla, arXiv:2203.15556, table 3",
        )


def _optimizer(run: Run) -> Iterator[Finding]:
    training = run.config.training
    if training.grad_clip == 0:
        yield Finding(
            "no-gradient-clipping",
            "warning",
            "grad_clip = 0: one bad batch can ruin the weights; V3 clips at 1.0",
            f"{V3}, section 4.2",
        )
    if training.optimizer in ("adam", "adamw") and training.adam_beta2 > 0.98:
        yield Finding(
            "adam-beta2",
            "note",
            f"adam_beta2 = {training.adam_beta2:g}: large models train with 0.95, which forgets spikes soon",
            f"{V3}, section 4.2",
        )
    if training.weight_decay == 0:
        yield Finding(
            "no-weight-decay",
            "note",
            "weight_decay = 0: V3 has 0.1",
            f"{V3}, section 4.2",
        )
    if run.resolved.precision == "fp16":
        yield Finding(
            "fp16",
            "note",
            "use_fp16: BF16 has FP32's range and needs no loss scaling; use it where the GPU has it",
            "arXiv:1905.12322",
        )


def _layout(run: Run) -> Iterator[Finding]:
    config, resolved = run.config, run.resolved
    per_node = config.distributed.slurm.gpus_per_node if config.distributed.slurm.enabled else None
    if run.gpu is not None:
        per_node = per_node or run.gpu.per_node
    if per_node and resolved.tp > per_node:
        yield Finding(
            "tensor-parallel-across-nodes",
            "warning",
            f"TP {resolved.tp} is more than the {per_node} GPUs of a node: every layer waits for the network",
            "Megatron-LM, arXiv:2104.04473, section 5.4.1",
        )
    if config.distributed.zero_stage == 0 and resolved.dp * resolved.cp > 1:
        yield Finding(
            "optimizer-not-sharded",
            "warning",
            f"zero_stage = 0 with {resolved.dp * resolved.cp} replicas: each keeps the same optimizer state; "
            "zero_stage = 1 spreads it at no more communication",
            "ZeRO, arXiv:1910.02054, section 7",
        )
    micro_batches = config.training.global_batch_size // (config.training.micro_batch_size * resolved.dp)
    stages = resolved.pp * (resolved.vpp or 1)
    if resolved.pp > 1 and micro_batches < resolved.pp:
        yield Finding(
            "pipeline-starves",
            "warning",
            f"{micro_batches} micro-batches for {resolved.pp} pipeline stages ({stages} with virtual ones): "
            "stages wait most of the time; use smaller micro-batches, fewer replicas or fewer stages",
            "Megatron-LM, arXiv:2104.04473, section 2.2",
        )


def _memory(run: Run) -> Iterator[Finding]:
    if run.gpu is None:
        return
    heaviest = max(memory_by_stage(run.config, run.resolved), key=lambda stage: stage.total)
    if heaviest.total > run.gpu.memory_bytes:
        yield Finding(
            "does-not-fit",
            "warning",
            f"pipeline stage {heaviest.stage} is estimated at {heaviest.total / 2**30:.1f} GiB, a "
            f"{run.gpu.name.upper()} has {run.gpu.memory_bytes / 2**30:.1f}: use gradient_checkpointing = "
            '"full", smaller micro-batches or another layout (tools/plan.py --search)',
            "megads.plan.memory",
        )


def slurm_seconds(text: str) -> int | None:
    """A time limit as sbatch takes it: minutes, MM:SS, HH:MM:SS, D-HH[:MM[:SS]]; None where it is none."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text.strip())
    if match is None:
        return None
    days, first, second, third = (int(part) if part else 0 for part in match.groups())
    if match[1]:
        return ((days * 24 + first) * 60 + second) * 60 + third
    if match[4]:
        return (first * 60 + second) * 60 + third
    return first * 60 + second


def _time(run: Run) -> Iterator[Finding]:
    """Checkpoints against what can end a job, by the predicted time of a step."""
    if run.gpu is None:
        return
    saved = SavedActivations(run.config, run.resolved)
    step_seconds = SpeedModel(saved, run.gpu, ModelFlops.of(run.config)).step().seconds
    interval, steps = run.config.training.save_interval, run.resolved.train_steps
    hours = step_seconds * (interval or steps) / 3600
    slurm = run.config.distributed.slurm
    limit = slurm_seconds(slurm.time) if slurm.enabled else None
    if limit is not None and hours * 3600 > limit / 2 and steps * step_seconds > limit:
        yield Finding(
            "checkpoints-rare-for-limit",
            "warning",
            f"a checkpoint every {hours:.1f} h in jobs of {limit / 3600:.1f} h: one that dies loses most of "
            f"its work; save_interval = {max(1, int(limit / 8 / step_seconds))} saves eight times in a job",
            "Young, CACM 17(9), 1974",
        )
    between = run.hours_between_interruptions
    if between is not None and hours > between / 4:
        yield Finding(
            "checkpoints-rare-for-interruptions",
            "warning",
            f"a checkpoint every {hours:.1f} h and an interruption every {between:g} h: "
            f"{hours / 2 / between:.0%} of the work is lost; "
            f"save_interval = {max(1, int(between / 16 * 3600 / step_seconds))} loses 3%",
            "Young, CACM 17(9), 1974",
        )
    if limit is not None and steps * step_seconds > limit:
        yield Finding(
            "longer-than-limit",
            "note",
            f"the run takes about {steps * step_seconds / 3600:,.0f} h, a job {limit / 3600:.1f} h at most: "
            f"about {steps * step_seconds / limit:,.0f} jobs, each resuming from the last",
            "megads.plan.speed",
        )


def _data(run: Run) -> Iterator[Finding]:
    """How often each source is read, where its datasets are there to be counted."""
    if not run.data_tokens:
        return
    data = run.config.data
    weights = {source.name: source.weight**data.mixing_temperature for source in data.sources}
    total = sum(weights.values())
    train_share = float(data.split.split(",")[0]) / sum(float(part) for part in data.split.split(","))
    for source in data.sources:
        tokens = run.data_tokens.get(source.name)
        if data.phases or not tokens or not total:
            continue
        epochs = run.resolved.total_tokens * weights[source.name] / total / (tokens * train_share)
        if source.max_epochs is None and epochs > 4:
            yield Finding(
                "data-repeated",
                "warning",
                f"source {source.name!r} has {tokens:,} tokens and is read {epochs:.1f} times: more than 4 "
                "add little; lower its weight, or set its max_epochs",
                "arXiv:2305.16264, section 5",
            )


RULES: tuple[Callable[[Run], Iterator[Finding]], ...] = (
    _warmup, _laws, _tokens_per_parameter, _optimizer, _layout, _memory, _time, _data,
)  # fmt: skip
