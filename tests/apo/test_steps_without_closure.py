"""Gradients that were accumulated before the step, and closures that aren't run at trials."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apo
from tests.apo.helpers import closure_of, mlp, same, weights

FRONT_ENDS: dict[str, Callable[..., Any]] = {
    "AdaptiveLR": lambda model, goal, **k: apo.AdaptiveLR(torch.optim.AdamW(model.parameters(), lr=1e-2), goal, **k),
    "APO": apo.APO,
    "FullPreconditioner": apo.FullPreconditioner,
}
each_front_end = pytest.mark.parametrize("front_end", FRONT_ENDS)


def built(front_end: str, *, own_loss: bool = True, **settings: Any) -> tuple[Any, nn.Module, Tensor, Tensor]:
    """With B′ of 16 pairs that are not the batch's."""
    model, x, t, _ = mlp()
    generator = torch.Generator().manual_seed(3)
    pairs = (
        torch.randn(16, 5, dtype=torch.float64, generator=generator),
        torch.randint(3, (16,), generator=generator),
    )
    goal = apo.ProximalObjective(
        model, [pairs if own_loss else pairs[0]], loss=F.cross_entropy if own_loss else None, wsd_weight=0.01
    )
    return FRONT_ENDS[front_end](model, goal, **settings), model, x, t


def accumulate(opt: Any, model: nn.Module, x: Tensor, t: Tensor, parts: int) -> Tensor:
    """As Trainer and accelerate do: the last part's loss over their number is what is at hand afterwards."""
    opt.zero_grad()
    for xs, ts in zip(x.chunk(parts), t.chunk(parts), strict=True):
        loss = F.cross_entropy(model(xs), ts) / parts
        loss.backward()
    return loss


@each_front_end
def test_a_step_without_a_closure_is_the_step_with_it(front_end: str) -> None:
    runs = []
    for given in (True, False):
        opt, model, x, t = built(front_end)
        closure = closure_of(opt, model, x, t)
        for _ in range(8):
            if given:
                opt.step(closure)
            else:
                closure()
                assert opt.step() is None
        runs.append((weights(model), opt.last, opt.param_groups[0]["lr"]))
    assert same(runs[0][0], runs[1][0])
    assert runs[0][1:] == runs[1][1:]


@each_front_end
@pytest.mark.parametrize("closure_returns", ["nothing", "stale loss"])
def test_accumulated_outside_is_the_joined_batch(front_end: str, closure_returns: str) -> None:
    runs = []
    for parts in (1, 8):
        opt, model, x, t = built(front_end)
        for _ in range(8):
            loss = accumulate(opt, model, x, t, parts)
            if closure_returns == "nothing":
                opt.step()
            else:
                opt.step(lambda loss=loss: loss)
        runs.append((weights(model), opt))
    (one, of_one), (eight, of_eight) = runs
    assert of_one.failed_trials == of_eight.failed_trials == 0
    assert of_one.last.objective == pytest.approx(of_eight.last.objective, rel=1e-9)
    assert all(torch.allclose(a, b, rtol=1e-7, atol=1e-10) for a, b in zip(one, eight, strict=True))


@each_front_end
def test_the_verdict_compares_with_the_loss_on_the_other_batch(front_end: str) -> None:
    """Whatever the closure returns; the trial's loss alone would be above a bound taken from −10."""
    opt, model, x, t = built(front_end)
    others, targets = opt.objective.inputs[0]
    expected = F.cross_entropy(model(others), targets).item()
    loss = closure_of(opt, model, x, t)()
    opt.step(lambda: loss.detach() - 10)
    assert opt.last.base == pytest.approx(expected, rel=1e-12)
    assert opt.failed_trials == 0
    assert opt.accepted


@each_front_end
def test_gradients_are_left_to_accumulate_further(front_end: str) -> None:
    opt, model, x, t = built(front_end)
    accumulate(opt, model, x, t, 2)
    held = [p.grad for p in model.parameters()]
    content = [g.clone() for g in held]
    opt.step()
    assert all(p.grad is g for p, g in zip(model.parameters(), held, strict=True))
    assert same(held, content)


