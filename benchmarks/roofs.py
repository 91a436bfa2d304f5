"""What this machine can do at best, measured: figures are given as shares of it."""

from __future__ import annotations

import torch

from benchmarks.timing import interleave

__all__ = ["copy_bandwidth", "matmul_rates"]


def matmul_rates(device: str, dtypes: list[torch.dtype], *, seconds: float = 1.0) -> dict[torch.dtype, float]:
    """FLOP/s of ``torch.mm`` on large square matrices, a dtype: the best of two sizes."""
    sizes = (512, 1024) if torch.device(device).type == "cpu" else (4096, 8192)
    rates: dict[torch.dtype, float] = {}
    for dtype in dtypes:
        operands = {size: torch.randn(size, size, device=device).to(dtype) for size in sizes}
        calls = {str(size): lambda X=X: torch.mm(X, X) for size, X in operands.items()}
        samples = interleave(calls, seconds=seconds)
        rates[dtype] = max(2 * size**3 / samples[str(size)].median for size in sizes)
    return rates


def copy_bandwidth(device: str, *, seconds: float = 1.0) -> float:
    """Bytes/s of a copy of a tensor that no cache holds: reads and writes counted."""
    source = torch.ones(2**26 if torch.device(device).type == "cpu" else 2**28, device=device)
    target = torch.empty_like(source)
    sample = interleave({"copy": lambda: target.copy_(source)}, seconds=seconds)["copy"]
    return 2 * source.nbytes / sample.median
