"""The measured peaks of this machine."""

from __future__ import annotations

import torch

from benchmarks.common.timing import interleave
from benchmarks.kernels import machine_peaks


def test_peaks_are_rates_of_this_machine() -> None:
    rates = machine_peaks.matmul_rates("cpu", [torch.float32], seconds=0.05)
    X = torch.randn(256, 256)
    sample = interleave({"mm": lambda: X @ X}, seconds=0.05)["mm"]
    assert rates[torch.float32] > 0.05 * 2 * 256**3 / min(sample.times)
    assert 1e8 < machine_peaks.copy_bandwidth("cpu", seconds=0.01) < 1e13
