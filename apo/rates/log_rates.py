"""Learned learning rates: ``φ = log lr``, one per param group or one factor for all."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

from torch import Tensor

from apo import checks
from apo.loop.past_weights import Way
from apo.rates.scheduled import Scheduled
from apo.rates.schedules import Schedules
from apo.rates.steady_steps import SteadySteps, Stride

__all__ = ["LogRates", "RateOptimizer", "get_rate", "set_rate"]

Group = dict[str, Any]
RateOptimizer = Literal["steady", "adam", "rmsprop"]

UNKNOWN = float("nan")
LEAST_SQUARE = 1e-150
"""Keeps slopes that underflow when squared from being divided by."""


def get_rate(group: Group) -> float:
    return float(group["lr"])


def set_rate(group: Group, rate: float) -> None:
    """Write a learning rate where the optimizer reads it: capturable ones hold it in a tensor."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


class LogRates:
    """Descends ``dQ/d log lr``. The rates stand in ``param_groups["lr"]``; what is remembered of each group stands
    beside it under keys that begin with ``"apo_"``, so that every checkpoint holds it.

    Args:
        meta_lr: about how much ``log lr`` moves in an update.
        meta_optimizer: ``"rmsprop"``, ``"adam"``, ``"relative"`` or ``"steady"``. RMSprop has no bias correction: its
            first steps are up to ``1/√(1 − meta_decay)`` times the rate, which helps a rate recover from a poor start.
            Relative steps divide each slope by its size, clamp it to ±1 and average it (:attr:`RELATIVE_BETA`):
            no change is larger than ``meta_lr``, whatever the magnitude of the slopes. Steady ones:
            :class:`~apo.rates.steady_steps.SteadySteps`.
        meta_decay: of the running mean of squared slopes.
        fitted: whether Q's loss is on B, which the step was fitted to; of steady steps.
        shared_lr: one factor for all groups, whose rates keep their ratios.
        bounds: ``(least, greatest)`` rate. A rate of 0 is frozen and stays 0.
        rescale_schedule: multiply what a scheduler writes by what was learned, instead of taking it as the new value.

    Raises:
        TypeError, ValueError: an argument isn't as above.
    """

    RELATIVE_BETA = 0.8

    def __init__(
        self,
        *,
        meta_lr: float,
        meta_optimizer: RateOptimizer | Literal["relative"] = "rmsprop",
        meta_decay: float = 0.99,
        fitted: bool = True,
        shared_lr: bool,
        bounds: tuple[float, float],
        rescale_schedule: bool = False,
    ) -> None:
        self.meta_lr = checks.number("meta_lr", meta_lr)
        checks.one_of("meta_optimizer", meta_optimizer, ("steady", "adam", "rmsprop", "relative"))
        self.meta_optimizer = meta_optimizer
        self.meta_decay = checks.fraction("meta_decay", meta_decay)
        self._steady = SteadySteps(fitted=fitted) if meta_optimizer == "steady" else None
        self.shared_lr = checks.boolean("shared_lr", shared_lr)
        self.rescale_schedule = checks.boolean("rescale_schedule", rescale_schedule)
        self.bounds = checks.increasing_pair("bounds", bounds)
        self._warned = False
        self._evidence, self._last_factor = 0.0, UNKNOWN

    def prepare(self, group: Group) -> None:
        """Put what is remembered of a rate into a new group."""
        if self._steady is not None:
            self._steady.prepare(group)
            Scheduled.prepare(group)
        else:
            group.setdefault("apo_slope_mean", 0.0)
            group.setdefault("apo_slope_square", 0.0)
            group.setdefault("apo_rate_updates", 0)
        group.setdefault("apo_log_factor", 0.0)
        group.setdefault("apo_found_lr", UNKNOWN)
        group.setdefault("apo_left_lr", UNKNOWN)

    def notice(self, groups: Sequence[Group], schedules: Schedules) -> bool:
        """Look at what others wrote into the rates since they were last left. Call it before every step.

        Returns:
            Whether a learned rate was overwritten.
        """
        written = [g for g in groups if not math.isnan(g["apo_left_lr"]) and get_rate(g) != g["apo_left_lr"]]
        if not written:
            return False
        keeps = schedules.keep_what_was_learned(groups)
        overwritten = False
        for group in written:
            found, left, before = get_rate(group), group["apo_left_lr"], group["apo_found_lr"]
            # from a rate of 0 nothing can be multiplied; at one, what was learned is still remembered
            kept = found == 0 or (left != 0 and (self._seems_kept(found, left, before) if keeps is None else keeps))
            if not kept and self.rescale_schedule:
                set_rate(group, self._within(found * math.exp(group["apo_log_factor"])))
                kept = True
            if not kept:
                overwritten = True
                group["apo_log_factor"] = 0.0
            if self._steady is not None:
                Scheduled.notice(group, kept=kept)
            group["apo_found_lr"] = group["apo_left_lr"] = get_rate(group)
        if overwritten and not self._warned:
            self._warned = True
            warnings.warn(
                "something else, such as a LambdaLR, sets the lr that was learned, so that what was learned is lost. "
                "Build the optimizer with rescale_schedule=True to multiply the schedule by what is learned, or "
                "leave the scheduler out.",
                stacklevel=4,
            )
        return overwritten

    def _seems_kept(self, found: float, left: float, before: float) -> bool:
        """Whether a rate that no scheduler of torch's wrote was multiplied rather than set from its own base.

        What is set mostly lies near what was ``before`` the learned change, what is multiplied near what was
        ``left``. As a decay may just cancel what is learned, it takes more than a little of it to tell.
        """
        if self.rescale_schedule or found == before:
            return False
        factor = found / left
        self._evidence += abs(math.log(factor)) - 2 * abs(math.log(found / before))
        if math.isclose(factor, self._last_factor, rel_tol=1e-9):
            self._evidence = 0.0
        self._last_factor = factor
        self._evidence = max(self._evidence, -1.0)
        return self._evidence < 0.3

    def update(
        self,
        groups: Sequence[Group],
        slopes: Sequence[float],
        sizes: Sequence[float] | None = None,
        share: float = 1.0,
        worth: tuple[float, float] | None = None,
        loss: float = math.nan,
        ways: Sequence[Way] = (),
        stride: Stride | None = None,
    ) -> list[float]:
        """Descend ``dQ/d log lr``.

        Args:
            slopes: one per group, ``⟨V, Δ⟩``.
            sizes: their magnitudes if V equalled G, ``|⟨G, Δ⟩|``; of relative and steady steps.
            share: of the training so far, what has passed since the last update; of steady steps.
            worth: the gain and the cost of the whole step on fresh examples, of which each group has a part by its
                size, as of what the loss falls by; of steady steps.
            loss: at present; of steady steps.
            ways: one per group, by the gradients on B; of steady steps.
            stride: of the whole step; of steady steps.

        Returns:
            Each group's new rate over its old one.
        """
        whole = sum(sizes or ())
        if self.shared_lr:
            slopes = [sum(slopes)] * len(groups)
            sizes = None if sizes is None else [whole] * len(groups)
            ways = [Way(*map(sum, zip(*ways, strict=True)))] * len(groups) if ways else ()
        if sizes is None:
            changes = [self._step(group, slope) for group, slope in zip(groups, slopes, strict=True)]
        elif self._steady is None:
            changes = [self._relative_step(*each) for each in zip(groups, slopes, sizes, strict=True)]
        else:
            change = partial(self._steady.change, share=share, meta_lr=self.meta_lr, loss=loss, stride=stride)
            changes = []
            for group, slope, size, way in zip(groups, slopes, sizes, ways or [Way()] * len(groups), strict=True):
                part = size / whole if whole else 0.0
                own = () if worth is None or not whole else [x * part for x in worth]
                way = Way(*(x / part for x in way)) if part else Way()  # beside what the whole loss falls by
                scheduled = Scheduled.of(group, get_rate(group) * math.exp(-group["apo_log_factor"]))
                changes.append(change(group, slope, size, *own, way=way, scheduled=scheduled))
        return [self._change(group, change) for group, change in zip(groups, changes, strict=True)]

    def shrink(self, groups: Sequence[Group]) -> None:
        """Divide every rate by e: the trial at these rates failed."""
        for group in groups:
            self._change(group, -1.0)

    def scale(self, groups: Sequence[Group], changes: Sequence[float], places: Sequence[int]) -> list[float]:
        """Change every log rate by the mean of the changes that stand for its group (for any group, where one
        factor is shared), not as a step of learning. Returns each group's new rate over its old one."""
        found = []
        for place, group in enumerate(groups):
            own = [c for c, at in zip(changes, places, strict=True) if self.shared_lr or at == place]
            found.append(self._change(group, sum(own) / len(own)) if own else 1.0)
        return found

    def _relative_step(self, group: Group, slope: float, size: float) -> float:
        """The change of log lr by a slope over its size."""
        group["apo_rate_updates"] += 1
        beta, ratio = self.RELATIVE_BETA, min(max(slope / size, -1.0), 1.0) if size > 0 else 0.0
        mean = group["apo_slope_mean"] = beta * group["apo_slope_mean"] + (1 - beta) * ratio
        return float(-self.meta_lr * mean / (1 - beta ** group["apo_rate_updates"]))

    def _step(self, group: Group, slope: float) -> float:
        """RMSprop's or Adam's change of log lr."""
        group["apo_rate_updates"] += 1
        count, decay = group["apo_rate_updates"], self.meta_decay
        square = group["apo_slope_square"] = decay * group["apo_slope_square"] + (1 - decay) * slope * slope
        if self.meta_optimizer == "rmsprop":
            return -self.meta_lr * slope / (math.sqrt(square) + LEAST_SQUARE)
        mean = group["apo_slope_mean"] = 0.9 * group["apo_slope_mean"] + 0.1 * slope
        root = math.sqrt(square / (1 - decay**count))
        return float(-self.meta_lr * mean / (1 - 0.9**count) / (root + LEAST_SQUARE))

    def _change(self, group: Group, change: float) -> float:
        old = get_rate(group)
        if old == 0:
            return 1.0
        set_rate(group, self._within(old * math.exp(change)))
        new = get_rate(group)
        if math.isnan(group["apo_found_lr"]) or group["apo_left_lr"] != old:
            group["apo_found_lr"] = old
        group["apo_left_lr"] = new
        group["apo_log_factor"] += math.log(new / old)
        return new / old

    def _within(self, rate: float) -> float:
        return min(max(rate, self.bounds[0]), self.bounds[1])
