"""The GPUs that plans are made for: what their makers publish, and what an hour of one costs.

Rates are those of the data sheets, dense and without sparsity, links in one direction. Prices are round
figures for the planner to start from, as of PRICES_OF, not quotes: pass your own. The H800's is the one
that DeepSeek-V3's report counts with (arXiv:2412.19437, table 1).
"""

from dataclasses import dataclass
from difflib import get_close_matches

from megads.errors import ConfigError

PRICES_OF = "2025-08"


@dataclass(frozen=True)
class Gpu:
    """One GPU of a node: FLOP/s, bytes, bytes per second, US dollars per hour.

    `node_link` is NVLink, `network_link` the share of the node's network that each GPU has;
    `fp8_speedup` is the dense FP8 rate over the BF16 one.
    """

    name: str
    bf16_flops_per_second: float
    memory_bytes: int
    memory_bytes_per_second: float
    node_link_bytes_per_second: float
    network_link_bytes_per_second: float
    fp8_speedup: float
    dollars_per_hour: float
    spot_dollars_per_hour: float
    per_node: int = 8


MIB = 2**20
GPUS = {
    gpu.name: gpu
    for gpu in (
        # name, dense BF16, memory as the driver reports it, its bandwidth, NVLink, network, FP8, prices
        Gpu("a100", 312e12, 81920 * MIB, 2.04e12, 300e9, 25e9, 1.0, 1.80, 0.90),
        Gpu("a800", 312e12, 81920 * MIB, 2.04e12, 200e9, 25e9, 1.0, 1.80, 0.90),
        Gpu("h100", 989.4e12, 81559 * MIB, 3.35e12, 450e9, 50e9, 2.0, 3.00, 1.80),
        Gpu("h800", 989.4e12, 81559 * MIB, 3.35e12, 200e9, 50e9, 2.0, 2.00, 1.20),
        Gpu("h200", 989.4e12, 143771 * MIB, 4.8e12, 450e9, 50e9, 2.0, 3.50, 2.20),
        Gpu("h20", 148e12, 97871 * MIB, 4.0e12, 450e9, 50e9, 2.0, 1.50, 0.90),
        Gpu("b200", 2250e12, 183359 * MIB, 8.0e12, 900e9, 50e9, 2.0, 5.00, 3.00),
    )
}


def gpu_named(name: str) -> Gpu:
    """The GPU called `name`, whatever the case. Raises ConfigError that lists those known."""
    found = GPUS.get(name.lower())
    if found is None:
        near = get_close_matches(name.lower(), GPUS, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(f"--gpu {name}: not in the table; {hint}there are {', '.join(GPUS)}")
    return found
