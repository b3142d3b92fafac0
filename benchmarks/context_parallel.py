"""What context parallelism sends: MLA's latent against full keys and values, counted in one run.

    python benchmarks/context_parallel.py [--ranks 2 4] [--seq-length 256] [--rounds 3] [--json FILE]

One attention layer of DeepSeek-V3 at its real widths (128 heads, hidden 7168) on gloo, forward and backward,
in FP32 with random weights. Every collective is seen by a dispatch mode, so the bytes are those of the
tensors that really pass; in BF16 they would be half of these, in the same ratio. Contenders:

- latent: our layer, which gathers the latent and the rotary key and projects them up on every rank;
- keys and values: the same layer, whose ranks project their own tokens up and gather the results, as
  Megatron-Core's and Transformer Engine's all-gather context parallelism does;
- ring: not run, by formula: keys and values go round once forward and once backward, and once their
  gradients.

Bytes are what a rank sends if each part goes to each other rank once (a ring's volume, the least possible).
The price of the latent is the up-projection of all tokens on every rank: the time of both is measured too,
alternating, on a CPU whose exchange costs next to nothing.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from torch.utils._python_dispatch import TorchDispatchMode

from megads.config.loader import load_config
from megads.config.resolve import resolve
from megads.mcore.groups import destroy_process_groups, initialize_device, initialize_process_groups
from megads.ports import free_port

CONFIG = Path(__file__).parents[1] / "configs" / "deepseek_v3_671b.json"
BYTES = 4  # FP32


class SentBytes(TorchDispatchMode):
    """Counts what this rank sends through collectives, by their names."""

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.others = ranks - 1
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace == "c10d" and name != "barrier":
            output, input = args[:2]
            # Gathering sends the own part to all others, scattering sums sends each its part.
            part = {"_allgather_base_": input, "_reduce_scatter_base_": output}[name]
            self.bytes[name] += part.numel() * part.element_size() * self.others
        return func(*args, **(kwargs or {}))


def _layers(ranks: int, seq_length: int) -> tuple[Any, Any, Any]:
    """The configuration, our layer, and the one that exchanges keys and values, with the same weights."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megads.mcore.translate import transformer_config
    from megads.model.backends import backend_modules
    from megads.model.context_parallel import gather_sequence, in_sequence_order, local_positions
    from megads.model.mla import MultiLatentAttention
    from megads.model.rope import rotate

    class GatheredKeysAndValues(MultiLatentAttention):
        def _project_up(
            self, q_latent_SBC: Tensor, kv_latent_SBC: Tensor, rope_key_SBR: Tensor, table: Tensor
        ) -> tuple[Tensor, Tensor, Tensor]:
            config, heads = self.config, self.local_heads
            table = table[:, local_positions(table.shape[1], self.cp_group, table.device)]
            q_SBND = self.linear_q_up_proj(q_latent_SBC)[0].unflatten(-1, (heads, self.qk_head_dim))
            kv_SBNX = self.linear_kv_up_proj(kv_latent_SBC)[0].unflatten(-1, (heads, -1))
            k_nope, v_SBNV = kv_SBNX.split((config.qk_head_dim, config.v_head_dim), dim=-1)
            q_nope, q_rope = q_SBND.split((config.qk_head_dim, config.qk_pos_emb_head_dim), dim=-1)
            k_rope = rotate(rope_key_SBR.unsqueeze(2), table).expand(-1, -1, heads, -1)
            q_SBND = torch.cat((q_nope, rotate(q_rope, table)), dim=-1)
            k_SBND = gather_sequence(torch.cat((k_nope, k_rope), dim=-1), self.cp_group)
            v_SBNV = gather_sequence(v_SBNV, self.cp_group)
            k_SBND, v_SBNV = (in_sequence_order(x, 1, ranks) for x in (k_SBND, v_SBNV))
            q, k, v = (x.permute(1, 2, 0, 3) for x in (q_SBND, k_SBND, v_SBNV))
            return q, k, v

    config = load_config(
        str(CONFIG),
        {
            "model.num_layers": 1,
            "model.moe.num_experts": 0,
            "model.moe.num_shared_experts": 0,
            "model.first_k_dense_replace": None,
            "training.use_mtp": False,
            "training.seq_length": seq_length,
            "distributed.device": "cpu",
            "distributed.tensor_parallel_size": 1,
            "distributed.pipeline_parallel_size": 1,
            "distributed.pipeline_layout": None,
            "distributed.expert_parallel_size": 1,
            "distributed.context_parallel_size": ranks,
        },
    )
    resolved = resolve(config, ranks, cuda=False)
    initialize_process_groups(resolved, timeout_minutes=5, seed=1)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    options = {"mla": config.model.mla, "backend": backend_modules("native"), "pg_collection": groups}
    transformer = transformer_config(config, resolved)
    ours = MultiLatentAttention(transformer, 1, **options)
    theirs = GatheredKeysAndValues(transformer, 1, **options)
    generator = torch.Generator().manual_seed(1)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        mine.data.normal_(std=0.02, generator=generator)
        other.data = mine.data
    return config, ours, theirs


