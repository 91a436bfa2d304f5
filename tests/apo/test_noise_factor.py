"""Steps are shortened where noise adds up, and nowhere else."""

from __future__ import annotations

import copy
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
from apo.noise.factor import NoiseFactor
from tests.apo.helpers import closure_of, mlp, objective, weights


def path(
    ratio: float, *, first: int = 20, last: int = 2000, loss: Callable[[int], float] = lambda _: 1.0, size: float = 1.0
) -> list[float]:
    """The factor after each look of every tenth step, where the gain is ``ratio`` times the cost."""
    held: dict[str, Any] = {**NoiseFactor.NUMBERS, "apo_noise_step": first - 10}
    found = []
    for step in range(first, last, 10):
        before = ratio * size if NoiseFactor.sees_cost(held) else None
        held = NoiseFactor().look(held, (ratio - 1) * size, 2.0, before, 3 * size, step=step, loss=loss(step))
        found.append(held["apo_noise_factor"])
    return found


def test_it_falls_where_steps_gain_nothing_as_a_power_of_time() -> None:
    found = path(0.5, first=200, last=2000)
    assert found[-1] == pytest.approx((1 / 10) ** NoiseFactor.SPEED, rel=0.25)  # it starts after a few looks
    assert all(a >= b for a, b in pairwise(found))


@pytest.mark.parametrize("ratio", [1.0, 1.3, 50.0, -2.0, 0.1, 0.25])
def test_it_stays_where_fresh_examples_gain_or_noise_does_not_add_up(ratio: float) -> None:
    assert set(path(ratio)) == {1.0}


def test_it_rises_again_but_not_above_1() -> None:
    held = {**NoiseFactor.NUMBERS, "apo_noise_factor": 0.1, "apo_noise_looks": 9, "apo_noise_step": 100}
    for step in range(110, 3000, 10):
        held = NoiseFactor().look(held, 1.0, 1.0, 2.0, 1.0, step=step, loss=1.0)
    assert held["apo_noise_factor"] == 1


def test_it_does_not_fall_while_the_loss_falls_faster_than_the_time() -> None:
    slower = path(0.5, loss=lambda t: t**-0.5)
    assert path(0.5, loss=lambda t: t**-1.5)[-1] > 0.9
    assert path(0.5)[-1] < slower[-1] < 0.5


def test_a_loss_that_is_not_positive_says_nothing() -> None:
    assert path(0.5, loss=lambda t: -t) == path(0.5)


@given(size=st.floats(1e-30, 1e30), ratio=st.floats(-3, 3))
@settings(max_examples=30, deadline=None)
def test_it_has_no_scale(size: float, ratio: float) -> None:
    assert path(ratio, size=size, last=200) == pytest.approx(path(ratio, last=200), rel=1e-9)


def test_one_look_counts_for_little() -> None:
    held = {**NoiseFactor.NUMBERS, "apo_noise_looks": 9}
    held = NoiseFactor().look(held, -0.5, 1.0, 0.5, 1.0, step=10**6, loss=1.0)
    assert held["apo_noise_factor"] > 0.8


@pytest.mark.parametrize("spacing", [1, 10, 40])
def test_looks_are_forgotten_by_the_time_that_has_passed(spacing: int) -> None:
    """Within ten looks, or half a one of log t where that is less, the means are another's for the most part."""
    held: dict[str, Any] = {**NoiseFactor.NUMBERS, "apo_noise_gain": 5.0, "apo_noise_cost": 1.0, "apo_noise_step": 400}
    held["apo_noise_curvature"] = 1.0
    looks = 0
    while held["apo_noise_gain"] > 5 / math.e:
        looks += 1
        held = NoiseFactor().look(held, -1.0, 1.0, 0.0, 1.0, step=400 + looks * spacing, loss=1.0)
    assert looks <= min(10, math.ceil(400 * math.expm1(0.5) / spacing))


