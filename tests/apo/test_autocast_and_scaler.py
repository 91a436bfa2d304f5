"""Autocast around the step or inside the closure, and the recipes of GradScaler."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apo
from tests.apo.helpers import mlp, same, weights

SCALE = 2.0**10

FRONT_ENDS: dict[str, Callable[..., Any]] = {
    "AdaptiveLR": lambda model, goal, **settings: apo.AdaptiveLR(
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), goal, **{"interval": 2, "warmup": 2, **settings}
    ),
    "AdaptiveLR(AdamW)": lambda model, goal, **settings: apo.AdaptiveLR(
        torch.optim.AdamW(model.parameters(), lr=1e-2), goal, **{"interval": 2, "warmup": 2, **settings}
    ),
    "APO": lambda model, goal, **settings: apo.APO(model, goal, **{"interval": 2, "warmup": 2, **settings}),
}
each_front_end = pytest.mark.parametrize("front_end", FRONT_ENDS)


class Setting:
    """A small net, its optimizer, and closures over one batch."""

    def __init__(self, front_end: str, *, loss: Any = None, context: Any = None, **settings: Any) -> None:
        self.model, self.x, self.t, other = mlp(dtype=torch.float32)
        targets = torch.randint(3, (12,), generator=torch.Generator().manual_seed(1))
        batch = other if loss is None else (other, targets)
        goal = apo.ProximalObjective(self.model, lambda: batch, loss=loss, context=context)
        self.scaler = settings.pop("scaler", None)
        if self.scaler is not None:
            settings["grad_scaler"] = self.scaler
        self.opt = FRONT_ENDS[front_end](self.model, goal, **settings)

    def loss(self) -> Tensor:
        return F.cross_entropy(self.model(self.x), self.t)

    def backward(self, loss: Tensor) -> None:
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def closure(self) -> Tensor:
        self.opt.zero_grad()
        loss = self.loss()
        self.backward(loss)
        return loss

    def update(self) -> None:
        if self.scaler is not None:
            self.scaler.update()

    @property
    def result(self) -> tuple[list[Tensor], list[float]]:
        return weights(self.model), [float(g["lr"]) for g in self.opt.param_groups]


def scaler(**settings: Any) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", **{"init_scale": SCALE, **settings})


def assert_same(a: Setting, b: Setting) -> None:
    assert same(a.result[0], b.result[0])
    assert a.result[1] == b.result[1]


def assert_close(a: Setting, b: Setting) -> None:
    """Dividing by a power of two rounds nothing, but where numbers are tiny."""
    for x, y in zip(a.result[0], b.result[0], strict=True):
        assert torch.allclose(x, y, rtol=1e-4, atol=1e-6)
    assert a.result[1] == pytest.approx(b.result[1], rel=1e-4)


@each_front_end
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("own_loss", [False, True])
def test_autocast_around_the_step_is_autocast_inside_the_closure(
    front_end: str, dtype: torch.dtype, own_loss: bool
) -> None:
    """To the bit: weights, rates and what the trials gave; the loss is taken in autocast in both."""

    def cast() -> AbstractContextManager[None]:
        return torch.autocast("cpu", dtype)

    runs = []
    for inside, outside in ((cast, nullcontext), (nullcontext, cast)):
        run = Setting(front_end, loss=F.cross_entropy if own_loss else None, context=cast)
        evaluations = []

        def closure(run: Setting = run, inside: Any = inside) -> Tensor:
            run.opt.zero_grad()
            with inside():
                loss = run.loss()
            loss.backward()
            return loss

        for _ in range(8):
            with outside():
                run.opt.step(closure)
            evaluations.append(run.opt.last)
        assert run.opt.last.fsd > 0
        assert all(p.dtype == torch.float32 for p in run.model.parameters())
        runs.append((run, evaluations))
    (a, terms_a), (b, terms_b) = runs
    assert_same(a, b)
    assert terms_a == terms_b


@each_front_end
def test_autocasts_cache_holds_no_weights_of_a_trial(front_end: str) -> None:
    """Inside one autocast: what the model gives before and after a meta_step, and what a graph from before gives."""
    run = Setting(front_end)
    with torch.autocast("cpu", torch.bfloat16):
        before = run.model(run.x)
        run.opt.meta_step(run.closure)
        assert run.opt.last.step_norm > 0
        assert torch.equal(run.model(run.x), before)
        assert torch.is_autocast_enabled("cpu")
        assert torch.is_autocast_cache_enabled()
        before.sum().backward()


@each_front_end
def test_autocast_is_as_it_was_after_an_exception(front_end: str) -> None:
    """And holds no casts of the trial's weights."""
    run = Setting(front_end, interval=1)

    def stopping() -> Tensor:
        loss = run.closure()
        if run.opt.in_trial:
            raise KeyboardInterrupt
        return loss

    with torch.autocast("cpu", torch.float16):
        before = run.model(run.x)
        with pytest.raises(KeyboardInterrupt):
            run.opt.step(stopping)
        assert torch.is_autocast_enabled("cpu")
        assert torch.get_autocast_dtype("cpu") == torch.float16
        assert torch.equal(run.model(run.x), before)
    assert not torch.is_autocast_enabled("cpu")


