"""Errors between settings, all found at once and before any process group is made.

`check` collects what each rule says; a rule yields one sentence per problem: what is wrong, and what to
do. Single values (types, limits) are the schema's business.
"""

import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from itertools import pairwise

from megads.config import (
    validate_cuda_graphs,
    validate_kernels,
    validate_layout,
    validate_model,
    validate_overlap,
    validate_precision,
    validate_recompute,
    validate_schedules,
    validate_zero,
)
from megads.config.deepspeed import deepspeed_problems
from megads.config.not_yet import missing_packages, not_yet
from megads.config.resolve import batch_schedule, run_length
from megads.config.schedule import learning_rate_schedule
from megads.config.schema import Budget, Config, Data, Training
from megads.config.tree import get
from megads.errors import ConfigError

NOTICE_SERVICES = ("aws", "gcp", "azure")


def check(config: Config, world_size: int, cuda: bool) -> None:
    """Raises one ConfigError that lists every reason why `config` cannot run on this many processes."""
    refuse_run(list(find_problems(config, world_size, cuda)), world_size)


def refuse_run(problems: Sequence[str], world_size: int) -> None:
    """Raises one ConfigError with all problems, numbered, if there are any."""
    if not problems:
        return
    many = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    lines = [f"  {number}. {problem}" for number, problem in enumerate(problems, 1)]
    processes = "1 process" if world_size == 1 else f"{world_size} processes"
    raise ConfigError("\n".join([f"the configuration has {many} (for {processes}):", *lines]))


def find_problems(config: Config, world_size: int, cuda: bool) -> Iterator[str]:
    """Each problem as one sentence with what to do."""
    yield from validate_model.model_problems(config)
    yield from validate_layout.layout_problems(config, world_size)
    yield from _training(config)
    yield from validate_precision.precision_problems(config, cuda)
    yield from _directories(config)
    yield from _data(config)
    yield from _checkpointing(config)
    yield from _budget(config.budget)
    yield from validate_zero.zero_problems(config)
    yield from validate_kernels.kernel_problems(config, cuda)
    yield from validate_recompute.recompute_problems(config)
    yield from validate_overlap.overlap_problems(config, cuda)
    yield from validate_cuda_graphs.cuda_graph_problems(config, cuda)
    yield from not_yet(config, cuda)
    yield from missing_packages(config)
    yield from deepspeed_problems(config, validate_layout.accumulation_steps(config, world_size))[0]


def notes(config: Config) -> list[str]:
    """Settings that differ from their default and yet change nothing in this run, with the reason."""
    default = Config()
    found = [
        f"{path} has no effect: {reason}"
        for paths, reason in _inert(config)
        for path in paths
        if get(config, path) != get(default, path)
    ]
    return found + deepspeed_problems(config, None)[1]


def _inert(config: Config) -> Iterator[tuple[list[str], str]]:
    """Parameters of what is switched off, and why they do nothing."""
    training, moe = config.training, config.model.moe
    style = training.lr_decay_style
    if training.optimizer == "sgd":
        yield ["training.adam_beta1", "training.adam_beta2", "training.adam_eps"], "the optimizer is sgd"
    else:
        yield ["training.sgd_momentum"], f"the optimizer is {training.optimizer}"
    if not training.use_mtp:
        yield (
            ["training.num_predict_tokens", "training.mtp_loss_weight", "training.mtp_loss_weight_phases"],
            "training.use_mtp is false",
        )
    if training.gradient_checkpointing != "selective":
        yield ["training.recompute_modules"], "gradient_checkpointing is not selective"
    if style != "multistep":
        yield ["training.lr_multistep"], f"lr_decay_style is {style}"
    if style != "wsd":
        yield ["training.lr_wsd_decay_fraction", "training.lr_wsd_decay_style"], f"lr_decay_style is {style}"
    if style in ("constant", "multistep"):
        yield ["training.min_learning_rate"], f"lr_decay_style is {style}, which has no minimum"
    if training.total_training_tokens is not None:
        yield ["training.train_steps"], "total_training_tokens comes first"
        yield ["training.tokens_per_parameter_ratio"], "total_training_tokens comes first"
    elif training.train_steps is not None:
        yield ["training.tokens_per_parameter_ratio"], "train_steps comes first"
    yield from _after_the_end(config)
    if config.checkpointing.init_from is None:
        yield ["checkpointing.init_optimizer"], "init_from is null: there is no optimizer to keep"
    if training.average_decay is None:
        yield ["training.average_interval"], "average_decay is null: there is no average"
    if (policy := training.stability.spike_policy) != "rollback":
        of_rollback = ("spike_patience", "rollback_lr_factor", "max_rollbacks")
        yield [f"training.stability.{name}" for name in of_rollback], f"spike_policy is {policy}"
    if not moe.use_aux_loss_free:
        yield (
            [f"model.moe.bias_update_{name}" for name in ("rate", "rate_phases", "centered")],
            "use_aux_loss_free is false",
        )
    if moe.balance_loss_type == "none":
        yield (
            ["model.moe.router_aux_loss_weight", "model.moe.router_aux_loss_weight_phases"],
            "balance_loss_type is none",
        )
    if moe.capacity_factor is None:
        yield ["model.moe.min_expert_capacity"], "capacity_factor is null, so nothing is dropped"
    if not config.model.mla.use_flash_mla:
        yield ["model.mla.fallback_to_dense"], "use_flash_mla is false"
    if not config.distributed.zero_offload:
        yield ["distributed.zero_offload_fraction"], "zero_offload is false"
    yield ["data.persistent_workers"], "loader processes live as long as the run, and validation needs none"
    yield from validate_precision.inert_precision(config)
    yield from _inert_checks(config)


