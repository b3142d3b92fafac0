"""Training speed on the CPU: MegaDS against transformers' DeepseekV3, side by side in one run.

    python benchmarks/train_cpu.py [--shape small] [--rounds 7] [--json FILE]

Both train the same shape on the same random tokens with AdamW and gradient clipping, in FP32 on all
cores: MegaDS through its own training step (Megatron-Core's schedule, data-parallel buffers, distributed
optimizer; bias balancing and the sequence loss on, which transformers does not have), transformers with
`loss.backward()`, and with the fastest of its expert implementations. MTP is off: transformers' model
does not train it.

Each contender has a process of its own, as its users run it: MegaDS keeps freed memory
(`megads/mcore/allocator.py`), which would otherwise help both. "+ our allocator setting" is transformers
with that setting, and shows how much of the difference is memory. Rounds alternate, so that noise of the
machine hits all; medians are compared. The share of the matmul rate is model FLOPs per second over that
of a large FP32 matmul in the same run.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from megads.config.flops import count_parameters, training_flops_per_token
from megads.config.loader import load_config
from megads.config.resolve import resolve
from megads.config.scalars import Schedules
from megads.config.schema import Config
from megads.mcore.allocator import keep_freed_memory
from megads.mcore.groups import initialize_device, initialize_process_groups

# Overrides of the defaults; the widths that are left out follow from these.
SHAPES: dict[str, dict[str, Any]] = {
    # configs/debug.json without MTP
    "debug": {
        "model.num_layers": 4, "model.vocab_size": 4096, "model.mla.d_model": 128, "model.mla.d_latent": 64,
        "model.mla.q_lora_rank": 64, "model.mla.num_heads": 4, "model.mla.qk_nope_head_dim": 32,
        "model.mla.qk_rope_head_dim": 16, "model.mla.v_head_dim": 32, "model.moe.num_experts": 8,
        "model.moe.expert_intermediate_size": 384, "training.seq_length": 256, "training.micro_batch_size": 4,
    },
    # configs/train_config_tiny.json without MTP, with the dense layer first, a q_lora_rank and
    # micro-batches of 2
    "tiny": {
        "model.num_layers": 4, "model.vocab_size": 32768, "model.mla.d_model": 512, "model.mla.d_latent": 128,
        "model.mla.q_lora_rank": 192, "model.mla.num_heads": 8, "model.moe.num_experts": 4,
        "model.moe.expert_intermediate_size": 3072, "training.seq_length": 512,
        "training.micro_batch_size": 2,
    },
    # wide enough that matrix products dominate
    "small-1024": {
        "model.num_layers": 4, "model.vocab_size": 8192, "model.mla.d_model": 512, "model.mla.d_latent": 128,
        "model.mla.q_lora_rank": 192, "model.mla.num_heads": 8, "model.mla.qk_nope_head_dim": 64,
        "model.mla.qk_rope_head_dim": 32, "model.mla.v_head_dim": 64, "model.moe.num_experts": 16,
        "model.moe.expert_intermediate_size": 512, "training.seq_length": 1024,
        "training.micro_batch_size": 2,
    },
    # DeepSeek-V2-Lite at its widths, cut to its dense layer and one MoE layer of 16 of its 64 experts
    "v2-lite-slice": {
        "model.num_layers": 2, "model.vocab_size": 8192, "model.intermediate_size": 10944,
        "model.mla.d_model": 2048, "model.mla.d_latent": 512, "model.mla.q_lora_rank": None,
        "model.mla.num_heads": 16, "model.mla.qk_nope_head_dim": 128, "model.mla.qk_rope_head_dim": 64,
        "model.mla.v_head_dim": 128, "model.moe.num_experts": 16, "model.moe.num_experts_per_token": 6,
        "model.moe.num_shared_experts": 2, "model.moe.expert_intermediate_size": 1408,
        "training.seq_length": 1024, "training.micro_batch_size": 1,
    },
}  # fmt: skip
SHAPES["small-512"] = SHAPES["small-1024"] | {"training.seq_length": 512, "training.micro_batch_size": 4}
COMMON = {
    "model.first_k_dense_replace": 1, "model.moe.num_experts_per_token": 2, "model.moe.num_shared_experts": 1,
    "model.moe.use_aux_loss_free": True, "model.init_method_std": 0.02, "distributed.device": "cpu",
    "training.train_steps": 1, "training.lr_warmup_steps": 0, "training.use_bf16": False,
    "training.lr_decay_style": "constant",
}  # fmt: skip
LARGE = "v2-lite-slice"  # not among the default ones: three processes of 5 GB, and a quarter of an hour
# Not "batched_mm": it copies the weights of each token's experts, tens of GB here.
EXPERTS = ("grouped_mm", "eager")

Step = Callable[[torch.Tensor], None]


def megads_step(config: Config) -> Step:
    """One optimizer step of MegaDS on a batch of tokens [B, S + 1]."""
    initialize_device("cpu")
    resolved = resolve(config, 1, False)
    initialize_process_groups(resolved, 10, config.seed)
    from megads.train.step import TrainingStep

    training = TrainingStep(config, resolved)
    _, scalars = Schedules(config, resolved).at(0)

    def step(tokens: torch.Tensor) -> None:
        inputs, labels = tokens[:, :-1], tokens[:, 1:]
        batch = {"tokens": inputs, "labels": labels, "loss_mask": torch.ones(inputs.shape)}
        training.train(iter([batch]), 1, scalars)

    return step


def transformers_step(config: Config, experts: str) -> Step:
    """One optimizer step of transformers' model of the same shape."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    model_, mla, moe, shape = (
        config.model,
        config.model.mla,
        config.model.moe,
        resolve(config, 1, False).shape,
    )
    model = DeepseekV3ForCausalLM(
        DeepseekV3Config(
            vocab_size=model_.vocab_size, hidden_size=mla.d_model, intermediate_size=shape.intermediate_size,
            moe_intermediate_size=moe.expert_intermediate_size, num_hidden_layers=model_.num_layers,
            num_attention_heads=mla.num_heads, num_key_value_heads=mla.num_heads,
            n_shared_experts=moe.num_shared_experts, n_routed_experts=moe.num_experts,
            routed_scaling_factor=moe.routed_scaling_factor, kv_lora_rank=mla.d_latent,
            q_lora_rank=mla.q_lora_rank, qk_rope_head_dim=shape.qk_rope_head_dim, v_head_dim=shape.v_head_dim,
            qk_nope_head_dim=shape.qk_nope_head_dim, n_group=1, topk_group=1,
            num_experts_per_tok=moe.num_experts_per_token, first_k_dense_replace=model_.first_k_dense_replace,
            max_position_embeddings=config.training.seq_length, use_cache=False,
        )
    ).float()  # fmt: skip
    model.set_experts_implementation(experts)
    expected, found = count_parameters(config).total, sum(p.numel() for p in model.parameters())
    assert found == expected, f"the models differ: {found} parameters against {expected}"
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=config.training.learning_rate,
        weight_decay=config.training.weight_decay,
        betas=(0.9, 0.95),
        fused=True,
    )

    def step(tokens: torch.Tensor) -> None:
        optimizer.zero_grad()
        logits = model(input_ids=tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.training.grad_clip)
        optimizer.step()

    return step


