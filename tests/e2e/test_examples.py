"""The scripts of examples/ and the judgement of the demo: what runs on a CPU runs here, at tiny sizes."""

import importlib.util
import json
import math
import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megads.errors import EnvironmentSetupError
from tests.e2e.commands import ENVIRONMENT, ROOT, Finished, records, run, steps, tool

EXAMPLES = sorted((ROOT / "examples").glob("*.sh"))
TINY = shlex.split(
    "--num-layers 2 --hidden-size 32 --kv-lora-rank 16 --q-lora-rank 16 --num-attention-heads 2 "
    "--qk-head-dim 16 --qk-pos-emb-head-dim 8 --v-head-dim 16 --moe-ffn-hidden-size 32 --num-experts 4 "
    "--seq-length 32 --global-batch-size 4 --micro-batch-size 2 --lr-warmup-iters 1 "
    "--log-interval 1 --eval-interval 0 --no-logging.tensorboard.enabled"
)


def example(name: str, *arguments: object, **environment: object) -> Finished:
    texts = {key: str(value) for key, value in environment.items()}
    return run(["bash", ROOT / "examples" / f"{name}.sh", *arguments], environment=texts)


def test_the_scripts_are_short_strict_and_executable() -> None:
    assert len(EXAMPLES) == 7
    for script in EXAMPLES:
        lines = script.read_text().splitlines()
        assert lines[0] == "#!/usr/bin/env bash"
        assert "set -euo pipefail" in lines
        assert len(lines) <= 30, script.name
        assert os.access(script, os.X_OK), script.name


def test_sample_data_are_made_once(tmp_path: Path) -> None:
    """Again after an interruption, and in another size on request, with nothing left of the first."""

    def make(*flags: object) -> str:
        done = tool("make_sample_data.py", "--output", tmp_path, "--mb", 1, "--vocab-size", *flags)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "train_tokenizer.py" in make(700)
    assert "there already" in make(600)
    (tmp_path / "code" / "code-0007.idx").touch()  # a larger corpus has more shards
    assert "train_tokenizer.py" in make(600, "--overwrite")
    assert not (tmp_path / "code" / "code-0007.idx").exists()
    record = json.loads((tmp_path / "sample.json").read_text())
    assert record == {"mb": 1, "vocab_size": 600}
    (tmp_path / "sample.json").write_text("")
    assert "train_tokenizer.py" in make(600)


def test_somebodys_own_data_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").touch()
    assert "there already" in tool("make_sample_data.py", "--output", tmp_path).stdout
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.model"]
    done = tool("make_sample_data.py", "--output", tmp_path / "tokenizer.model" / "below")
    assert done.returncode == EnvironmentSetupError.exit_code, done.stderr
    assert "choose another --output" in done.stderr


def test_debug_on_cpu(data: Path, tmp_path: Path) -> None:
    done = example("debug_on_cpu", *TINY, "--train-iters", 2, "--output_dir", tmp_path / "run", DATA=data)
    assert done.returncode == 0, done.stdout + done.stderr
    assert steps(tmp_path / "run") == [1, 2]
    assert records(tmp_path / "run", "run")[0]["layout"] == "EP2 DP2"


