"""The manual schedules of the learning rate, which learned rates are compared with."""

import math
from collections.abc import Callable, Sequence

SCHEDULES = {
    "step": "multiplied by `factor` at the task's milestones (Table 4's Decay)",
    "warmup": "rising linearly over the share `warmup` of the run, then constant",
    "warmup-decay": "rising linearly, then falling with the inverse square root of the step",
    "cooldown": "constant, then falling linearly to 0 over the last 0.3 of the run",
}
COOLDOWN = 0.3


def factor(
    name: str, total: int, milestones: Sequence[float], *, decay: float, warmup: float
) -> Callable[[int], float]:
    """What the rate is multiplied by at each step of a run of ``total`` steps; ValueError where there is none."""
    if name == "step":
        return lambda step: decay ** sum(step >= round(m * total) for m in milestones)
    if name == "cooldown":
        return lambda step: min((total - step) / (COOLDOWN * total), 1.0)
    rise = max(round(warmup * total), 1)
    if name == "warmup":
        return lambda step: min((step + 1) / rise, 1.0)
    if name == "warmup-decay":
        return lambda step: min((step + 1) / rise, math.sqrt(rise / (step + 1)))
    raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, but got {name!r}")
