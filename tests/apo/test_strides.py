"""A learned rate takes no step that momentum carries far beyond what the weights are long."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, NAdam, Optimizer, RMSprop

import apo
from apo.rates.steady_steps import SteadySteps, Stride
from apo.wrapped.lengths import carried, lasting
from tests.apo.helpers import closure_of

MAKERS: dict[str, Callable[[Any, float], Optimizer]] = {
    "SGDm": lambda parameters, lr: SGD(parameters, lr, momentum=0.9),
    "AdamW": lambda parameters, lr: AdamW(parameters, lr),
    "RMSprop": lambda parameters, lr: RMSprop(parameters, lr, momentum=0.9),
}


def path(stride: Stride, meta_lr: float = 0.3) -> list[float]:
    """``log lr`` after each of 66 trials that leave the gradient as it was."""
    rule, group, log = SteadySteps(fitted=False), dict[str, Any](), [0.0]
    rule.prepare(group)
    for i in range(66):
        log.append(log[-1] + rule.change(group, -1.0, 1.0, share=0.05, meta_lr=meta_lr, loss=0.9**i, stride=stride))
    return log


@pytest.mark.parametrize(("lasting", "rises"), [(0.49, True), (0.51, False)])
def test_the_rate_rises_only_while_steps_are_short_beside_the_weights(lasting: float, rises: bool) -> None:
    assert path(Stride(lasting, 0.0))[-1] == (path(Stride())[-1] if rises else 0.0)


@pytest.mark.parametrize("carried", [0.6, 1.0, 30.0])
def test_it_falls_to_where_momentum_carries_them_half_the_weights_length(carried: float) -> None:
    assert path(Stride(carried, carried))[1] == pytest.approx(math.log(0.5 / carried))
    assert path(Stride(carried, carried), meta_lr=0.0)[-1] == 0.0


@pytest.mark.parametrize(
    ("make", "lasts", "carries"),
    [
        (lambda p: SGD(p, 0.1), 1, 1),
        (lambda p: SGD(p, 0.1, momentum=0.9), 10, 10),
        (lambda p: RMSprop(p, 0.1, momentum=0.5), 2, 2),
        (lambda p: Adam(p, betas=(0.8, 0.99)), 5, 1),
        (lambda p: AdamW(p, betas=(0.0, 0.99)), 1, 1),
        (lambda p: NAdam(p), 10, 1),
        (lambda p: Adagrad(p), 1, 1),
    ],
)
def test_how_long_a_step_goes_on(make: Callable[[Any], Optimizer], lasts: float, carries: float) -> None:
    opt = make([nn.Parameter(torch.ones(2, 2))])
    assert lasting(opt) == pytest.approx(lasts)
    assert carried(opt) == pytest.approx(carries)


def trained(
    name: str,
    lr: float,
    model: nn.Module,
    batch: Callable[[], tuple[Tensor, Tensor]],
    loss: Callable[[Tensor, Tensor], Tensor] = F.mse_loss,
) -> tuple[list[float], list[float]]:
    """Of the loss after each of 150 steps, and of what each moved the matrices by over what they are long."""
    objective = apo.ProximalObjective(model, batch, "mse", loss=loss)
    opt = apo.AdaptiveLR(MAKERS[name](model.parameters(), lr), objective)
    matrices, losses, lengths = [p for p in model.parameters() if p.ndim > 1], [], []
    for _ in range(150):
        before = [p.detach().clone() for p in matrices]
        losses.append(float(opt.step(closure_of(opt, model, *batch(), loss)).detach()))
        moved, long = (
            math.sqrt(sum(float((p * p).sum()) for p in those))
            for those in ([p.detach() - b for p, b in zip(matrices, before, strict=True)], before)
        )
        lengths.append(moved / long if long else 0.0)
    return losses, lengths


@pytest.mark.parametrize("name", MAKERS)
def test_on_an_endless_slope_weights_grow_by_a_little_at_a_time(name: str) -> None:
    """There every trial says that the rate is too small."""
    torch.manual_seed(0)
    model, x = nn.Linear(10, 3), torch.randn(32, 10)
    _, lengths = trained(name, 1e-3, model, lambda: (x, x[:, :3]), loss=lambda y, t: (y * t).mean())
    assert max(lengths[60:]) < 0.05  # a tenth of a half: all last ten times as long
    assert all(b < 2 * a for a, b in pairwise(lengths[5:]))


@pytest.mark.parametrize("name", MAKERS)
def test_weights_that_start_at_zero_train_at_once(name: str) -> None:
    torch.manual_seed(0)
    model, w = nn.Linear(10, 3), torch.randn(10, 3)
    nn.init.zeros_(model.weight)

    def batch() -> tuple[Tensor, Tensor]:
        x = torch.randn(32, 10)
        return x, x @ w + 0.1 * torch.randn(32, 3)

    losses, _ = trained(name, 1e-2, model, batch)
    assert losses[0] > 5
    assert sum(losses[-20:]) / 20 < 0.03  # 0.01 of it is noise
