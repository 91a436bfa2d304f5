"""How much of the trial's step is taken, where gradients are noisy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

__all__ = ["NoiseFactor"]


class NoiseFactor:
    """The factor by which steps are shorter than the trial that φ is judged by.

    A trial fits the batch that it is made of, noise and all. The next batch says what a step was worth to others. With
    ``Δ`` the last step and G the next batch's gradient, before and after it, the step's gain at first is
    ``g = −⟨G(θ − Δ), Δ⟩``, and ``c = ⟨G(θ) − G(θ − Δ), Δ⟩`` what the loss's curvature takes from it on the way. Of
    their running means,

    - ``g > c``: the step ends before the minimum on fresh examples. The factor rises;
    - ``½ c < g < c``: it goes too far. The factor falls, fastest at ``½ c``, where a step gains nothing;
    - ``g < ½ c``: every step loses, which can't go on for long. So noise doesn't add up here, as where few batches
      are drawn without replacement and cancel within an epoch. It falls less, and rises again below ``¼ c``.

    ``c`` is seen in every third look, and in the first few. In between it is taken to be as large for its ``‖Δ‖²`` as
    it was, so that these looks need no gradient but the one at hand.

    ``log factor`` changes in proportion to ``log t`` of the step t, and the means follow at least as fast. It doesn't
    fall while the loss falls faster than ``1/t``, and less the faster it falls: then there is more to gain from steps
    than from less noise.
    """

    NUMBERS: ClassVar[dict[str, Any]] = {
        "apo_noise_factor": 1.0,
        "apo_noise_gain": 0.0,
        "apo_noise_cost": 0.0,
        "apo_noise_curvature": math.nan,
        "apo_noise_log_loss": math.nan,
        "apo_noise_looks": 0,
        "apo_noise_step": 0,
    }
    """What is remembered, and how it starts."""
    BETA, MEAN_SPEED = 0.9, 2.0
    """Of the running means of g and c: a look's share of them is 0.1, or this speed times its share of the training."""
    SPEED = 1.0
    """Greatest change of the logarithm, over that of the step's."""
    LONGEST = 0.1
    """Greatest share of the training so far that one look counts for."""
    FEWEST = 4
    """Looks before the factor changes."""
    EVERY = 3
    """Looks from one that sees the cost to the next."""
    LOSS_SPEED = 2.0
    """At which the mean of log losses follows them, likewise over the step's logarithm."""
    RATIOS, DIRECTIONS = (0.0, 0.25, 0.5, 1.0, 2.0), (0.5, 0.0, -1.0, 0.0, 1.0)
    """Of ``g/c``, and where the factor goes there; in between evenly."""

    @classmethod
    def sees_cost(cls, held: Mapping[str, Any]) -> bool:
        """Whether the next look needs the gradient before the step as well."""
        looks = held["apo_noise_looks"]
        return bool(looks < cls.FEWEST or looks % cls.EVERY == 0)

    def look(
        self,
        held: Mapping[str, Any],
        after: float,
        square: float,
        before: float | None,
        size: float,
        *,
        step: int,
        loss: float,
    ) -> dict[str, Any]:
        """What is remembered after a look at the last step.

        Args:
            held: what was remembered until now.
            after, before: ``−⟨G, Δ⟩`` after the step Δ, and before it; None where :meth:`sees_cost` said no.
            square: ``‖Δ‖²``, > 0.
            size: what the slopes are measured in, > 0.
            step: t.
            loss: at present.
        """
        curvature = held["apo_noise_curvature"] if before is None else (before - after) / square
        before = after + curvature * square
        looks = held["apo_noise_looks"] + 1
        share = min((step - held["apo_noise_step"]) / max(step, 1), self.LONGEST)
        beta = min(self.BETA, 1 - self.MEAN_SPEED * share)
        gain = beta * held["apo_noise_gain"] + (1 - beta) * before / size
        cost = beta * held["apo_noise_cost"] + (1 - beta) * (before - after) / size
        direction = float(np.interp(gain / cost if cost > 0 else math.inf, self.RATIOS, self.DIRECTIONS))
        log_loss = held["apo_noise_log_loss"]
        if loss > 0:
            now = math.log(loss)
            log_loss = now if math.isnan(log_loss) else log_loss
            slope = self.LOSS_SPEED * (now - log_loss)
            log_loss += self.LOSS_SPEED * share * (now - log_loss)
            if direction < 0:
                direction *= min(max(1 + slope, 0.0), 1.0)
        change = self.SPEED * share * direction if looks >= self.FEWEST else 0.0
        return {
            "apo_noise_factor": min(held["apo_noise_factor"] * math.exp(change), 1.0),
            "apo_noise_gain": gain,
            "apo_noise_cost": cost,
            "apo_noise_curvature": curvature,
            "apo_noise_log_loss": log_loss,
            "apo_noise_looks": looks,
            "apo_noise_step": step,
        }
