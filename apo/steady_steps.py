"""When a learned rate rises, is held, and falls."""

from __future__ import annotations

import math
from typing import Any

__all__ = ["SteadySteps"]

Group = dict[str, Any]


class SteadySteps:
    """Changes of ``log lr`` by ``r = ⟨V, Δ⟩ / |⟨G, Δ⟩|``, the slope in its own units.

    r is −1 where the trial left the gradient as it was, 0 where it reached the minimum along its step Δ, and 1 where it
    went twice as far. Once noise balances progress, r is about 0.3 at small rates and large ones alike, so there it
    says nothing of the rate. Therefore the rate

    - rises while the mean of r is below 0, the faster the longer that lasts;
    - is nearly held while it is between 0 and 1: where noise balances progress, it falls as about t^(−0.1);
    - falls by ``log r`` above 1, about as far as a Newton step along Δ goes; above 1.5 already by a short mean.

    A loss on B, which the step was fitted to, lowers r by about a half. It then rises below −0.5.

    Changes are in proportion to the share of training that has passed since the last one, so that the rate can change
    by orders of magnitude at first, and not by accident later.

    Args:
        fitted: whether the loss is on B.
    """

    MEAN, SHORT, SIZES = 0.9, 0.7, 0.8
    """Of the running means: of r, of r for falls, of sizes."""
    EARLY = 20
    """Steps in which each update counts as much as the first."""

    def __init__(self, *, fitted: bool) -> None:
        self.rises_below, self.expected = (-0.5, 0.0) if fitted else (0.0, 0.3)

    def prepare(self, group: Group) -> None:
        """Put what is remembered into a new group. The mean begins where a right rate would have it."""
        group.setdefault("apo_ratio_mean", self.expected)
        group.setdefault("apo_ratio_short", 0.0)
        group.setdefault("apo_size_mean", 0.0)
        group.setdefault("apo_ratios", 0)
        group.setdefault("apo_rising", 0.0)

    def change(self, group: Group, slope: float, size: float, *, share: float, meta_lr: float) -> float:
        """The change of a group's ``log lr``.

        Args:
            slope: ``⟨V, Δ⟩``.
            size: ``|⟨G, Δ⟩|``.
            share: of the training so far, what has passed since the last update.
            meta_lr: the most that ``log lr`` rises by.
        """
        count = group["apo_ratios"] = group["apo_ratios"] + 1
        size_mean = group["apo_size_mean"] = self.SIZES * group["apo_size_mean"] + (1 - self.SIZES) * size
        size_mean /= 1 - self.SIZES**count
        ratio = min(max(slope / size_mean, -10.0), 10.0) if size_mean > 0 else 0.0
        mean: float = self.MEAN * group["apo_ratio_mean"] + (1 - self.MEAN) * ratio
        short: float = self.SHORT * group["apo_ratio_short"] + (1 - self.SHORT) * ratio
        group["apo_ratio_mean"], group["apo_ratio_short"] = mean, short
        short /= 1 - self.SHORT**count
        leaps = short > 1.5
        rises = mean < self.rises_below and not leaps
        how_far = min(max(0.0, self.rises_below - mean) / (1 + self.rises_below), 1.0)
        rising: float = group["apo_rising"] + how_far if rises else 0.0
        group["apo_rising"] = rising
        early = min(1.0, self.EARLY * share)
        if rises:
            return meta_lr * early * min(1.0, 1 / 12 + rising / 45) * how_far
        if leaps or mean > 1:
            return -early * math.log(short if leaps else mean) if meta_lr else 0.0
        return -meta_lr * early * mean / 15
