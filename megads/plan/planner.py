"""Everything that is known of a run before it starts, in one object, which is also written as JSON."""

from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

from megads.config.flops import count_parameters, training_flops_per_token
from megads.config.resolve import Resolved
from megads.config.schema import Config
from megads.plan.activations import SavedActivations
from megads.plan.budget import Budget, Interruptions, budget, tokens_per_second_at
from megads.plan.findings import Finding, Run
from megads.plan.hardware import PRICES_OF, Gpu
from megads.plan.lint import lint
from megads.plan.memory import StageBytes, memory_by_stage
from megads.plan.scaling import RecommendedSettings, ScalingAdvice, advise, recommend
from megads.plan.search import Search, search
from megads.plan.speed import ModelFlops, SpeedModel, StepTime

RECOMMENDED_SIZES = (1e8, 1e9, 7e9, 16e9, 67e9)


@dataclass(frozen=True)
class Assumptions:
    """What the caller knows better than the planner; None: the planner's own prediction or default."""

    mfu: float | None = None
    spot: bool = False
    dollars_per_gpu_hour: float | None = None
    hours_between_interruptions: float | None = None


@dataclass(frozen=True)
class Plan:
    """A run on `gpus` GPUs; `gpu`, `step` and `budget` are None for a run on the CPU.

    `step` is the prediction; `budget` follows from it or from the MFU that was assumed instead.
    """

    config: Config
    resolved: Resolved
    gpu: Gpu | None
    stages: tuple[StageBytes, ...]
    step: StepTime | None
    budget: Budget | None
    assumptions: Assumptions
    scaling: ScalingAdvice
    findings: tuple[Finding, ...]
    found: Search | None

    @property
    def heaviest(self) -> StageBytes:
        return max(self.stages, key=lambda stage: stage.total)

    @property
    def fits(self) -> bool | None:
        """Whether the heaviest stage is within the GPU's memory."""
        return None if self.gpu is None else self.heaviest.total <= self.gpu.memory_bytes


def make_plan(
    config: Config,
    resolved: Resolved,
    gpu: Gpu | None,
    assumptions: Assumptions = Assumptions(),
    *,
    with_search: bool = False,
    data_tokens: dict[str, int] | None = None,
) -> Plan:
    """The plan of a configuration that passed validation for `resolved.world_size` processes."""
    step = money = None
    if gpu is not None:
        saved = SavedActivations(config, resolved)
        step = SpeedModel(saved, gpu, ModelFlops.of(config)).step()
        money = _budget(config, resolved, gpu, step, assumptions)
    between = assumptions.hours_between_interruptions
    return Plan(
        config=config,
        resolved=resolved,
        gpu=gpu,
        stages=tuple(memory_by_stage(config, resolved)),
        step=step,
        budget=money,
        assumptions=assumptions,
        scaling=advise(config),
        findings=tuple(lint(Run(config, resolved, gpu, data_tokens, between))),
        found=search(config, resolved.world_size, gpu) if with_search and gpu is not None else None,
    )


def _budget(config: Config, resolved: Resolved, gpu: Gpu, step: StepTime, assumptions: Assumptions) -> Budget:
    speed = step.tokens_per_second_per_gpu
    if assumptions.mfu is not None:
        speed = tokens_per_second_at(assumptions.mfu, gpu, training_flops_per_token(config))
    price = assumptions.dollars_per_gpu_hour
    if price is None:
        price = gpu.spot_dollars_per_hour if assumptions.spot else gpu.dollars_per_hour
    interruptions = None
    if assumptions.hours_between_interruptions is not None:
        seconds = step.tokens_per_gpu / speed
        interruptions = Interruptions.on_spot(
            seconds, config.training.save_interval, assumptions.hours_between_interruptions
        )
    return budget(resolved.total_tokens, resolved.world_size, speed, price, interruptions)


def recommended() -> list[RecommendedSettings]:
    """The laws' settings for usual sizes."""
    return [recommend(parameters) for parameters in RECOMMENDED_SIZES]


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as JSON: bytes, seconds, FLOPs, tokens and dollars, as the names say."""
    counts, resolved = count_parameters(plan.config), plan.resolved
    layout = {name: getattr(resolved, name) for name in ("tp", "pp", "vpp", "ep", "etp", "cp", "dp", "edp")}
    return {
        "experiment_name": plan.config.experiment_name,
        "gpus": resolved.world_size,
        "gpu": None if plan.gpu is None else asdict(plan.gpu) | {"prices_of": PRICES_OF},
        "layout": layout | {"pipeline_layout": list(resolved.pipeline_layout)},
        "parameters": {
            "total": counts.total_with_mtp,
            "active": counts.active_with_mtp,
            "without_mtp": {"total": counts.total, "active": counts.active},
            "by_part": counts.by_part(),
        },
        "flops_per_token": {
            "causal": training_flops_per_token(plan.config),
            "full_square": training_flops_per_token(plan.config, causal=False),
        },
        "memory_bytes": [
            stage.parts()
            | {
                "stage": stage.stage,
                "layers": stage.layers,
                "micro_batches": stage.micro_batches,
                "total": stage.total,
            }
            for stage in plan.stages
        ],
        "fits": plan.fits,
        "step": None if plan.step is None else _step(plan.step),
        "budget": None if plan.budget is None else _budget_as_json(plan.budget),
        "assumptions": asdict(plan.assumptions),
        "scaling": asdict(plan.scaling),
        "recommended": [asdict(one) for one in recommended()],
        "findings": [asdict(finding) for finding in plan.findings],
        "search": None if plan.found is None else _search(plan.found),
    }


def _budget_as_json(money: Budget) -> dict[str, float | None]:
    """JSON has no infinity: null where interruptions leave no progress."""
    return {name: value if isfinite(value) else None for name, value in asdict(money).items()}


def _step(step: StepTime) -> dict[str, Any]:
    return {
        "seconds": step.seconds,
        "seconds_by_cause": step.by_cause(),
        "tokens_per_second_per_gpu": step.tokens_per_second_per_gpu,
        "mfu": step.mfu,
    }


def _search(found: Search) -> dict[str, Any]:
    layouts = [
        {"settings": layout.settings, "total_bytes": layout.total_bytes, **_step(layout.step)}
        for layout in found.layouts
    ]
    return {"tried": found.tried, "layouts": layouts}
