"""Closures that add to gradients which were accumulated before them are refused; others are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apo
from tests.apo.helpers import mlp, objective, same, weights

each_front_end = pytest.mark.parametrize("name", ["AdaptiveLR", "APO"])


def front_end(name: str, model: nn.Module, other: Tensor, **settings: Any) -> Any:
    goal = objective(model, other, **settings)
    if name == "APO":
        return apo.APO(model, goal, lr=0.05)
    return apo.AdaptiveLR(torch.optim.SGD(model.parameters(), lr=0.05), goal)


@each_front_end
def test_gradients_accumulated_before_the_closure_are_refused(name: str) -> None:
    """As Lightning's accumulate_grad_batches does; nothing is changed."""
    model, x, t, other = mlp()
    opt = front_end(name, model, other)

    def part(i: int) -> Tensor:
        loss = F.cross_entropy(model(x.chunk(2)[i]), t.chunk(2)[i]) / 2
        loss.backward()
        return loss

    part(0)
    before, state = weights(model), str(opt.state_dict())
    with pytest.raises(ValueError, match="closure must clear the gradients that it finds"):
        opt.step(lambda: part(1))
    assert same(weights(model), before)
    assert str(opt.state_dict()) == state
    whole = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    F.cross_entropy(model(x), t).backward()
    assert all(torch.allclose(a, p.grad) for a, p in zip(whole, model.parameters(), strict=True))


def four_steps(model: nn.Module, opt: Any, x: Tensor, t: Tensor, *, to_none: bool, inside: bool) -> list[Tensor]:
    def closure() -> Tensor:
        if inside:
            opt.zero_grad(set_to_none=to_none)
        loss = F.cross_entropy(model(x), t)
        loss.backward()
        return loss

    for _ in range(4):
        if not inside:
            opt.zero_grad(set_to_none=to_none)
        opt.step(closure)
    return weights(model)


@each_front_end
@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("inside", [True, False])
def test_every_way_to_clear_is_taken(name: str, to_none: bool, inside: bool) -> None:
    runs = []
    for usual in (True, False):
        model, x, t, other = mlp()
        opt = front_end(name, model, other)

        def closure(
            usual: bool = usual, model: nn.Module = model, opt: Any = opt, x: Tensor = x, t: Tensor = t
        ) -> Tensor:
            if usual or inside:
                opt.zero_grad(set_to_none=usual or to_none)
            loss = F.cross_entropy(model(x), t)
            loss.backward()
            return loss

        for _ in range(4):
            if not usual and not inside:
                opt.zero_grad(set_to_none=to_none)
            opt.step(closure)
        runs.append(weights(model))
    assert same(*runs)


@each_front_end
def test_a_parameter_that_the_closure_leaves_alone_moves_by_nothing_new(name: str) -> None:
    """Its old gradient stays where it is and says nothing of the trial."""
    model, x, t, other = mlp()
    model.register_parameter("lone", nn.Parameter(torch.ones(1, dtype=x.dtype)))
    opt = front_end(name, model, other)
    model.lone.grad = torch.full((1,), 0.01, dtype=x.dtype)

    def closure() -> Tensor:
        model[0].zero_grad()
        model[2].zero_grad()
        loss = F.cross_entropy(model(x), t)
        loss.backward()
        return loss

    opt.step(closure)
    assert opt.failed_trials == 0
    assert torch.isfinite(model.lone).all()
    assert model.lone.grad.item() == pytest.approx(0.01)


@each_front_end
def test_with_a_loss_of_its_own_they_are_welcome(name: str) -> None:
    model, x, t, other = mlp()
    opt = front_end(name, model, other, loss=F.cross_entropy)
    opt.objective.inputs = [(other, torch.zeros(len(other), dtype=torch.int64))]

    def part(i: int) -> Tensor:
        loss = F.cross_entropy(model(x.chunk(2)[i]), t.chunk(2)[i]) / 2
        loss.backward()
        return loss

    part(0)
    opt.step(lambda: part(1))
    assert opt.steps == 1
