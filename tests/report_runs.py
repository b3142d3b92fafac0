"""Directories of runs that never were, with every field that records can have, for tests of the report."""

import json
import math
import random
from pathlib import Path
from typing import Any

import orjson

SOURCES = ("web", "code", "papers", "books", "wiki")
TOKENS_PER_STEP = 4_000_000


def train_record(step: int, steps: int, layers: int, noise: random.Random) -> dict[str, Any]:
    """A training record as a run writes it; the loss falls from 11 to about 2."""
    progress = step / steps
    loss = 1.9 + 9.1 * math.exp(-12 * progress) + noise.gauss(0, 0.03)
    uneven = 0.2 + 2.5 * math.exp(-20 * progress)
    tokens_per_second = 2.0e6 * (1 + noise.gauss(0, 0.01))
    return {
        "kind": "train",
        "step": step,
        "tokens": step * TOKENS_PER_STEP,
        "samples": step * 1000,
        "interval_steps": 10,
        "lm_loss": loss,
        "mtp_loss": loss + 0.5,
        "mtp_loss_1": loss + 0.4,
        "mtp_loss_2": loss + 0.6,
        "aux_loss": 1 + uneven / 10,
        "grad_norm": 0.3 + abs(noise.gauss(0, 0.1)),
        "param_norm": 900 + 200 * progress,
        "learning_rate": 2.2e-4 * min(1, step / 2000) * (1 - 0.9 * progress),
        "weight_decay": 0.1,
        "mtp_loss_weight": 0.3 if progress < 0.67 else 0.1,
        "bias_update_rate": 1e-3,
        "aux_loss_weight": 1e-4,
        "router_temperature": 1.0,
        "router_noise_std": 0.0,
        "seq_length": 4096,
        "batch_size": min(15360, 3072 + 40 * (step // 100)),
        "step_seconds": 2.0,
        "tokens_per_second": tokens_per_second,
        "tokens_per_second_per_device": tokens_per_second / 512,
        "model_flops_per_second": tokens_per_second * 2.5e11,
        "tflops_per_device": tokens_per_second * 2.5e11 / 512e12,
        "mfu": 0.41 + noise.gauss(0, 0.005),
        "seconds_left": (steps - step) * 2.0,
        "skipped_steps": step // (steps // 3),
        "wall_seconds": step * 2.0,
        "total_flops": step * TOKENS_PER_STEP * 2.5e11,
        "seconds/data": 0.02 + abs(noise.gauss(0, 0.01)),
        "seconds/forward_backward": 1.7 + noise.gauss(0, 0.02),
        "seconds/optimizer": 0.2,
        "seconds/checkpoint": 30.0 if step % 500 == 0 else 0.0,
        "seconds/evaluation": 0.0,
        "peak_memory_bytes": 68_000_000_000 + step,
        "memory_share": 0.82,
        "tokens_per_document": 900 + noise.gauss(0, 30),
        "fim_rate": 0.1 + noise.gauss(0, 0.004),
        "router_entropy": 3.9 + progress,
        "bias_range": 0.5 * progress,
        "max_vio": uneven,
        "dead_experts": int(20 * math.exp(-30 * progress)),
        **{f"loss/{name}": loss + 0.3 * i - 0.6 for i, name in enumerate(SOURCES)},
        **{f"share/{name}": (5 - i) / 15 for i, name in enumerate(SOURCES)},
        "max_vio_by_layer": [uneven * (1 + 0.5 * math.sin(layer)) for layer in range(layers)],
        "dead_experts_by_layer": [int(3 * math.exp(-30 * progress + layer / 20)) for layer in range(layers)],
        "router_entropy_by_layer": [3.9 + progress - layer / 100 for layer in range(layers)],
        "bias_range_by_layer": [0.5 * progress * (1 + layer / layers) for layer in range(layers)],
    }


def validation_record(step: int, steps: int) -> dict[str, Any]:
    """An evaluation as a run writes it."""
    loss = 1.95 + 9 * math.exp(-12 * step / steps)
    return {
        "kind": "validation",
        "step": step,
        "tokens": step * TOKENS_PER_STEP,
        "loss": loss,
        "perplexity": math.exp(loss),
        "is_best": True,
        "average_loss": loss - 0.02,
        **{f"loss/{name}": loss + 0.3 * i - 0.6 for i, name in enumerate(SOURCES)},
    }


def experts_record(step: int, layers: int, experts: int, noise: random.Random) -> dict[str, Any]:
    """The load of all experts as a run writes it: shares of a layer's tokens."""
    load = []
    for layer in range(layers):
        weights = [max(0.0, 1 + noise.gauss(0, 0.25)) for _ in range(experts)]
        weights[layer % experts] = 0.0
        load.append([round(weight / sum(weights), 4) for weight in weights])
    tokens = step * TOKENS_PER_STEP
    return {"kind": "experts", "step": step, "tokens": tokens, "load_by_layer": load}


def run_record(step: int, steps: int, layout: str = "PP16 EP64 DP128") -> dict[str, Any]:
    """A start or a resume as a run writes it."""
    return {
        "kind": "run",
        "step": step,
        "tokens": step * TOKENS_PER_STEP,
        "total_tokens": steps * TOKENS_PER_STEP,
        "train_steps": steps,
        "vocab_size": 129280,
        "layout": layout,
        "parameters": 685_000_000_000,
        "flops_per_token": 2.5e11,
    }


def event_record(step: int, event: str, **facts: Any) -> dict[str, Any]:
    """An event as a run writes it."""
    return {"kind": "event", "step": step, "tokens": step * TOKENS_PER_STEP, "event": event, **facts}


def write_run(
    directory: Path,
    *,
    records: int,
    layers: int = 4,
    experts: int = 8,
    done: float = 1.0,
    seed: int = 0,
    settings: dict[str, Any] | None = None,
) -> Path:
    """A run of `records` log intervals of 10 steps, of which the share `done` is written; its directory.

    It resumes once, has a spike, a warning, and evaluations; `settings` differ from their defaults.
    """
    noise, steps = random.Random(seed), 10 * records
    lines: list[dict[str, Any]] = [run_record(0, steps)]
    for i in range(1, int(records * done) + 1):
        lines.append(train_record(10 * i, steps, layers, noise))
        if i % max(1, records // 20) == 0:
            lines.append(validation_record(10 * i, steps))
            lines.append(experts_record(10 * i, layers, experts, noise))
        if i == records // 2:
            lines.append(run_record(10 * i, steps, "PP8 EP64 DP256"))
        if i == records // 3:
            lines.append(event_record(10 * i, "spike", loss=6.5, median_loss=2.9, action="warn"))
            lines.append(
                event_record(10 * i, "health", trouble="dead_experts", text="2 experts got no token")
            )
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "metrics.jsonl").write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))
    changed = {"training.learning_rate": 2.2e-4, "experiment_name": directory.name, **(settings or {})}
    saved = {
        "config": nested(changed),
        "non_defaults": changed,
        "resolved": {"world_size": 2048, "device": "cuda", "precision": "bf16"},
        "provenance": {"megads": "0.1.0", "git": {"revision": "0123456789abcdef", "modified": False}},
    }
    (directory / "run.json").write_text(json.dumps(saved), encoding="utf-8")
    return directory


def nested(settings: dict[str, Any]) -> dict[str, Any]:
    """Dotted paths as a tree."""
    tree: dict[str, Any] = {}
    for path, value in settings.items():
        *parents, name = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree
