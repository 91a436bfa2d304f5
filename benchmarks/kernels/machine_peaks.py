"""What this machine reaches at best, measured. Figures are given as shares of it."""

from functools import partial

import torch

from benchmarks.common.timing import interleave


def matmul_rates(device: str, dtypes: list[torch.dtype], *, seconds: float = 1.0) -> dict[torch.dtype, float]:
    """FLOP/s of ``torch.mm`` on square matrices, per dtype: the best of some sizes."""
    sizes = (128, 256, 512, 1024) if torch.device(device).type == "cpu" else (2048, 4096, 8192)
    rates = dict.fromkeys(dtypes, 0.0)
    for dtype in dtypes:
        for size in sizes:
            X = torch.randn(size, size, device=device).to(dtype)
            sample = interleave({"mm": partial(torch.mm, X, X)}, seconds=seconds / len(sizes))["mm"]
            rates[dtype] = max(rates[dtype], 2 * size**3 / sample.median)
            if 8 * sample.median > seconds:  # a larger one would take too long
                break
    return rates


def copy_bandwidth(device: str, *, seconds: float = 1.0) -> float:
    """Bytes/s of a copy of a tensor that no cache holds: reads and writes counted."""
    source = torch.ones(2**26 if torch.device(device).type == "cpu" else 2**28, device=device)
    target = torch.empty_like(source)
    sample = interleave({"copy": lambda: target.copy_(source)}, seconds=seconds)["copy"]
    return 2 * source.nbytes / sample.median
