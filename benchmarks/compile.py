"""What torch.compile would gain: elementwise groups of the model, as they run now and compiled, in one run.

    python benchmarks/compile.py [--rounds 7] [--group NAME ...] [--json FILE]

Each group is a forward and a backward pass at a model's widths: on a CPU those of train_cpu.py's small-1024
shape in FP32 on one thread, on CUDA those of DeepSeek-V3 in BF16. "now" is what the model runs there
without a kernel of `megads/mcore/fusions.py`, "compiled" is torch.compile of the plain formula, which it may
fuse as it likes.

Both take turns, each for the same number of calls per round, and medians of rounds are compared: the wall
clock (on CUDA time by events), and the process's CPU seconds, which a busy machine changes little. The first
call, which compiles, is measured apart, with nothing cached on disk and the compiler already imported. Routed
experts get another number of tokens in every call, as in training, so theirs is compiled for any number.
"""

import os

os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # so that its work counts as this process's

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from megads.command_line import run_tool
from megads.config.schema import MLA, MoE
from megads.model.functional import cross_entropy, rms_norm, swiglu
from megads.model.mla import assemble_heads
from megads.model.rope import rotary_table
from megads.model.router import choose_experts, gates_of, scores_of

Pass = Callable[..., Tensor | tuple[Tensor, ...]]
EPS = 1e-6


@dataclass(frozen=True)
class Sizes:
    """Widths of a model, tokens of a micro-batch, tokens whose logits exist at a time."""

    tokens: int
    hidden: int
    heads: int
    nope: int
    rope: int
    value: int
    expert_width: int
    experts: int
    groups: int
    chosen_groups: int
    per_token: int
    vocabulary: int
    loss_chunk: int


SIZES = {
    "cpu": Sizes(1024, 512, 8, 64, 32, 64, 512, 16, 4, 2, 2, 8192, 256),
    "cuda": Sizes(4096, 7168, 128, 128, 64, 128, 2048, 256, 8, 4, 8, 129280, 1024),
}


@dataclass(frozen=True)
class Group:
    """A part of the model: ways to compute it, and its inputs, of which each call takes the next.

    Inputs that require gradients get them; `dynamic`: their first dimension changes.
    """

    ways: dict[str, Pass]
    inputs: Sequence[tuple[Tensor, ...]]
    dynamic: bool = False


@dataclass(frozen=True)
class Measured:
    """Seconds are of one call, forward and backward, medians over rounds; of the first call, its own."""

    group: str
    way: str
    seconds: float
    cpu_seconds: float
    first_seconds: float
    first_cpu_seconds: float
    calls: int


# --- the groups -------------------------------------------------------------------------------


def _norm(sizes: Sizes, like: Tensor) -> Group:
    def plain(x: Tensor, weight: Tensor) -> Tensor:
        exact = x.float()
        return (exact * (exact.square().mean(-1, keepdim=True) + EPS).rsqrt()).to(x.dtype) * weight

    inputs = _leaf(like, sizes.tokens, 1, sizes.hidden), _leaf(like, sizes.hidden)
    return Group({"now": lambda x, weight: rms_norm(x, weight, EPS), "compiled": plain}, [inputs])


def _experts(sizes: Sizes, like: Tensor) -> Group:
    def plain(gate_up: Tensor, gates: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return (F.silu(gate.float()) * up * gates.unsqueeze(-1)).to(gate_up.dtype)

    slots = sizes.tokens * sizes.per_token
    inputs = [
        (_leaf(like, count, 2 * sizes.expert_width), _leaf(like.float(), count))
        for count in (slots - 64, slots, slots + 32)
    ]
    return Group({"now": swiglu, "compiled": plain}, inputs, dynamic=True)


def _rope(sizes: Sizes, like: Tensor) -> Group:
    positions = torch.arange(sizes.tokens, device=like.device).unsqueeze(1)
    table = rotary_table(MLA(), sizes.rope, positions)

    def now(q: Tensor, kv: Tensor, rope_key: Tensor) -> tuple[Tensor, ...]:
        return assemble_heads(q, kv, rope_key, table, table, sizes.value)

    inputs = (
        _leaf(like, sizes.tokens, 1, sizes.heads, sizes.nope + sizes.rope),
        _leaf(like, sizes.tokens, 1, sizes.heads, sizes.nope + sizes.value),
        _leaf(like, sizes.tokens, 1, sizes.rope),
    )
    return Group({"now": now, "compiled": now}, [inputs])


def _router(sizes: Sizes, like: Tensor) -> Group:
    moe = MoE(
        num_experts=sizes.experts,
        num_experts_per_token=sizes.per_token,
        n_group=sizes.groups,
        topk_group=sizes.chosen_groups,
        scoring_func="sigmoid",
    )
    bias = torch.randn(sizes.experts, device=like.device) * 0.01

    def now(logits: Tensor) -> Tensor:
        scores = scores_of(logits, moe.scoring_func)
        with torch.no_grad():
            experts = choose_experts(scores + bias, moe)
        gates = gates_of(scores.gather(-1, experts), moe)
        return torch.zeros_like(scores).scatter(-1, experts, gates)

    return Group({"now": now, "compiled": now}, [(_leaf(like.float(), sizes.tokens, sizes.experts),)])


def _loss(sizes: Sizes, like: Tensor) -> Group:
    labels = torch.randint(sizes.vocabulary, (sizes.loss_chunk,), device=like.device)

    def now(logits: Tensor) -> Tensor:
        # It overwrites its input: a copy stands for the logits that a product would have made.
        return cross_entropy(logits.float() if logits.dtype != torch.float32 else logits + 0, labels)

    def plain(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), labels, reduction="none")

    inputs = (_leaf(like, sizes.loss_chunk, sizes.vocabulary),)
    return Group({"now": now, "compiled": plain}, [inputs])


