"""The report in a real browser: everything is drawn, nothing is asked of a network, the controls work."""

import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from tests.e2e.browser import Browser, find_chromium
from tests.e2e.commands import ENVIRONMENT, ROOT, pretrain_well, records, tool
from tests.report_runs import run_record, train_record, write_run

pytestmark = pytest.mark.skipif(
    find_chromium() is None, reason="needs a Chromium browser (Debian: apt-get install chromium)"
)
DRAWN = "document.documentElement.dataset.drawn"
# A chart that is drawn has marks of its data: lines with points, or the picture of a map.
FILLED = """[...document.querySelectorAll('.plot')].filter(plot =>
    [...plot.querySelectorAll('path.js-line, path.js-fill, .scatterlayer path.point')]
        .some(path => path.getAttribute('d')?.length > 3)
    || plot.querySelector('.heatmaplayer image[href^="data:"], .heatmaplayer image')).map(plot =>
    plot.closest('figure').id)"""


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    program = find_chromium()
    assert program is not None
    with Browser(program, tmp_path / "profile") as started:
        yield started


def write_page(run: Path, *arguments: object) -> Path:
    done = tool("report.py", run, *arguments)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


def shown(browser: Browser, page: Path, **window: Any) -> list[str]:
    """Open a page; the ids of its charts, all of which must be drawn, without an error or a request."""
    browser.open(page, **window)
    count = int(browser.wait_until(DRAWN))
    charts = browser.evaluate("[...document.querySelectorAll('figure')].map(figure => figure.id)")
    assert len(charts) == count
    assert sorted(browser.evaluate(FILLED)) == sorted(charts)
    assert browser.errors == []
    assert set(browser.requests) == {page.as_uri()}
    return charts


def x_title(browser: Browser, chart: str) -> str:
    return str(browser.evaluate(f"document.getElementById('{chart}').querySelector('.xtitle').textContent"))


def click(browser: Browser, selector: str) -> None:
    browser.evaluate(f"document.querySelector({orjson.dumps(selector).decode()}).click()")
    browser.wait_until(DRAWN)


def test_a_real_run(config: Path, browser: Browser) -> None:
    pretrain_well("--config", config, "--training.train_steps", 12, "--training.eval_interval", 4)
    page = write_page(config.parent / "run")
    charts = shown(browser, page)
    assert {"loss", "train-mtp_loss", "train-learning_rate", "train-grad_norm", "heat-max_vio_by_layer"} <= {
        *charts
    }
    text = browser.evaluate("document.body.innerText")
    assert "12\nof 12" in text
    assert "finished" in text
    last = records(config.parent / "run", "train")[-1]
    assert f"{last['lm_loss']:.4f}" in text
    assert "model.mla.d_latent" in text  # of the settings that differ from their defaults
    assert "active per token" in text


def test_a_large_run(tmp_path: Path, browser: Browser) -> None:
    """Of the depth of V3's, and compared with another one; in the dark, in a narrow window."""
    run = write_run(tmp_path / "run", records=4000, layers=61, experts=256, done=0.7)
    other = write_run(tmp_path / "other", records=50)
    charts = shown(browser, write_page(run, "--compare", other), width=800, dark=True)
    assert len(charts) >= 30
    assert browser.evaluate("document.documentElement.scrollWidth") <= 800
    names = browser.evaluate("[...document.querySelectorAll('#loss .legend button')].map(b => b.textContent)")
    assert names[:4] == ["training", "training (other)", "validation", "validation (other)"]
    assert {"spike", "health", "resume"} <= {*names}


