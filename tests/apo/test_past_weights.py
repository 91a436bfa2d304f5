"""The mean of past weights, and what a learned rate makes of the way from it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apo
from apo.loop.past_weights import PastWeights, Way
from apo.rates.steady_steps import SteadySteps


def followed(way: Tensor, first: int = 1) -> PastWeights:
    past = PastWeights()
    for step in range(first, len(way) + 1):
        past.follow([way[step - 1]], 1 / step)
    return past


@pytest.mark.parametrize(("place", "power"), [(0, 1), (1, 7)])
def test_later_times_weigh_more_in_the_second_mean_more_so(place: int, power: int) -> None:
    torch.manual_seed(0)
    way = torch.randn(4000, 3).double().cumsum(0)
    weights = torch.arange(1, 4001, dtype=torch.float64) ** power
    expected = way[-1] - (weights[:, None] * way).sum(0) / weights.sum()
    assert torch.allclose(followed(way).ways_to([way[-1]])[place][0], expected, rtol=5e-3)


def test_a_straight_way_without_noise() -> None:
    """A third and a ninth of it are left, and by both together the loss falls as it does."""
    way = torch.arange(1.0, 3001.0)[:, None] * torch.tensor([1.0, -2.0])
    (old,), (recent,) = followed(way).ways_to([way[-1]])
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
    old, recent = (way[0] for way in followed(way).ways_to([way[-1]]))
    found = Way.by(float(3 * way[-1] @ old), float(3 * way[-1] @ recent))
    assert found.back == pytest.approx(3 * 500, rel=0.1)
    assert abs(found.falling) < 0.1 * found.back


def test_weights_of_16_bits_have_a_mean_of_32() -> None:
    """In which changes count that 16 bits would round away."""
    way = torch.full((2000, 1), 1.0).index_fill_(0, torch.arange(1000, 2000), 1.0078125).bfloat16()
    found = followed(way).ways_to([way[-1]])[0][0]
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(0.0078125 / 4, rel=0.02)


def test_where_weights_have_just_come_there_is_no_way() -> None:
    past = PastWeights()
    assert past.ways_to([torch.ones(3)])[0][0].tolist() == [0, 0, 0]
    past.follow([torch.ones(3)], 1.0)
    assert [x.tolist() for x in past.ways_to([torch.zeros(3), torch.ones(2)])[1]] == [[-1, -1, -1], [0, 0]]


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
    monkeypatch.setattr(SteadySteps, "_back", lambda self, *_: self.BACK)
    assert by_the_way < 0.2 * learned(1e-3)
