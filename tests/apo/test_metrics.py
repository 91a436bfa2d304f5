"""What there is to log of a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import apo
from tests.apo.helpers import closure_of, mlp, objective

FRONT_ENDS: dict[str, Callable[..., Any]] = {
    "AdaptiveLR": lambda m, goal, params: apo.AdaptiveLR(torch.optim.SGD(params or m.parameters(), lr=0.1), goal),
    "APO": lambda m, goal, params: apo.APO(m, goal, params, method=apo.Method(shared_lr=False)),
    "FullPreconditioner": lambda m, goal, params: apo.FullPreconditioner(m, goal),
}
COUNTS = {"steps", "failed_trials", "skipped_steps"}
TERMS = {"Q", "loss", "base_loss", "fsd", "wsd", "step_norm", "accepted"}
each_front_end = pytest.mark.parametrize("front_end", FRONT_ENDS)


@each_front_end
def test_names_and_values(front_end: str) -> None:
    """The terms come with the first trial; all are plain floats."""
    model, x, t, other = mlp()
    opt = FRONT_ENDS[front_end](model, objective(model, other), None)
    more = {"noise_factor", "promise_factor"} if front_end == "APO" else set()
    assert opt.metrics().keys() == {"lr", *COUNTS, *more}
    base = closure_of(opt, model, x, t)()
    opt.step(closure_of(opt, model, x, t))
    found = opt.metrics()
    assert found.keys() == {"lr", *COUNTS, *TERMS, *more}
    assert all(type(value) is float for value in found.values())
    assert found["base_loss"] == pytest.approx(base.item(), rel=1e-12)
    assert found["Q"] == pytest.approx(found["loss"] + 0.7 * found["fsd"] + 0.2 * found["wsd"], rel=1e-12)
    assert found["wsd"] == pytest.approx(found["step_norm"] ** 2 / 2, rel=1e-12)
    assert found["lr"] == opt.param_groups[0]["lr"]
    assert (found["steps"], found["failed_trials"], found["accepted"]) == (1, 0, 1)


@pytest.mark.parametrize("front_end", ["AdaptiveLR", "APO"])
def test_one_rate_per_group(front_end: str) -> None:
    model, x, t, other = mlp()
    params = [{"params": list(model[0].parameters())}, {"params": list(model[2].parameters()), "lr": 0.01}]
    opt = FRONT_ENDS[front_end](model, objective(model, other), params)
    for _ in range(3):
        opt.step(closure_of(opt, model, x, t))
    found = opt.metrics()
    assert "lr" not in found
    assert [found[f"lr/{i}"] for i in range(2)] == [group["lr"] for group in opt.param_groups]


@each_front_end
def test_failed_and_skipped_steps_are_counted(front_end: str) -> None:
    model, x, t, other = mlp()
    opt = FRONT_ENDS[front_end](model, objective(model, other), None)
    opt.interval = 1
    opt.step(closure_of(opt, model, x, t))
    opt.step(closure_of(opt, model, x * float("nan"), t))
    found = opt.metrics()
    assert [found[name] for name in ("steps", "failed_trials", "skipped_steps", "accepted")] == [2, 1, 1, 0]


def test_the_promise_factor_is_the_share_of_the_step_that_was_taken() -> None:
    model = nn.Linear(4, 1, bias=False)
    x = torch.randn(8, 4)
    goal = apo.ProximalObjective(model, [x], "mse")
    opt = apo.APO(
        model, goal, lr=0.01, momentum=0, interval=1, method=apo.Method(adapt_lr=False, meta_lr=0.0, fisher_start=0)
    )
    opt.step(closure_of(opt, model, x, None, lambda y, _: y.square().mean()))
    assert opt.metrics()["promise_factor"] == 1
    opt.interval = opt.warmup = 0
    before = model.weight.detach().clone()
    opt.step(closure_of(opt, model, x, None, lambda y, _: 1000 * y.sum()))
    factor = opt.metrics()["promise_factor"]
    assert 0 < factor < 0.1
    torch.testing.assert_close(before - model.weight, factor * 0.01 * model.weight.grad)


@each_front_end
def test_in_trial_tells_a_closure_that_logs(front_end: str) -> None:
    model, x, t, other = mlp()
    opt = FRONT_ENDS[front_end](model, objective(model, other), None)
    logged = []

    def closure() -> Any:
        loss = closure_of(opt, model, x, t)()
        if not opt.in_trial:
            logged.append(loss.item())
        return loss

    losses = [opt.step(closure).item() for _ in range(4)]
    assert logged == losses