def test_resume_in_another_layout(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    done = example("resume_in_another_layout", *TINY, DATA=data, OUTPUT=output, STEPS=4, STOP_STEP=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert steps(output) == [1, 2, 3, 4]
    assert [(run["step"], run["layout"]) for run in records(output, "run")] == [(0, "EP2 DP2"), (2, "TP2")]


def test_stages(data: Path, tmp_path: Path) -> None:
    """Pre-training, context extension and fine-tuning by one command; again, it has nothing left to do."""
    flags = ("--train-iters", 2, "--lr-warmup-iters", 0, "--log-interval", 1, "--eval-interval", 0)
    own = shutil.copytree(data, tmp_path / "data")  # it adds the conversations to them
    for words in ("stage answers: number 3 of 3", "nothing is left to do"):
        done = example("stages", *flags, "--output_dir", tmp_path / "run", DATA=own)
        assert done.returncode == 0, done.stdout + done.stderr
        assert words in done.stdout
    layouts = [
        records(tmp_path / "run" / stage, "run")[0]["layout"] for stage in ("pretrain", "extend", "answers")
    ]
    assert layouts == ["EP2 DP2", "TP2", "EP2 DP2"]


def test_own_data(corpus: Path, tmp_path: Path) -> None:
    mine = tmp_path / "corpus with a space"
    for source in ("code", "docs"):
        shutil.copytree(corpus / source, mine / source)
    done = example("own_data", mine, tmp_path / "data", *TINY, "--train-iters", 2, VOCAB_SIZE=1000)
    assert done.returncode == 0, done.stdout + done.stderr
    assert steps(tmp_path / "data" / "run") == [1, 2]
    assert list((tmp_path / "data" / "docs").glob("*.idx"))


@pytest.mark.parametrize(("name", "gpus"), [("one_gpu", 1), ("eight_gpus", 8)])
def test_the_commands_for_gpus_plan_a_run(name: str, gpus: int, tmp_path: Path) -> None:
    """What torchrun would start is planned for that many GPUs instead."""
    torchrun = tmp_path / "torchrun"
    torchrun.write_text(
        '#!/usr/bin/env bash\n[[ "$1 $2" == "--standalone --nproc-per-node" ]]\nprocesses=$3\nshift 3\n'
        'exec python "$@" --dry-run --world-size "$processes"\n'
    )
    torchrun.chmod(0o755)
    done = example(name, PATH=f"{tmp_path}:{ENVIRONMENT['PATH']}")
    assert done.returncode == 0, done.stderr
    assert f"{gpus} on cuda (nccl), bf16" in done.stdout
    assert f"DP {gpus}" in done.stdout


# ------------------------------------------------------------------ the demo judges itself


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("megads_demo", ROOT / "tools" / "demo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # A dataclass looks its module up.
    import sys

    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def good_run() -> list[dict[str, Any]]:
    """240 steps, stopped and resumed at 120, as a demo that works writes them."""
    start = {"kind": "run", "step": 0, "train_steps": 240, "vocab_size": 4096}
    train = [
        {"kind": "train", "step": step, "interval_steps": 10, "lm_loss": 4.5 + 3.5 * math.exp(-step / 60),
         "max_vio": 2.0 * math.exp(-step / 80)}
        for step in range(10, 250, 10)
    ]  # fmt: skip
    validation = [
        {"kind": "validation", "step": step, "loss": 6 - step / 200} for step in (60, 120, 180, 240)
    ]
    return [start, *train[:12], *validation[:2], {**start, "step": 120}, *train[12:], *validation[2:]]


def without(step: int) -> Callable[[list[dict[str, Any]]], None]:
    def remove(every: list[dict[str, Any]]) -> None:
        every[:] = [record for record in every if (record["kind"], record["step"]) != ("train", step)]

    return remove


def change(kind: str, first_step: int, **values: Any) -> Callable[[list[dict[str, Any]]], None]:
    def set_values(every: list[dict[str, Any]]) -> None:
        for record in every:
            if record["kind"] == kind and record["step"] >= first_step:
                record.update(values)

    return set_values


def test_a_good_run_passes_the_demo(demo: ModuleType) -> None:
    assert demo.judge(good_run(), 120) == []


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (change("run", 100, step=0), "resumed"),
        (change("run", 100, step=110), "resumed"),
        (without(130), "gaps"),
        (without(240), "last step"),
        (change("train", 20, lm_loss=7.9), "fell"),
        (change("train", 130, lm_loss=8.3), "jumped"),
        (change("validation", 240, loss=6.0), "validation loss"),
        (change("train", 20, max_vio=2.0), "balance"),
        (lambda every: every.__delitem__(slice(-4, None)), "last step"),
    ],
)
def test_the_demo_finds_what_went_wrong(
    demo: ModuleType, spoil: Callable[[list[dict[str, Any]]], None], word: str
) -> None:
    spoilt = good_run()
    spoil(spoilt)
    assert any(word in problem for problem in demo.judge(spoilt, 120)), demo.judge(spoilt, 120)


@pytest.mark.parametrize(
    ("gpus", "processes"), [(0, 2), (1, 1), (2, 2), (3, 2), (4, 4), (7, 4), (8, 8), (16, 8)]
)
def test_the_demo_uses_the_gpus_there_are(demo: ModuleType, gpus: int, processes: int) -> None:
    """Both layouts must be possible for that many processes: the dry run checks them."""
    plan = demo.plan_for(gpus)
    assert plan.processes == processes
    for flags in (plan.first, plan.second):
        config = ["--config", "configs/demo.json", "--dry-run", "--world-size", processes]
        done = run(["python", "pretrain_megads.py", *config, *flags])
        assert done.returncode == 0, done.stderr