def test_the_interval_grows_half_as_fast_where_the_next_batch_agrees() -> None:
    model, _, _, other = mlp()
    opt = apo.APO(model, objective(model, other), interval=8, warmup=32)
    opt.param_groups[0]["apo_begun"] = True
    for gain, grows in ((0.5, 4), (0.6, 8)):
        opt.param_groups[0]["apo_noise_gain"] = gain
        for step in range(90):
            opt.steps = step
            assert opt.meta_due == (step % min(max(1, step // grows), 8) == 0)


def test_between_two_looks_at_the_cost_it_is_that_of_as_long_a_step() -> None:
    held = {**NoiseFactor.NUMBERS, "apo_noise_looks": 9}
    assert NoiseFactor.sees_cost(held)
    held = NoiseFactor().look(held, -0.5, 1.0, 0.5, 1.0, step=100, loss=1.0)
    assert not NoiseFactor.sees_cost(held)
    seen = NoiseFactor().look(held, -0.1, 0.2, 0.1, 1.0, step=110, loss=1.0)  # as much for its square
    assert NoiseFactor().look(held, -0.1, 0.2, None, 1.0, step=110, loss=1.0) == pytest.approx(seen)


class Noisy:
    """A regression on 30 numbers whose targets are mostly noise.

    Args:
        batches: how many there are, in an order drawn anew in each epoch; None: each is drawn anew.
    """

    def __init__(self, batches: int | None, *, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.truth = torch.randn(30, 1, generator=self.generator).double()
        self.fixed = [self.drawn() for _ in range(batches or 0)]
        self.order: list[int] = []

    def drawn(self) -> tuple[Tensor, Tensor]:
        x = torch.randn(32, 30, generator=self.generator).double()
        return x, x @ self.truth + 5 * torch.randn(32, 1, generator=self.generator).double()

    def batch(self) -> tuple[Tensor, Tensor]:
        if not self.fixed:
            return self.drawn()
        self.order = self.order or torch.randperm(len(self.fixed), generator=self.generator).tolist()
        return self.fixed[self.order.pop()]

    def trained(self, steps: int = 600, **method: Any) -> tuple[apo.APO, float]:
        """The optimizer, and the loss at the end, above the least one: over fresh examples, or those that there are."""
        model = nn.Linear(30, 1).double()
        nn.init.zeros_(model.weight)
        goal = apo.ProximalObjective(model, lambda: self.batch()[0], "mse")
        opt = apo.APO(model, goal, lr=0.01, interval=5, warmup=100, method=apo.Method(**method))
        for _ in range(steps):
            x, t = self.batch()
            opt.step(closure_of(opt, model, x, t, lambda y, t: (y - t).square().mean() / 2))
        with torch.no_grad():
            if not self.fixed:
                return opt, float((model.weight.T - self.truth).square().sum() + model.bias.square().sum()) / 2
            x, t = (torch.cat(each) for each in zip(*self.fixed, strict=True))
            X = torch.cat([x, torch.ones(len(x), 1).double()], 1)
            best = (X @ torch.linalg.lstsq(X, t).solution - t).square().mean() / 2
            return opt, float((model(x) - t).square().mean() / 2 - best)


def test_noise_shortens_steps_and_the_loss_ends_lower() -> None:
    opt, excess = Noisy(None).trained()
    _, without = Noisy(None).trained(look_back=False)
    assert opt.metrics()["noise_factor"] < 0.5
    assert excess < 0.6 * without


def test_noise_that_an_epoch_cancels_shortens_steps_less() -> None:
    """Each batch comes back after three others, and is anticorrelated with them: no step should be as short as that
    alone would say."""
    opt, _ = Noisy(4).trained()
    fresh, _ = Noisy(None).trained()
    assert opt.metrics()["noise_factor"] > 2 * fresh.metrics()["noise_factor"]


def test_without_noise_steps_are_the_trial_s() -> None:
    model, x, t, other = mlp()
    opt = apo.APO(model, objective(model, other), interval=1)
    for _ in range(60):
        opt.step(closure_of(opt, model, x, t))
    assert opt.metrics()["noise_factor"] == 1


class Dropping(nn.Module):
    """What a look must not change: batch norm's means, and dropout's random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)).double()

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layers(x)
        return found


def dropping(**method: Any) -> tuple[apo.APO, Dropping, Callable[[], Tensor]]:
    torch.manual_seed(0)
    model = Dropping()
    _, x, t, other = mlp()
    torch.manual_seed(1)
    opt = apo.APO(model, objective(model, other), interval=1, method=apo.Method(**method))

    def closure() -> Tensor:
        model.train()
        loss: Tensor = closure_of(opt, model, x, t)()
        return loss

    return opt, model, closure


def test_a_look_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a factor that never moves, a run is to the bit what it is without looks: weights, buffers, gradients and
    random numbers."""
    monkeypatch.setattr(NoiseFactor, "SPEED", 0.0)
    ends = []
    for look_back in (True, False):
        opt, model, closure = dropping(look_back=look_back)
        for _ in range(12):
            opt.step(closure)
        ends.append([*weights(model), *model.buffers(), *(p.grad for p in model.parameters()), torch.rand(3)])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_a_look_repeats_the_batch_in_train_mode_with_the_same_random_numbers() -> None:
    opt, model, closure = dropping()
    for _ in range(3):
        opt.step(closure)
    masks: list[Tensor] = []
    model.layers[2].register_forward_hook(lambda _, args, out: masks.append((out == 0) & (args[0] != 0)))
    opt.step(closure)
    at_theta, looked_back, *trials = masks
    assert at_theta.any()
    assert torch.equal(at_theta, looked_back)
    assert not any(mask.any() for mask in trials)


@pytest.mark.parametrize("further", [0, 1])
def test_what_is_compared_is_the_slope_before_the_last_step_and_after(
    further: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    true = NoiseFactor.look
    monkeypatch.setattr(
        NoiseFactor, "look", lambda self, held, *found, **k: (seen.append(found), true(self, held, *found, **k))[1]
    )
    model, x, t, other = mlp()
    opt = apo.APO(model, objective(model, other), interval=1)
    for _ in range(NoiseFactor.FEWEST + further):
        opt.step(closure_of(opt, model, x, t))
    former = copy.deepcopy(model)
    with torch.no_grad():
        for layer, (weight, bias) in zip(opt.layers, zip(*[iter(former.parameters())] * 2, strict=True), strict=True):
            weight += layer.momentum[:, :-1]
            bias += layer.momentum[:, -1]
    steps = [a - b for a, b in zip(former.parameters(), model.parameters(), strict=True)]
    expected = []
    for each in (former, model):
        G = torch.autograd.grad(F.cross_entropy(each(x), t), list(each.parameters()))
        expected.append(sum(float((g * s).sum()) for g, s in zip(G, steps, strict=True)))
    sees_cost = NoiseFactor.sees_cost(opt.param_groups[0])
    opt.step(closure_of(opt, model, x, t))
    after, square, before, _ = seen[-1]
    assert after == pytest.approx(expected[1], rel=1e-9)
    assert square == pytest.approx(sum(float(s.square().sum()) for s in steps), rel=1e-9)
    assert sees_cost == (before is not None) == (further == 0)
    assert before is None or before == pytest.approx(expected[0], rel=1e-9)


@pytest.mark.parametrize(
    ("group", "method", "own_loss"),
    [({"momentum": 0.0}, {}, False), ({}, {"look_back": False}, False), ({}, {}, True)],
    ids=["no momentum", "turned off", "loss on B'"],
)
def test_where_there_is_nothing_to_look_at_the_closure_isnt_run_again(group: Any, method: Any, own_loss: bool) -> None:
    model, x, t, other = mlp()
    labelled = [(other, torch.zeros(len(other), dtype=torch.int64))]
    goal = objective(model, labelled, loss=F.cross_entropy) if own_loss else objective(model, other)
    opt = apo.APO(model, goal, interval=1, method=apo.Method(**method), **group)
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        loss: Tensor = closure_of(opt, model, x, t)()
        return loss

    for _ in range(3):
        opt.step(closure)
    assert calls == 3 * (1 if own_loss else 2)
    assert opt.metrics()["noise_factor"] == 1


def test_a_closure_that_fails_at_a_look_changes_nothing() -> None:
    model, x, t, other = mlp()
    opt = apo.APO(model, objective(model, other), interval=1)
    for _ in range(3):
        opt.step(closure_of(opt, model, x, t))
    before = [w.clone() for w in weights(model)], copy.deepcopy(opt.state_dict())
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise RuntimeError("out of memory")
        loss: Tensor = closure_of(opt, model, x, t)()
        return loss

    with pytest.raises(RuntimeError, match="out of memory"):
        opt.step(closure)
    assert all(torch.equal(a, b) for a, b in zip(weights(model), before[0], strict=True))
    after = opt.state_dict()
    assert str(after["param_groups"]) == str(before[1]["param_groups"])
    assert all(
        torch.equal(after["state"][p][name], x) for p, own in before[1]["state"].items() for name, x in own.items()
    )


def test_a_gradient_that_isnt_finite_there_says_nothing() -> None:
    model, x, t, other = mlp()
    opt = apo.APO(model, objective(model, other), interval=1)
    for _ in range(3):
        opt.step(closure_of(opt, model, x, t))
    looks, calls = opt.param_groups[0]["apo_noise_looks"], 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        opt.zero_grad()
        loss = F.cross_entropy(model(x), t) * (math.inf if calls == 2 else 1)
        loss.backward()
        return loss

    opt.step(closure)
    assert opt.param_groups[0]["apo_noise_looks"] == looks > 0
    assert all(bool(w.isfinite().all()) for w in weights(model))