@each_front_end
@pytest.mark.parametrize("returned", [None, {"loss": 1.0}, "text"])
def test_what_a_closure_returns_is_handed_on_where_the_objective_has_its_loss(front_end: str, returned: Any) -> None:
    opt, model, x, t = built(front_end)
    calls = []

    def closure() -> Any:
        calls.append(opt.in_trial)
        closure_of(opt, model, x, t)()
        return returned

    assert opt.step(closure) is returned
    assert calls == [False]


@each_front_end
def test_meta_steps_without_a_closure_move_no_weight(front_end: str) -> None:
    opt, model, x, t = built(front_end)
    closure_of(opt, model, x, t)()
    before, grads, state = weights(model), [p.grad.clone() for p in model.parameters()], str(opt.state_dict())
    assert opt.meta_step() is None
    assert same(weights(model), before)
    assert same([p.grad for p in model.parameters()], grads)
    assert str(opt.state_dict()) != state
    opt.step()
    assert not same(weights(model), before)


@each_front_end
def test_where_a_closure_is_needed_the_error_says_what_to_do(front_end: str) -> None:
    """And a closure that runs no backward at the trial is told that it should, with everything put back."""
    opt, model, x, t = built(front_end, own_loss=False)
    opt.step(closure_of(opt, model, x, t))  # so that there is a state
    loss = accumulate(opt, model, x, t, 2)
    before, grads, state = weights(model), [p.grad.clone() for p in model.parameters()], str(opt.state_dict())
    with pytest.raises(ValueError, match=r"call step\(closure\); or give the ProximalObjective a loss=.*interval=0"):
        opt.step()
    for closure in (lambda: loss, lambda: F.cross_entropy(model(x), t), lambda: loss.item()):
        with pytest.raises(ValueError, match=r"ran no backward there.*give the ProximalObjective a loss="):
            opt.step(closure)
    assert same(weights(model), before)
    assert same([p.grad for p in model.parameters()], grads)
    assert str(opt.state_dict()) == state
    assert not opt.in_trial


@each_front_end
def test_no_closure_is_needed_between_trials_nor_without_gradients(front_end: str) -> None:
    opt, model, x, t = built(front_end, own_loss=False, interval=0)
    before = weights(model)
    opt.step()  # no gradient: nothing to do
    assert same(weights(model), before)
    accumulate(opt, model, x, t, 2)
    opt.step()
    assert not same(weights(model), before)
    assert opt.steps == 2


@each_front_end
def test_gradients_set_to_zero_are_as_good_as_none(front_end: str) -> None:
    runs = []
    for to_none in (True, False):
        opt, model, x, t = built(front_end)
        for _ in range(5):
            opt.zero_grad(set_to_none=to_none)
            F.cross_entropy(model(x), t).backward()
            opt.step()
        runs.append(weights(model))
    assert same(*runs)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sparse_gradients_are_served_with_momentum_too(momentum: float) -> None:
    """Whose buffer is sparse as well."""
    runs = []
    torch.manual_seed(0)
    x, t = torch.randint(9, (16, 2)), torch.randint(3, (16,))
    for adapts in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Flatten(), nn.Linear(8, 3)).double()
        opt: Any = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)
        if adapts:
            goal = apo.ProximalObjective(model, lambda: (x, t), loss=F.cross_entropy)
            opt = apo.AdaptiveLR(opt, goal, meta_lr=0.0)
        for _ in range(12):
            opt.zero_grad()
            F.cross_entropy(model(x), t).backward()
            opt.step()
        runs.append(weights(model))
    assert same(*runs)


@pytest.mark.parametrize("lr", [1e-4, 1e-2])
def test_adafactor_is_served_at_its_own_rate_too(lr: float) -> None:
    """Which it caps at 1, after t steps at 1/√t."""
    model, x, t, _ = mlp()
    goal = apo.ProximalObjective(model, lambda: (x, t), loss=F.cross_entropy)
    opt = apo.AdaptiveLR(torch.optim.Adafactor(model.parameters(), lr=lr), goal)
    first = F.cross_entropy(model(x), t).item()
    for _ in range(60):
        opt.zero_grad()
        F.cross_entropy(model(x), t).backward()
        opt.step()
    assert F.cross_entropy(model(x), t).item() < 0.7 * first