def seconds(step: Step, tokens: torch.Tensor, steps: int) -> float:
    """Mean seconds of `steps` steps."""
    start = time.perf_counter()
    for _ in range(steps):
        step(tokens)
    return (time.perf_counter() - start) / steps


def contend(config: Config, name: str, pipe: Connection) -> None:
    """A contender's process: seconds per step for each number of steps asked for, until the pipe ends."""
    torch.manual_seed(config.seed)
    training = config.training
    tokens = torch.randint(config.model.vocab_size, (training.micro_batch_size, training.seq_length + 1))
    if name == "MegaDS":
        step = megads_step(config)
    else:
        implementation, *tuned = name.split(" + ")
        if tuned:
            keep_freed_memory()
        step = transformers_step(config, implementation.partition(" ")[2])
    try:
        while True:
            pipe.send(seconds(step, tokens, pipe.recv()))
    except EOFError:
        pass


@contextmanager
def contender(config: Config, name: str) -> Iterator[Callable[[int], float]]:
    """Seconds per step of a contender, which idles between the calls."""
    context = multiprocessing.get_context("spawn")
    ours, its = context.Pipe()
    process = context.Process(target=contend, args=(config, name, its), daemon=True)
    process.start()
    its.close()

    def measure(steps: int) -> float:
        ours.send(steps)
        return float(ours.recv())

    measure(3)  # warm
    try:
        yield measure
    finally:
        ours.close()
        process.join()


