"""Layers cut up for CUDA graphs lose nothing: on the CPU, with plain calls in place of captured graphs.

What a graph takes, what it gives back, and what runs between graphs is Megatron-Core's and our layers' code,
and runs here; only Transformer Engine's `make_graphed_callables` is replaced, by functions that compute anew
what a replay would, from exactly the inputs that it would get. `tests/gpu/test_cuda_graphs.py` has real ones.
"""

from typing import Any

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
}
GRAPHS = "training.cuda_graphs"


# --- in a worker ------------------------------------------------------------------------------


class StandIn:
    """`make_graphed_callables` without CUDA; counts the layers and the forward passes of all its results."""

    def __init__(self) -> None:
        self.layers = self.replays = self.released = 0

    def __call__(
        self, layers: tuple[Any, ...], samples: list[tuple[Tensor]], **options: Any
    ) -> tuple[Any, ...]:
        assert options["_order"] == [1, -1]
        assert not options["fp8_enabled"]
        self.layers += len(layers)
        inputs = zip(layers, samples, options["sample_kwargs"], strict=True)
        return tuple(self._graph(layer, hidden.float(), named) for layer, (hidden,), named in inputs)

    def _graph(self, layer: Any, hidden: Tensor, named: dict[str, Tensor]) -> Any:
        from megatron.core.transformer import cuda_graphs

        outputs = [output for output in layer(hidden, **named) if output.requires_grad]  # as when warming up
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
        layer.zero_grad(set_to_none=True)  # Transformer Engine puts back what was there: nothing

        def replay(given: Tensor, **others: Any) -> tuple[Tensor, ...]:
            assert given.shape == hidden.shape
            assert all(others[name].shape == sample.shape for name, sample in named.items())
            assert all(others[name].dtype == sample.dtype for name, sample in named.items())
            self.replays += 1
            cuda_graphs._set_capture_start()
            try:
                return layer._te_cuda_graph_capture(given, **{name: others[name] for name in named})
            finally:
                cuda_graphs._set_capture_end()

        replay.reset = self._release  # type: ignore[attr-defined]
        return replay

    def _release(self) -> None:
        self.released += 1


def install_stand_in() -> StandIn:
    """For the rest of this process, whose configurations are not checked for graphs any more."""
    from megatron.core.transformer import cuda_graphs

    from megads.config import validate_cuda_graphs
    from megads.model import build

    validate_cuda_graphs.cuda_graph_problems = lambda config, cuda: iter(())
    build.check_cuda_graphs = lambda *args: None
    stand_in = StandIn()
    cuda_graphs.make_graphed_callables = stand_in
    cuda_graphs.HAVE_TE_GRAPHS = True
    cuda_graphs.is_te_min_version = lambda version: True
    return stand_in


def train(settings: dict[str, Any]) -> list[Any]:
    step = tiny.start(settings)
    found: list[Any] = tiny.train(step, 0, STEPS - 1)
    held_out = tiny.micro_batches(step, tiny.global_batch(9))
    found.append(step.evaluate(iter(held_out), len(held_out))[0].tolist())
    found += tiny.train(step, STEPS - 1, 1)
    step.release_graphs()
    return found


def run_cases(cases: list[str], layout: dict[str, Any]) -> dict[str, Any]:
    from megads.mcore.groups import initialize_device

    initialize_device("cpu")
    stand_in = install_stand_in()
    models = {CASES[case][0] for case in cases}
    found: dict[str, Any] = {model: train(layout | MODELS[model]) for model in models}
    for case in cases:
        model, parts, _ = CASES[case]
        stand_in.layers = stand_in.replays = stand_in.released = 0
        results = train(layout | MODELS[model] | {GRAPHS: parts})
        found[f"{case} captured"] = results, stand_in.layers, stand_in.replays, stand_in.released
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
    """Two micro-batches per step."""
    _, captured, replays, released = one_process[f"{case} captured"]
    assert captured == released == CASES[case][2]
    assert replays == captured * 2 * (STEPS - 2)


def test_over_ranks() -> None:
    """Weights are gathered by hooks that replays call, and tokens go over two ranks."""
    layout = tiny.LAYOUTS["ep2"].settings
    for found in run_distributed(2, run_cases, cases=["all"], layout=layout):
        assert found["all captured"][0] == found["shared"]
        assert found["all captured"][2]
