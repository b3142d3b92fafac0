"""How many decoder layers each pipeline stage gets, so that none has much more to do than the others."""

from megads.config.flops import ParameterCounts, attention_flops_per_token
from megads.config.schema import Config


def balanced_layout(config: Config, stages: int, counts: ParameterCounts) -> tuple[int, ...] | None:
    """Layers of each stage so that the largest sum of FLOPs is least; None where none fits.

    The last stage has MTP and a head per prediction depth besides. Only the ends may have no layer.
    """
    head = config.model.vocab_size * config.model.mla.d_model
    scores = attention_flops_per_token(config)
    last = 2.0 * ((1 + len(counts.mtp_layers)) * head + counts.mtp_projection)
    last += sum(2 * layer.matrices + scores for layer in counts.mtp_layers)
    costs = [2 * layer.matrices + scores for layer in counts.layers]
    if len(costs) < stages - 2 or stages < 2:
        return None
    low, high = max(max(costs), last), sum(costs) + last
    while high - low > max(costs) / 100:
        middle = (low + high) / 2
        low, high = (low, middle) if _fill(costs, last, stages, middle) else (middle, high)
    return _fill(costs, last, stages, high)


def _fill(costs: list[float], last: float, stages: int, limit: float) -> tuple[int, ...] | None:
    """Layers of each stage with no stage above `limit`, filled from the last one; None: too many layers."""
    layout, position = [], len(costs)
    for stage in reversed(range(stages)):
        sum_of_stage = last if stage == stages - 1 else 0.0
        must_leave = max(0, stage - 1)  # a layer for every stage in the middle
        taken = 0
        while position > must_leave and sum_of_stage + costs[position - 1] <= limit:
            position -= 1
            sum_of_stage += costs[position]
            taken += 1
        layout.append(taken)
    return tuple(reversed(layout)) if position == 0 else None
