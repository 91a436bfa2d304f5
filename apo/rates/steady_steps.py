"""When a learned rate rises, is held, and falls."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from apo.loop.past_weights import Way
from apo.rates.scheduled import Scheduled

__all__ = ["SteadySteps", "Stride"]

Group = dict[str, Any]


class Stride(NamedTuple):
    """How long a step is beside the weights.

    Attributes:
        lasting: as far as momentum or a mean of gradients makes it go on.
        carried: as far as momentum carries it. A mean of gradients doesn't add them up, and Adam's first steps are much
            longer than later ones.
    """

    lasting: float = 0.0
    carried: float = 0.0


class SteadySteps:
    """Changes of ``log lr`` by ``r = ⟨V, Δ⟩ / |⟨G, Δ⟩|``, the slope in its own units.

    r is −1 where the trial left the gradient as it was, 0 where it reached the minimum along its step Δ, and 1 where it
    went twice as far. Once noise balances progress, r is about 0.3 at small rates and large ones alike, so there it
    says nothing of the rate. Therefore the rate

    - rises while the mean of r is below 0, the faster the longer that lasts;
    - is held while it is between 0 and 1¼: about 1 is where steps bounce between the walls of a valley, which at a
      lower rate only grows steeper;
    - falls above 1¼, the further the more, from ``r ≫ 1`` by about ``log r``, as far as a Newton step along Δ goes;
      above 1½ already by a short mean. In the first trials it falls by ``log r`` above 1.

    About 0.3 the way come tells what r doesn't. Let θ̄ be a mean of the weights over training, each weighed by its
    time. ``⟨G, θ − θ̄⟩`` is twice what noise adds to the loss, less what the loss falls by on the way; over
    ``−dJ/d log t`` it is w, −⅓ where there is no noise. Of the latter there are two estimates: what losses say, which
    are noisy and fall by themselves too, and what gradients say along the way, which bends. The rate rises while w is
    below 1 by both, at most as t³, and falls above 1¼ by both, at most as t^(−2), so that what noise adds is about
    what the loss falls by in the time that training has taken. Where the loss falls faster than as 1/t no noise holds
    it up, and where steps are long a cliff may be near: there this raises no rate.

    A loss on B′ says more. On these examples a step gains ``g = −⟨∇Q(θ), Δ⟩`` at first, in which the noise of its own
    batch has no part, and curvature costs it ``c = ⟨V, Δ⟩ + g``. Of short means, the rate

    - rises too while c is clearly below ½ g;
    - doesn't rise at trials that went past the minimum;
    - falls to the minimum at ``g/c`` once, but by no more than it has risen, where c is above g after a rise. Later
      noise balances progress at c = 2g, whatever the rate.

    A loss on B, which the step was fitted to, lowers r by about a half. The rate then rises below −0.5, by the short
    mean too, as no g and c stop it, and noise balances progress about −0.2. θ − θ̄ isn't fitted to it.

    Units that a step carries too far don't come back, and a plateau doesn't warn of it: there r is −1. So the rate
    rises only while a step, as far as momentum or a mean of gradients makes it last, is at most half as long as the
    weights, and falls to where momentum carries it no further.

    Where a schedule has the rate at a share s of its greatest, r + 1 and c/g are s times what they would be there.
    The rate rises by what they would be, so that what is learned doesn't make up for the schedule; w, which lags
    behind it, then raises no rate. For noise the rate falls by what the schedule hasn't fallen.

    Changes are in proportion to the share of training that has passed since the last one, so that the rate can change
    by orders of magnitude at first, and not by accident later.

    Args:
        fitted: whether the loss is on B.
    """

    MEAN, SHORT, SIZES, BRIEF = 0.9, 0.7, 0.8, 0.7
    """Of the running means: of r, of r for falls, of sizes, of g and c."""
    PAST, LEAP = 1.25, 1.5
    """The mean of r, and the short mean, above which the rate falls."""
    BALANCED = (0.0, 0.2, 0.6, 0.9)
    """Means of r at which noise may balance progress: from the first to the last, in full between the middle ones."""
    CALM = (0.3, 0.5)
    """Means of r to which the way come raises a rate in full, and from which not at all."""
    ONWARD, BACK = 1.0, 1.25
    """w below which the rate rises, and above which it falls."""
    FASTER, SLOWER = 3.0, 2.0
    """By which powers of t at most."""
    FAST = (1.0, 2.0)
    """Powers of 1/t to which the loss falls where the way come raises a rate in full, and from which not at all."""
    RECENT, BEFORE = 8.0, 2.0
    """How fast a mean of log losses follows them, over the step's logarithm, and an earlier one this mean."""
    LONG = 0.5
    """The stride above which the rate doesn't rise, or falls."""
    NEAR = 0.25
    """The stride above which the way come raises no rate."""
    FIRST = 40
    """Trials in which the rate falls in full, as training may have begun far above the right one."""
    UNTIL_ONWARD, UNTIL_NOISE = 20, 60
    """Trials before the way come raises a rate, and lowers it."""
    DOUBT = 0.1
    """Share of g's variance in that of its mean."""
    FEWEST = 2
    """Trials before g and c count."""
    EARLY = 20
    """Steps in which each update counts as much as the first."""

    def __init__(self, *, fitted: bool) -> None:
        self.fitted = fitted
        self.rises_below, self.expected, self.least = (-0.5, 0.0, -10.0) if fitted else (0.0, 0.3, -1.0)

    def prepare(self, group: Group) -> None:
        """Put what is remembered into a new group. The mean begins where a right rate would have it."""
        group.setdefault("apo_ratio_mean", self.expected)
        means = ("ratio_short", "size_mean", "gain_mean", "gain_square", "cost_mean", "back_mean", "falling_mean")
        for name in (*means, "rising", "risen"):
            group.setdefault(f"apo_{name}", 0.0)
        group.setdefault("apo_ratios", 0)
        group.setdefault("apo_share_mean", 1.0)
        for name in ("log_loss", "log_loss_before"):
            group.setdefault(f"apo_{name}", math.nan)

    def change(
        self,
        group: Group,
        slope: float,
        size: float,
        gain: float | None = None,
        cost: float | None = None,
        *,
        share: float,
        meta_lr: float,
        loss: float,
        way: Way | None = None,
        stride: Stride | None = None,
        scheduled: Scheduled | None = None,
    ) -> float:
        """The change of a group's ``log lr``.

        Args:
            slope: ``⟨V, Δ⟩``.
            size: ``|⟨G, Δ⟩|``.
            gain, cost: g and c, of a loss on B′.
            share: of the training so far, what has passed since the last update.
            meta_lr: the most that ``log lr`` rises by.
            loss: at present.
            way: what the gradient on B says of the way come; None: not known.
            stride: how long the step is; None: too short to matter.
            scheduled: where a schedule has the rate; None: there is none.
        """
        mean, short, size_mean = self._ratios(group, slope, size)
        leaps = short > self.LEAP
        at, moved = scheduled or Scheduled()
        lasting, carried = stride or Stride()
        group["apo_share_mean"] = self.MEAN * group["apo_share_mean"] + (1 - self.MEAN) * at  # as the mean of r
        group["apo_cost_mean"] *= math.exp(moved)  # as c/g goes with the rate
        least, most = self._back(group, way or Way(), self._fallen(group, loss, share))
        how_far, passed, best = self._small(group, max(mean, short) if self.fitted else mean), False, math.inf
        if gain is not None and cost is not None and size_mean > 0:
            spare, best = self._weigh(group, gain / size_mean, cost / size_mean)
            spare = 1 - (1 - spare) / at
            passed = slope > 0
            how_far = max(how_far, spare if spare > 0.5 and not passed else 0.0)
        early, change = min(1.0, self.EARLY * share), 0.0
        if how_far > 0 and not leaps and lasting <= self.LONG:
            if not passed:
                group["apo_rising"] += how_far
                change = meta_lr * early * min(1.0, 1 / 12 + group["apo_rising"] / 45) * how_far
        elif meta_lr:
            group["apo_rising"] = 0.0
            change = min(max(-moved, 0.0) - share * self._noisy(group, mean, least), 0.0)
            fall = self._fall(mean, short, first=group["apo_ratios"] <= self.FIRST)
            change = min(change, -early * fall)
            if carried > self.LONG:
                change = min(change, math.log(self.LONG / carried))
            change = min(change, self._taken_back(group, best, least, leaps=leaps))
            if change == 0 and not leaps and lasting <= self.NEAR:
                change = min(share * self._onward(group, mean, most, at), meta_lr)
        group["apo_risen"] += max(change, 0.0)
        group["apo_cost_mean"] *= math.exp(change)
        return change

    def _small(self, group: Group, mean: float) -> float:
        """From 0 to 1, how far r says that the rate is too small."""
        rises_below = group["apo_share_mean"] * (1 + self.rises_below) - 1  # as r + 1 goes with the rate
        return float(min(max(0.0, rises_below - mean) / (1 + rises_below), 1.0))

    def _fall(self, mean: float, short: float, *, first: bool) -> float:
        """By how much ``log lr`` falls where trials go too far."""
        if first:
            return math.log(short if short > self.LEAP else max(mean, 1.0))
        return math.log1p(max(mean - self.PAST, short - self.LEAP, 0.0))

    def _noisy(self, group: Group, mean: float, w: float) -> float:
        """By which power of t the rate falls for noise."""
        if group["apo_ratios"] <= self.UNTIL_NOISE or w <= self.BACK:
            return 0.0
        balanced = float(np.interp(mean - self.rises_below, self.BALANCED, (0.0, 1.0, 1.0, 0.0)))
        return self.SLOWER * balanced * (1 - self.BACK / w)

    def _onward(self, group: Group, mean: float, w: float, at: float) -> float:
        """By which power of t the rate rises, as the way come goes on."""
        scheduled = min(at, group["apo_share_mean"]) < 0.99
        if group["apo_ratios"] <= self.UNTIL_ONWARD or w >= self.ONWARD or scheduled:
            return 0.0
        calm = float(np.interp(mean - self.rises_below, self.CALM, (1.0, 0.0)))
        if not math.isnan(speed := self._speed(group)):
            calm *= float(np.interp(speed, self.FAST, (1.0, 0.0)))
        return calm * self.FASTER * (1.0 if w <= 0 else (self.ONWARD - w) / (1 + w))

    def _back(self, group: Group, way: Way, fallen: float) -> tuple[float, float]:
        """w by the greater estimate of the fall, and by the lesser; where nothing is known, as where a rate is held."""
        if math.isnan(way.back):
            return self.BACK, self.BACK
        for name, value in zip(("back_mean", "falling_mean"), way, strict=True):
            group[f"apo_{name}"] = self.MEAN * group[f"apo_{name}"] + (1 - self.MEAN) * value
        seen = 1 - self.MEAN ** group["apo_ratios"]
        back, falling = group["apo_back_mean"] / seen, group["apo_falling_mean"] / seen
        if back == 0:
            return self.BACK, self.BACK
        falls = (falling,) if math.isnan(fallen) else (falling, fallen)
        least, most = (back / f if f > 0 else math.copysign(math.inf, back) for f in (max(falls), min(falls)))
        return least, most

    def _fallen(self, group: Group, loss: float, share: float) -> float:
        """``−dJ/d log t``, by an earlier and a recent mean of the loss's logarithm; not a number where it has none."""
        if not 0 < loss < math.inf:
            return math.nan
        now, recent, before = math.log(loss), group["apo_log_loss"], group["apo_log_loss_before"]
        if math.isnan(recent):
            recent = before = now
        recent += min(self.RECENT * share, 1.0) * (now - recent)
        before += min(self.BEFORE * share, 1.0) * (recent - before)
        group["apo_log_loss"], group["apo_log_loss_before"] = recent, before
        return self._speed(group) * math.exp(recent)

    def _speed(self, group: Group) -> float:
        """By which power of 1/t the loss falls; not a number where it has no logarithm."""
        return float(self.BEFORE * (group["apo_log_loss_before"] - group["apo_log_loss"]))

    def _ratios(self, group: Group, slope: float, size: float) -> tuple[float, float, float]:
        """The means of r, the short one unbiased, and that of sizes."""
        count = group["apo_ratios"] = group["apo_ratios"] + 1
        size_mean = group["apo_size_mean"] = self.SIZES * group["apo_size_mean"] + (1 - self.SIZES) * size
        size_mean /= 1 - self.SIZES**count
        ratio = min(max(slope / size_mean, self.least), 10.0) if size_mean > 0 else 0.0
        mean: float = self.MEAN * group["apo_ratio_mean"] + (1 - self.MEAN) * ratio
        short: float = self.SHORT * group["apo_ratio_short"] + (1 - self.SHORT) * ratio
        group["apo_ratio_mean"], group["apo_ratio_short"] = mean, short
        return mean, short / (1 - self.SHORT**count), size_mean

    def _weigh(self, group: Group, gain: float, cost: float) -> tuple[float, float]:
        """Of the means of g and c: ``1 − c/g`` and ``g/c``; 0 and infinite where g is in doubt."""
        for name, value in (("gain_mean", gain), ("gain_square", gain * gain), ("cost_mean", cost)):
            group[f"apo_{name}"] = self.BRIEF * group[f"apo_{name}"] + (1 - self.BRIEF) * value
        seen = 1 - self.BRIEF ** group["apo_ratios"]
        g, c = group["apo_gain_mean"] / seen, group["apo_cost_mean"] / seen
        variance = max(group["apo_gain_square"] / seen - g * g, 0.0)
        if group["apo_ratios"] <= self.FEWEST or g <= math.sqrt(self.DOUBT * variance):
            return 0.0, math.inf
        return 1 - max(c, 0.0) / g, g / c if c > 0 else math.inf

    def _taken_back(self, group: Group, best: float, w: float, *, leaps: bool) -> float:
        """The change of ``log lr`` after a rise that went past the minimum, which is at ``best`` times the rate."""
        risen, onward = group["apo_risen"], group["apo_ratios"] > self.UNTIL_ONWARD and -math.inf < w < self.BACK
        past = risen > 0.5 and best < 0.8 and group["apo_ratio_mean"] > 0.1 and not onward
        if past or leaps:
            group["apo_risen"] = 0.0
        return max(math.log(max(best, 0.2)), -risen) if past else math.inf
