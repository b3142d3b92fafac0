"""tools/plan.py as a user types it: tables, JSON, plot, lint, mistakes; and that it stays light."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

from megads.config.flags import parse_flags
from megads.config.loader import load_config
from megads.config.validate import check

ROOT = Path(__file__).parents[2]
LITE = "configs/deepseek_v2_lite.json"


def plan(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/plan.py", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_the_whole_plan(tmp_path: Path) -> None:
    out, png = tmp_path / "plan.json", tmp_path / "memory.png"
    done = plan(LITE, "--gpu", "h100", "--search", "--spot", "--json", str(out), "--plot", str(png))
    assert done.returncode == 0, done.stderr
    for words in (
        "15.71B in all",
        "64 x H100",
        "It fits: stage 0 needs",
        "Layouts that fit",
        "interruption every 12 h",
        "Lint",
    ):
        assert words in done.stdout
    whole = json.loads(out.read_text())
    assert whole["parameters"]["without_mtp"]["total"] == 15_706_484_224
    assert whole["fits"] is True
    (stage,) = whole["memory_bytes"]
    parts = ("weights", "gradients", "optimizer", "activations", "dispatch", "mtp", "logits", "workspace",
             "runtime", "margin")  # fmt: skip
    assert sum(stage[part] for part in parts) == stage["total"]
    step = whole["step"]
    assert sum(step["seconds_by_cause"].values()) == step["seconds"]
    assert whole["budget"]["dollars"] > 0
    assert whole["search"]["layouts"][0]["seconds"] <= step["seconds"]
    assert png.read_bytes().startswith(b"\x89PNG")


def test_the_fastest_layout_is_given_as_flags_that_work() -> None:
    done = plan(LITE, "--search", "--gpus", "32")
    flags = shlex.split(done.stdout.split("the first as flags:")[1].split("Lint")[0])
    arguments = parse_flags(["--config", LITE, *flags])
    check(load_config(ROOT / LITE, arguments.overrides), 32, cuda=True)


def test_a_run_on_the_cpu_and_flags_of_training() -> None:
    done = plan("configs/debug.json", "--training.micro_batch_size", "8", "--json", "-")
    whole = json.loads(done.stdout)
    assert whole["gpu"] is None
    assert whole["step"] is None
    larger = whole["memory_bytes"][0]["activations"]
    usual = json.loads(plan("configs/debug.json", "--json", "-").stdout)["memory_bytes"][0]["activations"]
    assert 1.9 < larger / usual < 2.1


def test_efficiency_and_price_are_inputs() -> None:
    words = (
        "configs/deepseek_v3_671b.json",
        "--gpu",
        "h800",
        "--mfu",
        "0.389",
        "--price",
        "2",
        "--json",
        "-",
    )
    money = json.loads(plan(*words).stdout)["budget"]
    assert abs(money["gpu_hours_per_trillion_tokens"] / 180e3 - 1) < 0.15
    assert money["dollars"] == 2 * money["gpu_hours"]
    hopeless = json.loads(plan(LITE, "--interruption-hours", "0.1", "--json", "-").stdout)["budget"]
    assert hopeless["lost_share"] == 1
    assert hopeless["days"] is None


def test_lint_and_strict() -> None:
    assert plan(LITE, "--lint", "--strict").returncode == 0
    warned = plan(LITE, "--lint", "--training.grad_clip", "0")
    assert warned.returncode == 0
    assert "no-gradient-clipping" in warned.stdout
    assert plan(LITE, "--lint", "--strict", "--training.grad_clip", "0").returncode == 1
    refused = plan(LITE, "--lint", "--model.moe.router_aux_loss_weight", "0", "--json", "-")
    assert refused.returncode == 1
    assert json.loads(refused.stdout)[0]["id"] == "router-unbalanced"


def test_data_that_lies_there_is_counted(tmp_path: Path) -> None:
    for name, tokens in (("a-0", 40_000), ("a-1", 60_000)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"format": "megads-indexed-1", "tokens": tokens}))
        (tmp_path / f"{name}.idx").touch()
    (tmp_path / "other.json").write_text('{"tokens": 1}')
    done = plan(
        "configs/debug.json", "--lint", "--data-path", str(tmp_path), "--training.train_steps", "1000"
    )
    assert "has 100,000 tokens and is read 21.6 times" in " ".join(done.stdout.split())


def test_mistakes() -> None:
    for words, told in (
        ((), "which configuration?"),
        ((LITE, "--gpu", "h10"), "did you mean"),
        (("configs/debug.json", "--search"), "--search: this run is on the CPU"),
        (
            ("configs/debug.json", "--gpu", "h100", "--distributed.device", "cpu"),
            'this run is on the CPU (distributed.device = "cpu"); --distributed.device auto --gpu h100 plans',
        ),
        (("--gpu", "h100", LITE), "belongs to no flag"),
        ((LITE, "--gpus", "0"), "--gpus must be above 0"),
        ((LITE, "--gpus", "12"), "cannot run"),
        ((LITE, "--mfuu", "1"), "unknown flag"),
        (("configs/deepseek_v3_671b_stages.json",), "--stage with one of"),
    ):
        done = plan(*words)
        assert done.returncode == 2, words
        assert told in done.stderr
        assert "Traceback" not in done.stderr


def test_nothing_heavy_is_imported() -> None:
    """It runs on login nodes, at once: neither torch nor numpy, and matplotlib for a plot only."""
    program = (
        "import runpy, sys; sys.argv = ['tools/plan.py', sys.argv[1], '--search', '--gpus', '8'];\n"
        "try: runpy.run_path('tools/plan.py', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'numpy', 'matplotlib', 'megatron', 'transformers', 'pandas'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "configs/train_config_small.json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
