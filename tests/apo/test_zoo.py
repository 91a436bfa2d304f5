"""A trial over a zoo of modules: it leaves no trace, and measures no change where there is none."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apo
from apo.trial.contents import Content
from tests.apo.zoo import CLASSES, FRONT_ENDS, WIDTH, ZOO, Run, assert_equal, contents, equal, seed, vectors

each_kind = pytest.mark.parametrize("kind", ZOO)
each_front_end = pytest.mark.parametrize("front_end", FRONT_ENDS)
each_mode = pytest.mark.parametrize("mode", ["train", "eval"])
each_autocast = pytest.mark.parametrize("autocast", ["none", "outside", "inside"])


@each_kind
@each_front_end
@each_mode
@each_autocast
def test_a_step_of_no_length_has_no_fsd_and_leaves_no_trace(
    kind: str, front_end: str, mode: str, autocast: str
) -> None:
    """The step with a trial disturbs no more than the closure at θ does."""
    plain, tried = (
        Run(kind, front_end, mode=mode, autocast=autocast, lr=1e-30, interval=meta, warmup=0) for meta in (0, 1)
    )
    found = []
    for run in (plain, tried):
        seed(1)
        run.step()
        found.append(run.traces())
    assert tried.opt.last is not None
    assert tried.opt.last.fsd == 0
    assert tried.opt.failed_trials == 0
    assert_equal(*found)


class Stop(Exception):
    pass


@contextmanager
def stopped_after(model: nn.Module, calls: int) -> Iterator[list[int]]:
    """Raise once the model has been called so many times; 0: never. Yields the number of calls so far."""
    found = [0]

    def count(module: nn.Module, *_: Any) -> None:
        if not torch.compiler.is_compiling() and module is model:  # dynamo can't trace a model that a hook holds
            found[0] += 1
            if found[0] == calls:
                raise Stop

    handle = torch.nn.modules.module.register_module_forward_hook(count)
    try:
        yield found
    finally:
        handle.remove()


@each_kind
@pytest.mark.parametrize(("front_end", "left"), [*product(FRONT_ENDS, (0, 1, 2)), ("APO", 3)])
def test_an_exception_leaves_all_as_the_closure_did(kind: str, front_end: str, left: int) -> None:
    """Whether it comes at B′ at θ′, when no calls of the model are left, in the closure there (1), at the anchor (2) or
    where APO looks back (3)."""
    expected, counted, stopped = (Run(kind, front_end, mode="train", lr=0.01) for _ in range(3))
    for run in (expected, counted, stopped):
        seed(1)
        run.step()  # so that there are states
        assert run.opt.failed_trials == 0
    seed(2)
    with stopped_after(counted.model, 0) as calls:
        counted.step()
    assert calls == [4 + (front_end == "APO")]
    seed(2)
    expected.closure()
    wanted = expected.traces()
    state, versions = repr(stopped.opt.state_dict()), [p._version for p in stopped.opt.parameters]
    seed(2)
    with pytest.raises(Stop), stopped_after(stopped.model, calls[0] - left):
        stopped.step()
    assert_equal(wanted, stopped.traces())
    assert repr(stopped.opt.state_dict()) == state
    for a, b in zip(expected.model.parameters(), stopped.model.parameters(), strict=True):
        assert equal(a.detach(), b.detach())
        assert equal(a.grad, b.grad)
    if kind != "embedding with max_norm":  # which writes its weights whenever it is called
        assert [p._version for p in stopped.opt.parameters] == versions


@each_kind
@each_front_end
@pytest.mark.parametrize("looked_at", [True, False])
def test_a_refused_trial_leaves_all_as_the_closure_did(
    kind: str, front_end: str, looked_at: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where nobody looks whether a tensor changed, as on a GPU: then all are written at once."""
    if not looked_at:
        monkeypatch.setattr(Content, "LOOKED_AT", frozenset())
    expected, refused = (Run(kind, front_end, lr=1e30) for _ in range(2))
    seed(1)
    expected.closure()
    wanted = expected.traces()
    seed(1)
    refused.step()
    assert refused.opt.failed_trials == 1
    assert_equal(wanted, refused.traces())
    for a, b in zip(expected.model.parameters(), refused.model.parameters(), strict=True):
        assert equal(a.detach(), b.detach())


