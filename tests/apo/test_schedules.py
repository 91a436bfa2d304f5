"""Schedulers: those that multiply the learned rate, those that set it from their own base, and both together."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler as torch_schedulers

import apo
from tests.apo.helpers import closure_of, same, weights

RATE = 1e-3
Make = Callable[[Any], Any]


def linear(opt: Any, factor: float) -> Any:
    return torch_schedulers.LinearLR(opt, factor, total_iters=5)


def cosine(opt: Any) -> Any:
    return torch_schedulers.CosineAnnealingLR(opt, 60)


def hugging_face(name: str, *arguments: int) -> Make:
    def make(opt: Any) -> Any:
        return getattr(pytest.importorskip("transformers.optimization"), name)(opt, *arguments)

    return make


MULTIPLY: dict[str, Make] = {
    "CosineAnnealingLR": cosine,
    "StepLR": lambda opt: torch_schedulers.StepLR(opt, 4, 0.5),
    "MultiStepLR": lambda opt: torch_schedulers.MultiStepLR(opt, [3, 7], 0.1),
    "ExponentialLR": lambda opt: torch_schedulers.ExponentialLR(opt, 0.9),
    "MultiplicativeLR": lambda opt: torch_schedulers.MultiplicativeLR(opt, lambda _: 0.95),
    "ConstantLR": lambda opt: torch_schedulers.ConstantLR(opt, 0.5, 5),
    "LinearLR": lambda opt: linear(opt, 0.1),
    "PolynomialLR": lambda opt: torch_schedulers.PolynomialLR(opt, 60),
    "ReduceLROnPlateau": lambda opt: torch_schedulers.ReduceLROnPlateau(opt, patience=0, factor=0.5),
    "ChainedScheduler": lambda opt: torch_schedulers.ChainedScheduler(
        [linear(opt, 0.1), torch_schedulers.ExponentialLR(opt, 0.97)]
    ),
    "by hand": lambda opt: ByHand(opt, lambda lr, base, step: lr * 0.97),
    "by hand, once": lambda opt: ByHand(opt, lambda lr, base, step: lr * 0.5 if step == 9 else lr),
}
SET: dict[str, Make] = {
    "LambdaLR, constant": lambda opt: torch_schedulers.LambdaLR(opt, lambda _: 1.0),
    "LambdaLR, warm-up": lambda opt: torch_schedulers.LambdaLR(opt, lambda s: min(1.0, (s + 1) / 10)),
    "LambdaLR, warm-up from 0": lambda opt: torch_schedulers.LambdaLR(opt, lambda s: min(1.0, s / 10)),
    "LambdaLR, decay to 0": lambda opt: torch_schedulers.LambdaLR(opt, lambda s: max(0.0, 1 - s / 10)),
    "OneCycleLR": lambda opt: torch_schedulers.OneCycleLR(opt, 10 * RATE, total_steps=60, cycle_momentum=False),
    "CyclicLR": lambda opt: torch_schedulers.CyclicLR(opt, RATE, 10 * RATE, 5, cycle_momentum=False),
    "CosineAnnealingWarmRestarts": lambda opt: torch_schedulers.CosineAnnealingWarmRestarts(opt, 30),
    "SequentialLR": lambda opt: torch_schedulers.SequentialLR(opt, [linear(opt, 0.1), cosine(opt)], [5]),
    "transformers, linear": hugging_face("get_linear_schedule_with_warmup", 4, 60),
    "transformers, constant": hugging_face("get_constant_schedule"),
    "by hand": lambda opt: ByHand(opt, lambda lr, base, step: base * (1 + math.cos(step / 20)) / 2),
    "by hand, once": lambda opt: ByHand(opt, lambda lr, base, step: 0.5 * base if step == 9 else lr),
}
each_front_end = pytest.mark.parametrize("front_end", ["AdaptiveLR", "APO"])


class ByHand:
    """What loops write into ``param_groups`` themselves."""

    def __init__(self, opt: Any, rate: Callable[[float, float, int], float]) -> None:
        self.opt, self.rate = opt, rate
        self.bases = [group["lr"] for group in opt.param_groups]
        self.count = 0

    def step(self) -> None:
        self.count += 1
        for group, base in zip(self.opt.param_groups, self.bases, strict=True):
            group["lr"] = self.rate(group["lr"], base, self.count)


class Run:
    def __init__(self, front_end: str, make: Make | None, **settings: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(8, 4)
        self.x, self.t = torch.randn(64, 8), torch.randint(4, (64,))
        goal = apo.ProximalObjective(self.model, [self.x])
        if front_end == "APO":
            self.opt: Any = apo.APO(self.model, goal, lr=RATE, **settings, method=apo.Method(lr_meta_lr=0.3))
        else:
            base = torch.optim.SGD(self.model.parameters(), lr=RATE)
            self.opt = apo.AdaptiveLR(base, goal, meta_optimizer="rmsprop", **settings)
        self.scheduler = make(self.opt) if make is not None else None
        self.taken: list[float] = []

    def go(self, steps: int) -> int:
        """How many warnings said that what was learned is lost. ``taken`` are the rates of the steps."""
        closure = closure_of(self.opt, self.model, self.x, self.t)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for _ in range(steps):
                loss: Tensor = self.opt.step(closure)
                self.taken.append(self.opt.param_groups[0]["lr"])
                if isinstance(self.scheduler, torch_schedulers.ReduceLROnPlateau):
                    self.scheduler.step(loss.item())
                elif self.scheduler is not None:
                    self.scheduler.step()
        return sum("what was learned is lost" in str(w.message) for w in seen)


@each_front_end
@pytest.mark.parametrize("name", MULTIPLY)
def test_schedulers_that_multiply_keep_what_was_learned(front_end: str, name: str) -> None:
    """Without a warning, also when a decay cancels what is learned, and whatever rescale_schedule says."""
    run = Run(front_end, MULTIPLY[name])
    assert run.go(40) == 0
    assert max(run.taken) > 20 * RATE
    if not name.startswith("by hand"):
        rescaled = Run(front_end, MULTIPLY[name], rescale_schedule=True)
        assert rescaled.go(40) == 0
        assert rescaled.taken == run.taken


@each_front_end
@pytest.mark.parametrize("name", SET)
def test_schedulers_that_set_the_rate_are_told_of_once(front_end: str, name: str) -> None:
    run = Run(front_end, SET[name])
    assert run.go(20) == 1
    assert run.go(20) == 0


@each_front_end
@pytest.mark.parametrize("name", [name for name in SET if not name.startswith("by hand")])
def test_both_together_multiply_the_schedule_by_what_is_learned(front_end: str, name: str) -> None:
    """Each step's rate is the schedule's times the product of all learned changes."""
    run, schedule = Run(front_end, SET[name], rescale_schedule=True), Run(front_end, SET[name], interval=0, warmup=0)
    learned = 0.0
    for _ in range(25):
        assert run.go(1) + schedule.go(1) == 0
        own = schedule.taken[-1]
        if own:
            learned = math.log(run.taken[-1] / own)
        assert run.opt.param_groups[0]["apo_log_factor"] == pytest.approx(learned, abs=1e-9)
        assert (run.taken[-1] == 0) == (own == 0)
    assert max(run.taken) > 5 * max(schedule.taken)


@each_front_end
def test_what_was_learned_outlives_rates_of_zero(front_end: str) -> None:
    """A schedule that pauses: the steps after the pause go on with what was learned before it."""
    run = Run(
        front_end, lambda o: torch_schedulers.LambdaLR(o, lambda s: float(not 10 <= s < 15)), rescale_schedule=True
    )
    run.go(10)
    before = run.taken[-1]
    weights_before = weights(run.model)
    run.go(5)
    assert run.taken[-5:] == [0.0] * 5
    if front_end == "AdaptiveLR":  # APO's momentum runs out meanwhile
        assert same(weights(run.model), weights_before)
    run.go(1)
    assert before / 3 < run.taken[-1] < 3 * before


@each_front_end
@pytest.mark.parametrize("name", ["LambdaLR, warm-up", "SequentialLR", "OneCycleLR"])
def test_resumed_with_the_schedule_to_the_bit(front_end: str, name: str) -> None:
    """New objects, made in the usual order, load what was saved after the scheduler's step."""
    whole = Run(front_end, SET[name], rescale_schedule=True)
    whole.go(12)
    half = Run(front_end, SET[name], rescale_schedule=True)
    half.go(7)
    saved = copy.deepcopy([x.state_dict() for x in (half.model, half.opt, half.scheduler)])
    resumed = Run(front_end, SET[name], rescale_schedule=True)
    for part, state in zip((resumed.model, resumed.opt, resumed.scheduler), saved, strict=True):
        part.load_state_dict(state)
    assert resumed.go(5) == 0
    assert resumed.taken == whole.taken[7:]
    assert same(weights(resumed.model), weights(whole.model))


