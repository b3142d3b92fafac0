"""A plan as text for a terminal or a file."""

import json
import shlex
from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from megads.config.flops import count_parameters, training_flops_per_token
from megads.config.schema import Config
from megads.config.tree import get
from megads.plan.findings import Finding
from megads.plan.hardware import PRICES_OF
from megads.plan.planner import Plan, recommended
from megads.plan.search import Layout, Search

GIB = 2**30
STYLES = {"error": "bold red", "warning": "yellow", "note": "dim"}
SHOWN_LAYOUTS = 10
SHORT = {
    "tensor_parallel_size": "TP",
    "pipeline_parallel_size": "PP",
    "virtual_pipeline_parallel_size": "VPP",
    "expert_parallel_size": "EP",
    "expert_tensor_parallel_size": "ETP",
    "context_parallel_size": "CP",
    "zero_stage": "ZeRO",
    "micro_batch_size": "micro-batch",
    "gradient_checkpointing": "recompute",
}


def print_plan(plan: Plan, console: Console) -> None:
    """The whole plan, section by section."""
    for part in _parts(plan):
        console.print(part)
        console.print()


def print_findings(findings: Sequence[Finding], console: Console) -> None:
    """What the linter found, or that it found nothing."""
    console.print(_findings(findings))


def _parts(plan: Plan) -> Iterator[RenderableType]:
    yield _facts(plan)
    yield _memory(plan)
    if plan.step is not None:
        yield _speed(plan)
    if plan.budget is not None:
        yield _money(plan)
    yield _laws(plan)
    if plan.found is not None:
        yield _layouts(plan.found, plan.config)
    yield _findings(plan.findings)


def _section(title: str, body: RenderableType, *below: str) -> Group:
    """Titles and remarks stand outside the tables, which would break them at their own width."""
    return Group(Text(title, style="bold"), body, *(Text(line) for line in below))


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    return table


def _facts(plan: Plan) -> Group:
    config, resolved = plan.config, plan.resolved
    counts = count_parameters(config)
    table = Table(box=None, show_header=False, pad_edge=False)
    device = "CPU" if plan.gpu is None else plan.gpu.name.upper()
    table.add_row("hardware", f"{resolved.world_size:,} x {device}")
    vpp = f" x VPP {resolved.vpp}" if resolved.vpp else ""
    table.add_row(
        "layout",
        f"TP {resolved.tp} x PP {resolved.pp}{vpp} x CP {resolved.cp} x DP {resolved.dp}; experts: "
        f"EP {resolved.ep} x ETP {resolved.etp} x DP {resolved.edp}; ZeRO {config.distributed.zero_stage}",
    )
    table.add_row("parameters", f"{count(counts.total)} in all, {count(counts.active)} active per token")
    if counts.mtp:
        table.add_row(
            "with MTP", f"{count(counts.total_with_mtp)} in all, {count(counts.active_with_mtp)} active"
        )
    table.add_row(
        "FLOPs per token",
        f"{count(training_flops_per_token(config))} forward and backward (attention causal; full square "
        f"{count(training_flops_per_token(config, causal=False))})",
    )
    table.add_row("length", f"{count(resolved.total_tokens)} tokens in {resolved.train_steps:,} steps")
    return _section(config.experiment_name, table)


def _memory(plan: Plan) -> Group:
    recompute = plan.config.training.gradient_checkpointing
    kept = {False: "no", "selective": "selective"}.get(recompute, "full")
    parts = [name for name in plan.stages[0].parts() if any(stage.parts()[name] for stage in plan.stages)]
    table = _table("stage", "layers", "in flight", *parts, "total")
    for stage in plan.stages:
        style = "bold" if stage is plan.heaviest else None
        if plan.gpu is not None and stage.total > plan.gpu.memory_bytes:
            style = "red"
        values = [f"{stage.parts()[name] / GIB:.2f}" for name in parts]
        total = f"{stage.total / GIB:.2f}"
        table.add_row(
            str(stage.stage), str(stage.layers), f"{stage.micro_batches:g}", *values, total, style=style
        )
    title = f"Memory per process in GiB, {kept} recomputation"
    if plan.gpu is None:
        return _section(title, table)
    limit = f"of {plan.gpu.memory_bytes / GIB:.1f} GiB on a {plan.gpu.name.upper()}"
    return _section(
        title,
        table,
        f"It fits: {_fullest(plan)} {limit}."
        if plan.fits
        else f"It does not fit: {_fullest(plan)} {limit}; --search looks for layouts that do.",
    )


def _fullest(plan: Plan) -> str:
    return f"stage {plan.heaviest.stage} needs {plan.heaviest.total / GIB:.1f}"


