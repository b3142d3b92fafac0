"""Balancing at work: MaxVio of a small MoE with a skewed start, with and without the router's bias.

    python benchmarks/balancing.py [--steps 160] [--json FILE] [--figure FILE]

Both runs begin with the same weights, two of 16 experts preferred by every router, and read the same
samples of a text that is made here. There is no other balancing: no auxiliary loss, no noise, no capacity.
MaxVio (arXiv:2408.15664, eq. 4) is the load of the busiest expert over the mean, minus 1, on the global
batch; here its mean over the MoE layers.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from megads.config.loader import load_config  # noqa: E402
from megads.config.resolve import resolve  # noqa: E402
from megads.config.scalars import Schedules  # noqa: E402
from megads.mcore.compat import quiet_megatron  # noqa: E402
from megads.mcore.groups import (  # noqa: E402
    destroy_process_groups,
    initialize_device,
    initialize_process_groups,
)

quiet_megatron()

from megads.train.step import TrainingStep  # noqa: E402

VOCABULARY, SEQ_LENGTH, BATCH, PREFERRED = 512, 64, 32, 2
SETTINGS: dict[str, Any] = {
    "model.num_layers": 3,
    "model.vocab_size": VOCABULARY,
    "model.init_method_std": 0.03,
    "model.first_k_dense_replace": 1,
    "model.mla.d_model": 64,
    "model.mla.d_latent": 32,
    "model.mla.num_heads": 2,
    "model.mla.qk_nope_head_dim": 32,
    "model.mla.qk_rope_head_dim": 16,
    "model.mla.v_head_dim": 32,
    "model.mla.max_context_length": SEQ_LENGTH,
    "model.moe.num_experts": 16,
    "model.moe.num_experts_per_token": 2,
    "model.moe.expert_intermediate_size": 64,
    "model.moe.num_shared_experts": 1,
    "model.moe.balance_loss_type": "none",
    "training.seq_length": SEQ_LENGTH,
    "training.global_batch_size": BATCH,
    "training.micro_batch_size": BATCH,
    "training.learning_rate": 1e-3,
    "training.lr_warmup_steps": 10,
    "distributed.device": "cpu",
    "data.sources": [{"name": "made here", "path": "-"}],
}
WITH_BIAS = {"model.moe.use_aux_loss_free": True, "model.moe.bias_update_rate": 0.015}


def text_batches(seed: int) -> Iterator[dict[str, Tensor]]:
    """A Markov chain of tokens [BATCH, SEQ_LENGTH]: each is followed by one of four, the likelier first."""
    generator = torch.Generator().manual_seed(seed)
    followers = torch.randint(0, VOCABULARY, (VOCABULARY, 4), generator=generator)
    likelihood = torch.tensor([0.5, 0.25, 0.15, 0.1])
    shape = (BATCH, SEQ_LENGTH)
    while True:
        text = [torch.randint(0, VOCABULARY, (BATCH,), generator=generator)]
        for _ in range(SEQ_LENGTH):
            choice = torch.multinomial(likelihood, BATCH, replacement=True, generator=generator)
            text.append(followers[text[-1], choice])
        tokens = torch.stack(text, dim=1)
        yield {
            "tokens": tokens[:, :-1],
            "labels": tokens[:, 1:],
            "loss_mask": torch.ones(shape),
            "position_ids": torch.arange(SEQ_LENGTH).expand(shape),
            "document_ids": torch.zeros(shape, dtype=torch.long),
        }


@torch.no_grad()
def skew(step: TrainingStep) -> None:
    """Let every router prefer the first experts: what all tokens have in common speaks for them.

    Hidden states at the start have little in common, so every embedding gets the same direction on top.
    """
    for name, parameter in step.chunks[0].named_parameters():
        if name.endswith("word_embeddings.weight"):
            parameter += parameter.std()
    for router in step.routers:
        router.weight[:PREFERRED] += 3 * router.weight.std()
    step.optimizer.reload_model_params()


def max_vio(loads_LE: Tensor) -> float:
    """Mean over the layers."""
    return float((loads_LE.amax(dim=-1) / loads_LE.mean(dim=-1) - 1).mean())


def run(settings: dict[str, Any], steps: int) -> dict[str, list[float]]:
    """MaxVio and loss of every step."""
    config = load_config(None, SETTINGS | settings | {"training.train_steps": steps})
    resolved = resolve(config, 1, cuda=False)
    initialize_device(resolved.device)
    initialize_process_groups(resolved, timeout_minutes=2, seed=config.seed)
    step, schedules = TrainingStep(config, resolved), Schedules(config, resolved)
    skew(step)
    batches = text_batches(seed=0)
    measured: dict[str, list[float]] = {"max_vio": [], "loss": []}
    for number in range(steps):
        _, scalars = schedules.at(number * BATCH * SEQ_LENGTH)
        result = step.train(batches, 1, scalars)
        assert result.applied
        measured["max_vio"].append(max_vio(result.loads))
        measured["loss"].append(float(result.loss_sums[0] / result.token_counts[0]))
    destroy_process_groups()
    return measured


def draw(runs: dict[str, dict[str, list[float]]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), dpi=144, layout="constrained")
    for axes, name, label in zip(
        figure.subplots(1, 2), ("max_vio", "loss"), ("MaxVio, mean of the layers", "loss"), strict=True
    ):
        for (title, measured), color in zip(runs.items(), ("#1f5fa8", "#d1495b"), strict=True):
            axes.plot(range(1, len(measured[name]) + 1), measured[name], color=color, label=title)
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e5e7eb", linewidth=0.8)
        axes.set_ylim(bottom=0 if name == "max_vio" else None)
    figure.axes[0].axhline(0.5, color="#6b7280", linewidth=0.8, linestyle="--")
    figure.axes[0].legend(frameon=False)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    runs = {
        "with the bias": run(WITH_BIAS, options.steps),
        "without": run({}, options.steps),
    }
    print(f"{'':14} {'MaxVio at the start':>20} {'in the last tenth':>18} {'loss at the end':>16}")
    for title, measured in runs.items():
        last = measured["max_vio"][-max(1, options.steps // 10) :]
        end = sum(last) / len(last)
        print(f"{title:14} {measured['max_vio'][0]:>20.2f} {end:>18.2f} {measured['loss'][-1]:>16.3f}")
    if options.json:
        options.json.write_text(json.dumps(runs) + "\n", encoding="utf-8")
    if options.figure:
        draw(runs, options.figure)


if __name__ == "__main__":
    main()