def _inert_checks(config: Config) -> Iterator[tuple[list[str], str]]:
    """Of preflight and budget."""
    budget, preflight = config.budget, config.distributed.preflight
    if budget.max_cost is None and budget.max_hours is None:
        of_limits = ("warn_at", "alert_command", "alert_webhook", "alert_timeout_seconds")
        yield [f"budget.{name}" for name in of_limits], "there is neither max_cost nor max_hours"
    elif not budget.alert_command and budget.alert_webhook is None:
        yield ["budget.alert_timeout_seconds"], "there is neither alert_command nor alert_webhook"
    if preflight.policy == "off":
        checks = ("speed_test", "slow_factor", "max_clock_skew_seconds")
        yield [f"distributed.preflight.{name}" for name in checks], "policy is off"
    elif not preflight.speed_test:
        yield ["distributed.preflight.slow_factor"], "speed_test is false"


def _after_the_end(config: Config) -> Iterator[tuple[list[str], str]]:
    try:
        _, train_steps = run_length(config)
    except ValueError:
        return  # a batch ramp that cannot be: `find_problems` says why
    for path in ("training.exit_step", "logging.profile.start_step"):
        if (get(config, path) or 0) > train_steps:
            yield [path], f"the run ends after step {train_steps:,}"


def _training(config: Config) -> Iterator[str]:
    training = config.training
    if training.seq_length > config.model.mla.max_context_length:
        yield (
            f"training.seq_length = {training.seq_length} is more than model.mla.max_context_length = "
            f"{config.model.mla.max_context_length}: raise the context length, or shorten the sequences"
        )
    has_minimum = training.lr_decay_style not in ("phases", "constant", "multistep")
    if has_minimum and training.min_learning_rate > training.learning_rate:
        yield (
            f"training.min_learning_rate = {training.min_learning_rate:g} is above learning_rate = "
            f"{training.learning_rate:g}: lower it"
        )
    if training.lr_decay_style == "multistep" and any(factor < 0 for _, factor in training.lr_multistep):
        yield (
            f"training.lr_multistep = {training.lr_multistep}: factors on the learning rate cannot be "
            "negative"
        )
    yield from _phases(training)
    yield from _length(config)
    yield from validate_schedules.sequence_length_problems(config)


def _phases(training: Training) -> Iterator[str]:
    if training.lr_decay_style != "phases":
        return
    default = Training()
    for name in ("learning_rate", "min_learning_rate", "lr_warmup_steps"):
        if getattr(training, name) != getattr(default, name):
            yield (
                f'training.{name} cannot act with lr_decay_style "phases": lr_phases is the whole schedule, '
                f"warm-up included; put the value there and leave {name} out"
            )
    if training.lr_phases and not any(phase.to > 0 for phase in training.lr_phases):
        yield "training.lr_phases never leaves 0: give at least one phase a positive `to`"


def _length(config: Config) -> Iterator[str]:
    """Batch ramp, length of the run, and the learning rate over it."""
    training = config.training
    try:
        batch = batch_schedule(training)
    except ValueError as error:
        yield (
            f"{error} (training.global_batch_size, training.batch_size_rampup_start, "
            "training.batch_size_rampup_tokens)"
        )
        return
    total_tokens, train_steps = run_length(config)
    yield from validate_schedules.phase_problems(config, total_tokens)
    yield from validate_schedules.unreached(config, total_tokens)
    if training.lr_decay_style != "phases" and training.lr_warmup_steps > train_steps:
        yield (
            f"training.lr_warmup_steps = {training.lr_warmup_steps} is more than the {train_steps} steps of "
            "the run: shorten the warm-up or lengthen the run"
        )
        return
    try:
        learning_rate_schedule(training, total_tokens, batch)
    except ConfigError as error:
        yield str(error)