def test_controls(tmp_path: Path, browser: Browser) -> None:
    page = write_page(write_run(tmp_path / "run", records=100))
    shown(browser, page)
    assert x_title(browser, "loss") == "training tokens"
    click(browser, "button[data-x=steps]")
    assert x_title(browser, "loss") == x_title(browser, "heat-max_vio_by_layer") == "steps"
    full = browser.evaluate("document.querySelector('#loss .plot').layout.xaxis.range")
    assert full[1] == pytest.approx(1000, rel=0.02)
    # A zoom into one chart is a zoom into all, and the vertical axis fits what is left.
    browser.evaluate(
        "Plotly.relayout(document.querySelector('#train-grad_norm .plot'),"
        "{'xaxis.range[0]': 500, 'xaxis.range[1]': 900}) && 0"
    )
    browser.wait_until("document.querySelector('#loss .plot').layout.xaxis.range[0] === 500")
    browser.wait_until(DRAWN)
    assert browser.evaluate("document.querySelector('#loss .plot').layout.yaxis.range[1]") < 3
    browser.evaluate("document.querySelector('#loss .plot').emit('plotly_doubleclick') || 0")
    browser.wait_until(DRAWN)
    assert browser.evaluate("document.querySelector('#loss .plot').layout.xaxis.range") == full
    # A line is hidden by its name, the values behind the smoothed lines by their button.
    shown_lines = "document.querySelectorAll('#loss path.js-line').length"
    before = browser.evaluate(shown_lines)
    click(browser, "#loss .legend button")
    assert browser.evaluate(shown_lines) < before
    click(browser, "#loss .head button")
    assert browser.evaluate("document.querySelector('#loss .plot').layout.yaxis.type") == "log"
    # The map of the experts goes back in time.
    at = "document.querySelector('#expert-load .slider span').textContent"
    assert browser.evaluate(at).startswith("step 1,000,")
    browser.evaluate("(slider => { slider.value = 0; slider.dispatchEvent(new Event('input')) })"
                     "(document.querySelector('#expert-load input'))")  # fmt: skip
    assert not browser.evaluate(at).startswith("step 1,000,")
    assert browser.evaluate("getComputedStyle(document.body).colorScheme") == "light"
    browser.evaluate(
        "[...document.querySelectorAll('#bar button')].find(b => b.textContent === 'Dark').click()"
    )
    browser.wait_until(DRAWN)
    assert browser.evaluate("getComputedStyle(document.body).colorScheme") == "dark"
    assert browser.errors == []


def test_a_run_that_goes_on_is_followed(tmp_path: Path, browser: Browser) -> None:
    """While `--watch` writes it, the page loads itself again, at the place and in the view it was left."""
    run = write_run(tmp_path / "run", records=40, done=0.5)
    noise = random.Random(2)
    watching = subprocess.Popen(
        [sys.executable, ROOT / "tools" / "report.py", run, "--watch", "1"], stdout=subprocess.PIPE,
        env=ENVIRONMENT,
    )  # fmt: skip
    try:
        assert watching.stdout is not None
        page = Path(watching.stdout.readline().decode().strip())
        browser.open(page)
        browser.wait_until("document.querySelector('button[data-x=hours]')?.click() ?? view.x === 'hours'")
        browser.wait_until("scrollTo(0, 700) ?? scrollY === 700")
        with (run / "metrics.jsonl").open("ab") as metrics:
            for step in range(210, 401, 10):
                metrics.write(orjson.dumps(train_record(step, 400, 4, noise)) + b"\n")
            metrics.write(orjson.dumps(run_record(400, 400))[:50])  # and half a line
        browser.wait_until("document.querySelector('.badge')?.textContent === 'finished'")
        browser.wait_until(DRAWN)
        assert x_title(browser, "loss") == "hours of training"
        assert browser.evaluate("scrollY") == 700
        assert browser.errors == []
        assert watching.wait(60) == 0
    finally:
        watching.kill()
        watching.wait()


def test_watching_ends_at_a_signal_and_leaves_no_part_of_a_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", records=40, done=0.5)
    watching = subprocess.Popen(
        [sys.executable, ROOT / "tools" / "report.py", run, "--watch", "1"], stdout=subprocess.PIPE,
        env=ENVIRONMENT,
    )  # fmt: skip
    assert watching.stdout is not None
    watching.stdout.readline()
    time.sleep(0.2)
    watching.send_signal(signal.SIGTERM)
    assert watching.wait(60) == 128 + signal.SIGTERM
    assert sorted(path.name for path in run.iterdir()) == ["metrics.jsonl", "report.html", "run.json"]


def test_bad_input(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        ([tmp_path / "empty"], "holds no metrics.jsonl"),
        ([tmp_path / "nowhere"], "is not a directory"),
        ([write_run(tmp_path / "run", records=5), "--compare", tmp_path / "gone"], "gone is not a directory"),
    ):
        done = tool("report.py", *arguments)
        assert (done.returncode, done.stdout) == (3, "")
        assert done.stderr.startswith("error: ")
        assert message in done.stderr
    assert not (tmp_path / "run" / "report.html").exists()
    assert tool("report.py", tmp_path / "run", "--watch", "0").returncode == 2


def test_stages_side_by_side(tmp_path: Path, browser: Browser) -> None:
    write_run(tmp_path / "base" / "pretrain", records=40)
    settings = {"checkpointing.init_from": str(tmp_path / "base" / "pretrain" / "checkpoints")}
    write_run(tmp_path / "base" / "extend", records=40, settings=settings)
    shown(browser, write_page(tmp_path / "base"))
    assert "extend" in browser.evaluate("document.querySelector('#loss .annotation').textContent")
