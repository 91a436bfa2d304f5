"""P is damped where noise adds up, by how much noise there is, and nowhere else."""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import apo
from apo.fisher.start import FisherStart
from apo.noise.damping import NoiseDamping
from tests.apo.helpers import closure_of, convnet, mlp, objective, same, weights


def held(factor: float = 0.5, square: float = 1e-4, loss: float = 1.0) -> dict[str, Any]:
    return {"apo_noise_factor": factor, "apo_gradient_square": square, "apo_mean_loss": loss}


def test_there_is_none_while_noise_does_not_add_up() -> None:
    assert NoiseDamping.delta(held(factor=1.0)) == 0
    assert NoiseDamping.delta(held(square=math.nan)) == 0


def test_it_comes_in_as_steps_are_shortened_and_is_whole_from_three_quarters_on() -> None:
    found = [NoiseDamping.delta(held(factor)) for factor in (1.0, 0.95, 0.9, 0.8, 0.75, 0.5, 0.01)]
    assert all(a < b for a, b in pairwise(found[:5]))
    assert found[4] == found[5] == found[6] == pytest.approx(10 * 1e-4 / 2)


def test_it_goes_with_the_variance_and_vanishes_where_all_is_fitted() -> None:
    assert NoiseDamping.delta(held(square=3e-4)) == pytest.approx(3 * NoiseDamping.delta(held()))
    assert NoiseDamping.delta(held(loss=3.0)) == pytest.approx(NoiseDamping.delta(held()) / 2)
    assert NoiseDamping.delta(held(square=1e-12, loss=0.0)) < 1e-10


def test_the_mean_square_begins_with_the_first_and_forgets_it() -> None:
    mean = NoiseDamping.mean(held(square=math.nan), 5.0)
    assert mean == 5
    for _ in range(100):
        mean = NoiseDamping.mean(held(square=mean), 1.0)
    assert mean == pytest.approx(1.0, rel=1e-3)


def test_the_mean_square_is_of_all_entries_that_have_a_gradient() -> None:
    model, x, t, other = convnet()
    opt = apo.APO(model, objective(model, other))
    closure_of(opt, model, x, t)()
    model[1].weight.grad = None
    grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert opt._arena.mean_square(opt._gradients()) == pytest.approx(float(grads.square().mean()), rel=1e-12)
    opt.zero_grad()
    assert opt._arena.mean_square(opt._gradients()) == 0


def shortened(model: nn.Module, other: Tensor, factor: float, **settings: Any) -> apo.APO:
    """One whose steps are shortened from the start, as if by noise."""
    opt = apo.APO(model, objective(model, other, fsd_weight=1.0, wsd_weight=1e-4), interval=1, **settings)
    opt.param_groups[0]["apo_noise_factor"] = factor
    return opt


@pytest.mark.parametrize(("factor", "damped"), [(1.0, False), (0.6, True)])
def test_the_start_is_led_to_the_damped_inverse(factor: float, damped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    deltas: list[float] = []
    step = FisherStart.step
    monkeypatch.setattr(
        FisherStart, "step", lambda self, layers, delta, done=0: deltas.append(delta) or step(self, layers, delta, done)
    )
    model, x, t, other = mlp()
    opt = shortened(model, other, factor, method=apo.Method(look_back=False))
    for _ in range(5):
        opt.step(closure_of(opt, model, x, t))
    assert len(deltas) >= 4
    assert all((delta > 1.01e-4) == damped for delta in deltas)
    assert opt.param_groups[0]["apo_gradient_square"] > 0 or not damped
    if damped:
        assert deltas[-1] == pytest.approx(NoiseDamping.delta(opt.param_groups[0]))


def test_resumed_to_the_bit() -> None:
    model, x, t, other = mlp()
    opt = shortened(model, other, 0.6)
    for _ in range(5):
        opt.step(closure_of(opt, model, x, t))
    twin = copy.deepcopy(model)
    resumed = shortened(twin, other, 1.0)
    resumed.load_state_dict(opt.state_dict())
    for one, net in ((opt, model), (resumed, twin)):
        for _ in range(4):
            one.step(closure_of(one, net, x, t))
    assert same(weights(model), weights(twin))


def test_once_the_start_is_over_gradients_are_no_longer_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, t, other = mlp()
    opt = shortened(model, other, 0.6, method=apo.Method(fisher_start=2))
    for _ in range(3):
        opt.step(closure_of(opt, model, x, t))
    monkeypatch.setattr(type(opt._arena), "mean_square", lambda self, Gs: pytest.fail("measured"))
    for _ in range(3):
        opt.step(closure_of(opt, model, x, t))
