"""One model, many layouts: ten optimizer steps on gloo give what one process gives.

Same weights at the start (bitwise), losses of every prediction depth within 1e-5, gradient norms within
1e-4 (both relative), the very same experts chosen, the same balancing biases and balance losses. MTP,
bias balancing, node-limited groups and the sequence loss are on.
"""

import functools
from typing import Any

import pytest

from tests.dist import tiny
from tests.dist.harness import run_distributed
from tests.dist.tiny import LAYOUTS

STEPS = 10
LOSS_TOLERANCE, GRAD_NORM_TOLERANCE = 1e-5, 1e-4

TIED = {"model.tie_word_embeddings": True}
MASKED = {"data.document_mask": True, "data.reset_position_ids": True}
# What DeepSeek's models leave off.
VARIANTS = {
    "model.norm_type": "layernorm",
    "model.mla.q_lora_rank": None,
    "model.mla.sliding_window": 5,
    "model.moe.balance_loss_type": "entropy",
    "model.moe.router_z_loss_weight": 1e-2,
}
DENSE = {
    "model.moe.num_experts": 0,
    "model.moe.num_shared_experts": 0,
    "model.intermediate_size": 48,
    "model.first_k_dense_replace": None,
}


def run(settings: dict[str, Any], masked: bool) -> dict[str, Any]:
    step = tiny.start(settings)
    at_start = tiny.shards(step, optimizer=False)
    records = tiny.train(step, 0, STEPS, masked=masked, documents=masked)
    at_end = tiny.shards(step, optimizer=False)
    return {"start": at_start, "end": at_end, "records": records}


def results(layout: str, settings: dict[str, Any], masked: bool) -> dict[str, Any]:
    processes, of_layout = LAYOUTS[layout]
    ranks = run_distributed(processes, run, settings=settings | of_layout, masked=masked)
    return {
        "start": tiny.assemble([rank["start"] for rank in ranks]),
        "end": tiny.assemble([rank["end"] for rank in ranks]),
        "records": list(tiny.merge([rank["records"] for rank in ranks])),
    }


@functools.cache
def single(settings: tuple[tuple[str, Any], ...], masked: bool) -> dict[str, Any]:
    return results("single", dict(settings), masked)


def assert_same_run(
    layout: str, settings: dict[str, Any], masked: bool = False, only_here: dict[str, Any] | None = None
) -> None:
    """`only_here` are settings of this run and not of the one on a single process."""
    expected = single(tuple(settings.items()), masked)
    found = results(layout, settings | (only_here or {}), masked)
    assert found["start"].keys() == expected["start"].keys()
    differ = [name for name, whole in found["start"].items() if not whole.equal(expected["start"][name])]
    assert not differ, f"the run starts from other weights: {differ}"
    for index, (mine, other) in enumerate(zip(found["records"], expected["records"], strict=True)):
        at = f"step {index}"
        assert mine["token_counts"] == other["token_counts"], at
        assert mine["losses"] == pytest.approx(other["losses"], rel=LOSS_TOLERANCE), at
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=GRAD_NORM_TOLERANCE), at
        assert mine["loads"] == other["loads"], at
        assert mine["balance"] == pytest.approx(other["balance"], rel=1e-5, abs=1e-6), at
    biases = {name: bias for name, bias in expected["end"].items() if name.endswith("expert_bias")}
    assert len(biases) == len(expected["records"][0]["loads"])
    for name, bias in biases.items():
        assert found["end"][name].equal(bias), name


def test_the_run_that_all_are_compared_with_trains() -> None:
    """Weights and biases move, loads are uneven, each loss depth counts its own labels."""
    found = single((), False)
    first, last = found["records"][0], found["records"][-1]
    tokens = tiny.GLOBAL_BATCH * tiny.SEQ_LENGTH
    assert first["token_counts"] == [tokens - k * tiny.GLOBAL_BATCH for k in range(3)]
    assert first["losses"] != last["losses"]
    assert len(first["loads"]) == len(first["balance"]) == 5
    for loads in first["loads"].values():
        assert sum(loads) == 2 * tokens
        assert len(set(loads)) > 2
    moved = {name for name, whole in found["end"].items() if not whole.equal(found["start"][name])}
    assert moved == found["end"].keys()


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "single"])
def test_every_layout_trains_like_one_process(layout: str) -> None:
    assert_same_run(layout, {})


@pytest.mark.parametrize("layout", ["pp2", "pp2-vpp2"])
def test_tied_embeddings(layout: str) -> None:
    """First and last stage hold copies of one table: their gradients are summed, both stay equal."""
    assert_same_run(layout, TIED)


@pytest.mark.parametrize("layout", ["dp2", "tp2", "pp2", "cp2"])
def test_masks_that_differ_between_sequences(layout: str) -> None:
    """Unmasked tokens weigh the same wherever they are; documents reach every stage and cross split ones."""
    assert_same_run(layout, MASKED, masked=True)


@pytest.mark.parametrize("layout", ["tp2", "cp2"])
def test_layernorm_window_entropy_and_z_loss(layout: str) -> None:
    """The window crosses the parts of a split sequence; the entropy is of a mean over all ranks."""
    assert_same_run(layout, VARIANTS)


@pytest.mark.parametrize(
    "modules",
    [["mla_up_proj", "layernorm"], ["moe_act", "mlp", "shared_experts"], ["mla_up_proj", "mlp", "moe"]],
)
@pytest.mark.parametrize("layout", ["single", "tp2-ep2"])
def test_what_is_recomputed_changes_nothing(layout: str, modules: list[str]) -> None:
    recompute = {"training.gradient_checkpointing": "selective", "training.recompute_modules": modules}
    assert_same_run(layout, {}, only_here=recompute)


@pytest.mark.parametrize("layout", ["tp2", "pp2"])
def test_dense_model(layout: str) -> None:
    assert_same_run(layout, DENSE)


@pytest.mark.parametrize(
    ("layout", "settings", "only_here"),
    [
        ("single", TIED, {}),
        ("dp2", {}, {}),
        ("dp2-zero3", {}, {}),
        ("tp2", DENSE, {"distributed.sequence_parallel": False}),
        ("pp2", TIED, {}),
        ("tp2-cp2", {}, {}),
    ],
)
def test_losses_by_chunks_of_tokens(layout: str, settings: dict[str, Any], only_here: dict[str, Any]) -> None:
    """The last chunk is shorter, and chunks cross sequences and prediction depths."""
    assert_same_run(layout, settings, only_here={"training.loss_chunk_tokens": 7} | only_here)