def measure(config: Config, rounds: int, steps: int) -> dict[str, Any]:
    """Median seconds per step of each contender, their ratios and shares of the matmul rate."""
    from megads.train.matmul_rate import measure_matmul_rate

    training = config.training
    trials = {}
    for implementation in EXPERTS:
        with contender(config, f"transformers {implementation}") as run:
            trials[implementation] = statistics.median(run(1) for _ in range(3))
    fastest = f"transformers {min(trials, key=lambda name: trials[name])}"
    names = ("MegaDS", fastest, f"{fastest} + our allocator setting")
    times: dict[str, list[float]] = {name: [] for name in names}
    rates = []
    with ExitStack() as stack:
        contenders = {name: stack.enter_context(contender(config, name)) for name in names}
        for _ in range(rounds):
            for name, run in contenders.items():
                times[name].append(run(steps))
            rates.append(measure_matmul_rate("cpu", torch.float32))
    rate, per_step = statistics.median(rates), training.micro_batch_size * training.seq_length
    flops = training_flops_per_token(config) * per_step
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratios = {name: [b / a for a, b in zip(times["MegaDS"], times[name], strict=True)] for name in names[1:]}
    return {
        "parameters": count_parameters(config).total,
        "tokens_per_step": per_step,
        "threads": torch.get_num_threads(),
        "matmul_flops_per_second": rate,
        "seconds_per_step": medians,
        "tokens_per_second": {name: per_step / value for name, value in medians.items()},
        "share_of_matmul_rate": {name: flops / value / rate for name, value in medians.items()},
        "speedup": {name: medians[name] / medians["MegaDS"] for name in names[1:]},
        "speedup_range": {name: [min(values), max(values)] for name, values in ratios.items()},
    }


def show(shape: str, result: dict[str, Any]) -> None:
    title = (
        f"{shape}: {result['parameters'] / 1e6:.1f}M parameters, {result['threads']} threads, "
        f"matmul rate {result['matmul_flops_per_second'] / 1e9:.0f} GFLOP/s"
    )
    table = Table(title=title)
    for heading in ("", "ms/step", "tokens/s", "share of matmul rate", "MegaDS is faster by (rounds)"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, value in result["seconds_per_step"].items():
        faster = ""
        if name in result["speedup"]:
            low, high = result["speedup_range"][name]
            faster = f"{result['speedup'][name]:.2f}x ({low:.2f} to {high:.2f})"
        table.add_row(
            name,
            f"{1e3 * value:.1f}",
            f"{result['tokens_per_second'][name]:,.0f}",
            f"{result['share_of_matmul_rate'][name]:.1%}",
            faster,
        )
    Console().print(table)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, action="append", help=f"default: all but {LARGE}")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="steps per round")
    parser.add_argument("--json", help="write the results here")
    arguments = parser.parse_args()
    results = {}
    for shape in arguments.shape or [shape for shape in SHAPES if shape != LARGE]:
        overrides = {**COMMON, **SHAPES[shape]}
        overrides["training.global_batch_size"] = overrides["training.micro_batch_size"]
        overrides["model.mla.max_context_length"] = overrides["training.seq_length"]
        config = load_config(None, overrides)
        results[shape] = measure(config, arguments.rounds, arguments.steps)
        show(shape, results[shape])
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=2)
    return 0


if __name__ == "__main__":
    sys.exit(main())
