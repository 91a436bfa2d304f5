"""The mean of past weights, and what a learned rate makes of the way from it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apo
from apo.loop.past_weights import NAMES, Way, follow, ways_to
from apo.rates.steady_steps import SteadySteps


def ways(way: Tensor) -> list[Tensor]:
    """From the older mean and the recent one to where a way ends."""
    p, state = nn.Parameter(torch.zeros_like(way[0])), dict[Tensor, dict[str, Any]]()
    p.grad = torch.zeros_like(p)
    for step, weight in enumerate(way, 1):
        follow(state, [p], [weight], 1 / step)
    p.data = way[-1]
    return [found[0] for found in ways_to(state, [p])]


@pytest.mark.parametrize(("place", "power"), [(0, 1), (1, 7)])
def test_later_times_weigh_more_in_the_second_mean_more_so(place: int, power: int) -> None:
    torch.manual_seed(0)
    way = torch.randn(4000, 3).double().cumsum(0)
    weights = torch.arange(1, 4001, dtype=torch.float64) ** power
    expected = way[-1] - (weights[:, None] * way).sum(0) / weights.sum()
    assert torch.allclose(ways(way)[place], expected, rtol=5e-3)


def test_a_straight_way_without_noise() -> None:
    """A third and a ninth of it are left, and by both together the loss falls as it does."""
    way = torch.arange(1.0, 3001.0)[:, None] * torch.tensor([1.0, -2.0])
    old, recent = ways(way)
    assert torch.allclose(old, torch.tensor([1000.0, -2000.0]), rtol=3e-3)
    assert torch.allclose(recent, torch.tensor([1000.0, -2000.0]) / 3, rtol=5e-3)
    G = torch.tensor([-0.1, 0.3])
    found = Way.by(float(G @ old), float(G @ recent))
    assert found.falling == pytest.approx(-3000 * float(G @ torch.tensor([1.0, -2.0])), rel=1e-2)
    assert found.back == pytest.approx(-found.falling / 3, rel=1e-2)


def test_noise_adds_to_what_going_back_gains_and_not_to_the_fall() -> None:
    """About a minimum of curvature h the way gains h σ², which is twice what noise adds to the loss."""
    torch.manual_seed(0)
    way = torch.randn(4000, 500).double()
    old, recent = ways(way)
    found = Way.by(float(3 * way[-1] @ old), float(3 * way[-1] @ recent))
    assert found.back == pytest.approx(3 * 500, rel=0.1)
    assert abs(found.falling) < 0.1 * found.back


def test_weights_of_16_bits_have_a_mean_of_32() -> None:
    """In which changes count that 16 bits would round away."""
    way = torch.full((2000, 1), 1.0).index_fill_(0, torch.arange(1000, 2000), 1.0078125).bfloat16()
    found = ways(way)[0]
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(0.0078125 / 4, rel=0.02)


def test_where_weights_have_just_come_there_is_no_way() -> None:
    p, state = nn.Parameter(torch.ones(3)), dict[Tensor, dict[str, Any]]()
    follow(state, [p], [torch.zeros(3)], 1.0)  # it has no gradient, so that no step has begun it
    assert state == {}
    assert [x[0].tolist() for x in ways_to(state, [p])] == [[0, 0, 0]] * 2


class Lazy(torch.optim.Optimizer):
    """Takes an empty state for one that it hasn't begun, as torch's own do."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                if not self.state[p]:
                    self.state[p]["mean"] = torch.zeros_like(p)
                p -= self.param_groups[0]["lr"] * self.state[p]["mean"].lerp_(p.grad, 0.5)


class Run:
    def __init__(self, make: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        objective = apo.ProximalObjective(self.model, [(torch.randn(8, 3), torch.randn(8, 2))], "mse", loss=F.mse_loss)
        self.opt = apo.AdaptiveLR(make(self.model.parameters()), objective, interval=2, warmup=0)

    def go(self, steps: int) -> None:
        for _ in range(steps):
            self.opt.zero_grad()
            self.model(torch.randn(4, 3)).square().sum().backward()
            self.opt.step()

    def means(self) -> list[Tensor]:
        return [self.opt.state[p][name] for p in self.model.parameters() for name in NAMES]


@pytest.mark.parametrize("make", [Lazy, lambda p: torch.optim.SGD(p, 0.1), lambda p: torch.optim.AdamW(p, 0.1)])
def test_the_means_stand_beside_what_optimizers_hold(make: Any) -> None:
    """Where those that begin their state lazily don't take them for it, also of weights that join later."""
    run = Run(make)
    first, second = run.model
    second.requires_grad_(False)
    run.go(3)
    assert set(NAMES) <= set(run.opt.state[first.weight])
    assert not run.opt.state.get(second.weight)
    second.requires_grad_(True)
    run.go(4)
    assert len(run.means()) == 8
    assert all((m - p).abs().max() > 0 for m, p in zip(run.means()[::2], run.model.parameters(), strict=True))


def test_trainers_may_move_them() -> None:
    """As is done with what an optimizer has loaded, by writing into its state; torch's loading casts to the weights'
    dtype besides."""
    runs = [Run(lambda p: torch.optim.AdamW(p, 1e-2)) for _ in range(2)]
    for run in runs:
        torch.manual_seed(1)
        run.go(5)
    for state in runs[1].opt.state.values():
        for name, value in state.items():
            state[name] = value.double() if name in NAMES else value.clone()
    runs[1].go(2)
    assert {mean.dtype for mean in runs[1].means()} == {torch.float32}
    runs[0].opt.load_state_dict(runs[1].opt.state_dict())
    assert all(map(torch.equal, runs[0].means(), runs[1].means()))


def learned(rate: float) -> float:
    """The excess loss that RMSprop ends at on noisy targets, where much is to be learned in directions of little
    curvature: noise along the others soon balances progress."""
    torch.manual_seed(0)
    scales = torch.cat([torch.ones(10), torch.full((10,), 0.05)])
    true = torch.cat([torch.zeros(10), 20 * torch.randn(10)])
    model = nn.Linear(20, 1, bias=False)

    def batch() -> tuple[Tensor, Tensor]:
        x = torch.randn(32, 20) * scales
        return x, (x @ true + torch.randn(32))[:, None]

    objective = apo.ProximalObjective(model, batch, "mse", loss=F.mse_loss)
    opt = apo.AdaptiveLR(torch.optim.RMSprop(model.parameters(), rate), objective)
    for _ in range(1000):
        x, t = batch()
        opt.zero_grad()
        F.mse_loss(model(x), t).backward()  # type: ignore[no-untyped-call]
        opt.step()
    return float(((model.weight.detach()[0] - true) * scales).square().sum())


def test_a_rate_that_noise_would_hold_rises_while_the_way_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    by_the_way = learned(1e-3)
    monkeypatch.setattr(SteadySteps, "_back", lambda self, *_: (self.BACK, self.BACK))
    assert by_the_way < 0.2 * learned(1e-3)
