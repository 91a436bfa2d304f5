"""Before the first step, a rate at which the trial overshoots is made smaller, and no step is taken at it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import apo
from apo.wrapped.lengths import carried
from tests.apo.helpers import begun, closure_of
from tests.apo.optimizers import Lookahead

CURVATURE = 3.0


class Valley:
    """``½ · 3 w²`` from w = 1: a trial of rate ``lr`` rises along its step where ``lr · reach > ⅓``.

    Args:
        other: the objective has a loss on B′, ``½ 3 (w − 1 + other)² + level``; None: it has none.
        beside: a further weight.
        momentum: of AdaptiveLR's SGD.
    """

    def __init__(
        self,
        front_end: str,
        lr: float,
        interval: int = 1,
        *,
        other: float | None = None,
        level: float = 0.0,
        beside: float = 100.0,
        momentum: float = 0.0,
    ) -> None:
        self.model = nn.Linear(2, 1, bias=False).double()
        with torch.no_grad():
            self.model.weight.copy_(torch.tensor([[1.0, beside]]))  # of no effect, but of a length
        self.x = torch.tensor([[1.0, 0.0]]).double()
        loss = {} if other is None else {"loss": lambda y, _: self.loss(y - 1 + other) + level}
        batches = [self.x] if other is None else [(self.x, self.x)]
        goal = apo.ProximalObjective(self.model, batches, "mse", fsd_weight=0.0, wsd_weight=0.0, **loss)
        settings: dict[str, Any] = {"interval": interval, "warmup": 0}
        self.opt: apo.APO | apo.AdaptiveLR
        if front_end == "APO":
            self.opt, self.reach = apo.APO(self.model, goal, lr=lr, momentum=0.5, **settings), 2.0
        else:
            base = torch.optim.SGD(self.model.parameters(), lr=lr, momentum=momentum)
            self.opt, self.reach = apo.AdaptiveLR(base, goal, **settings), 1.0

    @staticmethod
    def loss(y: Tensor) -> Tensor:
        return CURVATURE / 2 * y.square().sum()

    @property
    def weight(self) -> float:
        return self.model.weight[0, 0].item()

    def step(self) -> None:
        self.opt.step(closure_of(self.opt, self.model, self.x, None, lambda y, _: self.loss(y)))

    def meta_step(self) -> None:
        self.opt.meta_step(closure_of(self.opt, self.model, self.x, None, lambda y, _: self.loss(y)))


@pytest.mark.parametrize("interval", [1, 5])
@pytest.mark.parametrize("front_end", ["APO", "AdaptiveLR"])
def test_the_rate_falls_until_a_trial_ends_before_the_minimum(front_end: str, interval: int) -> None:
    own = Valley(front_end, 5.0, interval)
    while own.weight == 1.0:
        assert own.opt.meta_due
        own.step()
    refused = own.opt.failed_trials
    length = 5.0 * own.reach * math.exp(-refused)
    assert length <= 1 / CURVATURE < length * math.e
    assert own.opt.steps == refused + 1
    assert 0 <= own.weight < 1
    assert own.opt.meta_due == (own.opt.steps % interval == 0)


@pytest.mark.parametrize("momentum", [0.5, 0.9])
def test_once_a_rate_was_too_large_the_first_step_is_short_as_far_as_momentum_carries_it(momentum: float) -> None:
    own = Valley("AdaptiveLR", 5.0, momentum=momentum, beside=0.3)
    while own.weight == 1.0:
        own.step()
    length = 5.0 / (1 - momentum) * math.exp(-own.opt.failed_trials) * CURVATURE / math.hypot(1, 0.3)
    assert length <= 0.1 < length * math.e
    assert own.opt.failed_trials == own.opt.steps - 1


def test_a_rate_that_was_not_is_taken_as_it_is() -> None:
    own = Valley("AdaptiveLR", 0.3, momentum=0.9)
    own.step()
    assert own.opt.failed_trials == 0


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_step_that_momentum_carries_further_than_the_weights_are_long_has_to_gain(momentum: float) -> None:
    """Here the loss on other examples rises a little, at a step of a fifth of the weights."""
    own = Valley("AdaptiveLR", 0.1, other=-1.0, level=10.0, beside=1.0, momentum=momentum)
    begun(own.opt)
    own.step()
    assert own.opt.last is not None
    assert own.opt.last.base < own.opt.last.loss < 2 * own.opt.last.base
    assert own.opt.failed_trials == (momentum > 0)


@pytest.mark.parametrize(
    ("make", "times"),
    [
        (lambda p: torch.optim.SGD(p, 0.1), 1),
        (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), 10),
        (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, dampening=0.5), 5),
        (lambda p: torch.optim.RMSprop(p, 0.1, momentum=0.75), 4),
        (lambda p: torch.optim.Adam(p, 0.1), 1),
        (lambda p: Lookahead(torch.optim.SGD(p, 0.1, momentum=0.5)), 2),
    ],
)
def test_how_far_momentum_carries_a_step(make: Callable[[Any], torch.optim.Optimizer], times: float) -> None:
    assert carried(make([nn.Parameter(torch.ones(2))])) == pytest.approx(times)


@pytest.mark.parametrize("front_end", ["APO", "AdaptiveLR"])
def test_later_trials_may_rise_along_their_step(front_end: str) -> None:
    own = Valley(front_end, 0.1)
    own.step()
    for group in own.opt.param_groups:
        group["lr"] = 0.5 / own.reach
    own.step()
    assert own.opt.failed_trials == 0


@pytest.mark.parametrize("front_end", ["APO", "AdaptiveLR"])
def test_so_may_those_of_a_meta_step_which_moves_nothing(front_end: str) -> None:
    own = Valley(front_end, 0.5 if front_end == "AdaptiveLR" else 0.25)
    own.meta_step()
    assert own.opt.failed_trials == 0
    own.step()
    assert own.opt.failed_trials == 1


@pytest.mark.parametrize("front_end", ["APO", "AdaptiveLR"])
def test_a_loss_on_other_examples_is_taken_to_be_a_parabola(front_end: str) -> None:
    """Where it falls at first, a shorter step will do; where it rises from the start, none will."""
    along = Valley(front_end, 0.5 if front_end == "AdaptiveLR" else 0.25, other=1.0)
    along.step()
    assert along.opt.failed_trials == 1
    against = Valley(front_end, 0.1, other=-1.0)
    against.step()
    assert against.opt.failed_trials == 0


@pytest.mark.parametrize(("level", "refused"), [(100.0, 1), (1e4, 0)])
@pytest.mark.parametrize("front_end", ["APO", "AdaptiveLR"])
def test_other_examples_that_hardly_notice_the_step_say_nothing_of_its_length(
    front_end: str, level: float, refused: int
) -> None:
    own = Valley(front_end, 0.55 if front_end == "AdaptiveLR" else 0.275, other=1.0, level=level)
    own.step()
    assert own.opt.failed_trials == refused


@pytest.mark.parametrize("front_end", ["APO", "AdaptiveLR"])
def test_a_checkpoint_knows_that_training_has_begun(front_end: str) -> None:
    own, fresh = Valley(front_end, 0.1), Valley(front_end, 0.1)
    own.step()
    fresh.opt.load_state_dict(own.opt.state_dict())
    for group in fresh.opt.param_groups:
        group["lr"] = 0.5 / own.reach
    fresh.step()
    assert fresh.opt.failed_trials == 0


@pytest.mark.parametrize(("beside", "refused"), [(100.0, 0), (0.3, 1)])
@pytest.mark.parametrize("front_end", ["APO", "AdaptiveLR"])
def test_a_first_trial_is_no_longer_than_the_weights(front_end: str, beside: float, refused: int) -> None:
    """Though it may gain, as here on other examples, whose minimum lies far ahead."""
    own = Valley(front_end, 0.6, other=8.0, beside=beside)
    own.step()
    assert own.opt.last is not None
    assert own.opt.last.loss < own.opt.last.base
    assert own.opt.failed_trials == refused


@pytest.mark.parametrize("front_end", ["APO", "AdaptiveLR"])
def test_weights_of_zero_say_nothing_of_lengths(front_end: str) -> None:
    own = Valley(front_end, 0.1)
    nn.init.zeros_(own.model.weight)
    own.opt.step(closure_of(own.opt, own.model, own.x, None, lambda y, _: own.loss(y - 1)))
    assert own.opt.failed_trials == 0
    assert own.weight > 0


@pytest.mark.parametrize(("other", "refused"), [(8.0, 0), (1.0, 1)])
@pytest.mark.parametrize("front_end", ["APO", "AdaptiveLR"])
def test_later_trials_that_are_longer_must_gain(front_end: str, other: float, refused: int) -> None:
    """On other examples the loss falls, or rises by less than makes a trial fail otherwise."""
    own = Valley(front_end, 0.01, other=other, beside=0.3, level=100.0)
    own.step()
    for group in own.opt.param_groups:
        group["lr"] = 1.2 / own.reach
    own.step()
    assert own.opt.failed_trials == refused
