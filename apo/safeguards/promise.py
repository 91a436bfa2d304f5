"""How much a step may promise to lower the loss by."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

__all__ = ["Promise"]


class Promise:
    """The safeguard of :class:`~apo.APO`: a bound on the decrease that a step predicts, in terms of the loss."""

    NUMBERS: ClassVar[dict[str, Any]] = {"apo_most_promised": math.inf, "apo_mean_loss": math.nan}
    """What is remembered, and how it starts."""
    MOST = 2.0
    """Greatest predicted decrease of a step, over the loss."""
    BETA = 0.9
    """Of the running mean of that loss, over meta-updates."""

    @classmethod
    def noted(cls, held: Mapping[str, Any], loss: float) -> dict[str, Any]:
        """What is remembered after a trial at this loss, >= 0: by it and by those before."""
        mean = held["apo_mean_loss"]
        mean = loss if math.isnan(mean) else cls.BETA * mean + (1 - cls.BETA) * loss
        return {"apo_mean_loss": mean, "apo_most_promised": cls.MOST * max(loss, mean)}
