"""A step whose gradients aren't finite is left out and counted; one whose gradients are merely large isn't."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import apo
from apo.safeguards.late_verdict import LateVerdict
from tests.apo.helpers import closure_of, mlp, same, weights


class JudgedLate(apo.APO):
    """As on a GPU: its plain steps don't wait for the gradients."""

    JUDGED_LATE = frozenset({"cpu"})


FRONT_ENDS: dict[str, Callable[..., Any]] = {
    "AdaptiveLR": lambda model, goal: apo.AdaptiveLR(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), goal),
    "AdaptiveLR of AdamW": lambda model, goal: apo.AdaptiveLR(torch.optim.AdamW(model.parameters(), lr=1e-2), goal),
    "APO": apo.APO,
    "FullPreconditioner": apo.FullPreconditioner,
}
each_front_end = pytest.mark.parametrize("front_end", FRONT_ENDS)


def trained(front_end: str, dtype: torch.dtype = torch.float32) -> tuple[Any, nn.Module, Callable[[], Tensor]]:
    """Three steps on, so that there is a state; only plain steps follow."""
    model, x, t, other = mlp(dtype=dtype)
    opt = {**FRONT_ENDS, "judged late": JudgedLate}[front_end](model, apo.ProximalObjective(model, [other]))
    closure = closure_of(opt, model, x, t)
    for _ in range(3):
        opt.step(closure)
    opt.interval = opt.warmup = 0
    return opt, model, closure


def spoil(parameter: Tensor, change: Callable[[Tensor], Tensor]) -> Any:
    return parameter.register_hook(change)


