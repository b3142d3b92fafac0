"""The table of DeepSeek-V3 on 2,048 GPUs: its bytes against sums by hand, and what each layout is."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from plan_at_scale import EP, LAYOUTS, TP, predict, rows

from megads.plan.hardware import GPUS

H800 = GPUS["h800"]
TOKENS, WIDTH, CHOSEN = 4096, 7168, 8
MICRO_BATCHES = 15360 // 128
# Dispatch and combine in BF16, forward and backward, for the 4 MoE layers of a middle stage.
ROUTED_BYTES = 4 * MICRO_BATCHES * 4 * TOKENS * CHOSEN * WIDTH * 2
ONCE_MORE = 4 / 3  # full recomputation sends tokens again


def test_experts_over_eight_nodes_send_most_over_the_network() -> None:
    found = predict({}, H800)
    received = ROUTED_BYTES * ONCE_MORE
    assert found.in_node["expert_parallel"] == pytest.approx(received * 7 / 64)
    assert found.between_nodes["expert_parallel"] == pytest.approx(received * 56 / 64)
    assert found.in_node["tensor_parallel"] == found.between_nodes["tensor_parallel"] == 0
    assert found.between_nodes["pipeline"] == 2 * MICRO_BATCHES * TOKENS * WIDTH * 2


def test_experts_inside_a_node_and_fp8_dispatch_send_less() -> None:
    inside = predict({EP: 8}, H800)
    assert inside.between_nodes["expert_parallel"] == 0
    assert inside.in_node["expert_parallel"] == pytest.approx(ROUTED_BYTES * ONCE_MORE * 7 / 8)
    fp8 = predict({EP: 8, "training.use_fp8": True}, H800)
    # Tokens go out as one byte with a scale per 128, and come back as two.
    ratio = (1 + 4 / 128 + 2) / 4
    assert fp8.in_node["expert_parallel"] == pytest.approx(inside.in_node["expert_parallel"] * ratio)


def test_a_moe_layer_that_is_recomputed_sends_again() -> None:
    selective = {"training.gradient_checkpointing": "selective"}
    sent = predict(selective, H800).between_nodes["expert_parallel"]
    moe = predict(selective | {"training.recompute_modules": ["moe"]}, H800)
    assert moe.between_nodes["expert_parallel"] == pytest.approx(sent * ONCE_MORE)


def test_speed_does_not_depend_on_the_links_that_count_bytes() -> None:
    found = predict({EP: 8}, H800)
    assert found.step.tokens_per_second_per_gpu < found.hidden_tokens_per_second
    seconds = found.step.by_cause()
    exposed = found.in_node["expert_parallel"] / H800.node_link_bytes_per_second / 0.8
    assert seconds["expert_parallel"] == pytest.approx(exposed)
    alone = predict({EP: 1, TP: 8, "distributed.pipeline_parallel_size": 16}, H800)
    assert alone.hidden_tokens_per_second == pytest.approx(alone.step.tokens_per_second_per_gpu)


def test_every_layout_has_a_row() -> None:
    headings, *lines = rows(GPUS["h200"])
    assert [line[0] for line in lines] == list(LAYOUTS)
    assert {len(line) for line in lines} == {len(headings)}
