"""Whether tensors are finite."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def all_finite(tensors: list[Tensor]) -> bool:
    """Whether every entry is finite; one synchronisation."""
    if not tensors:
        return True
    # 0·x is NaN where x isn't finite; its sum can't overflow as that of x could
    sums = torch.stack([(tensor * 0).sum(dtype=torch.float32) for tensor in tensors])
    return math.isfinite(sums.sum().item())
