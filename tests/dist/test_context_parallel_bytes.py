"""Context parallelism exchanges the latent and nothing else: the bytes of every collective, counted."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.dist import tiny
from tests.dist.harness import run_distributed

RANKS = 2


class Received(TorchDispatchMode):
    """Bytes of the outputs of collectives, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.bytes[func.overloadpacket.__name__] += args[0].numel() * args[0].element_size()
        return func(*args, **(kwargs or {}))


def attend(settings: dict[str, Any]) -> dict[str, int]:
    from megads.model.build import unwrap
    from megads.model.rope import rotary_table

    # No reduction of weight gradients meanwhile.
    alone = {"distributed.context_parallel_size": RANKS, "distributed.overlap_grad_reduce": False}
    step = tiny.start(settings | alone)
    model = unwrap(step.chunks[0])
    layer = model.decoder.layers[0].self_attention
    positions = torch.arange(tiny.SEQ_LENGTH)[:, None]
    hidden = torch.randn(tiny.SEQ_LENGTH // RANKS, 3, tiny.BASE["model.mla.d_model"], requires_grad=True)
    with Received() as received:
        output, _ = layer(hidden, rotary_pos_emb=rotary_table(model.mla, model.rope_dim, positions))
        output.sum().backward()
    return dict(received.bytes)


@pytest.mark.parametrize(
    ("settings", "gathers"), [({}, 1), ({"training.gradient_checkpointing": "selective"}, 2)], ids=str
)
def test_a_layer_exchanges_the_latent_and_its_gradient(settings: dict[str, Any], gathers: int) -> None:
    """Recomputed up-projections gather it a second time: keeping it would be keeping what they discard."""
    base, batch, fp32 = tiny.BASE, 3, 4
    latent = base["model.mla.d_latent"] + base["model.mla.qk_rope_head_dim"]
    whole = tiny.SEQ_LENGTH * batch * latent * fp32
    for found in run_distributed(RANKS, attend, settings=settings):
        assert found == {"_allgather_base_": gathers * whole, "_reduce_scatter_base_": whole // RANKS}
