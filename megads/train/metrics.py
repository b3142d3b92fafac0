"""The records of a run: flat JSON objects, told apart by `kind`, which every sink gets.

| kind         | written                     | says                                              |
|--------------|-----------------------------|---------------------------------------------------|
| `run`        | at the start and each resume| layout, size, vocabulary, length of the run       |
| `train`      | each log interval           | losses, rate, norms, speed, expert balance        |
| `experts`    | every so many of them       | the load of each expert of each MoE layer         |
| `validation` | each evaluation             | loss and perplexity, together and by source       |
| `event`      | when it happens             | a spike of the loss, a rollback                   |

Lists hold one value per MoE layer. A value that is unknown or not finite is null in JSON.
`docs/metrics.md` tells every field: what it means, its unit and formula.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from megads.config.scalars import Scalars
from megads.train.meters import Averages, ExpertBalance, Memory, Speed
from megads.train.state import TrainState

Record = dict[str, Any]


def train_record(
    state: TrainState,
    averages: Averages,
    speed: Speed,
    *,
    scalars: Scalars,
    batch_size: int,
    memory: Memory,
    sampled: Mapping[str, int] | None = None,
) -> Record:
    """The record of a log interval that ended with `state`; `scalars` are those of its last step.

    `sampled` are the sequences of each source so far: their shares show the mix that was really seen.
    """
    record: Record = {
        "kind": "train",
        "step": state.step,
        "tokens": state.tokens,
        "samples": state.samples,
        "interval_steps": averages.steps,
        **averages.means,
        **asdict(scalars),
        "batch_size": batch_size,
        **asdict(speed),
        "skipped_steps": state.skipped_steps,
        "wall_seconds": state.wall_seconds,
        "job_seconds": state.job_seconds,
        "cost": state.cost,
        "total_flops": state.flops,
        "peak_memory_bytes": memory.peak_bytes,
        "memory_share": memory.share,
    }
    seen = sum((sampled or {}).values())
    record |= {f"share/{name}": count / seen for name, count in (sampled or {}).items() if seen}
    return record | _of_experts(averages.experts)


def _of_experts(experts: ExpertBalance | None) -> Record:
    """Each number by layer, and one for the whole model."""
    if experts is None:
        return {}
    record: Record = {
        "max_vio": _mean(experts.max_vio),
        "dead_experts": sum(experts.dead_experts),
        "router_entropy": _mean(experts.router_entropy),
        "max_vio_by_layer": experts.max_vio,
        "dead_experts_by_layer": experts.dead_experts,
        "router_entropy_by_layer": experts.router_entropy,
    }
    ranges = [value for value in experts.bias_range if value is not None]
    return record | ({"bias_range": max(ranges), "bias_range_by_layer": experts.bias_range} if ranges else {})


def experts_record(state: TrainState, experts: ExpertBalance) -> Record:
    """The record of the load of every expert in the log interval that ended with `state`."""
    load = [[round(share, 4) for share in layer] for layer in experts.load]
    return {"kind": "experts", "step": state.step, "tokens": state.tokens, "load_by_layer": load}


def validation_record(
    state: TrainState,
    loss: float,
    *,
    loss_by_source: Mapping[str, float],
    is_best: bool,
    average_loss: float | None = None,
) -> Record:
    """The record of an evaluation; losses are in nats per token, `average_loss` the averaged weights'."""
    of_average = {} if average_loss is None else {"average_loss": average_loss}
    return {
        "kind": "validation",
        "step": state.step,
        "tokens": state.tokens,
        "loss": loss,
        "perplexity": perplexity(loss),
        **of_average,
        "is_best": is_best,
        **{f"loss/{name}": value for name, value in loss_by_source.items()},
    }


def event_record(step: int, tokens: int, event: str, facts: Mapping[str, Any]) -> Record:
    """The record of something out of the ordinary at a step: a spike, a rollback."""
    return {"kind": "event", "step": step, "tokens": tokens, "event": event, **facts}


def run_record(
    state: TrainState, *, total_tokens: int, train_steps: int, vocab_size: int, layout: str, **facts: Any
) -> Record:
    """The record of a start (state at step 0) or a resume; `layout` is for people, as "TP2 PP1 EP1 DP1"."""
    return {
        "kind": "run",
        "step": state.step,
        "tokens": state.tokens,
        "total_tokens": total_tokens,
        "train_steps": train_steps,
        "vocab_size": vocab_size,
        "layout": layout,
        **facts,
    }


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that does not fit a float."""
    return math.inf if loss >= 700 else math.exp(loss)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
