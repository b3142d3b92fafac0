"""Training on a real GPU; every test skips itself where there is none.

Not yet seen running: no GPU was at hand when this was written.
"""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.dist import tiny

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

STEPS = 30
# In a process of its own: this one may have Megatron-Core's CPU substitutions installed.
PROGRAM = """
import json, sys
from tests.dist import tiny
bf16, steps = json.loads(sys.argv[1])
step = tiny.start({"distributed.device": "cuda", "training.use_bf16": bf16})
losses = []
for _ in range(steps):
    parts = tiny.micro_batches(step, tiny.global_batch(0))
    result = step.train(iter(parts), len(parts), tiny.scalars(step))
    losses.append(float(result.loss_sums[0] / result.token_counts[0]))
print(json.dumps(losses))
"""


@pytest.mark.parametrize("bf16", [True, False])
def test_a_batch_is_learned(bf16: bool) -> None:
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", PROGRAM, json.dumps([bf16, STEPS])]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    losses = json.loads(done.stdout.splitlines()[-1])
    assert losses[0] == pytest.approx(math.log(tiny.VOCABULARY), rel=0.3)
    assert losses[-1] < 0.7 * losses[0]