@each_front_end
def test_a_closure_that_switches_autocast_off_is_heard(front_end: str) -> None:
    """And our own arithmetic, the backward of Q's terms and the discrepancy, isn't cast either."""
    runs = []
    for outside in (nullcontext(), torch.autocast("cpu", torch.bfloat16)):
        run = Setting(front_end, context=lambda: torch.autocast("cpu", enabled=False))
        run.opt.objective.discrepancy = lambda new, old: ((new - old).mT @ (new - old)).trace()

        def closure(run: Setting = run) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                return run.closure()

        with outside:
            for _ in range(4):
                run.opt.step(closure)
        runs.append(run)
    assert_same(*runs)


@each_front_end
@pytest.mark.parametrize("who", ["step", "opt", "base"])
def test_unscaling_and_clipping_in_the_closure(front_end: str, who: str) -> None:
    """As without a scaler: unscaled by the step (and not clipped), by the closure, by it on the base."""
    runs = []
    for scale in (None, scaler()):
        run = Setting(front_end, scaler=scale, interval=1)
        whom = getattr(run.opt, "optimizer", run.opt) if who == "base" else run.opt

        def closure(run: Setting = run, whom: Any = whom) -> Tensor:
            loss = run.closure()
            if who != "step":
                if run.scaler is not None:
                    run.scaler.unscale_(whom)
                nn.utils.clip_grad_norm_(run.model.parameters(), 0.05)
            return loss

        for _ in range(6):
            run.opt.step(closure)
            run.update()
        assert run.opt.failed_trials == run.opt.skipped_steps == 0
        runs.append(run)
    assert_close(*runs)
    assert runs[1].scaler.get_scale() == SCALE


@each_front_end
@pytest.mark.parametrize("built_with_scaler", [False, True])
def test_scaler_step_where_the_loss_is_on_other_examples(front_end: str, built_with_scaler: bool) -> None:
    """The usual loop, unchanged: backward, unscale_, clip, scaler.step(opt), update."""
    plain = Setting(front_end, loss=F.cross_entropy)
    scaled = Setting(front_end, loss=F.cross_entropy, **({"scaler": scaler()} if built_with_scaler else {}))
    held = scaled.scaler or scaler()
    for _ in range(6):
        plain.closure()
        nn.utils.clip_grad_norm_(plain.model.parameters(), 0.1)
        plain.opt.step()
        scaled.opt.zero_grad()
        held.scale(scaled.loss()).backward()
        held.unscale_(scaled.opt)
        nn.utils.clip_grad_norm_(scaled.model.parameters(), 0.1)
        held.step(scaled.opt)
        held.update()
    assert plain.opt.failed_trials == scaled.opt.failed_trials == 0
    assert_close(plain, scaled)
    assert held.get_scale() == SCALE


@each_front_end
def test_scaler_step_leaves_out_what_overflows(front_end: str) -> None:
    run = Setting(front_end, loss=F.cross_entropy, scaler=scaler())
    run.opt.zero_grad()
    run.backward(run.loss())
    run.model[0].weight.grad.fill_(float("inf"))
    before = weights(run.model)
    run.scaler.step(run.opt)
    run.update()
    assert same(weights(run.model), before)
    assert run.scaler.get_scale() == SCALE / 2
    assert run.opt.steps == 0  # the scaler didn't call it


@each_front_end
def test_meta_step_then_step(front_end: str) -> None:
    runs = []
    for scale in (None, scaler()):
        run = Setting(front_end, scaler=scale, interval=0, warmup=0)
        for _ in range(4):
            run.opt.meta_step(run.closure)
            run.opt.step(run.closure)
            run.update()
        assert run.opt.last.fsd > 0
        runs.append(run)
    assert_close(*runs)


@each_front_end
def test_an_overflow_in_the_trial_alone_lowers_no_scale(front_end: str) -> None:
    run = Setting(front_end, scaler=scaler(), interval=1)
    run.opt.step(run.closure)
    run.update()
    handle = run.model[0].weight.register_hook(lambda grad: grad * float("inf") if run.opt.in_trial else grad)
    before = weights(run.model)
    run.opt.step(run.closure)
    run.update()
    handle.remove()
    assert run.scaler.get_scale() == SCALE
    assert run.opt.failed_trials == 1
    assert run.opt.skipped_steps == 0
    assert all(p.isfinite().all() for p in run.model.parameters())
    assert not same(weights(run.model), before)  # the gradients at θ were good


