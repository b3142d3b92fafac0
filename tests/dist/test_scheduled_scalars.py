"""What a schedule gives to a step acts as the same setting in the configuration would."""

from typing import Any

import pytest
import torch

from tests.dist import tiny
from tests.dist.harness import run_distributed
from tests.dist.tiny import LAYOUTS

MASKED = {"data.document_mask": True, "data.reset_position_ids": True}
SHORT = tiny.SEQ_LENGTH // 2


def run(settings: dict[str, Any], changes: dict[str, float], cut: bool, steps: int = 3) -> list[list[float]]:
    """Losses by depth and the gradient norm of each step; `cut`: batches come cut to half their length."""
    from megads.train.step import shortened

    step = tiny.start(settings)
    documents = step.config.data.document_mask
    found = []
    for index in range(steps):
        batch = tiny.global_batch(index, masked=True, documents=documents)
        if cut:
            batch = shortened(batch, SHORT)
        parts = tiny.micro_batches(step, batch)
        result = step.train(
            iter(parts) if step.needs_data else None, len(parts), tiny.scalars(step, **changes)
        )
        assert result.grad_norm is not None
        found.append([*(result.loss_sums / result.token_counts).tolist(), result.grad_norm])
    return found


def pair(settings: dict[str, Any], changes: dict[str, float], others: dict[str, Any], cut: bool) -> Any:
    scheduled = run(settings, changes, cut=False)
    return scheduled, run(settings | others, {}, cut), run(settings, {}, cut=False)


def assert_acts_like(
    settings: dict[str, Any], changes: dict[str, float], others: dict[str, Any], cut: bool = False
) -> None:
    [(scheduled, configured, unchanged)] = run_distributed(
        1, pair, settings=settings, changes=changes, others=others, cut=cut
    )
    assert scheduled == configured
    assert scheduled != unchanged


@pytest.mark.parametrize(
    ("changes", "others"),
    [
        ({"router_temperature": 0.5}, {"model.moe.router_temperature": 0.5}),
        ({"aux_loss_weight": 0.5}, {"model.moe.router_aux_loss_weight": 0.5}),
        ({"mtp_loss_weight": 0.9}, {"training.mtp_loss_weight": 0.9}),
    ],
)
def test_a_scheduled_value_acts_as_the_setting(changes: dict[str, float], others: dict[str, Any]) -> None:
    assert_acts_like({}, changes, others)


@pytest.mark.parametrize("masked", [False, True])
def test_a_short_phase_is_training_on_short_sequences(masked: bool) -> None:
    of_short = {
        "training.seq_length": SHORT,
        "training.micro_batch_size": 2 * tiny.MICRO_BATCH,
        "training.global_batch_size": 2 * tiny.GLOBAL_BATCH,
    }
    assert_acts_like(MASKED if masked else {}, {"seq_length": SHORT}, of_short, cut=True)


@pytest.mark.parametrize("layout", ["tp2", "pp2", "cp2", "pp2-vpp2"])
def test_a_short_phase_is_the_same_in_every_layout(layout: str) -> None:
    changes = {"seq_length": SHORT}
    [expected] = run_distributed(1, run, settings={}, changes=changes, cut=False)
    processes, of_layout = LAYOUTS[layout]
    for found in run_distributed(processes, run, settings=of_layout, changes=changes, cut=False):
        for mine, other in zip(found, expected, strict=True):
            assert mine == pytest.approx(other, rel=1e-4)


def cut_batch() -> dict[str, torch.Tensor]:
    from megads.train.step import shortened

    # One sample of three documents of 3, 4 and 1 tokens, cut in the middle of the second.
    whole = {
        "tokens": torch.arange(8)[None],
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0]]),
        "document_ids": torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2]]),
        "source": torch.tensor([3]),
    }
    return shortened(whole, 4)


def test_positions_restart_at_a_cut() -> None:
    [cut] = run_distributed(1, cut_batch)
    assert cut["tokens"].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert cut["position_ids"].tolist() == [[0, 1, 2, 0], [0, 1, 2, 0]]
    assert cut["document_ids"].tolist() == [[0, 0, 0, 1], [1, 1, 1, 2]]
    assert cut["source"].tolist() == [3, 3]


def centred_biases() -> tuple[list[float], list[float]]:
    from megads.model.router import update_expert_biases

    step = tiny.start({})
    router = step.routers[0]
    assert router.expert_bias is not None
    experts = len(router.expert_bias)
    loads = torch.ones(1, experts)
    loads[0, 0] = 10.0
    before = router.expert_bias.clone()
    update_expert_biases([router], loads, 0.1, centered=True)
    centred = (router.expert_bias - before).tolist()
    router.expert_bias.copy_(before)
    update_expert_biases([router], loads, 0.1)
    return centred, (router.expert_bias - before).tolist()


def test_centred_updates_keep_the_sum_of_biases() -> None:
    [(centred, plain)] = run_distributed(1, centred_biases)
    experts = len(plain)
    assert plain == pytest.approx([-0.1] + [0.1] * (experts - 1))
    mean = 0.1 * (experts - 2) / experts
    assert centred == pytest.approx([value - mean for value in plain], abs=1e-6)
