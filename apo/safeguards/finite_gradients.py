"""Whether gradients are finite, and what they are divided by where products of them would overflow."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from apo.inner_products import norms
from apo.ranks.sharding import Shards

__all__ = ["scale_of_gradients"]

HUGE = 1e18
"""Gradients from here on are divided by their largest entry before products are taken that would overflow."""


def scale_of_gradients(shards: Shards) -> float:
    """1, or the largest entry of gradients that are huge; infinite or NaN where one isn't finite.

    One synchronisation. Over all ranks that hold parts of the weights.
    """
    grads = [_values(grad) for grad in shards.grads() if grad is not None and grad.numel()]
    if not grads and not shards.groups:
        return 1.0
    if shards.largest(_largest(grads, shards.parts, ord=2)) <= HUGE:
        return 1.0
    # a norm may overflow where no entry does; to look at every entry takes ten times as long
    most = shards.largest(_largest(grads, shards.parts, ord=math.inf))
    return 1.0 if most <= HUGE else most


def _largest(grads: Sequence[Tensor], parameters: Sequence[Tensor], ord: float) -> Tensor:
    """The largest of the gradients' norms, NaN where one is, 0 of none."""
    if not grads:
        return torch.zeros((), dtype=torch.float64, device=parameters[0].device)
    return norms(grads, ord).max()  # max() passes NaN on


def _values(grad: Tensor) -> Tensor:
    return grad.coalesce().values() if grad.is_sparse else grad