@each_front_end
def test_an_overflow_at_the_weights_leaves_the_step_out(front_end: str) -> None:
    run = Setting(front_end, scaler=scaler(), interval=1)
    run.opt.step(run.closure)
    run.update()
    before, rates = run.result
    handle = run.model[0].weight.register_hook(lambda grad: grad * float("inf"))
    run.opt.step(run.closure)
    run.update()
    handle.remove()
    assert same(weights(run.model), before)
    assert run.result[1] == rates
    assert run.scaler.get_scale() == SCALE / 2
    assert (run.opt.skipped_steps, run.opt.failed_trials, run.opt.steps) == (1, 0, 2)


@each_front_end
def test_a_step_may_be_tried_again_after_an_exception(front_end: str) -> None:
    """Its gradients aren't taken for unscaled then, for the step before had unscaled its own."""
    plain, scaled = Setting(front_end, interval=1), Setting(front_end, interval=1, scaler=scaler())
    for run in (plain, scaled):

        def closure(run: Setting = run) -> Tensor:
            if run.opt.in_trial:
                raise KeyboardInterrupt
            return run.closure()

        with pytest.raises(KeyboardInterrupt):
            run.opt.step(closure)
        for _ in range(3):
            run.opt.step(run.closure)
            run.update()
    assert_close(plain, scaled)


@each_front_end
def test_a_forgotten_update_is_an_error_as_torchs(front_end: str) -> None:
    run = Setting(front_end, scaler=scaler())
    run.opt.step(run.closure)
    before = weights(run.model)
    with pytest.raises(RuntimeError, match=r"unscale_\(\) is being called after step"):
        run.opt.step(run.closure)
    assert same(weights(run.model), before)


@each_front_end
def test_several_optimizers_under_one_scaler(front_end: str) -> None:
    """Another optimizer, which scaler.step steps as ever, has its own weights in the same loss."""
    runs = []
    for scale in (None, scaler()):
        run = Setting(front_end, scaler=scale, interval=1)
        factor = torch.ones(3, requires_grad=True)
        other = torch.optim.SGD([factor], lr=0.1)

        def closure(run: Setting = run, factor: Tensor = factor, other: Any = other) -> Tensor:
            run.opt.zero_grad()
            other.zero_grad()
            loss = F.cross_entropy(run.model(run.x) * factor, run.t)
            run.backward(loss)
            if run.scaler is not None:
                run.scaler.unscale_(other)
            nn.utils.clip_grad_norm_([factor], 0.05)
            return loss

        for _ in range(5):
            (expected,) = torch.autograd.grad(F.cross_entropy(run.model(run.x) * factor, run.t), [factor])
            run.opt.step(closure)
            clipped = expected * (0.05 / expected.norm()).clamp(max=1)
            assert torch.allclose(factor.grad, clipped, rtol=1e-3)
            if run.scaler is None:
                other.step()
            else:
                run.scaler.step(other)
            run.update()
        runs.append((run, factor.detach()))
    assert_close(runs[0][0], runs[1][0])
    assert torch.allclose(runs[0][1], runs[1][1], rtol=1e-4)


@each_front_end
def test_two_of_ours_under_one_scaler(front_end: str) -> None:
    runs = []
    for scale in (None, scaler()):
        first, second = (Setting(front_end, scaler=scale, interval=1) for _ in range(2))
        for _ in range(4):
            first.opt.step(first.closure)
            second.opt.step(second.closure)
            first.update()
        assert_close(first, second)
        runs.append(first)
    assert_close(*runs)


@each_front_end
def test_a_disabled_scaler_is_none(front_end: str) -> None:
    runs = []
    for scale in (None, scaler(enabled=False)):
        run = Setting(front_end, scaler=scale)
        for _ in range(4):
            run.opt.step(run.closure)
            run.update()
        runs.append(run)
    assert_same(*runs)


@each_front_end
def test_float16_with_a_scaler_trains_as_float32_nearly(front_end: str) -> None:
    losses = []
    for scale, context in ((None, nullcontext), (scaler(), lambda: torch.autocast("cpu", torch.float16))):
        run = Setting(front_end, scaler=scale, context=context)
        for _ in range(25):
            with context():
                run.opt.step(run.closure)
            run.update()
        losses.append(run.loss().item())
    assert losses[1] == pytest.approx(losses[0], rel=0.05, abs=0.02)