def _step(layer: Any, hidden_SBH: Tensor, table: Tensor) -> tuple[list[Tensor], float]:
    """Output and input gradient of one forward and backward pass, and its seconds."""
    layer.zero_grad(set_to_none=True)
    hidden_SBH = hidden_SBH.clone().requires_grad_()
    dist.barrier()
    started = time.perf_counter()
    output, _ = layer(hidden_SBH, rotary_pos_emb=table)
    output.sin().sum().backward()
    return [output.detach(), hidden_SBH.grad], time.perf_counter() - started  # type: ignore[list-item]


def _worker(rank: int, ranks: int, port: int, seq_length: int, rounds: int, results: Any) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port), CUDA_VISIBLE_DEVICES="",
    )  # fmt: skip
    torch.set_num_threads(1)
    initialize_device("cpu")
    config, ours, theirs = _layers(ranks, seq_length)
    from megads.model.rope import rotary_table

    hidden = torch.randn(seq_length // ranks, 1, config.model.mla.d_model)
    table = rotary_table(
        config.model.mla, config.model.mla.qk_rope_head_dim, torch.arange(seq_length)[:, None]
    )
    layers, sent, tensors = {"latent": ours, "keys and values": theirs}, {}, {}
    for name, layer in layers.items():
        with SentBytes(ranks) as counter:
            tensors[name], _ = _step(layer, hidden, table)
        sent[name] = dict(counter.bytes)
    for mine, other in zip(*tensors.values(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4)
    seconds: dict[str, list[float]] = {name: [] for name in layers}
    for _ in range(rounds):
        for name, layer in layers.items():
            seconds[name].append(_step(layer, hidden, table)[1])
    if rank == 0:
        mla = config.model.mla
        full = mla.num_heads * (mla.qk_nope_head_dim + mla.qk_rope_head_dim + mla.v_head_dim)
        once = full * seq_length // ranks * (ranks - 1) * BYTES
        sent["ring"] = {"keys and values, forward and backward": 2 * once, "gradients": once}
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        results.put({"ranks": ranks, "sent_bytes": sent, "seconds": medians})
    destroy_process_groups()


def _measure(ranks: int, seq_length: int, rounds: int) -> dict[str, Any]:
    results = torch.multiprocessing.get_context("spawn").SimpleQueue()
    spawn(_worker, (ranks, free_port(), seq_length, rounds, results), nprocs=ranks)
    return results.get()  # type: ignore[no-any-return]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--seq-length", type=int, default=256, help="tokens (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="timed ones (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write the results here")
    arguments = parser.parse_args()
    table = Table("ranks", "exchanged", "MB sent", "bytes per token", "over latent", "seconds", "over latent")
    found = [_measure(ranks, arguments.seq_length, arguments.rounds) for ranks in arguments.ranks]
    for result in found:
        sent = {name: sum(by_call.values()) for name, by_call in result["sent_bytes"].items()}
        seconds, least = result["seconds"], sent["latent"]
        for name, size in sent.items():
            timed = name in seconds
            table.add_row(
                str(result["ranks"]),
                name,
                f"{size / 1e6:.2f}",
                f"{size * result['ranks'] / arguments.seq_length:,.0f}",
                f"{size / least:.1f}x",
                f"{seconds[name]:.2f}" if timed else "by formula",
                f"{seconds[name] / seconds['latent']:.2f}x" if timed else "",
            )
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
