"""Inner products and norms of many tensors, in as few passes and operations as the device allows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["inner_products", "norms"]


def inner_products(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> Tensor:
    """``⟨x, y⟩`` of each pair, as one vector. Sums are in float32, of float64 operands in float64; a sum of every
    entry in float64 would take ten times as long."""
    if not xs:
        return torch.zeros(0, dtype=torch.float32)
    if all(x.device.type != "cpu" for x in xs):
        return _together(xs, ys)
    return torch.stack([_inner(x, y) for x, y in zip(xs, ys, strict=True)])


def norms(tensors: Sequence[Tensor], ord: float = 2) -> Tensor:
    """The norm of each tensor, as one float64 vector; there must be one at least."""
    found = torch._foreach_norm(list(tensors), ord=ord)
    alike = all(x.dtype == found[0].dtype for x in found)
    return torch.stack(found).double() if alike else torch.stack([x.double() for x in found])


def _together(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> Tensor:
    """By operations on all pairs at once, of which none sums but norms: what is above 0, and what is below."""
    wide = [_wide(x, y) for x, y in zip(xs, ys, strict=True)]
    below = torch._foreach_mul(*([x.to(dtype) for x, dtype in zip(each, wide, strict=True)] for each in (xs, ys)))
    above = torch._foreach_clamp_min(below, 0.0)
    torch._foreach_clamp_max_(below, 0.0)
    return torch.stack(torch._foreach_norm(above, ord=1)) - torch.stack(torch._foreach_norm(below, ord=1))


def _wide(x: Tensor, y: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)


def _inner(x: Tensor, y: Tensor) -> Tensor:
    dtype = _wide(x, y)
    if x.device.type == "cpu" and x.dtype == y.dtype == dtype and x.is_contiguous() and y.is_contiguous():
        return torch.dot(x.flatten(), y.flatten())  # a pass and no copy
    return torch.sum(x * y, dtype=dtype)
