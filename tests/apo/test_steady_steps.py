"""When a learned rate rises, is held, and falls."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import apo
from apo.loop.past_weights import Way
from apo.rates.log_rates import LogRates
from apo.rates.scheduled import Scheduled
from apo.rates.steady_steps import SteadySteps, Stride

EARLY = 1 / 20


def path(
    ratio: Callable[[int], float],
    updates: int,
    *,
    fitted: bool = False,
    size: float = 1.0,
    gain: Callable[[int], float] | None = None,
    loss: Callable[[int], float] = lambda i: 0.9**i,
    way: Way | None = None,
    share: float = 1.0,
) -> list[float]:
    """``log lr`` after each update of early training, where slope and gain are in units of the size. The loss falls.
    A schedule has the rate at a share of its height."""
    rule, group, log = SteadySteps(fitted=fitted), dict[str, Any](), [0.0]
    rule.prepare(group)
    for i in range(updates):
        slope = ratio(i) * size
        worth = () if gain is None else (gain(i) * size, gain(i) * size + slope)
        at = Scheduled(share, math.log(share) if i == 0 else 0.0)
        now = {"share": EARLY, "meta_lr": 0.3, "loss": loss(i), "way": way}
        log.append(log[-1] + rule.change(group, slope, size, *worth, **now, scheduled=at))
    return log


@pytest.mark.parametrize("fitted", [False, True])
def test_a_rate_far_too_small_rises_by_orders_and_the_faster_the_longer(fitted: bool) -> None:
    log = path(lambda _: -1.0, 66, fitted=fitted)  # as many as there are in a warm-up
    assert log[-1] > math.log(1000)
    rises = [b - a for a, b in pairwise(log[20:])]
    assert all(a <= b + 1e-12 for a, b in pairwise(rises))
    assert max(rises) <= 0.3 + 1e-12


def test_a_rate_far_too_large_falls_at_once_as_a_newton_step_would() -> None:
    log = path(lambda _: 9.0, 2)
    assert log[1] == pytest.approx(-math.log(9))


def test_trials_that_leap_a_little_take_little() -> None:
    """At rates that are right, three in a row may."""
    held = path(lambda _: 0.5, 80)[-1]
    assert 0.05 < held - path(lambda i: 2.2 if 50 <= i <= 52 else 0.5, 80)[-1] < 0.3
    assert held - path(lambda i: 2.2 if 20 <= i <= 22 else 0.5, 80)[-1] > 0.4  # a start that may be far too high


@pytest.mark.parametrize("ratio", [0.9, 1.0])
def test_where_steps_bounce_between_the_walls_of_a_valley_the_rate_is_held(ratio: float) -> None:
    log = path(lambda _: ratio, 100, loss=lambda _: 1.0)
    assert -math.log(1.6) < log[-1] <= 0


@pytest.mark.parametrize("ratio", [0.2, 0.3, 0.5, 0.7])
def test_what_noise_looks_like_hardly_changes_a_rate(ratio: float) -> None:
    torch.manual_seed(0)
    noise = (0.5 * torch.randn(66)).tolist()
    log = path(lambda i: ratio + noise[i], 66)
    assert -math.log(2.5) < log[-1] < math.log(1.5)


def late(
    w: float,
    *,
    fitted: bool = False,
    ratio: float = 0.3,
    speed: float = 0.2,
    fallen: float = 0.0,
    beside: float = 1.0,
    lasting: float = 0.0,
) -> float:
    """The power of t by which a rate goes late in training, of a loss that falls as ``t**-speed``, where going back
    would gain w times what that is over log t. By gradients it falls by ``beside`` times as much as by losses. A
    schedule lets the rate fall by a power of its own. Steps are ``lasting`` times as long as the weights."""
    rule, group, log = SteadySteps(fitted=fitted), dict[str, Any](), []
    rule.prepare(group)
    for step in range(100, 10_000, 10):
        loss = 3 * step**-speed
        way = Way(w * speed * loss, beside * speed * loss) if speed else Way(w, 0.0)
        now = {"share": 10 / step, "meta_lr": 0.3, "loss": loss, "way": way}
        at = Scheduled(1.0, -fallen * 10 / step)
        log.append(rule.change(group, ratio - 0.5 * fitted, 1.0, **now, scheduled=at, stride=Stride(lasting)))
    return sum(log[290:]) / math.log(10_000 / 3000)  # from step 3,000


@pytest.mark.parametrize("fitted", [False, True])
def test_a_rate_rises_by_orders_where_the_way_goes_on_though_noise_hides_it_from_single_steps(fitted: bool) -> None:
    assert late(-1 / 3, fitted=fitted) == pytest.approx(3, rel=0.1)
    assert late(1 / 3, fitted=fitted) == pytest.approx(1.5, rel=0.1)
    assert late(1.1, fitted=fitted) == 0


@pytest.mark.parametrize("fitted", [False, True])
def test_a_rate_falls_where_noise_adds_more_to_the_loss_than_it_falls_by(fitted: bool) -> None:
    """The faster the more, as 1/t² at most, which is where the loss stands still."""
    assert late(2.5, fitted=fitted) == pytest.approx(-1, rel=0.1)
    assert late(5, fitted=fitted) == pytest.approx(-1.5, rel=0.1)
    assert late(1.0, speed=0, fitted=fitted) == pytest.approx(-2, rel=0.1)


@pytest.mark.parametrize("speed", [0.02, 1.0])
def test_the_way_counts_beside_what_the_loss_falls_by(speed: float) -> None:
    assert late(1 / 3, speed=speed) == pytest.approx(late(1 / 3), rel=0.15)
    assert late(2.5, speed=speed) == pytest.approx(late(2.5), rel=0.15)


def test_it_does_not_raise_a_rate_at_which_steps_bounce() -> None:
    assert [late(-1 / 3, ratio=ratio) > 0 for ratio in (0.1, 0.3, 0.4, 0.55, 0.7, 1.0)] == [True] * 3 + [False] * 3


def test_nor_one_that_a_schedule_has_lowered() -> None:
    """As the weights come to rest then, the way goes on whatever the rate."""
    noisy: dict[str, Any] = {"way": Way(-1.0, 3.0), "loss": lambda i: 0.99**i}
    assert path(lambda _: 0.3, 66, **noisy)[-1] > 1
    assert path(lambda _: 0.3 * 0.5 - 0.5, 66, **noisy, share=0.5)[-1] <= 0


def test_nor_one_at_which_the_loss_falls_faster_than_where_noise_holds_it_up() -> None:
    """As behind a cliff, or where all examples come to be fitted."""
    assert late(-1 / 3, speed=1.5) == pytest.approx(1.5, rel=0.1)
    assert late(-1 / 3, speed=2.5) == 0


def test_nor_one_at_which_steps_are_long_beside_the_weights() -> None:
    assert [late(-1 / 3, lasting=lasting) > 0 for lasting in (0.1, 0.24, 0.26, 0.5)] == [True, True, False, False]


@pytest.mark.parametrize("fitted", [False, True])
@pytest.mark.parametrize(("share", "rise"), [(0.5, 300), (0.1, 50), (0.01, 2)])
def test_what_is_learned_does_not_make_up_for_a_schedule(fitted: bool, share: float, rise: float) -> None:
    """A rate that is right at a schedule's height is right below it. One that is far too small there is too, though
    the less is left of it the longer that takes to show."""
    right, small = -0.2 if fitted else 0.3, -0.999
    assert path(lambda _: share * (1 + right) - 1, 66, fitted=fitted, share=share)[-1] <= 0
    assert path(lambda _: share * (1 + small) - 1, 66, fitted=fitted, share=share)[-1] > math.log(rise)


def test_nor_where_curvature_costs_little_of_a_gain_that_a_schedule_has_made_small() -> None:
    for c_over_g, rises in ((0.8, False), (0.1, True)):
        assert (path(lambda _, c=0.1 * c_over_g: c - 1, 66, gain=lambda _: 1.0, share=0.1)[-1] > 1) == rises


@pytest.mark.parametrize("fallen", [0.5, 1.0, 2.0])
def test_for_noise_a_rate_falls_by_what_a_schedule_has_not_fallen(fallen: float) -> None:
    assert late(2.5, fallen=fallen) == pytest.approx(-max(1 - fallen, 0), rel=0.1, abs=1e-9)


def test_a_loss_without_a_logarithm_leaves_it_to_the_way() -> None:
    found = [path(lambda _: 0.3, 100, loss=lambda _: -1.0, way=way)[-1] for way in (Way(0.2, 1.0), Way(1.1, 1.0))]
    assert found[0] > found[1] + 1
    assert path(lambda _: 0.3, 100, loss=lambda _: -1.0, way=Way(3.0, 1.0))[-1] < found[1] - 0.5


def test_a_rate_changes_only_where_two_estimates_of_the_fall_agree() -> None:
    """Losses fall by themselves too, and are noisy; a way may have turned back."""
    assert late(0.4, beside=0.2) == late(3.0, beside=5) == 0  # w is 2 and 0.6 by gradients
    assert late(0.4, beside=0.5) == pytest.approx(late(0.8), rel=0.1)
    assert late(5, beside=2) == pytest.approx(late(2.5), rel=0.1)
    assert late(0.4, beside=-1) == 0


def test_a_way_that_is_not_known_changes_no_rate() -> None:
    held = path(lambda _: 0.4, 100, loss=lambda _: 1.0)
    assert held[-1] == held[20]


def test_what_is_a_part_of_the_step_has_its_part_of_the_fall() -> None:
    """Two groups, of which one makes a tenth of the step: both are as far from where they should be."""
    rates = LogRates(meta_lr=0.3, meta_optimizer="steady", fitted=False, shared_lr=False, bounds=(1e-10, 1e10))
    groups: list[dict[str, Any]] = [{"lr": 1.0}, {"lr": 1.0}]
    for group in groups:
        rates.prepare(group)
    for step in range(100, 1000, 10):
        loss = 3 * step**-0.2
        parts = [0.9, 0.1]
        ways = [Way(0.5 * 0.2 * loss * part, 0.2 * loss * part) for part in parts]
        rates.update(groups, [0.3 * x for x in parts], parts, 10 / step, None, loss, ways)
    assert groups[0]["lr"] == pytest.approx(groups[1]["lr"])
    assert groups[0]["lr"] > 2


def test_a_rise_ends_with_the_trials_that_asked_for_it() -> None:
    """Without a gain and a cost that say so, a rate on a plateau would rise by orders while the mean follows."""
    log = path(lambda i: -1.0 if i < 50 else -0.1, 66, fitted=True, loss=lambda _: 1.0)
    assert log[50] > math.log(100)
    assert max(log) - log[50] < math.log(2)


def test_a_loss_that_the_step_was_fitted_to_raises_no_rate_by_that() -> None:
    assert abs(path(lambda _: -0.4, 66, fitted=True)[-1]) < 0.6
    assert path(lambda _: -0.4, 66, fitted=False)[-1] > 1.5


def test_a_gain_that_curvature_hardly_costs_raises_a_rate_through_noise() -> None:
    """The slope is a tenth of what the step gained on its own batch, for the rest is noise, as of single slopes."""
    torch.manual_seed(0)
    noise = (0.1 * torch.randn(66)).tolist()
    slopes = [-0.1 + x for x in noise]
    without = path(slopes.__getitem__, 66)[-1]
    with_gain = path(slopes.__getitem__, 66, gain=lambda i: 0.01 - slopes[i])[-1]
    assert without < 0.2 * with_gain
    assert with_gain > math.log(10)


def test_no_rate_rises_at_a_trial_that_went_past_the_minimum() -> None:
    """Though the mean of slopes still says so."""
    log = path(lambda i: -1.0 if i < 20 else 0.2, 24, gain=lambda _: 1.0)
    assert log[20] > log[19]
    assert all(b <= a for a, b in pairwise(log[20:]))


def test_a_rise_that_went_too_far_is_taken_back_once() -> None:
    log = path(lambda i: -0.98 if i < 25 else 0.8, 60, gain=lambda _: 1.0)
    changes = [b - a for a, b in pairwise(log)]
    falls = [change for change in changes if change < -0.1]
    assert len(falls) == 1
    assert falls[0] == pytest.approx(-math.log(1.8), rel=0.1)  # the minimum is at 1/1.8 of the way
    assert abs(sum(changes[changes.index(falls[0]) + 1 :])) < 0.5


def test_no_more_is_taken_back_than_was_risen() -> None:
    log = path(lambda i: -0.98 if i < 16 else 1.4, 30, gain=lambda i: 1.0 if i < 16 else 0.2)
    assert 0.5 < max(log) < 1.5
    assert min(log[16:]) > -0.3


@given(size=st.floats(1e-12, 1e12), seed=st.integers(0, 100))
@settings(max_examples=20, deadline=None)
def test_the_unit_of_the_loss_does_not_matter(size: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ratios = torch.randn(30, generator=generator).tolist()
    for gain in (None, lambda i: 0.5 - ratios[i] / 2):
        assert path(ratios.__getitem__, 30, size=size, gain=gain) == pytest.approx(
            path(ratios.__getitem__, 30, gain=gain)
        )


def test_gain_and_cost_are_those_of_the_loss_on_other_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a quadratic they follow from Q at θ and θ′ and the slope at θ′ alone, to rounding."""
    torch.manual_seed(0)
    model = nn.Linear(5, 2).double()
    B, other = ((torch.randn(8, 5).double(), torch.randn(8, 2).double()) for _ in range(2))
    objective = apo.ProximalObjective(model, [other], "mse", loss=F.mse_loss, fsd_weight=0.3, wsd_weight=0.1)
    opt = apo.AdaptiveLR(torch.optim.SGD(model.parameters(), 0.05), objective)
    seen = []
    taken = opt.rates.update
    monkeypatch.setattr(opt.rates, "update", lambda *each: (seen.append(each[4]), taken(*each))[1])
    F.mse_loss(model(other[0]), other[1]).backward()  # type: ignore[no-untyped-call]
    there = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    start = [p.detach().clone() for p in model.parameters()]
    F.mse_loss(model(B[0]), B[1]).backward()  # type: ignore[no-untyped-call]
    steps = [-0.05 * p.grad for p in model.parameters() if p.grad is not None]
    opt.step()
    ((gain, cost),) = seen
    assert gain == pytest.approx(-sum(float((g * d).sum()) for g, d in zip(there, steps, strict=True)), rel=1e-9)
    with torch.no_grad():
        moved = [x + d for x, d in zip(start, steps, strict=True)]
        outputs = [other[0] @ W.T + b for W, b in (start, moved)]
        curved = F.mse_loss(outputs[1], outputs[0])  # its own curvature, the loss's, and half of it: the discrepancy's
        wsd = sum(float((d * d).sum()) for d in steps)
    rho = apo.ProximalObjective(model, [other], "mse").discrepancy(outputs[1], outputs[0])
    assert cost == pytest.approx(2 * float(curved) + 2 * 0.3 * float(rho) + 0.1 * wsd, rel=1e-9)