@each_front_end
def test_a_scheduler_of_a_later_phase_is_noticed(front_end: str) -> None:
    run = Run(front_end, MULTIPLY["ExponentialLR"])
    assert run.go(10) == 0
    run.scheduler = SET["LambdaLR, constant"](run.opt)
    assert run.go(10) == 1


def test_a_scheduler_on_the_wrapped_optimizer_is_noticed() -> None:
    assert Run("AdaptiveLR", lambda opt: torch_schedulers.StepLR(opt.optimizer, 3, 0.5)).go(20) == 0
    assert Run("AdaptiveLR", lambda opt: torch_schedulers.LambdaLR(opt.optimizer, lambda s: 0.9**s)).go(20) == 1


def test_asking_a_scheduler_changes_nothing() -> None:
    """Rates, momentum and the scheduler itself are as before."""
    run = Run("AdaptiveLR", lambda o: torch_schedulers.OneCycleLR(o, 1.0, total_steps=50, cycle_momentum=False))
    run.go(5)
    before = copy.deepcopy(run.scheduler.state_dict()), [dict(g) for g in run.opt.param_groups]
    run.opt._schedules.keep_what_was_learned(run.opt.param_groups)
    after = run.scheduler.state_dict(), [dict(g) for g in run.opt.param_groups]
    assert str(after) == str(before)