GROUPS = {
    "RMSNorm": _norm,
    "SwiGLU with gates": _experts,
    "RoPE and heads": _rope,
    "router": _router,
    "loss of a chunk": _loss,
}


def _leaf(like: Tensor, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=like.dtype, device=like.device).requires_grad_()


# --- measuring --------------------------------------------------------------------------------


def _call(way: Pass, inputs: tuple[Tensor, ...]) -> None:
    """Forward and backward; gradients of the outputs are the outputs, which makes all of them matter."""
    outputs = way(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.grad(outputs, inputs, [output.detach() for output in outputs])


def _cpu_seconds() -> float:
    """Of this process, and of compilers that it has started and that have ended."""
    times = os.times()
    return time.process_time() + times.children_user + times.children_system


def _seconds(way: Pass, batches: Iterator[tuple[Tensor, ...]], calls: int, cuda: bool) -> tuple[float, float]:
    """(elapsed, CPU) seconds of some calls: elapsed by events on CUDA."""
    before, begin = _cpu_seconds(), time.perf_counter()
    if cuda:
        started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        started.record()
    for _ in range(calls):
        _call(way, next(batches))
    if cuda:
        ended.record()
        ended.synchronize()
        return started.elapsed_time(ended) / 1e3, _cpu_seconds() - before
    return time.perf_counter() - begin, _cpu_seconds() - before


def measure(name: str, group: Group, rounds: int, round_seconds: float, cuda: bool) -> list[Measured]:
    """Every way of a group: its first call, then rounds in which all take turns."""
    ways = {
        way: torch.compile(function, dynamic=True if group.dynamic else None) if way != "now" else function
        for way, function in group.ways.items()
    }
    batches = itertools.cycle(group.inputs)
    first = {way: _seconds(function, batches, 1, cuda) for way, function in ways.items()}
    for function in ways.values():
        _seconds(function, batches, 2 * len(group.inputs), cuda)
    calls = max(3, round(round_seconds / (_seconds(ways["now"], batches, 3, cuda)[0] / 3)))
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for number in range(rounds):
        order = list(ways) if number % 2 == 0 else list(reversed(ways))
        for way in order:
            found[way].append(_seconds(ways[way], batches, calls, cuda))
    results = []
    for way in ways:
        elapsed, cpu = (statistics.median(column) / calls for column in zip(*found[way], strict=True))
        results.append(Measured(name, way, elapsed, cpu, *first[way], calls))
    return results


def rows_of(results: list[Measured], cuda: bool) -> Iterator[list[str]]:
    """A row per group: times, their ratio, and after how many calls compiling has paid.

    That is counted in CPU seconds on a CPU, in elapsed ones on CUDA.
    """
    for name, group in itertools.groupby(results, key=lambda result: result.group):
        now, compiled = group
        cost = compiled.first_seconds if cuda else compiled.first_cpu_seconds
        saved = now.seconds - compiled.seconds if cuda else now.cpu_seconds - compiled.cpu_seconds
        yield [
            name,
            f"{now.seconds * 1e3:.3f} ({now.cpu_seconds * 1e3:.3f})",
            f"{compiled.seconds * 1e3:.3f} ({compiled.cpu_seconds * 1e3:.3f})",
            f"{now.seconds / compiled.seconds:.2f} ({now.cpu_seconds / compiled.cpu_seconds:.2f})",
            f"{compiled.first_seconds:.1f} ({compiled.first_cpu_seconds:.1f})",
            f"{cost / saved:,.0f} calls" if saved > 0 else "never",
        ]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--group", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--round-seconds", type=float, default=0.5, help="of each way in each round")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    torch.manual_seed(1)
    like = torch.empty(0, device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    begin, before = time.perf_counter(), _cpu_seconds()
    torch.compile(torch.sin)(torch.zeros(8, device=device))
    print(f"compiler started in {time.perf_counter() - begin:.1f} s, CPU {_cpu_seconds() - before:.1f} s")
    results: list[Measured] = []
    for name in options.group:
        group = GROUPS[name](SIZES[device], like)
        results += measure(name, group, options.rounds, options.round_seconds, device == "cuda")
    table = Table(title="one call, forward and backward: elapsed (CPU) milliseconds")
    for heading in (
        "group", "now", "compiled", "times as fast", "first call, s", "won back after"
    ):  # fmt: skip
        table.add_column(heading)
    for row in rows_of(results, device == "cuda"):
        table.add_row(*row)
    Console(width=110).print(table)
    if options.json is not None:
        options.json.write_text(
            json.dumps([asdict(result) for result in results], indent=2), encoding="utf-8"
        )
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
