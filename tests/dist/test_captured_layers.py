"""Layers of which parts are CUDA graphs compute what whole layers do: on the CPU, by graphs that are tapes.

Which parts are captured, what a graph takes and gives, and what runs between graphs is Megatron-Core's and
our layers' code; `taped_graphs.py` captures and replays. `tests/gpu/test_cuda_graphs.py` has real graphs.
"""

import itertools
import sys
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from tests.dist import tiny
from tests.dist.harness import run_distributed

STEPS = 4  # two without graphs, two with
ALL = ["attn", "mlp", "moe_router", "moe_preprocess"]
MODELS: dict[str, dict[str, Any]] = {
    "shared": {},
    "no-shared": {"model.moe.num_shared_experts": 0},
    "capacity": {"model.moe.capacity_factor": 0.7},
    "recomputed": {
        "training.gradient_checkpointing": "selective",
        "training.recompute_modules": ["mla_up_proj", "moe_act"],
    },
}
# Model, parts, and how many layers have any of them, of a dense one, three of experts, and two of MTP.
CASES: dict[str, tuple[str, list[str], int]] = {
    "attn": ("shared", ["attn"], 6),
    "mlp": ("shared", ["mlp"], 1),
    "router": ("shared", ["moe_router"], 5),
    "attn-router": ("shared", ["attn", "moe_router"], 6),
    "all": ("shared", ALL, 6),
    "no-shared-all": ("no-shared", ALL, 6),
    "capacity": ("capacity", ["attn", "moe_router"], 6),
    "recomputed": ("recomputed", ALL, 6),
}
GRAPHS = "training.cuda_graphs"


# --- in a worker ------------------------------------------------------------------------------


def make_taped_callables(
    layers: tuple[Any, ...], samples: list[tuple[Tensor]], **options: Any
) -> tuple[Any, ...]:
    """Transformer Engine's `make_graphed_callables`, for what Megatron-Core asks of it here."""
    from tests.dist.taped_graphs import TapedCallable

    assert not options["fp8_enabled"]
    micro_batches = len(samples) // len(layers)  # that have graphs of their own: with a pipeline
    left, captured = iter(layers), []
    for layers_of_chunk in options["_num_layers_per_chunk"]:
        captured += list(itertools.islice(left, layers_of_chunk)) * micro_batches
    inputs = zip(captured, samples, options["sample_kwargs"], strict=True)
    return tuple(TapedCallable(layer, hidden, named) for layer, (hidden,), named in inputs)


def make_taped_callables_by_transformer_engine(*args: Any, **options: Any) -> tuple[Any, ...]:
    """Its own, which takes the graphs that torch has."""
    from transformer_engine.pytorch import graph

    from tests.dist.taped_graphs import TapedGraph, taped

    graph.graph_safe_rng_available = lambda: False
    with mock.patch("torch.cuda.CUDAGraph", TapedGraph), mock.patch("torch.cuda.graph", taped):
        return graph.make_graphed_callables(*args, **options)  # type: ignore[no-any-return]


def install_tapes(by_transformer_engine: bool) -> list[Any]:
    """For the rest of this process; gives the list of the layers that will be captured."""
    from megatron.core.transformer import cuda_graphs

    from megads.config import validate_cuda_graphs
    from megads.model import build

    if by_transformer_engine:
        hopper = SimpleNamespace(
            name="H200", major=9, minor=0, multi_processor_count=132, total_memory=141 << 30
        )
        torch.cuda.get_device_capability = lambda *device: (hopper.major, hopper.minor)
        torch.cuda.get_device_properties = lambda *device: hopper
        for name in [name for name, module in sys.modules.items() if module is None]:
            del sys.modules[name]  # a CPU run hides it
        make = make_taped_callables_by_transformer_engine
    else:
        make = make_taped_callables
    layers: list[Any] = []

    def capture(found: tuple[Any, ...], samples: list[tuple[Tensor]], **options: Any) -> tuple[Any, ...]:
        layers.extend(found)
        exact = [(hidden.detach().float().requires_grad_(),) for (hidden,) in samples]
        return make(found, exact, **options)

    validate_cuda_graphs.cuda_graph_problems = lambda config, cuda: iter(())
    build.check_cuda_graphs = lambda *args: None
    cuda_graphs.make_graphed_callables = capture
    cuda_graphs.HAVE_TE_GRAPHS = True
    cuda_graphs.is_te_min_version = lambda version: True
    return layers


def train(settings: dict[str, Any]) -> list[Any]:
    step = tiny.start(settings)
    found: list[Any] = tiny.train(step, 0, STEPS - 1)
    held_out = tiny.micro_batches(step, tiny.global_batch(9))
    found.append(step.evaluate(iter(held_out), len(held_out))[0].tolist())
    found += tiny.train(step, STEPS - 1, 1)
    step.release_graphs()
    return found


def run_cases(
    cases: list[str], layout: dict[str, Any], by_transformer_engine: bool = False
) -> dict[str, Any]:
    from megads.mcore.groups import initialize_device
    from tests.dist.taped_graphs import TapedGraph

    initialize_device("cpu")
    layers = install_tapes(by_transformer_engine)
    models = {CASES[case][0] for case in cases}
    found: dict[str, Any] = {model: train(layout | MODELS[model]) for model in models}
    for case in cases:
        model, parts, _ = CASES[case]
        layers.clear()
        TapedGraph.replays = 0
        results = train(layout | MODELS[model] | {GRAPHS: parts})
        assert not any(layer.cuda_graphs for layer in layers)  # they were released
        found[f"{case} captured"] = results, len(layers), TapedGraph.replays
    return found


# --- with the workers' results ----------------------------------------------------------------


@pytest.fixture(scope="module")
def one_process() -> dict[str, Any]:
    (found,) = run_distributed(1, run_cases, cases=list(CASES), layout={})
    return found


@pytest.mark.parametrize("case", CASES)
def test_every_number_is_that_of_whole_layers(one_process: dict[str, Any], case: str) -> None:
    results, *_ = one_process[f"{case} captured"]
    assert results == one_process[CASES[case][0]]


@pytest.mark.parametrize("case", CASES)
def test_layers_are_captured_once_and_replayed_in_training_only(
    one_process: dict[str, Any], case: str
) -> None:
    """Two micro-batches per step, two graphs per layer."""
    _, captured, replays = one_process[f"{case} captured"]
    assert captured == CASES[case][2]
    assert replays == captured * 2 * 2 * (STEPS - 2)


@pytest.mark.skipif(find_spec("transformer_engine") is None, reason="Transformer Engine is not installed")
def test_transformer_engine_makes_the_same_of_them() -> None:
    (found,) = run_distributed(1, run_cases, cases=["all"], layout={}, by_transformer_engine=True)
    assert found["all captured"] == (found["shared"], 6, 6 * 2 * 2 * (STEPS - 2))


@pytest.mark.parametrize("name", ["ep2", "tp2", "cp2", "pp2-vpp2"])
def test_over_ranks(name: str) -> None:
    """Weights are gathered by hooks that replays call, and graphs have the exchange between ranks."""
    layout = tiny.LAYOUTS[name].settings
    for found in run_distributed(2, run_cases, cases=["all"], layout=layout):
        assert found["all captured"][0] == found["shared"]
        assert found["all captured"][2]
