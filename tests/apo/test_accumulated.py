"""Closures that add to gradients which were accumulated before them are refused; others are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apo
from tests.apo.helpers import closure_of, mlp, objective, same, weights

each_front_end = pytest.mark.parametrize("name", ["AdaptiveLR", "APO"])


def front_end(name: str, model: nn.Module, other: Tensor, **settings: Any) -> Any:
    goal = objective(model, other, **settings)
    if name == "APO":
        return apo.APO(model, goal, lr=0.05)
    return apo.AdaptiveLR(torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), goal)


@each_front_end
def test_gradients_accumulated_before_the_closure_are_refused(name: str) -> None:
    """As Lightning's accumulate_grad_batches does; nothing is changed."""
    model, x, t, other = mlp()
    opt = front_end(name, model, other)

    def part(i: int) -> Tensor:
        loss = F.cross_entropy(model(x.chunk(2)[i]), t.chunk(2)[i]) / 2
        loss.backward()
        return loss

    opt.step(closure_of(opt, model, x, t))  # so that there is a state
    opt.zero_grad()
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
def test_a_parameter_that_the_closure_leaves_alone_moves_by_nothing_new(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its old gradient stays where it is and says nothing of the trial."""
    model, x, t, other = mlp()
    model.register_parameter("lone", nn.Parameter(torch.ones(1, dtype=x.dtype)))
    opt = front_end(name, model, other)
    model.lone.grad = torch.full((1,), 0.01, dtype=x.dtype)
    seen: list[tuple[float, float]] = []
    evaluate, at = type(opt)._evaluate, [p is model.lone for p in opt.parameters].index(True)

    def noted(*arguments: Any) -> Any:
        trial = evaluate(*arguments)
        seen.append((trial.V[at].item(), trial.steps[at].item()))
        return trial

    monkeypatch.setattr(type(opt), "_evaluate", noted)

    def closure() -> Tensor:
        model[0].zero_grad()
        model[2].zero_grad()
        loss = F.cross_entropy(model(x), t)
        loss.backward()
        return loss

    opt.step(closure)
    assert opt.failed_trials == 0
    assert 0 < 1 - model.lone.item() < 1e-3  # by the gradient that it has
    assert model.lone.grad.item() == 0.01
    ((slope, step),) = seen
    assert slope == opt.objective.wsd_weight * step != 0


@each_front_end
def test_with_a_loss_of_its_own_they_are_welcome(name: str) -> None:
    """The step is that of the joined batch."""
    runs = []
    for parts in (1, 2):
        model, x, t, other = mlp()
        opt = front_end(name, model, other, loss=F.cross_entropy)
        opt.objective.inputs = [(other, torch.zeros(len(other), dtype=torch.int64))]

        def part(i: int, model: nn.Module = model, x: Tensor = x, t: Tensor = t, parts: int = parts) -> Tensor:
            loss = F.cross_entropy(model(x.chunk(parts)[i]), t.chunk(parts)[i]) / parts
            loss.backward()
            return loss

        before = weights(model)
        for i in range(parts - 1):
            part(i)
        opt.step(lambda part=part, last=parts - 1: part(last))
        assert opt.failed_trials == 0
        runs.append([b - w for b, w in zip(before, weights(model), strict=True)])
    assert all(torch.allclose(a, b, rtol=1e-9, atol=0) for a, b in zip(*runs, strict=True))
