"""Hooks before and after an optimizer's step, under AdaptiveLR: how often they run, and that what they do counts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import optimizer as torch_optimizer

import apo
from tests.apo.helpers import begun, closure_of, mlp, objective, same, weights
from tests.apo.optimizers import Lookahead


@pytest.mark.parametrize("outcome", ["taken", "refused", "stopped", "meta_step"])
def test_each_hook_runs_once_a_step(outcome: str) -> None:
    """Hooks before the base's step run once, for a trial needs what they make of the gradients; those after it only
    if the step is taken. The same for optimizers that it wraps, and for hooks of all optimizers."""
    model, x, t, other = mlp()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    opt = apo.AdaptiveLR(Lookahead(inner), objective(model, other), interval=1)
    opt.step(closure_of(opt, model, x, t))
    counts: dict[str, int] = {}

    def count(name: str) -> Callable[..., None]:
        return lambda one, *_: counts.update({name: counts.get(name, 0) + 1}) if one in (opt, inner) else None

    opt.register_step_pre_hook(count("own, before"))
    opt.register_step_post_hook(count("own, after"))
    inner.register_step_pre_hook(count("inner, before"))
    inner.register_step_post_hook(count("inner, after"))
    handles = [
        torch_optimizer.register_optimizer_step_pre_hook(count("all, before")),
        torch_optimizer.register_optimizer_step_post_hook(count("all, after")),
    ]

    def closure() -> Tensor:
        loss = closure_of(opt, model, x, t)()
        if opt.in_trial and outcome == "stopped":
            raise KeyboardInterrupt
        return loss + math.inf if opt.in_trial and outcome == "refused" else loss

    try:
        if outcome == "meta_step":
            opt.meta_step(closure)
        elif outcome == "stopped":
            with pytest.raises(KeyboardInterrupt):
                opt.step(closure)
        else:
            opt.step(closure)
    finally:
        for handle in handles:
            handle.remove()
    stepped, taken = outcome != "meta_step", outcome == "taken"
    done = outcome in ("taken", "refused")  # AdaptiveLR's own step came to its end
    assert counts.get("own, before", 0) == stepped
    assert counts.get("own, after", 0) == done
    assert counts.get("inner, before", 0) == 1
    assert counts.get("inner, after", 0) == taken
    assert counts.get("all, before", 0) == 1 + stepped
    assert counts.get("all, after", 0) == done + taken


@pytest.mark.parametrize("interval", [0, 1])
def test_what_hooks_make_of_gradients_and_weights_counts(interval: int) -> None:
    """A hook before the step that adds noise to gradients, one after it that keeps weights positive."""
    model, x, t, other = mlp()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []

    def noisy(*_: Any) -> None:
        for p in model.parameters():
            p.grad.add_(torch.randn_like(p.grad))
        seen.append([p.grad.clone() for p in model.parameters()])

    def positive(*_: Any) -> None:
        with torch.no_grad():
            for p in model.parameters():
                p.clamp_(min=0)

    base.register_step_pre_hook(noisy)
    base.register_step_post_hook(positive)
    opt = apo.AdaptiveLR(base, objective(model, other), interval=interval)
    begun(opt)
    for step in range(3):
        before = weights(model)
        opt.step(closure_of(opt, model, x, t))
        assert len(seen) == step + 1
        rate = opt.param_groups[0]["lr"]
        wanted = [(p - rate * g).clamp(min=0) for p, g in zip(before, seen[-1], strict=True)]
        for p, w in zip(model.parameters(), wanted, strict=True):
            assert torch.allclose(p, w, rtol=1e-12, atol=0)
    assert opt.failed_trials == 0


def test_a_hook_after_the_step_that_raises_leaves_all_as_it_was() -> None:
    model, x, t, other = mlp()
    base = torch.optim.Adam(model.parameters(), lr=0.1)
    opt = apo.AdaptiveLR(base, objective(model, other), interval=1)
    begun(opt)
    opt.step(closure_of(opt, model, x, t))
    assert base.state
    before, state, rate = weights(model), repr(opt.state_dict()), opt.param_groups[0]["lr"]

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = base.register_step_post_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        opt.step(closure_of(opt, model, x, t))
    handle.remove()
    assert same(weights(model), before)
    assert repr(opt.state_dict()) == state
    assert opt.param_groups[0]["lr"] == rate
    opt.step(closure_of(opt, model, x, t))