@pytest.mark.parametrize("front_end", [*FRONT_ENDS, "judged late"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("trial", [False, True])
def test_left_out_and_counted_with_weights_and_state_intact(front_end: str, value: float, trial: bool) -> None:
    """One bad entry of one bias is enough."""
    opt, model, closure = trained(front_end)
    opt.interval = int(trial)
    before, state = weights(model), copy.deepcopy(opt.state_dict())
    handle = spoil(model[2].bias, lambda g: g.index_fill(0, torch.tensor([1]), value))
    opt.step(closure)
    handle.remove()
    assert same(weights(model), before)
    assert (opt.steps, opt.skipped_steps, opt.failed_trials) == (4, 1, int(trial))
    if trial:
        assert not opt.accepted
    if not trial or front_end.startswith("AdaptiveLR"):
        assert str(opt.state_dict()["state"]) == str(state["state"])
    if front_end.startswith("AdaptiveLR") and trial:
        assert opt.param_groups[0]["lr"] < state["param_groups"][0]["lr"]
    opt.step(closure)
    assert not same(weights(model), before)
    assert all(p.isfinite().all() for p in model.parameters())
    assert opt.skipped_steps == 1


@pytest.mark.parametrize("front_end", ["AdaptiveLR", "APO", "judged late"])
def test_bfloat16_gradients(front_end: str) -> None:
    opt, model, closure = trained(front_end, torch.bfloat16)
    before = weights(model)
    handle = spoil(model[0].weight, lambda g: g * float("nan"))
    opt.step(closure)
    handle.remove()
    assert same(weights(model), before)
    assert opt.skipped_steps == 1


@pytest.mark.parametrize("bad", [False, True])
def test_sparse_gradients(bad: bool) -> None:
    model = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Linear(4, 3))
    x, t = torch.randint(9, (8,)), torch.randint(3, (8,))
    opt = apo.AdaptiveLR(torch.optim.SGD(model.parameters(), lr=0.1), apo.ProximalObjective(model, [x]), interval=0)
    opt.warmup = 0
    before = weights(model)
    handle = spoil(model[0].weight, lambda g: g * (float("nan") if bad else 1.0))
    opt.step(closure_of(opt, model, x, t))
    handle.remove()
    assert same(weights(model), before) == bad
    assert opt.skipped_steps == int(bad)


@each_front_end
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_largest_finite_gradients_are_not_taken_for_infinite(front_end: str, dtype: torch.dtype) -> None:
    """Nor do they overflow inside P(G): 3.3e38 is just below the largest float32."""
    opt, model, closure = trained(front_end, dtype)
    if front_end.startswith("AdaptiveLR"):
        opt = apo.AdaptiveLR(torch.optim.SGD(model.parameters(), lr=1e-3), opt.objective, interval=0, warmup=0)
    handles = [spoil(p, lambda g: torch.full_like(g, 3.3e38)) for p in model.parameters()]
    before = weights(model)
    opt.step(closure)
    for handle in handles:
        handle.remove()
    assert opt.skipped_steps == 0
    assert all(p.isfinite().all() for p in model.parameters())
    assert not any(torch.equal(p, was) for p, was in zip(model.parameters(), before, strict=True))


def test_where_steps_are_judged_late_huge_gradients_cost_one() -> None:
    """Then they are looked at first, and divided."""
    opt, model, closure = trained("judged late")
    handles = [spoil(p, lambda g: torch.full_like(g, 3.3e38)) for p in model.parameters()]
    before = weights(model)
    opt.step(closure)
    assert same(weights(model), before)
    opt.step(closure)
    for handle in handles:
        handle.remove()
    assert opt.skipped_steps == 1
    assert not same(weights(model), before)
    assert all(p.isfinite().all() for p in model.parameters())


def test_judged_late_or_at_once_steps_are_the_same() -> None:
    """To the bit, and a copy made between a step and its verdict knows it."""
    found = []
    for front_end in ("APO", "judged late"):
        opt, model, closure = trained(front_end)
        for i in range(6):
            handle = spoil(model[0].weight, lambda g, i=i: g * float("nan") if i == 3 else g)
            opt.step(closure)
            handle.remove()
            if i == 3:
                assert copy.deepcopy(opt).param_groups[0]["apo_skipped_steps"] == 1
        assert opt.state_dict()["param_groups"][0]["apo_skipped_steps"] == 1
        found.append(weights(model))
    assert same(*found)


def test_the_verdict_on_a_step_is_asked_for_after_the_next_closure(monkeypatch: pytest.MonkeyPatch) -> None:
    """When a GPU has the closure's passes to do: asked before, it would run dry."""
    opt, _, closure = trained("judged late")
    opt.step(closure)
    order: list[str] = []
    monkeypatch.setattr(LateVerdict, "taken", property(lambda _: order.append("verdict") is None))
    opt.step(lambda: (order.append("closure"), closure())[1])
    assert order == ["closure", "verdict"]


def test_a_large_step_of_the_preconditioner_goes_where_the_gradient_points() -> None:
    """What is divided out to keep products finite is multiplied back."""
    model = nn.Linear(3, 2, bias=False)
    opt = apo.APO(
        model,
        apo.ProximalObjective(model, fsd_weight=0),
        lr=1e-20,
        momentum=0,
        interval=0,
        method=apo.Method(bounds=(1e-30, 1.0)),
    )
    before = model.weight.detach().clone()
    model.weight.grad = torch.randn(2, 3) * 1e20
    opt.step()
    torch.testing.assert_close(before - model.weight, 1e-20 * model.weight.grad)


@each_front_end
def test_one_synchronisation_at_most_in_a_plain_step(front_end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted on tensors that the optimizer makes; torch reads the step counts that it keeps on the CPU itself."""
    opt, _, closure = trained(front_end)
    closure()
    counted: list[str] = []
    own = {id(t) for state in opt.state.values() for t in state.values() if isinstance(t, Tensor)}
    for name in ("item", "__bool__", "__float__", "__int__", "tolist", "nonzero", "cpu"):
        true = getattr(Tensor, name)

        def watched(self: Tensor, *args: Any, name: str = name, true: Any = true) -> Any:
            if id(self) not in own:
                counted.append(name)
            return true(self, *args)

        monkeypatch.setattr(Tensor, name, watched)
    opt.step()
    monkeypatch.undo()
    # on the CPU, where that costs nothing, APO looks at its promise factor as well
    assert len(counted) <= (2 if front_end == "APO" else 1), counted