def _checkpointing(config: Config) -> Iterator[str]:
    checkpointing = config.checkpointing
    notice = checkpointing.preemption.notice
    if notice is not None and notice not in NOTICE_SERVICES and not re.match(r"https?://[^\s/]", notice):
        yield (
            f"checkpointing.preemption.notice = {notice!r} is neither a URL nor one of "
            f"{', '.join(NOTICE_SERVICES)}: correct it, or leave it out"
        )
    if not checkpointing.save_scheduler:
        yield (
            "checkpointing.save_scheduler = false is refused: no run could go on from such a checkpoint. "
            "Leave it out; to start at token 0 with the weights of a checkpoint, give checkpointing.init_from"
        )
    if checkpointing.init_from is not None and checkpointing.load not in (None, "latest"):
        yield (
            f"checkpointing.init_from = {checkpointing.init_from!r} starts a new run and "
            f"checkpointing.load = {checkpointing.load!r} goes on with one: leave out one of them"
        )


def _budget(budget: Budget) -> Iterator[str]:
    if budget.max_cost is not None and budget.device_hour_cost == budget.job_hour_cost == 0:
        yield (
            f"budget.max_cost = {budget.max_cost:g}, but nothing has a price: give budget.device_hour_cost "
            "or budget.job_hour_cost, or a limit of time with budget.max_hours"
        )
    if any(not 0 < share < 1 for share in budget.warn_at):
        yield f"budget.warn_at = {list(budget.warn_at)}: shares of a limit lie between 0 and 1, as [0.8, 0.9]"
    webhook = budget.alert_webhook
    if webhook is not None and not re.fullmatch(r"https?://[^\s/]+\S*|\$[A-Za-z_]\w*", webhook):
        yield (
            "budget.alert_webhook must be a URL that begins with https:// or http://, or $NAME for one in "
            "the environment"
        )


def _directories(config: Config) -> Iterator[str]:
    written = {
        "output_dir": config.output_dir,
        "data.cache_dir": config.data.cache_dir,
        "checkpointing.save_dir": config.checkpointing.save_dir or "",
    }
    for name, path in written.items():
        if "://" in path:
            yield (
                f"{name} = {path!r} is a URL, but a run writes to mounted file systems: give a path; "
                "checkpointing.mirror copies checkpoints to a store, and data.sources may lie in one"
            )


def _data(config: Config) -> Iterator[str]:
    data = config.data
    if not data.preprocessing.shuffle:
        yield (
            "data.preprocessing.shuffle = false is refused: documents in file order are no training set, and "
            "Megatron-Core's index always shuffles; set it to true and fix preprocessing.shuffle_seed instead"
        )
    yield from _split(config)
    if not data.sources:
        yield (
            "data.sources is empty: name at least one preprocessed dataset there, or give "
            "--data-path PREFIX (tools/preprocess_dolma.py makes one)"
        )
        return
    if not data.phases and sum(source.weight for source in data.sources) <= 0:
        yield "the weights of data.sources are all 0: give at least one source a positive weight"
    names = [source.name for source in data.sources]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield (
            f"data.sources has more than one source named {name!r}: names keep them apart in logs, change one"
        )
    for source in data.sources:
        if not source.path and source.subset is None:
            yield (
                f"data.sources: {source.name!r} has neither path nor subset: give one, to say where its "
                "files lie"
            )
    yield from _data_phases(data)


def _data_phases(data: Data) -> Iterator[str]:
    starts = [phase.from_tokens for phase in data.phases]
    if starts and (starts[0] != 0 or any(later <= earlier for earlier, later in pairwise(starts))):
        yield f"data.phases must begin at 0 and at increasing numbers of tokens; from_tokens are {starts}"
    names = [source.name for source in data.sources]
    for number, phase in enumerate(data.phases, 1):
        where = f"data.phases, phase {number}"
        for name, weight in phase.weights.items():
            if name not in names:
                near = get_close_matches(name, names, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names)}"
                yield f"{where}: no source is named {name!r}; {hint}"
            if weight < 0:
                yield f"{where}: the weight of {name!r} is {weight:g}; it cannot be negative"
        if sum(phase.weights.values()) <= 0:
            yield f"{where}: the weights are all 0: give at least one source a positive weight"


def _split(config: Config) -> Iterator[str]:
    text, training = config.data.split, config.training
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        shares = []
    if len(shares) != 3 or min(shares) < 0 or shares[0] <= 0:
        yield (
            f"data.split = {text!r} must be three numbers, shares of train, validation and test, the first "
            "of "
            'them positive: "98,1,1"'
        )
    elif shares[1] == 0 and training.eval_interval > 0:
        yield (
            f"data.split = {text!r} leaves nothing for validation, but training.eval_interval is "
            f"{training.eval_interval}: give validation a share, or set eval_interval to 0"
        )
