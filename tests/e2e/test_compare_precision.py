"""tools/compare_precision.py: two runs from the same weights, what is told of them, and what is refused."""

import json
from pathlib import Path

import pytest

from tests.e2e.commands import records, tool

STEPS = 8


def compare(config: Path, output: Path, *flags: object):  # type: ignore[no-untyped-def]
    return tool("compare_precision.py", config, "--steps", STEPS, "--output", output, *flags)


def test_fp8_is_compared_with_fp32(config: Path, tmp_path: Path) -> None:
    output = tmp_path / "comparison"
    flags = ("--a", "fp32", "--b", "fp8", "--b-set", "training.fp8.recipe=tensorwise", "--decay", 0.5)
    done = compare(config, output, *flags, "--max-difference", 0)
    assert done.returncode == 1, done.stderr  # any difference is too large
    assert "a: fp32, b: fp8 training.fp8.recipe=tensorwise" in done.stdout
    report = json.loads((output / "comparison.json").read_text(encoding="utf-8"))
    losses = {name: [r["lm_loss"] for r in records(output / name, "train")] for name in ("a", "b")}
    assert len(losses["a"]) == STEPS
    assert (report["loss_a"], report["loss_b"]) == (losses["a"], losses["b"])
    assert losses["a"][0] == pytest.approx(losses["b"][0], rel=1e-3)  # the same weights, rounded
    for step in range(STEPS):
        a, b = losses["a"][step], losses["b"][step]
        assert report["difference_percent"][step] == pytest.approx(100 * (b / a - 1))
        weights = [0.5 ** (step - earlier) for earlier in range(step + 1)]
        means = [sum(w * x for w, x in zip(weights, losses[name], strict=False)) for name in ("a", "b")]
        smoothed = 100 * (means[1] / means[0] - 1)
        assert report["smoothed_difference_percent"][step] == pytest.approx(smoothed)
    largest = max(map(abs, report["smoothed_difference_percent"][STEPS // 2 :]))
    assert report["largest_smoothed_difference_percent"] == largest > 0
    assert (output / "comparison.png").read_bytes().startswith(b"\x89PNG")

    again = compare(config, output, *flags)
    assert again.returncode == 5
    assert "give another --output" in again.stderr


def test_a_run_that_ends_says_why(config: Path, tmp_path: Path) -> None:
    done = compare(config, tmp_path / "comparison", "--a", "fp16", "--b", "fp8")
    assert done.returncode == 6
    assert "run a (fp16) ended with exit code 2" in done.stderr
    assert "training.use_fp16 needs CUDA" in done.stderr


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--a", "fp8"), "the same"),
        (("--b-set", "training.fp8.recipe"), "NAME=VALUE"),
        (("--decay", 1), "in [0, 1)"),
    ],
)
def test_what_makes_no_comparison_is_refused(flags: tuple[object, ...], said: str, config: Path) -> None:
    done = compare(config, config.parent / "comparison", *flags)
    assert done.returncode == 2
    assert said in done.stderr
