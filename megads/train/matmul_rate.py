"""What 100% means when utilization is reported: the rate of matrix products a process can reach.

On a GPU that we know it is the maker's dense BF16 peak, which is what published MFU figures divide by
(PaLM, arXiv:2204.02311, appendix B). Elsewhere nobody publishes a peak that can be reached, so it is
measured: the rate of `torch.matmul` on this machine, with this process's threads, now.
"""

import statistics
import time
from dataclasses import dataclass

import torch

# Dense BF16 FLOP/s of one device, without structured sparsity, from NVIDIA's data sheets. The longest
# name that occurs in the device's own name wins, so that "H100 PCIe" is not taken for an "H100".
DENSE_BF16_PEAKS = {
    "A100": 312e12,
    "A800": 312e12,
    "H100": 989.4e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H800": 989.4e12,
    "H800 PCIe": 756e12,
    "H200": 989.4e12,
    "H200 NVL": 835e12,
    "GH200": 989.4e12,
    "H20": 148e12,
    "B200": 2250e12,
    "GB200": 2500e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
}


@dataclass(frozen=True)
class PeakRate:
    """FLOP/s of one process that count as 100%, and where the number is from."""

    flops_per_second: float
    source: str


def peak_rate(device: torch.device | str) -> PeakRate:
    """The published dense BF16 peak of `device`, or what `measure_matmul_rate` finds there."""
    device = torch.device(device)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        published = published_peak(name)
        if published is not None:
            return PeakRate(published, f"dense BF16 peak of {name}")
        return PeakRate(
            measure_matmul_rate(device, torch.bfloat16, size=8192), f"measured BF16 matmul on {name}"
        )
    rate = measure_matmul_rate(device, torch.float32)
    return PeakRate(rate, f"measured FP32 matmul, {torch.get_num_threads()} threads per process")


def published_peak(device_name: str) -> float | None:
    """Dense BF16 FLOP/s of the GPU that calls itself `device_name`.

    None when it is not in the table, and for a slice of a GPU (MIG), which no data sheet lists.
    """
    words = f" {device_name.replace('-', ' ')} ".casefold()
    if " mig " in words:
        return None
    known = [name for name in DENSE_BF16_PEAKS if f" {name.casefold()} " in words]
    return DENSE_BF16_PEAKS[max(known, key=len)] if known else None


def measure_matmul_rate(
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    size: int = 1024,
    seconds: float = 0.15,
) -> float:
    """FLOP/s of a `size` x `size` x `size` product on `device`: the median of those done in `seconds`.

    All ranks of a node should measure at the same time, so that what they share is shared.
    """
    device = torch.device(device)
    left = torch.randn(
        size, size, device=device, dtype=dtype, generator=torch.Generator(device).manual_seed(0)
    )
    product = torch.empty_like(left)
    times = [_matmul_seconds(left, product) for _ in range(2)][1:]  # the first one warms up
    while sum(times) < seconds or len(times) < 3:
        times.append(_matmul_seconds(left, product))
    return 2 * size**3 / statistics.median(times)


def _matmul_seconds(left: torch.Tensor, product: torch.Tensor) -> float:
    start = time.perf_counter()
    with torch.no_grad():
        torch.matmul(left, left, out=product)
    product[0, 0].item()  # waits for an asynchronous device
    return time.perf_counter() - start
