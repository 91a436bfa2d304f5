"""Moves of P's scale to the rates: only ``lr·P`` means anything, so P would else grow while ``lr`` falls, to the
bounds of the rate and of 16-bit blocks."""

from __future__ import annotations

import math
from typing import Any

import torch

from apo.layers.arena import Arena
from apo.rates.log_rates import LogRates

__all__ = ["move_scale_to_rates"]


def move_scale_to_rates(arena: Arena, rates: LogRates, groups: list[dict[str, Any]]) -> list[float]:
    """Give A and B the identity's RMS, S one of 1 in the mean over the layers, and the rates what P loses.

    Returns:
        What each layer's P has been divided by; nothing, and all as it was, where the RMS of one is 0 or infinite.
    """
    rms = arena.root_mean_squares()
    if not all(0 < x < math.inf for own in rms for x in own):
        return []
    growths = [2 * sum(map(math.log, own)) for own in rms]  # P goes with the squares
    of_group = rates.scale(groups, growths, [layer.group for layer in arena.layers])
    moved = [of_group[layer.group] for layer in arena.layers]
    factors = []
    for own, lost in zip(rms, moved, strict=True):
        *of_blocks, _ = own
        factors += [*(1 / x for x in of_blocks), math.prod(of_blocks) / math.sqrt(lost)]
    torch._foreach_mul_([own.tensor for own in arena.phi], factors)
    torch._foreach_mul_([own.ones for own in arena.phi], factors)
    return moved