class Bowl:
    """SGD on ``½ |w − ξ|²``, ξ another at each step: a rate of 1 takes one step to ξ, and 0.9 is held."""

    def __init__(self, make: Make | None, lr: float = 0.9, **settings: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(8, 1, bias=False).double()
        nn.init.constant_(self.model.weight, 10.0)  # beside which no step is long
        goal = apo.ProximalObjective(self.model, [torch.eye(8).double()], "mse", fsd_weight=0.0)
        self.opt = apo.AdaptiveLR(torch.optim.SGD(self.model.parameters(), lr=lr), goal, **settings)
        self.scheduler = make(self.opt) if make is not None else None

    def go(self, steps: int) -> float:
        """By how much the rate's logarithm rises, but for the schedule."""
        for target in torch.randn(steps, 8, generator=torch.Generator().manual_seed(0)).double() + 10:
            self.opt.step(partial(self.towards, target))
            if self.scheduler is not None:
                self.scheduler.step()
        found: float = self.opt.param_groups[0]["apo_log_factor"]
        return found

    def towards(self, target: Tensor) -> Tensor:
        self.opt.zero_grad()
        loss = (self.model.weight - target).square().sum() / 2
        loss.backward()
        return loss


DECAYS: dict[str, Make] = {
    "StepLR": lambda opt: torch_schedulers.StepLR(opt, 20, 0.3),
    "cosine": lambda opt: torch_schedulers.CosineAnnealingLR(opt, 130),
    "warm-up": lambda opt: torch_schedulers.LambdaLR(opt, lambda s: min(1.0, (s + 1) / 50)),
    "one cycle": lambda opt: torch_schedulers.OneCycleLR(opt, 0.9, total_steps=130, cycle_momentum=False),
    "by hand": lambda opt: ByHand(opt, lambda lr, base, step: lr * 0.95),
}


@pytest.mark.parametrize("name", DECAYS)
def test_a_height_that_is_right_is_left_alone_under_a_schedule(name: str) -> None:
    """Until it falls for noise, after 60 trials, and by no more than without a schedule."""
    own = {"rescale_schedule": name in ("warm-up", "one cycle"), "lr": 0.9 / 25 if "cycle" in name else 0.9}
    assert abs(Bowl(DECAYS[name], **own).go(90)) < 0.15
    assert 0.15 > Bowl(DECAYS[name], **own).go(120) > Bowl(None).go(120) > -0.5


def test_one_that_is_too_small_rises_under_a_schedule() -> None:
    assert Bowl(DECAYS["cosine"], lr=1e-3).go(60) > math.log(20)


def test_what_is_no_schedule_is_no_reason_to_stay_small() -> None:
    """As a rate from an earlier phase of training, noted in the group."""
    noted = Bowl(None, lr=1e-3)
    noted.opt.param_groups[0]["initial_lr"] = 0.9
    assert noted.go(60) > math.log(20)
