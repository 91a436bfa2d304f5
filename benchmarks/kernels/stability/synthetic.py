"""Factors with a given condition number."""

import math

import torch
from torch import Tensor

from benchmarks.kernels.stability.problem import LayerFactors


def synthetic_case(condition: float, *, m: int = 64, n: int = 96, seed: int = 0) -> LayerFactors:
    """Both factors of the given condition number, and ``G = F_B^½ Z F_A^½`` with ``Z`` standard normal.

    Such a gradient has the covariance ``F_A ⊗ F_B``: it is small where the factors are small, as a real gradient is.
    Noise of one size in all directions would be harder on an inverse than training is.
    """
    if not (condition >= 1 and math.isfinite(condition)):
        raise ValueError(f"condition must be finite and at least 1, but got {condition}")
    generator = torch.Generator().manual_seed(seed)
    A, B = _spectrum(n, condition, generator), _spectrum(m, condition, generator)
    Z = torch.randn(m, n, dtype=torch.float64, generator=generator)
    G = _power(*B, 0.5) @ Z @ _power(*A, 0.5)
    return LayerFactors(f"condition {condition:.0e}", "synthetic", G, _power(*A, 1.0), _power(*B, 1.0))


def _spectrum(size: int, condition: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """``λ``, log-spaced from 1 down to 1/condition, and ``Q``, Haar-distributed."""
    Q, R = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))
    values = torch.logspace(0, -math.log10(condition), size, dtype=torch.float64)
    return values, Q * R.diagonal().sign()  # R's diagonal made positive


def _power(values: Tensor, Q: Tensor, exponent: float) -> Tensor:
    F = (Q * values**exponent) @ Q.T
    return (F + F.T) / 2
