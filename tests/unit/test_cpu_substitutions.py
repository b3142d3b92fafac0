"""mcore/cpu.py: nothing at import, everything after the call, refusals where it must not act.

Each test runs in a process of its own, since the substitutions stay for the rest of a process.
"""

import subprocess
import sys

import pytest


def run(program: str) -> None:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_importing_it_changes_nothing() -> None:
    run("""
import torch, torch.distributed as dist
names = [(torch, "zeros"), (torch.Tensor, "to"), (torch.Tensor, "type"), (torch.cuda, "current_device"),
         (torch.cuda, "Stream"), (dist, "all_to_all_single"), (dist, "reduce_scatter_tensor")]
before = [getattr(owner, name) for owner, name in names]
import megads.mcore.cpu
assert [getattr(owner, name) for owner, name in names] == before
""")


def test_after_the_call_cuda_means_the_cpu() -> None:
    run("""
import torch
compile_ = torch.compile
from megads.mcore.cpu import install_cpu_substitutions
install_cpu_substitutions()
zeros = torch.zeros
install_cpu_substitutions()
assert torch.zeros is zeros, "a second call wraps nothing again"
assert torch.compile is compile_, "only Megatron-Core's import goes without the compiler"

assert torch.zeros(2, device="cuda").device.type == "cpu"
assert torch.tensor([1.0], device=torch.device("cuda", 1)).device.type == "cpu"
assert torch.empty_like(torch.ones(2), device="cuda:0").device.type == "cpu"
assert torch.ones(2).to("cuda").device.type == "cpu"
assert torch.ones(2).to(device="cuda", dtype=torch.float64).dtype == torch.float64
assert torch.ones(2).to("meta").device.type == "meta", "other devices are left alone"
assert torch.zeros(2, device=torch.cuda.current_device()).cuda().device.type == "cpu"
assert torch.ones(2).type() == "torch.cuda.FloatTensor"
assert torch.ones(2).type(torch.int32).dtype == torch.int32
assert torch.cuda.Stream() == torch.cuda.current_stream()
event = torch.cuda.current_stream().record_event()
with torch.cuda.stream(torch.cuda.Stream()):
    event.wait()
    torch.cuda.synchronize()
state = torch.cuda.get_rng_state()
first = torch.rand(3)
torch.cuda.set_rng_state(state)
assert torch.equal(torch.rand(3), first), "CUDA's generator is the CPU's"

from megatron.core.jit import jit_fuser
assert jit_fuser(len) is len
from megatron.core.optimizer import clip_grads
grads = [torch.ones(3), torch.ones(2, 2)]
clip_grads.multi_tensor_scale_impl(0, None, [grads, grads], 0.5)
assert all(bool((grad == 0.5).all()) for grad in grads)
from megatron.core.tensor_parallel import layers
main_grad, x, grad = torch.ones(4, 3), torch.randn(5, 3), torch.randn(5, 4)
layers.fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32(x, grad, main_grad)
torch.testing.assert_close(main_grad, 1 + grad.t() @ x)
""")


def test_collectives_of_one_process() -> None:
    run("""
import os, tempfile, torch, torch.distributed as dist
from megads.mcore.cpu import install_cpu_substitutions
install_cpu_substitutions()
dist.init_process_group("gloo", init_method="file://" + tempfile.mktemp(), rank=0, world_size=1)
x = torch.arange(4.0)
assert dist.reduce_scatter_tensor(x, x, async_op=True).wait()
assert dist.all_gather_into_tensor(x, x) is None
assert x.tolist() == [0, 1, 2, 3]
copy = torch.empty(4)
dist.all_gather_into_tensor(copy, x)
assert copy.tolist() == x.tolist(), "into another tensor it still copies"
dist.all_to_all_single(copy, x + 1, torch.tensor([4]), torch.tensor([4]))
assert copy.tolist() == [1, 2, 3, 4], "split sizes may be tensors"
""")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        ("torch.cuda.is_available = lambda: True", "CUDA_VISIBLE_DEVICES"),
        ("importlib.metadata.version = lambda name: '0.18.0'", "0.18.0 is installed"),
    ],
)
def test_it_refuses(spoil: str, words: str) -> None:
    run(f"""
import importlib.metadata, torch
from megads.errors import EnvironmentSetupError
from megads.mcore.cpu import install_cpu_substitutions
{spoil}
zeros = torch.zeros
try:
    install_cpu_substitutions()
except EnvironmentSetupError as error:
    assert {words!r} in str(error), error
else:
    raise AssertionError("it did not refuse")
assert torch.zeros is zeros
""")
