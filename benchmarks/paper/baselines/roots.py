"""Inverse roots of symmetric positive matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.common.fisher.damping import eigenbasis


def inverse_root(H: Tensor, damping: float, exponent: float) -> Tensor | None:
    """``(H + ε I)^(−exponent)`` by eigendecomposition, in H's dtype; None where that fails or isn't finite.

    Eigenvalues below the rounding error of the largest are noise, and count as that error: without damping they would
    be blown up.
    """
    pair = eigenbasis(H, retry=True)
    if pair is None:
        return None
    values, Q = pair
    values = values + damping
    noise = values[-1] * len(values) * torch.finfo(H.dtype).eps
    root = (Q * values.clamp(min=noise).pow(-exponent)) @ Q.T
    root = root.to(H.dtype)
    return root if bool(root.isfinite().all()) else None
