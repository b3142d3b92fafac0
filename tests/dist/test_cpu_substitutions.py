"""The CPU substitutions: nothing before they are asked for, refused where they do not belong."""

import contextlib
import importlib.metadata
import multiprocessing
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any
from unittest import mock

import pytest
import torch

from megads.errors import EnvironmentSetupError
from tests.dist.harness import run_distributed
from tests.waiting import LONGEST_SECONDS

FACTORIES: dict[str, tuple[Any, ...]] = {
    "arange": (3,), "as_tensor": ([1.0, 2.0],), "empty": (2, 3), "eye": (2,), "full": ((2,), 7.0),
    "linspace": (0, 1, 5), "ones": (2,), "rand": (2,), "randint": (5, (2,)), "randn": (2,), "randperm": (4,),
    "tensor": ([1.0, 2.0],), "zeros": (2,),
}  # fmt: skip
LIKE = ("empty_like", "full_like", "ones_like", "zeros_like")
TENSOR_METHODS = ("to", "cuda", "type", "record_stream", "new_empty", "new_full", "new_tensor", "new_zeros")
COLLECTIVES = ("all_to_all_single", "reduce_scatter_tensor", "all_gather_into_tensor")
CUDA_NAMES = (
    "current_device", "set_device", "synchronize", "Stream", "Event", "current_stream", "default_stream",
    "stream", "get_rng_state", "set_rng_state", "manual_seed",
)  # fmt: skip


def substituted_names() -> dict[str, Any]:
    """What the substitutions replace, as it is now."""
    import torch.distributed as dist

    owners: list[tuple[Any, tuple[str, ...]]] = [
        (torch, (*FACTORIES, *LIKE, "compile")),
        (torch.Tensor, TENSOR_METHODS),
        (dist, COLLECTIVES),
        (torch.cuda, CUDA_NAMES),
    ]
    return {f"{owner.__name__}.{name}": getattr(owner, name) for owner, names in owners for name in names}


def changed(before: dict[str, Any]) -> set[str]:
    return {name for name, now in substituted_names().items() if now is not before[name]}


# --- before they are installed: in an interpreter of its own ----------------------------------


def only_import() -> tuple[set[str], bool]:
    before = substituted_names()
    import megads.mcore.cpu  # noqa: F401

    return changed(before), "megatron.core" in sys.modules


def refuse(patches: dict[str, Any]) -> tuple[str, set[str]]:
    """The message of the refusal, and what has changed nevertheless."""
    from megads.mcore.cpu import install_cpu_substitutions

    before = substituted_names()
    with contextlib.ExitStack() as stack:
        for name, value in ({"torch.cuda.is_available": no} | patches).items():
            stack.enter_context(mock.patch(name, value))
        refused = stack.enter_context(pytest.raises(EnvironmentSetupError))
        install_cpu_substitutions()
    return str(refused.value), changed(before)


def yes() -> bool:
    return True


def no() -> bool:
    return False


def another_version(name: str) -> str:
    return "0.18.0"


def no_package(name: str) -> str:
    raise importlib.metadata.PackageNotFoundError(name)


def install_twice() -> tuple[set[str], set[str]]:
    """What the first call changes, and what the second one does."""
    from megads.mcore.cpu import install_cpu_substitutions

    before = substituted_names()
    with mock.patch("torch.cuda.is_available", no):
        install_cpu_substitutions()
        first, after_first = changed(before), substituted_names()
        install_cpu_substitutions()
    return first, changed(after_first)