def _speed(plan: Plan) -> Group:
    assert plan.step is not None
    step = plan.step
    table = _table("cause", "seconds", "share")
    for cause, seconds in step.by_cause().items():
        if seconds > 0:
            table.add_row(cause.replace("_", " "), f"{seconds:.3f}", f"{seconds / step.seconds:.0%}")
    table.add_row("step", f"{step.seconds:.3f}", "", style="bold")
    rate = f"{step.tokens_per_second_per_gpu:,.0f} tokens/s per GPU"
    return _section("Predicted step", table, f"{rate}, MFU {step.mfu:.1%} (causal, of the dense BF16 peak)")


def _money(plan: Plan) -> Group:
    assert plan.budget is not None
    money, assumed = plan.budget, plan.assumptions
    efficiency = f"MFU {assumed.mfu:.1%} as given" if assumed.mfu is not None else "the predicted step"
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_row("time", f"{money.days:,.1f} days, {money.gpu_hours:,.0f} GPU hours")
    table.add_row("per trillion tokens", f"{money.gpu_hours_per_trillion_tokens:,.0f} GPU hours")
    kind = "spot" if assumed.spot else "on demand"
    dated = (
        "as given" if assumed.dollars_per_gpu_hour is not None else f"{kind}, a round figure of {PRICES_OF}"
    )
    table.add_row(
        "money", f"${money.dollars:,.0f} at ${money.dollars_per_gpu_hour:.2f} per GPU hour ({dated})"
    )
    if money.lost_share:
        between = assumed.hours_between_interruptions
        table.add_row("lost", f"{money.lost_share:.1%} to an interruption every {between:g} h")
    return _section(f"Time and money, from {efficiency}", table)


def _laws(plan: Plan) -> Group:
    advice, training = plan.scaling, plan.config.training
    table = _table("", "law", "here")
    rate = max([phase.to for phase in training.lr_phases], default=training.learning_rate)
    table.add_row("peak learning rate", f"{advice.learning_rate:.3g}", f"{rate:.3g}")
    batch = training.global_batch_size * training.seq_length
    table.add_row("batch, tokens", count(advice.batch_tokens), count(batch))
    table.add_row(
        "model scale M, FLOPs per token", count(advice.optimal_model_scale), count(advice.model_scale)
    )
    table.add_row("tokens D", count(advice.optimal_tokens), count(advice.tokens))
    title = f"Scaling laws at {advice.compute_flops:.3g} FLOPs (DeepSeek LLM, arXiv:2401.02954; C = M D)"
    loss = f"{advice.chinchilla_loss:.3f} nats per token by active parameters"
    laws = _section(title, table, f"Chinchilla's loss (arXiv:2203.15556, eq. 10): {loss}", *advice.remarks)
    sizes = _table("parameters", "tokens", "FLOPs", "learning rate", "batch, tokens")
    for one in recommended():
        sizes.add_row(
            count(one.parameters), count(one.tokens), f"{one.compute_flops:.2g}", f"{one.learning_rate:.3g}",
            count(one.batch_tokens),
        )  # fmt: skip
    return Group(laws, Text(), _section("Compute-optimal settings of dense models by these laws", sizes))


def _layouts(found: Search, config: Config) -> Group:
    table = _table(*SHORT.values(), "GiB", "step, s", "MFU")
    for layout in found.layouts[:SHOWN_LAYOUTS]:
        values = [_value(layout, name) for name in SHORT]
        table.add_row(
            *values, f"{layout.total_bytes / GIB:.1f}", f"{layout.step.seconds:.2f}", f"{layout.step.mfu:.1%}"
        )
    title = f"Layouts that fit: {len(found.layouts):,} of {found.tried:,}, fastest first"
    if not found.layouts:
        return _section(title, Text("none: more GPUs, larger ones, or a smaller model"))
    return _section(title, table, f"the first as flags: {shlex.join(as_flags(found, config))}")


def as_flags(found: Search, config: Config) -> list[str]:
    """The words that make `config` take the fastest layout; empty where it has it already."""
    words = []
    for path, value in found.layouts[0].settings.items():
        if value != get(config, path):
            words += [
                f"--{path}",
                value if isinstance(value, str) else json.dumps(value, separators=(",", ":")),
            ]
    return words


def _value(layout: Layout, name: str) -> str:
    section = "training" if name in ("micro_batch_size", "gradient_checkpointing") else "distributed"
    value = layout.settings[f"{section}.{name}"]
    return "-" if value in (None, False) else str(value)


def _findings(findings: Sequence[Finding]) -> RenderableType:
    if not findings:
        return Text("Lint: nothing found.", style="bold")
    lines = [Text("Lint", style="bold")]
    for one in findings:
        line = Text(f"{one.severity}: ", style=STYLES[one.severity])
        lines.append(
            line.append(one.message, style="default").append(f"  [{one.id}; {one.source}]", style="dim")
        )
    return Group(*lines)


def count(number: float) -> str:
    """A large number for people: 671B, 262.1G FLOPs are 262.1B here too."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.4g}{letter}"
    return f"{number:.4g}"
