"""How much P is damped where gradients are noisy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

__all__ = ["NoiseDamping"]


class NoiseDamping:
    """The δ of ``(F + δI)⁻¹`` where noise adds up (:mod:`apo.fisher.start`).

    An inverse treats all directions alike. But of those with little curvature a batch says little: what it says is
    noise, and long steps along them cost others what the rest gains. A larger δ shortens these steps. With σ² the mean
    square of a gradient's entries, which is their noise where noise adds up, J the loss, and κ the noise factor
    (:mod:`apo.noise.factor`), ::

        δ = 10 σ² / (1 + J) · min(4 (1 − κ), 1)

    So there is none as long as noise doesn't add up, and it vanishes with the noise where all examples can be fitted.
    The form is what several tasks have in common, found by experiment (``docs/experiments.md``).
    """

    NUMBERS: ClassVar[dict[str, Any]] = {"apo_gradient_square": math.nan}
    """What is remembered, and how it starts."""
    BETA = 0.9
    """Of the running mean of σ²."""
    SHARE, RISE = 10.0, 4.0

    @classmethod
    def wanted(cls, held: Mapping[str, Any]) -> bool:
        """Whether noise adds up."""
        return bool(held["apo_noise_factor"] < 1)

    @classmethod
    def mean(cls, held: Mapping[str, Any], square: float) -> float:
        """σ² after a gradient whose entries have this mean square."""
        before = held["apo_gradient_square"]
        return square if math.isnan(before) else cls.BETA * before + (1 - cls.BETA) * square

    @classmethod
    def delta(cls, held: Mapping[str, Any]) -> float:
        """δ, of what is remembered and of the present κ and J."""
        square = held["apo_gradient_square"]
        if math.isnan(square):
            return 0.0
        gate = min(cls.RISE * (1 - held["apo_noise_factor"]), 1.0)
        return float(gate * cls.SHARE * square / (1 + held["apo_mean_loss"]))