def test_later_changes_are_in_proportion_to_the_time_between_them() -> None:
    """The same in ten updates a tenth apart as in one, once the means have settled."""
    found = []
    for every in (1, 10):
        rule, group = SteadySteps(fitted=False), dict[str, Any]()
        rule.prepare(group)
        steps = range(1000, 3000, every)
        log = [rule.change(group, 0.5, 1.0, share=every / step, meta_lr=0.3, loss=1.0) for step in steps]
        found.append(sum(log[-1000 // every :]))
    assert found[0] == pytest.approx(found[1], rel=0.05)


def test_no_slope_no_change() -> None:
    rule, group = SteadySteps(fitted=True), dict[str, Any]()
    rule.prepare(group)
    assert rule.change(group, 0.0, 0.0, share=1.0, meta_lr=0.3, loss=1.0) == 0


def regression(lr: float, clip: float | None, steps: int = 200) -> tuple[float, float]:
    """The learned rate and the loss, on noisy targets."""
    torch.manual_seed(0)
    x, w = torch.randn(2000, 10), torch.randn(10, 1)
    y = x @ w + torch.randn(2000, 1)
    model = nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 1))

    def batch() -> tuple[Tensor, Tensor]:
        rows = torch.randint(0, 2000, (32,))
        return x[rows], y[rows]

    objective = apo.ProximalObjective(model, batch, "mse", loss=F.mse_loss)
    opt = apo.AdaptiveLR(torch.optim.SGD(model.parameters(), lr, momentum=0.9), objective)
    for _ in range(steps):
        inputs, targets = batch()

        def closure(inputs: Tensor = inputs, targets: Tensor = targets) -> Tensor:
            opt.zero_grad()
            loss = F.mse_loss(model(inputs), targets)
            loss.backward()  # type: ignore[no-untyped-call]
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            return loss

        opt.step(closure)
    return float(opt.param_groups[0]["lr"]), F.mse_loss(model(x), y).item()


def test_from_any_start_to_about_the_same_loss() -> None:
    losses = [regression(lr, None)[1] for lr in (1e-4, 1e-2, 1.0)]
    assert max(losses) < 1.5 * min(losses)


def test_clipping_is_not_taken_for_a_leap() -> None:
    """Gradients a hundred times shorter than on B′ would say at each step that it went far too far."""
    rate, loss = regression(0.1, 0.05)
    assert rate > 0.02
    assert loss < 1.5 * regression(0.1, None)[1]
