"""The loss curve: what is drawn, read back from the figure and from the pixels."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from megads.errors import DataError
from megads.train.curve import draw_curve, smooth
from megads.train.metrics import run_record, validation_record
from megads.train.sinks import JsonLinesSink
from megads.train.state import TrainState


def write_metrics(path: Path, intervals: int, *, resumes: tuple[int, ...] = ()) -> None:
    sink = JsonLinesSink(path, 0)
    facts: dict[str, Any] = {"total_tokens": 0, "train_steps": 0, "vocab_size": 4096}
    sink.write(run_record(TrainState(), layout="TP1", **facts))
    for i in range(1, intervals + 1):
        state = TrainState(step=i, tokens=1000 * i)
        loss = 4 + 4 * math.exp(-i / intervals * 5)
        rate = 1e-3 / i
        sink.write(
            {"kind": "train", "step": i, "tokens": state.tokens, "lm_loss": loss, "learning_rate": rate}
        )
        if i % max(1, intervals // 4) == 0:
            sink.write(validation_record(state, loss + 0.1, loss_by_source={}, is_best=True))
        if i in resumes:
            sink.write(run_record(state, layout=f"DP{i}", **facts))
    sink.close()


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved."""
    figures: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, *arguments: Any, **named: Any) -> None:
        figures.append(figure)
        save(figure, *arguments, **named)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def texts(figure: Figure) -> str:
    return "\n".join(text.get_text() for axes in figure.axes for text in axes.texts)


def test_curve(tmp_path: Path, drawn: list[Figure]):
    metrics = tmp_path / "metrics.jsonl"
    write_metrics(metrics, 40, resumes=(20,))
    png = draw_curve(metrics, tmp_path / "plots" / "loss.png", title="my run")
    [figure] = drawn
    losses, rates = figure.axes
    raw, smoothed, validation = losses.lines[:3]
    assert raw.get_xdata()[-1] == smoothed.get_xdata()[-1] == 40_000
    assert raw.get_ydata()[0] == pytest.approx(4 + 4 * math.exp(-1 / 8))
    assert list(validation.get_xdata()) == [10_000, 20_000, 30_000, 40_000]
    assert rates.lines[-1].get_ydata()[3] == pytest.approx(1e-3 / 4)
    assert losses.get_title(loc="left") == "my run"
    assert "ln 4,096 = 8.32" in texts(figure)
    assert "resumed: DP20" in texts(figure)
    assert "resumed: TP1" not in texts(figure)
    assert losses.get_ylim()[1] > math.log(4096)
    assert [path.name for path in png.parent.iterdir()] == ["loss.png"]


def test_pixels_show_the_curve(tmp_path: Path):
    metrics = tmp_path / "metrics.jsonl"
    write_metrics(metrics, 40)
    pixels = imread(draw_curve(metrics, tmp_path / "loss.png"))[..., :3]
    assert pixels.shape[0] > 600
    assert pixels.shape[1] > 1000
    blue = np.argwhere(np.abs(pixels - np.array([0x1F, 0x5F, 0xA8]) / 255).max(-1) < 0.05)
    left = blue[blue[:, 1] < blue[:, 1].min() + 20]
    middle = blue[np.abs(blue[:, 1] - pixels.shape[1] // 2) < 20]
    assert len(blue) > 1000
    assert left[:, 0].mean() < middle[:, 0].mean() - 100  # it falls


def test_short_run_is_not_smoothed(tmp_path: Path, drawn: list[Figure]):
    metrics = tmp_path / "metrics.jsonl"
    write_metrics(metrics, 5)
    draw_curve(metrics, tmp_path / "loss.png")
    assert len(drawn[0].axes[0].lines[0].get_xdata()) == 5


def test_many_resumes_do_not_write_over_each_other(tmp_path: Path, drawn: list[Figure]):
    metrics = tmp_path / "metrics.jsonl"
    write_metrics(metrics, 40, resumes=tuple(range(5, 40)))
    draw_curve(metrics, tmp_path / "loss.png")
    assert len(drawn[0].axes[1].lines) == 1 + 35
    assert texts(drawn[0]).count("resumed") <= 4


def test_one_interval_with_unknown_loss_among_others(tmp_path: Path, drawn: list[Figure]):
    metrics = tmp_path / "metrics.jsonl"
    write_metrics(metrics, 5)
    with metrics.open("a") as file:
        file.write('{"kind":"train","step":6,"tokens":6000,"lm_loss":null,"learning_rate":0.1}\n{"kind":"tr')
    draw_curve(metrics, tmp_path / "loss.png")
    assert list(drawn[0].axes[0].lines[0].get_xdata()) == [1000, 2000, 3000, 4000, 5000]


def test_nothing_to_draw(tmp_path: Path):
    with pytest.raises(DataError, match="does not exist"):
        draw_curve(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    (tmp_path / "metrics.jsonl").write_text('{"kind":"run","step":0}\n')
    with pytest.raises(DataError, match="no training loss"):
        draw_curve(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


def test_smoothing_keeps_a_slope_and_calms_noise():
    slope = [10.0 - 0.1 * i for i in range(50)]
    assert smooth(slope, 4) == pytest.approx(slope)
    noise = [(-1.0) ** i for i in range(50)]
    assert max(abs(value) for value in smooth(noise, 4)[4:-4]) < 0.12
