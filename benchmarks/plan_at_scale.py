"""DeepSeek-V3 on 2,048 GPUs by layout, as the planner predicts it: speed, memory, and what a GPU sends.

    python benchmarks/plan_at_scale.py [--gpu h800 h200]

Prints a Markdown table per GPU. tokens/s are per GPU; "hidden" is the same step if all expert exchange hid
behind computation, as DeepEP and DualPipe want it: the truth lies between the two. Bytes are those that a
GPU of the busiest stage receives per optimizer step, those of its own node over NVLink, of others over the
network; pipeline stages get hidden states and their gradients over the network. The model is
`megads/plan/speed.py`, and what V3 recomputed are norms and up-projections (section 3.2.3).
"""

import argparse
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megads.config.flops import count_parameters
from megads.config.loader import load_config
from megads.config.resolve import Resolved, resolve
from megads.config.schema import Config
from megads.config.validate import check
from megads.plan.activations import SavedActivations
from megads.plan.hardware import GPUS, Gpu
from megads.plan.memory import memory_by_stage, micro_batches_per_step
from megads.plan.speed import LINK_EFFICIENCY, OVERLAP, ModelFlops, SpeedModel, StepTime

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "deepseek_v3_671b.json"
PROCESSES = 2048
GIB, GB = 2**30, 1e9
TP, EP = "distributed.tensor_parallel_size", "distributed.expert_parallel_size"
RECOMPUTE = "training.gradient_checkpointing"
FP8 = {"training.use_fp8": True}

MOE_TOO = {RECOMPUTE: "selective", "training.recompute_modules": ["mla_up_proj", "layernorm", "moe"]}

# Beside configs/deepseek_v3_671b.json: TP 1, PP 16, EP 64, full recomputation, BF16.
LAYOUTS: dict[str, dict[str, Any]] = {
    "as shipped": {},
    "FP8, MoE layers and what V3 recomputed": FP8 | MOE_TOO,
    "FP8, what V3 recomputed": FP8 | {RECOMPUTE: "selective"},
    "experts inside a node": {EP: 8},
    "experts inside a node, FP8": FP8 | {EP: 8},
    "TP 4, nothing recomputed": {TP: 4, EP: 8, RECOMPUTE: False},
    "TP 2, FP8, what V3 recomputed": FP8 | {TP: 2, EP: 8, RECOMPUTE: "selective"},
}
EXCHANGES = ("tensor_parallel", "expert_parallel", "data_parallel")


@dataclass(frozen=True)
class Prediction:
    """One layout on one GPU; bytes per optimizer step and GPU, `in_node` and `between_nodes` by exchange."""

    config: Config
    resolved: Resolved
    step: StepTime
    heaviest_bytes: int
    in_node: dict[str, float]
    between_nodes: dict[str, float]

    @property
    def hidden_tokens_per_second(self) -> float:
        """If the expert exchange took no time of its own, in pipeline bubbles neither."""
        seconds, exchange = self.step.by_cause(), self.step.expert_parallel
        working = sum(seconds.values()) - seconds["bubble"]
        stretched = seconds["bubble"] * (working - exchange) / working
        return self.step.tokens_per_gpu / (working - exchange + stretched)


def predict(settings: dict[str, Any], gpu: Gpu) -> Prediction:
    """DeepSeek-V3 on `PROCESSES` GPUs with `settings` on top of the shipped configuration."""
    config = load_config(CONFIG, settings)
    check(config, PROCESSES, True)
    resolved = resolve(config, PROCESSES, True)
    saved, model = SavedActivations(config, resolved), ModelFlops.of(config)
    pipeline = _pipeline_bytes(config, resolved, saved)
    # A link of one byte per second takes as many seconds as it carries bytes.
    in_node = replace(gpu, node_link_bytes_per_second=1.0, network_link_bytes_per_second=math.inf)
    between = replace(gpu, node_link_bytes_per_second=math.inf, network_link_bytes_per_second=1.0)
    return Prediction(
        config=config,
        resolved=resolved,
        step=SpeedModel(saved, gpu, model).step(),
        heaviest_bytes=max(stage.total for stage in memory_by_stage(config, resolved)),
        in_node=_bytes(SpeedModel(saved, in_node, model).step(), config),
        between_nodes=_bytes(SpeedModel(saved, between, model).step(), config) | {"pipeline": pipeline},
    )


def _bytes(step: StepTime, config: Config) -> dict[str, float]:
    hidden = OVERLAP if config.distributed.overlap_grad_reduce else 0.0
    found = {exchange: getattr(step, exchange) * LINK_EFFICIENCY for exchange in EXCHANGES}
    return found | {"data_parallel": found["data_parallel"] / (1 - hidden)}


def _pipeline_bytes(config: Config, resolved: Resolved, saved: SavedActivations) -> float:
    """A middle stage receives hidden states from one neighbour and their gradients from the other."""
    if resolved.pp == 1:
        return 0.0
    return 2.0 * micro_batches_per_step(config, resolved) * saved.hidden_bytes


def rows(gpu: Gpu) -> list[list[str]]:
    """The table of one GPU; the first row is the heading."""
    found = [
        [
            "TP 1, PP 16, EP 64, BF16, but for", "GiB", "tokens/s", "MFU", "hidden",
            "NVLink: TP / EP / DP, GB", "network: EP / DP / PP, GB",
        ]
    ]  # fmt: skip
    for name, settings in LAYOUTS.items():
        plan = predict(settings, gpu)
        inside, between = plan.in_node, plan.between_nodes
        gib, fits = plan.heaviest_bytes / GIB, plan.heaviest_bytes <= gpu.memory_bytes
        row = [
            name,
            f"{gib:.1f}" if fits else f"{gib:.1f}: too much",
            f"{plan.step.tokens_per_second_per_gpu:,.0f}",
            f"{plan.step.mfu:.1%}",
            f"{plan.hidden_tokens_per_second:,.0f}",
            _gigabytes(inside, EXCHANGES),
            _gigabytes(between, ("expert_parallel", "data_parallel", "pipeline")),
        ]
        found.append(row)
    return found


def _gigabytes(sizes: dict[str, float], names: tuple[str, ...]) -> str:
    return " / ".join(f"{sizes[name] / GB:,.0f}" for name in names)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpu", nargs="+", choices=GPUS, default=["h800", "h200"])
    for name in parser.parse_args().gpu:
        gpu = GPUS[name]
        parameters = count_parameters(load_config(CONFIG)).total / 1e9
        print(f"\n{PROCESSES:,} x {name.upper()}, {gpu.memory_bytes / GIB:.1f} GiB; {parameters:.0f}B\n")
        (headings, *lines) = rows(gpu)
        print(f"| {' | '.join(headings)} |\n|{'---|' * len(headings)}")
        for line in lines:
            print(f"| {' | '.join(line)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