@each_front_end
def test_modules_that_the_objective_doesnt_know_are_met_when_they_are_called(front_end: str) -> None:
    """One called by ``forward=``, one by the closure alone: flags, statistics and dropout."""
    runs = []
    for meta in (0, 1):
        seed(0)
        model = nn.Linear(WIDTH, CLASSES)
        before, after = (nn.Sequential(nn.BatchNorm1d(n), nn.Dropout(0.5)) for n in (WIDTH, CLASSES))
        x, other, t = vectors(6), vectors(4), torch.randint(CLASSES, (6,))
        goal = apo.ProximalObjective(model, lambda other=other: other, forward=lambda m, b, f=before: m(f(b)))
        opt = FRONT_ENDS[front_end](model, goal, 1e-30, interval=meta, warmup=0)
        modes: list[bool] = []
        handle = after[1].register_forward_hook(lambda m, *_, modes=modes: modes.append(m.training))

        def closure(model: Any = model, opt: Any = opt, x: Any = x, t: Any = t, f: Any = before, g: Any = after) -> Any:
            opt.zero_grad()
            loss = F.cross_entropy(g(model(f(x))), t)
            loss.backward()
            return loss

        opt.step(closure)
        handle.remove()
        grads = [p.grad for m in (before, after) for p in m.parameters()]
        runs.append([contents([*before.buffers(), *after.buffers(), *grads]), before.training, torch.get_rng_state()])
    assert opt.last.fsd == 0
    assert modes == [True, False]
    assert_equal(*runs)


@each_front_end
def test_a_graph_from_before_a_meta_step_is_still_good(front_end: str) -> None:
    run = Run("tied weights", front_end)
    loss = F.cross_entropy(run.model(run.x), run.t)
    run.opt.meta_step(run.closure)
    assert run.opt.last.step_norm > 0
    loss.backward()


@each_front_end
def test_attributes_hold_no_graph_of_the_trial(front_end: str) -> None:
    """The loss on the side is the closure's at θ, which a trainer may log."""
    run = Run("remembering", front_end)
    seen = []
    handle = run.model.register_forward_hook(lambda m, *_: seen.append(m.loss_on_the_side))
    run.step()
    handle.remove()
    assert len(seen) == 4
    assert run.model.loss_on_the_side is seen[0]


@each_front_end
def test_anomaly_detection_doesnt_take_a_trial_that_leaps_for_one(front_end: str) -> None:
    run = Run("dropout", front_end, lr=1e30)
    with torch.autograd.set_detect_anomaly(True):
        run.step()
        assert torch.is_anomaly_enabled()
    assert run.opt.failed_trials == 1


@each_front_end
def test_another_optimizer_that_steps_in_the_backward_steps_once(front_end: str) -> None:
    """As ``register_post_accumulate_grad_hook`` lets it: not at a trial."""
    run = Run("tied weights", front_end, interval=1)
    other = torch.optim.SGD([run.stranger], lr=0.1)

    def step(_: Tensor) -> None:
        other.step()
        other.zero_grad()

    run.stranger.register_post_accumulate_grad_hook(step)
    (expected,) = torch.autograd.grad(F.cross_entropy(run.model(run.x) * run.stranger, run.t), [run.stranger])
    run.step()
    assert run.stranger.item() == pytest.approx(1 - 0.1 * expected.item(), rel=1e-6)


@each_front_end
def test_copies_that_a_closure_makes_of_the_model_are_whole(front_end: str) -> None:
    """In a trial too: they can be pickled, and switched to train and back."""
    run = Run("dropout", front_end, interval=1)
    copies = []

    def closure() -> float:
        copies.append(pickle.loads(pickle.dumps(run.model)))
        copies.append(copy.deepcopy(run.model))
        loss = run.closure()
        assert [m.training for m in run.model.modules()] == [not run.opt.in_trial] * 5
        return loss

    run.opt.step(closure)
    assert len(copies) == 4
    for model in [run.model, *copies]:
        for mode in (True, False):
            assert model.train(mode) is model
            assert all(m.training == mode for m in model.modules())


@each_front_end
@pytest.mark.parametrize("where", ["inputs", "mask", "outputs", "discrepancy", "backward"])
def test_what_the_objective_calls_may_raise(front_end: str, where: str) -> None:
    expected, run = (Run("remembering", front_end, interval=1) for _ in range(2))
    goal, armed = run.opt.objective, [False]

    def stop(value: Any, *_: Any) -> Any:
        if armed and armed.pop():
            raise Stop
        return value

    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return stop(grad)

    def with_samples(rho: Any) -> Any:
        rho.fisher_sample = true.fisher_sample
        return rho

    batch, true = goal.inputs(), goal.discrepancy
    if where == "inputs":
        goal.inputs = lambda: stop(batch)
    elif where == "mask":
        goal.mask = lambda b: stop(torch.ones(len(b), dtype=torch.bool))
    elif where == "outputs":
        goal._outputs = stop
    elif where == "discrepancy":
        goal.discrepancy = with_samples(lambda new, old: stop(true(new, old)))
    else:
        goal.discrepancy = with_samples(lambda new, old: true(Backward.apply(new), old))
    for each in (expected, run):
        seed(1)
        each.step()
    seed(2)
    expected.closure()
    wanted, state, before = (
        expected.traces(),
        repr(run.opt.state_dict()),
        [p.detach().clone() for p in run.opt.parameters],
    )
    seed(2)
    armed[:] = [True]
    with pytest.raises(Stop):
        run.step()
    assert not armed
    assert_equal(wanted, run.traces())
    assert repr(run.opt.state_dict()) == state
    assert all(map(torch.equal, before, run.opt.parameters))
    run.step()
    assert run.opt.failed_trials == 0
