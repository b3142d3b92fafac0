"""One contender in one precision, in this process: builds it, trains a few steps, measures them.

    python -m gpu_training.variant JSON

`train_gpu.py` starts one such process for each variant and round, so that each begins with an empty device
and none can take another one down. The last line of its output is the result as JSON.
"""

import json
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from gpu_training.contenders import SETTINGS, Contender, Step, build_contender
from gpu_training.kernels import seconds_by_group
from gpu_training.shapes import SHAPES, Overrides, planned_tensor_bytes, resolved_on, slice_config
from gpu_training.stopwatch import PHASES, Stopwatch
from megads.config.flops import count_parameters, training_flops_per_token
from megads.config.schema import Config
from megads.errors import MegadsError
from megads.plan.hardware import GPUS

WARM_UP_STEPS, PROFILED_STEPS = 3, 2
# Of a CPU's slice: any number that lets the tiny shape pass.
CPU_MEMORY_BYTES = GPUS["h200"].memory_bytes
ZIPF_OFFSET = 2.7


@dataclass(frozen=True)
class Job:
    """What a process is asked for; `changes` are settings of the user's that win over the slice's."""

    shape: str
    contender: str
    precision: str
    device: str
    steps: int
    micro_batches: int
    profiled: bool
    changes: Overrides


@dataclass(frozen=True)
class Measured:
    """What it found. Lists are by step, `phases` and `kernels` seconds per step, the latter only if profiled.

    `max_vio` is the mean over MoE layers of the largest load of an expert over the mean one, minus 1, and
    `peak_flops_per_second` what 100% utilization is. Bytes are None on a CPU.
    """

    about: str
    device: str
    parameters: int
    layers: int
    tokens_per_step: int
    flops_per_token: float
    flops_per_token_whole_square: float
    peak_flops_per_second: float
    planned_bytes: int
    seconds: list[float]
    losses: list[float]
    phases: dict[str, float]
    kernels: dict[str, float]
    peak_allocated_bytes: int | None
    peak_reserved_bytes: int | None
    max_vio: float


def measure(job: Job) -> Measured:
    """Build, warm up, time `job.steps` steps, and profile a few more.

    Raises:
        EnvironmentSetupError, ConfigError: the contender cannot train this slice here.
    """
    from megads.train.matmul_rate import peak_rate

    cuda = job.device == "cuda"
    memory = torch.cuda.get_device_properties(0).total_memory if cuda else CPU_MEMORY_BYTES
    changes = SETTINGS.get(job.contender, {}) | job.changes
    config = slice_config(SHAPES[job.shape], job.precision, job.device, memory, job.micro_batches, changes)
    watch = Stopwatch(cuda=cuda)
    contender = build_contender(job.contender, config, resolved_on(config), watch)
    batches = zipf_batches(config, WARM_UP_STEPS + job.steps + PROFILED_STEPS, job.micro_batches)
    max_vio = max_violation(contender, config, batches[0])
    for batch in batches[1:WARM_UP_STEPS]:
        contender.step(batch)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    timed = batches[WARM_UP_STEPS : WARM_UP_STEPS + job.steps]
    seconds, losses, phases = time_steps(contender.step, timed, watch, cuda)
    allocated = torch.cuda.max_memory_allocated() if cuda else None
    reserved = torch.cuda.max_memory_reserved() if cuda else None
    training = config.training
    return Measured(
        about=contender.about,
        device=torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads",
        parameters=count_parameters(config).total,
        layers=config.model.num_layers,
        tokens_per_step=training.global_batch_size * training.seq_length,
        flops_per_token=training_flops_per_token(config),
        flops_per_token_whole_square=training_flops_per_token(config, causal=False),
        peak_flops_per_second=peak_rate(job.device).flops_per_second,
        planned_bytes=planned_tensor_bytes(config),
        seconds=seconds,
        losses=losses,
        phases=phases,
        kernels=profiled(contender.step, batches[-PROFILED_STEPS:], cuda) if job.profiled else {},
        peak_allocated_bytes=allocated,
        peak_reserved_bytes=reserved,
        max_vio=max_vio,
    )


def zipf_batches(config: Config, steps: int, micro_batches: int) -> list[list[Tensor]]:
    """Micro-batches of tokens [B, S + 1] for each step, on the device; the same for every contender.

    Token r has a probability in proportion to 1 / (r + 2.7), as words of a language have by rank
    (Zipf-Mandelbrot): the router sees frequent tokens often, and its experts are loaded unevenly.
    """
    training = config.training
    weights = 1 / (torch.arange(config.model.vocab_size) + ZIPF_OFFSET)
    generator = torch.Generator().manual_seed(config.seed)
    shape = (micro_batches, training.micro_batch_size, training.seq_length + 1)
    count = shape[0] * shape[1] * shape[2]
    device = config.distributed.device
    return [
        list(torch.multinomial(weights, count, replacement=True, generator=generator).view(shape).to(device))
        for _ in range(steps)
    ]


def max_violation(contender: Contender, config: Config, batch: list[Tensor]) -> float:
    """MaxVio (arXiv:2408.15664) of one step, the mean over the MoE layers."""
    loads: dict[str, Tensor] = {}

    def count(name: str, output: Any) -> None:
        chosen = output[-1].detach()  # which experts: a map [T, E], or numbers [T, K]
        load = (
            chosen.sum(0)
            if chosen.dtype == torch.bool
            else torch.bincount(chosen.flatten(), minlength=config.model.moe.num_experts)
        )
        loads[name] = loads[name] + load if name in loads else load

    hooks = [
        module.register_forward_hook(lambda module, inputs, output, name=name: count(name, output))
        for name, module in contender.model.named_modules()
        if type(module).__name__.endswith("Router")
    ]
    contender.step(batch)
    for hook in hooks:
        hook.remove()
    per_layer = torch.stack(list(loads.values())).double()
    return float((per_layer.amax(1) / per_layer.mean(1) - 1).mean())


def time_steps(
    step: Step, batches: list[list[Tensor]], watch: Stopwatch, cuda: bool
) -> tuple[list[float], list[float], dict[str, float]]:
    """Seconds and loss of each step, mean seconds per step of each phase."""
    seconds, losses, phases = [], [], dict.fromkeys(PHASES, 0.0)
    for batch in batches:
        if cuda:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        watch.start()
        losses.append(step(batch))
        of_step = watch.seconds()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
        for phase, spent in of_step.items():
            phases[phase] += spent / len(batches)
    return seconds, losses, phases


def profiled(step: Step, batches: list[list[Tensor]], cuda: bool) -> dict[str, float]:
    """Seconds per step by group of kernels."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities, acc_events=True) as found:
        for batch in batches:
            step(batch)
        if cuda:
            torch.cuda.synchronize()
    return seconds_by_group(found, len(batches))


def main(argument: str) -> None:
    try:
        result = asdict(measure(Job(**json.loads(argument))))
    except MegadsError as error:
        result = {"problem": str(error)}
    except torch.OutOfMemoryError as error:
        result = {"problem": f"out of memory: {str(error).split('. ')[0]}"}
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
