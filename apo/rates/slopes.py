"""The slopes of Q along the logarithms of APO's rates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import apo_kernels as ak
from apo.inner_products import inner_products
from apo.layers.preconditioner import PreconditionedLayer
from apo.ranks.sharding import local, over, sum_over
from apo.rates.log_rates import get_rate

__all__ = ["carried_in", "decay_of", "rate_slopes"]

Group = dict[str, Any]


def decay_of(group: Group) -> float:
    """λ, where the decay isn't part of the gradient."""
    return float(group["weight_decay"]) if group["decoupled_weight_decay"] else 0.0


def carried_in(group: Group) -> float:
    """How many times its own length the momentum of a group carries a step."""
    momentum = float(group.get("momentum") or 0.0)
    return (1 - float(group.get("dampening") or 0.0)) / (1 - momentum) if 0 < momentum < 1 else 1.0


def rate_slopes(
    slopes: ak.ModelSlopes,
    layers: Sequence[PreconditionedLayer],
    groups: Sequence[Group],
    V: Sequence[Tensor | None],
    factors: Sequence[float],
) -> tuple[list[float], list[float]]:
    """``dQ/d log lr = −lr ⟨V, c P(G) + λθ⟩`` of each group, and what it would be, except the sign and the weights'
    decay, if V equalled G; one synchronisation.

    Args:
        slopes: of the layers.
        V: of each parameter of the groups; None for what takes no part.
        factors: each group's c.
    """
    decayed = [
        (at, v, p)
        for v, (at, p) in zip(V, ((at, p) for at, g in enumerate(groups) for p in g["params"]), strict=True)
        if v is not None and decay_of(groups[at])
    ]
    thetas = inner_products([v for _, v, _ in decayed], [local(p) for *_, p in decayed])
    count, of_layers = len(layers), [layer.view.over for layer in layers]
    both = sum_over(torch.cat([slopes.inner, slopes.size]).double(), of_layers * 2)
    values = torch.cat([both, sum_over(thetas, [over(p) for *_, p in decayed]).to(both)]).tolist()
    sums, sizes = [0.0] * len(groups), [0.0] * len(groups)
    for layer, value, size in zip(layers, values[:count], values[count : 2 * count], strict=True):
        sums[layer.group] -= get_rate(groups[layer.group]) * factors[layer.group] * value
        sizes[layer.group] += size
    for (at, *_), value in zip(decayed, values[2 * count :], strict=True):
        sums[at] -= get_rate(groups[at]) * decay_of(groups[at]) * value
    return sums, sizes
