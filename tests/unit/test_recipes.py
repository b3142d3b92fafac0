"""The published recipes, scalar by scalar at their breakpoints, as a run of our configs would use them.

Numbers: DeepSeek-V3 (arXiv:2412.19437, section 4.2), Moonlight (arXiv:2502.16982, section 3.3), DeepSeek
LLM (arXiv:2401.02954, section 2.3).
"""

from pathlib import Path
from typing import Any

import pytest

from megads.config.loader import load_config
from megads.config.resolve import resolve
from megads.config.scalars import Scalars, Schedules
from megads.config.validate import find_problems

CONFIGS = Path(__file__).parents[2] / "configs"
T = 10**12
B = 10**9


class Recipe:
    """A config's schedules, asked for the step that begins at some number of tokens."""

    def __init__(self, name: str | None, world_size: int = 2048, **overrides: Any) -> None:
        path = None if name is None else str(CONFIGS / f"{name}.json")
        self.config = load_config(path, overrides)
        self.resolved = resolve(self.config, world_size, cuda=True)
        self.schedules = Schedules(self.config, self.resolved)

    def at(self, tokens: int) -> tuple[int, Scalars]:
        return self.schedules.at(tokens)


@pytest.fixture(scope="module")
def v3() -> Recipe:
    return Recipe("deepseek_v3_671b")


@pytest.fixture(scope="module")
def moonlight() -> Recipe:
    return Recipe("moonlight_16b_a3b", world_size=64)


@pytest.mark.parametrize(
    ("tokens", "learning_rate"),
    [
        (2000 * 3072 * 4096 - 3072 * 4096, 2.2e-4),  # the 2,000th step is the first at the peak
        (1000 * 3072 * 4096 - 3072 * 4096, 1.1e-4),
        (5 * T, 2.2e-4),
        (10 * T - B, 2.2e-4),
        (12 * T + 150 * B, 2.2e-5 + (2.2e-4 - 2.2e-5) / 2),  # the middle of the cosine
        (14 * T + 300 * B, 2.2e-5),
        (14 * T + 632 * B, 2.2e-5),
        (14 * T + 634 * B, 7.3e-6),
        (14 * T + 799 * B, 7.3e-6),
    ],
)
def test_v3_learning_rate(v3: Recipe, tokens: int, learning_rate: float) -> None:
    assert v3.at(tokens)[1].learning_rate == pytest.approx(learning_rate, rel=1e-4)


@pytest.mark.parametrize(
    ("tokens", "batch"), [(0, 3072), (468 * B, 12288), (469 * B, 15360), (14 * T, 15360)]
)
def test_v3_batch(v3: Recipe, tokens: int, batch: int) -> None:
    assert v3.at(tokens)[0] == batch


def test_v3_balancing_and_mtp(v3: Recipe) -> None:
    early, middle, late = (v3.at(tokens)[1] for tokens in (0, 10 * T + B, 14 * T + 301 * B))
    assert (early.mtp_loss_weight, middle.mtp_loss_weight, late.mtp_loss_weight) == (0.3, 0.1, 0.1)
    assert (early.bias_update_rate, middle.bias_update_rate, late.bias_update_rate) == (0.001, 0.001, 0.0)
    assert v3.at(10 * T - B)[1].mtp_loss_weight == 0.3
    assert v3.at(14 * T + 299 * B)[1].bias_update_rate == 0.001
    for scalars in (early, middle, late):
        assert (scalars.aux_loss_weight, scalars.weight_decay, scalars.seq_length) == (1e-4, 0.1, 4096)


@pytest.mark.parametrize(
    ("tokens", "learning_rate", "bias_update_rate", "batch"),
    [
        (2000 * 2048 * 8192 - 2048 * 8192, 4.2e-4, 0.001, 2048),
        (199 * B, 4.2e-4, 0.001, 2048),
        (201 * B, 4.2e-4, 0.001, 4096),
        (5 * T + 199 * B, 4.2e-5, 0.001, 4096),
        (5 * T + 200 * B + 99 * 4096 * 8192, 1e-4, 0.0, 4096),  # 100 steps up to 1e-4
        (5 * T + 451 * B + 677 * 10**6, 5e-5, 0.0, 4096),  # half of the linear way to 0
        (5 * T + 700 * B - 4096 * 8192, 0.0, 0.0, 4096),
    ],
)
def test_moonlight(
    moonlight: Recipe, tokens: int, learning_rate: float, bias_update_rate: float, batch: int
) -> None:
    sequences, scalars = moonlight.at(tokens)
    assert scalars.learning_rate == pytest.approx(learning_rate, rel=5e-3, abs=1e-8)
    assert (scalars.bias_update_rate, sequences) == (bias_update_rate, batch)


def test_moonlight_centres_its_bias_updates(moonlight: Recipe) -> None:
    assert moonlight.config.model.moe.bias_update_centered


def test_deepseek_llm_multistep() -> None:
    recipe = Recipe(
        None,
        1,
        **{
            "training.lr_decay_style": "multistep", "training.learning_rate": 4.2e-4,
            "training.global_batch_size": 2304, "training.seq_length": 4096,
            "training.total_training_tokens": 2 * T, "training.lr_warmup_steps": 2000,
        },
    )  # fmt: skip
    step = 2304 * 4096
    found = [recipe.at(tokens - step)[1].learning_rate for tokens in (2000 * step, int(1.59 * T))]
    assert found == [4.2e-4, 4.2e-4]
    assert recipe.at(int(1.7 * T))[1].learning_rate == pytest.approx(4.2e-4 * 0.316)
    assert recipe.at(int(1.9 * T))[1].learning_rate == pytest.approx(4.2e-5)


# ------------------------------------------------------------------ phases that cannot be

ONE_BILLION = {"training.total_training_tokens": B, "training.lr_warmup_steps": 0}
MTP, LENGTH = "training.mtp_loss_weight_phases", "training.seq_length_phases"


@pytest.mark.parametrize(
    ("path", "phases", "problem"),
    [
        (MTP, [(B // 2, 0.3)], "ends at 500,000,000 tokens but the run has 1,000,000,000"),
        (MTP, [(B, 0.3), (2 * B, 0.1)], "before the phase until 2,000,000,000 tokens begins"),
        (MTP, [(B // 2, 0.3), (B // 2, 0.2), (B, 0.1)], "increasing"),
        (LENGTH, [(B // 2, 100), (B, 2048)], "divides training.seq_length = 2048"),
        (LENGTH, [(B, 1024)], "let the last phase have the full length"),
    ],
)
def test_phases_that_cannot_be_are_refused(path: str, phases: list[tuple[int, float]], problem: str) -> None:
    listed = [{"until_tokens": until, "to": to} for until, to in phases]
    config = load_config(None, {**ONE_BILLION, path: listed})
    assert any(path in found and problem in found for found in find_problems(config, 1, False))


def test_short_sequences_must_fit_the_layout() -> None:
    phases = [{"until_tokens": B // 2, "to": 4}, {"until_tokens": B, "to": 2048}]
    layout = {"distributed.tensor_parallel_size": 4, "distributed.context_parallel_size": 2}
    config = load_config(None, {**ONE_BILLION, **layout, LENGTH: phases})
    assert any("16 equal parts" in problem for problem in find_problems(config, 8, False))
