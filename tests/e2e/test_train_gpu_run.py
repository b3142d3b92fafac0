"""The GPU benchmark as a whole, on a CPU with its tiny shape: results are written, refusals are told."""

import json
import subprocess
import sys
from pathlib import Path

from tests.e2e.commands import ROOT


def test_a_run_on_the_cpu_measures_megads_and_tells_why_the_others_cannot(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/train_gpu.py", "--shape", "tiny", "--device", "cpu"]
    command += ["--precision", "fp32", "--against", "stock", "--rounds", "1", "--steps", "2"]
    command += ["--micro-batches", "1", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    ours, stock = results["variants"]
    (only,) = ours["rounds"]
    assert len(only["seconds"]) == 2
    assert only["losses"][0] < 7.5  # of 1,024 tokens
    assert ours["tokens_per_second"] > 0
    assert sum(only["kernels"].values()) > 0
    assert only["kernels"]["grouped products"] > 0
    assert sum(only["phases"].values()) <= sum(only["seconds"]) / 2 * 1.01
    assert "Transformer Engine" in stock["problem"]
    assert "Transformer Engine" in done.stdout
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
    assert "| tiny | fp32 | megads |" in (tmp_path / "results.md").read_text()
