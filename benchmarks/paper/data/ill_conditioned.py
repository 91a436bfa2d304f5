"""Linear regression with an ill-conditioned map (Rahimi & Recht 2017, reference [68] of the paper)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from benchmarks.paper.data.examples import Dataset, Examples
from benchmarks.paper.data.source import Source

CONDITION = 1e10
INPUTS, OUTPUTS, SAMPLES = 6, 10, 1000


def ill_conditioned_map(generator: torch.Generator) -> Tensor:
    """``A (10, 6)`` float64 with singular values spaced evenly in log from 1 to 1e-10."""
    left, right = (torch.randn(rows, INPUTS, generator=generator, dtype=torch.float64) for rows in (OUTPUTS, INPUTS))
    values = torch.logspace(0, -torch.log10(torch.tensor(CONDITION)).item(), INPUTS, dtype=torch.float64)
    U, V = torch.linalg.qr(left).Q, torch.linalg.qr(right).Q
    A: Tensor = U * values @ V.T
    return A


def _made(_: Path) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    A = ill_conditioned_map(generator)
    train, test = (torch.randn(SAMPLES, INPUTS, generator=generator, dtype=torch.float64) for _ in range(2))
    return Dataset("t = Ax", Examples((train,), train @ A.T), Examples((test,), test @ A.T))


ILL_CONDITIONED = Source("t = Ax, κ(A) = 1e10, x ~ N(0, I)", _made)
