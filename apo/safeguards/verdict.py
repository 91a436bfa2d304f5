"""What a trial's evaluation says of it: whether it can be learned from, and what its step is worth."""

from __future__ import annotations

from typing import NamedTuple

from apo.objective import Evaluation

__all__ = ["LONG", "SHORT", "Worth", "overshoots", "passes", "worth"]

HARDLY = 1e-3
"""Share of the loss by which a trial has to change it to say anything of the rate before the first step."""
LONG = 1.0
"""Length of a step, over that of the weights, above which Q must not rise; before the first step the greatest."""
SHORT = 0.1
"""The greatest length of a first step, as far as momentum will carry it, where the rate was found too large before."""


class Worth(NamedTuple):
    """What a step gains at first on B′, and what curvature costs it there."""

    gain: float
    cost: float


def passes(evaluation: Evaluation, base: float, relative_length: float) -> bool:
    """Whether a trial can be learned from: Q is finite, and not far above the loss at θ.

    Stricter bounds drive rates to zero, because a step along the momentum may well go up on this batch. Yet a step as
    long as that from which units may not come back has to be worth something.

    Args:
        base: the loss at θ, negative where it is maximized.
        relative_length: of the step, over that of the weights.
    """
    if relative_length > LONG and evaluation.objective > base:
        return False
    return evaluation.objective <= base + abs(base) + 1  # False where Q is NaN


def worth(evaluation: Evaluation, base: float, slope: float) -> Worth:
    """Of the parabola through Q at θ and at θ′ with this slope at θ′, where the loss is on B′."""
    rise = evaluation.objective - base
    return Worth(slope - 2 * rise, 2 * (slope - rise))


def overshoots(evaluation: Evaluation, base: float, slope: float, *, fresh: bool) -> bool:
    """Whether Q rises along the step at θ′, and would fall along a shorter one.

    Before any step the rate is too large then, and steps at it may do what later ones can't undo. Other examples than
    the step was made of may speak against any length: then it gains nothing on them at first. Or they say nothing, as
    where batch norm has seen no batch yet: then the loss on them hardly changes.

    Args:
        fresh: whether the loss is on B′.
    """
    if slope <= 0:
        return False
    if not fresh:
        return True
    return worth(evaluation, base, slope).gain > 0 and abs(evaluation.objective - base) > HARDLY * abs(base)