@contextlib.contextmanager
def new_interpreter() -> Iterator[Callable[..., Any]]:
    """Calls functions in one interpreter that nothing else has used."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield lambda function, *args: pool.submit(function, *args).result(timeout=LONGEST_SECONDS)


@pytest.fixture(scope="module")
def fresh() -> Iterator[Callable[..., Any]]:
    """For what must leave the interpreter as it was."""
    with new_interpreter() as call:
        yield call


def test_importing_the_module_changes_nothing(fresh: Any) -> None:
    assert fresh(only_import) == (set(), False)


def test_a_machine_with_cuda_is_refused(fresh: Any) -> None:
    message, touched = fresh(refuse, {"torch.cuda.is_available": yes})
    assert "this machine has CUDA" in message
    assert "distributed.device=cuda" in message
    assert touched == set()


@pytest.mark.parametrize(
    ("version", "words"),
    [(another_version, "megatron-core 0.18.0 is installed"), (no_package, "not installed")],
)
def test_another_megatron_core_is_refused(fresh: Any, version: Any, words: str) -> None:
    message, touched = fresh(refuse, {"importlib.metadata.version": version})
    assert words in message
    assert "pip install megatron-core==0.19.2" in message
    assert touched == set()


def test_a_second_installation_changes_nothing() -> None:
    with new_interpreter() as call:
        first, second = call(install_twice)
    assert first == substituted_names().keys() - {"torch.compile"}
    assert second == set()


# --- once they are installed: in a worker -----------------------------------------------------


def devices_of_factories() -> dict[str, tuple[str, str]]:
    """Where each factory puts a tensor that asks for CUDA, by string and by device."""
    found = {}
    for name, args in FACTORIES.items():
        makers = [getattr(torch, name)(*args, device=d) for d in ("cuda", torch.device("cuda", 0))]
        found[name] = tuple(tensor.device.type for tensor in makers)
    for name in LIKE:
        args = (torch.ones(2), 3.0) if name == "full_like" else (torch.ones(2),)
        makers = [getattr(torch, name)(*args, device=d) for d in ("cuda:1", torch.device("cuda"))]
        found[name] = tuple(tensor.device.type for tensor in makers)
    return found


def test_factories_give_cpu_tensors() -> None:
    (found,) = run_distributed(1, devices_of_factories)
    assert found == dict.fromkeys((*FACTORIES, *LIKE), ("cpu", "cpu"))


def other_devices_stay() -> tuple[str, str, str]:
    return (
        torch.zeros(2, device="meta").device.type,
        torch.zeros(2).to("meta").device.type,
        torch.zeros(2, device=None).device.type,
    )


def test_other_devices_are_left_alone() -> None:
    assert run_distributed(1, other_devices_stay)[0] == ("meta", "meta", "cpu")


def move_tensors() -> dict[str, Any]:
    x = torch.arange(3.0)
    x.record_stream(torch.cuda.current_stream())
    moved = [
        x.to("cuda"),
        x.to(torch.device("cuda")),
        x.to(device="cuda"),
        x.cuda(),
        x.cuda(0, non_blocking=True),
    ]
    both = x.to("cuda", torch.float64)
    return {
        "same": [y is x for y in moved],
        "dtype": both.dtype,
        "device": both.device.type,
        "cast": x.to(torch.float16).dtype,
        "type": x.type(),
        "integer type": torch.arange(2).type(),
        "type cast": x.type(torch.int32).dtype,
        "module": torch.nn.Linear(2, 2).to("cuda").weight.device.type,
    }


def test_moves_to_cuda_keep_the_tensor() -> None:
    assert run_distributed(1, move_tensors)[0] == {
        "same": [True] * 5,
        "dtype": torch.float64,
        "device": "cpu",
        "cast": torch.float16,
        "type": "torch.cuda.FloatTensor",
        "integer type": "torch.cuda.LongTensor",
        "type cast": torch.int32,
        "module": "cpu",
    }


def use_streams() -> dict[str, Any]:
    side, event = torch.cuda.Stream(), torch.cuda.Event(enable_timing=True)
    torch.cuda.set_device(3)
    with torch.cuda.stream(side):
        event.record(side)
    event.wait()
    event.synchronize()
    side.wait_stream(torch.cuda.current_stream())
    side.wait_event(side.record_event())
    side.synchronize()
    torch.cuda.synchronize()
    return {
        "same": side == torch.cuda.current_stream() == torch.cuda.default_stream(),
        "one": len({side, torch.cuda.current_stream()}),
        "other": side == 0,
        "done": event.query(),
        "devices": placed_on_the_current_device(),
    }


def placed_on_the_current_device() -> set[str]:
    """Where tensors are that Megatron-Core makes for the current device, by its index or its name."""
    index = torch.cuda.current_device()
    x = torch.zeros(2, device=index)
    made = [x, x.to(index), x.new_empty(2, device=index), torch.ones(2).to(f"cuda:{index}")]
    return {tensor.device.type for tensor in made}


def test_there_is_one_stream_and_it_is_always_done() -> None:
    expected = {"same": True, "one": 1, "other": False, "done": True, "devices": {"cpu"}}
    assert run_distributed(1, use_streams)[0] == expected


def use_generators() -> list[bool]:
    from megatron.core.tensor_parallel import random

    torch.cuda.manual_seed(5)
    state = torch.cuda.get_rng_state()
    drawn = torch.rand(4)
    torch.cuda.set_rng_state(state)
    again = torch.rand(4)
    random._set_cuda_rng_state(state)
    through_megatron = torch.equal(random._get_cuda_rng_state(), state)
    tracker = random.CudaRNGStatesTracker()
    tracker.add("mine", 6)
    untouched = torch.equal(torch.get_rng_state(), state)
    with tracker.fork("mine"):
        forked = torch.rand(4)
    expected = torch.rand(4, generator=torch.Generator().manual_seed(6))
    return [
        torch.equal(drawn, again),
        through_megatron,
        untouched,
        torch.equal(forked, expected),
        torch.equal(torch.rand(4), drawn),
    ]


def test_the_cuda_generator_is_the_cpu_generator() -> None:
    assert run_distributed(1, use_generators)[0] == [True] * 5


def megatron_fsdp_calls(rank: int) -> tuple[list[float], list[float]]:
    """Its collectives as it makes them: together, and with named arguments."""
    import torch.distributed as dist

    group = dist.group.WORLD
    mine, gathered = torch.full((2,), float(rank)), [torch.empty(4), torch.empty(4)]
    with dist._coalescing_manager(group, async_ops=True) as event:
        for whole in gathered:
            dist.all_gather_into_tensor(output_tensor=whole, input_tensor=mine, group=group, async_op=True)
    event.wait()
    whole = torch.arange(4.0)
    part = whole[2 * rank : 2 * rank + 2]
    with dist._coalescing_manager(group):
        dist.reduce_scatter_tensor(output=part, input=whole, op=dist.ReduceOp.SUM, group=group)
    return (gathered[0] + gathered[1]).tolist(), part.tolist()


def communicate() -> dict[str, Any]:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    # Rank 0 keeps one row and sends two, rank 1 sends three and keeps none.
    sizes = torch.tensor([[1, 2], [3, 0]])
    rows = torch.full((3, 2), float(rank))
    received = torch.empty(int(sizes[:, rank].sum()), 2)
    dist.all_to_all_single(received, rows, sizes[:, rank], sizes[rank])
    even = torch.empty(2)
    dist.all_to_all_single(even, torch.tensor([10.0 * rank, 10.0 * rank + 1]))
    # The second half of a buffer that holds the whole: in place, and yet not alone.
    buffer = torch.tensor([1.0, 2.0]) + rank
    part = buffer[rank : rank + 1]
    dist.reduce_scatter_tensor(part, buffer)
    gathered = torch.empty(2)
    dist.all_gather_into_tensor(gathered, torch.tensor([float(rank)]))
    alone = [dist.new_group([one]) for one in range(2)][rank]
    x = torch.arange(3.0) + rank
    handles = [
        collective(x, x, group=alone, async_op=asynchronous)
        for collective in (dist.reduce_scatter_tensor, dist.all_gather_into_tensor)
        for asynchronous in (False, True)
    ]
    copied = torch.empty(3)
    dist.all_gather_into_tensor(copied, x, group=alone)
    return {
        "uneven": received[:, 0].tolist(),
        "even": even.tolist(),
        "reduced": part.tolist(),
        "gathered": gathered.tolist(),
        "alone": x.tolist(),
        "copied": copied.tolist(),
        "handles": [handle is None or (handle.wait() and handle.is_completed()) for handle in handles],
        "without handle": [handle is None for handle in handles],
        "by name": megatron_fsdp_calls(rank),
    }


def test_collectives() -> None:
    first, second = run_distributed(2, communicate)
    assert (first["uneven"], second["uneven"]) == ([0.0, 1.0, 1.0, 1.0], [0.0, 0.0])
    assert (first["even"], second["even"]) == ([0.0, 10.0], [1.0, 11.0])
    assert (first["reduced"], second["reduced"]) == ([3.0], [5.0])
    for rank, found in enumerate((first, second)):
        assert found["gathered"] == [0.0, 1.0]
        assert found["alone"] == found["copied"] == [rank, 1.0 + rank, 2.0 + rank]
        assert found["by name"] == ([0.0, 0.0, 2.0, 2.0], [4.0 * rank, 2.0 + 4.0 * rank])
        assert found["handles"] == [True] * 4
        assert found["without handle"] == [True, False, True, False]


def megatron_kernels() -> dict[str, Any]:
    from megatron.core.jit import jit_fuser
    from megatron.core.optimizer import clip_grads
    from megatron.core.tensor_parallel import layers

    def function(x: Any) -> Any:
        return x

    x, grad = torch.randn(4, 3), torch.randn(4, 2)
    main_grad = torch.ones(2, 3)
    layers.fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32(x, grad, main_grad)
    gradients = [torch.ones(2), torch.full((3,), 4.0)]
    scale = clip_grads.multi_tensor_scale_impl
    scale(65536, torch.zeros(1), [gradients, gradients], 0.25)
    with pytest.raises(AssertionError):
        scale(65536, torch.zeros(1), [gradients, [torch.ones(2), torch.ones(3)]], 0.25)
    return {
        "weight gradient": torch.allclose(main_grad, 1 + grad.T @ x),
        "scaled": [gradient.tolist() for gradient in gradients],
        "fuser": jit_fuser(function) is function,
        "compile": torch.compile.__module__,
    }


def test_kernels_of_megatron_core() -> None:
    """Weight gradients are added up, gradients are scaled in place, nothing is compiled."""
    found = run_distributed(1, megatron_kernels)[0]
    assert found["weight gradient"]
    assert found["scaled"] == [[0.25, 0.25], [1.0, 1.0, 1.0]]
    assert found["fuser"]
    assert found["compile"] == "torch"
