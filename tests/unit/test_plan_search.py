"""The search for layouts: what it offers passes the real run's validation, fits, and is in order."""

from pathlib import Path

import pytest

from megads.config.balance import balanced_layout
from megads.config.flops import count_parameters
from megads.config.loader import load_config
from megads.config.resolve import resolve
from megads.config.validate import check
from megads.plan.hardware import gpu_named
from megads.plan.memory import memory_by_stage
from megads.plan.search import Search, search

CONFIGS = Path(__file__).parents[2] / "configs"
CASES = [("deepseek_v2_lite", 64, "a100"), ("train_config_small", 8, "h100")]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case[0])
def found(request: pytest.FixtureRequest) -> tuple[str, int, str, Search]:
    name, gpus, gpu = request.param
    return name, gpus, gpu, search(load_config(CONFIGS / f"{name}.json"), gpus, gpu_named(gpu))


def test_every_layout_can_run_and_fits(found: tuple[str, int, str, Search]) -> None:
    name, gpus, gpu, result = found
    assert len(result.layouts) > 20
    for layout in result.layouts[:: max(1, len(result.layouts) // 20)]:
        config = load_config(CONFIGS / f"{name}.json", layout.settings)
        check(config, gpus, cuda=True)
        stages = memory_by_stage(config, resolve(config, gpus, cuda=True))
        assert max(stage.total for stage in stages) == layout.total_bytes <= gpu_named(gpu).memory_bytes


def test_the_fastest_comes_first_and_nothing_twice(found: tuple[str, int, str, Search]) -> None:
    result = found[3]
    seconds = [layout.step.seconds for layout in result.layouts]
    assert seconds == sorted(seconds)
    assert len({tuple(layout.settings.items()) for layout in result.layouts}) == len(result.layouts)
    assert result.tried >= len(result.layouts)


def test_the_configs_own_kind_of_layout_is_among_them() -> None:
    result = search(load_config(CONFIGS / "deepseek_v2_lite.json"), 64, gpu_named("h100"))
    own = [
        layout
        for layout in result.layouts
        if layout.settings["distributed.expert_parallel_size"] == 8
        and layout.settings["distributed.tensor_parallel_size"] == 1
        and layout.settings["distributed.pipeline_parallel_size"] == 1
    ]
    assert own
    assert result.layouts[0].step.seconds <= own[0].step.seconds


def test_a_model_too_large_has_no_layout() -> None:
    result = search(load_config(CONFIGS / "deepseek_v3_671b.json"), 16, gpu_named("h100"))
    assert result.layouts == ()
    assert result.tried > 0


def test_balanced_layouts() -> None:
    config = load_config(CONFIGS / "deepseek_v3_671b.json")
    counts = count_parameters(config)
    layout = balanced_layout(config, 16, counts)
    assert layout is not None
    assert sum(layout) == 61
    assert layout[-1] < min(layout[1:-1]), "the last stage has MTP and two heads besides"
    assert min(layout[1:-1]) >= 1
    assert balanced_layout(config, 64, counts) is None
