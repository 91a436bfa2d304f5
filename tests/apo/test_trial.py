"""A trial leaves nothing behind: weights, buffers, random state, gradients, flags, optimizer state."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apo
from apo.trial import Lookahead, Undisturbed, surely
from tests.apo.helpers import closure_of, mlp, objective, same, weights

Make = Callable[..., Any]


def adaptive(model: nn.Module, inputs: Any, **settings: Any) -> apo.AdaptiveLR:
    base = torch.optim.SGD(model.parameters(), lr=settings.pop("lr", 0.1), momentum=0.9)
    return apo.AdaptiveLR(base, objective(model, inputs), **settings)


def preconditioned(model: nn.Module, inputs: Any, **settings: Any) -> apo.APO:
    return apo.APO(model, objective(model, inputs), **settings)


def full(model: nn.Module, inputs: Any, **settings: Any) -> apo.FullPreconditioner:
    return apo.FullPreconditioner(model, objective(model, inputs), **settings)


FRONT_ENDS: dict[str, Make] = {"AdaptiveLR": adaptive, "APO": preconditioned, "FullPreconditioner": full}


def noisy_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))


@pytest.mark.parametrize("front_end", FRONT_ENDS)
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_trial_leaves_buffers_random_state_gradients_and_flags(front_end: str, mode: str) -> None:
    """The step with a meta-update disturbs no more than the closure at θ does."""
    x, t, other = torch.randn(16, 5), torch.randint(3, (16,)), torch.randn(9, 5)
    seen = []
    for meta in (False, True):
        model = noisy_net()
        model[2].eval()  # a flag of its own
        opt = FRONT_ENDS[front_end](model, other, interval=1 if meta else 0, warmup=0)
        opt.objective = objective(model, other, mode=mode)
        torch.manual_seed(7)
        model(x)  # buffers that are not at their start
        opt.step(closure_of(opt, model, x, t))
        grads = [p.grad for p in model.parameters()]
        flags = [m.training for m in model.modules()]
        seen.append((list(model.buffers()), grads, flags, torch.get_rng_state()))
    for plain, trial in zip(*seen, strict=True):
        if isinstance(plain, Tensor):
            assert torch.equal(plain, trial)
        else:
            assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(plain, trial, strict=True))


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_trials_are_evaluated_in_eval_mode_unless_asked_otherwise(front_end: str) -> None:
    x, t, other = torch.randn(16, 5), torch.randint(3, (16,)), torch.randn(9, 5)
    for mode in ("eval", "train"):
        model = noisy_net()
        opt = FRONT_ENDS[front_end](model, other, interval=1)
        opt.objective = objective(model, other, mode=mode)
        modes: list[bool] = []
        handle = model[1].register_forward_hook(lambda module, *_, modes=modes: modes.append(module.training))
        opt.step(closure_of(opt, model, x, t))
        handle.remove()
        # the closure at θ, B′ at θ, the closure at θ′, B′ at θ′
        assert modes[0]
        assert modes[1:] == [mode == "train"] * 3
        assert all(m.training for m in model.modules())


def test_train_mode_gives_both_evaluations_of_the_batch_one_dropout_mask() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(40, 3))
    other = torch.randn(9, 40)
    opt = adaptive(model, other, lr=1e-30, interval=1)  # the lookahead is where the weights are
    opt.objective = objective(model, other, mode="train")
    opt.step(closure_of(opt, model, torch.randn(4, 40), torch.randint(3, (4,))))
    assert opt.last.fsd == 0


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_a_non_finite_trial_leaves_batch_norms_statistics_finite(front_end: str) -> None:
    x, t = torch.randn(16, 5), torch.randint(3, (16,))
    model = noisy_net()
    opt = FRONT_ENDS[front_end](model, torch.randn(9, 5), lr=1e30, interval=1)
    opt.objective = objective(model, torch.randn(9, 5), mode="train")
    before = weights(model)
    opt.step(closure_of(opt, model, x, t))
    assert opt.failed_trials == 1
    assert same(weights(model), before)  # a failed step is left out
    assert all(b.isfinite().all() for b in model.buffers())
    expected = noisy_net()
    expected(x)
    for b, wanted in zip(model.buffers(), expected.buffers(), strict=True):
        assert torch.equal(b, wanted)


@pytest.mark.parametrize("front_end", FRONT_ENDS)
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("call", [1, 2, 3])
def test_an_exception_in_a_trial_undoes_everything(front_end: str, error: type[BaseException], call: int) -> None:
    """Whether in the first evaluation of B′ (1), in the closure (2) or in the second evaluation (3); ``APO`` begins by
    looking at the last step."""
    model, x, t, other = mlp()
    model.insert(1, nn.BatchNorm1d(7).double())
    opt = FRONT_ENDS[front_end](model, other, interval=1)
    closure = closure_of(opt, model, x, t)
    for _ in range(3):
        opt.step(closure)
    reference = copy.deepcopy(opt.state_dict())
    before, twin = weights(model), copy.deepcopy(model)
    calls = 0

    def raising(*_: Any) -> None:
        nonlocal calls
        calls += opt.in_trial
        if calls == call:
            raise error("stop")

    handle = model[-1].register_forward_hook(raising)
    with pytest.raises(error, match="stop"):
        opt.step(closure)
    handle.remove()
    assert same(weights(model), before)
    twin(x)  # as the closure at θ did
    assert same([*model.buffers()], [*twin.buffers()])
    assert model.training
    assert not opt.in_trial
    after = opt.state_dict()
    assert str(after) == str(reference)
    # and it goes on as if nothing had been
    opt.step(closure)
    assert opt.failed_trials == 0


def test_weights_come_back_although_the_restoring_is_interrupted() -> None:
    done = []

    def restore() -> None:
        done.append(len(done))
        if len(done) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        surely(restore)
    assert done == [0, 1]


def test_lookahead_restores_to_the_bit() -> None:
    p = torch.tensor([1.0, float("nan"), -0.0, 1e-45])
    bits = p.view(torch.int32).clone()
    with Lookahead([p]):
        p.fill_(3)
    assert torch.equal(p.view(torch.int32), bits)


def test_undisturbed_puts_back_replaced_buffers() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.seen = self.seen + 1
            return x

    model = Counter()
    held = model.seen
    with Undisturbed([model], []):
        model(torch.zeros(1))
        assert model.seen == 1
    assert model.seen is held
    assert held == 0


def test_a_recurrent_net_keeps_its_flag_and_loses_its_dropout() -> None:
    """cuDNN has no backward in eval mode."""
    model = nn.ModuleList([nn.LSTM(3, 3), nn.LSTM(3, 3, 2, dropout=0.5)])
    with Undisturbed([model], []):
        assert [m.training for m in model] == [True, True]
        assert [m.dropout for m in model] == [0, 0]
    assert [m.dropout for m in model] == [0, 0.5]


def test_loss_at_the_lookahead_is_taken_on_the_same_batch_and_fsd_on_another() -> None:
    """Q's terms, each against its definition at the lookahead."""
    model, x, t, other = mlp()
    base = torch.optim.SGD(model.parameters(), lr=0.5)
    opt = apo.AdaptiveLR(base, objective(model, other), interval=1)
    theta, f = apo.proximal.flat_model(model)
    closure = closure_of(opt, model, x, t)
    closure()
    new = theta - 0.5 * torch.cat([p.grad.flatten() for p in model.parameters()])
    opt.meta_step(closure)
    log_p, log_q = f(theta, other).log_softmax(-1), f(new, other).log_softmax(-1)
    assert opt.last.loss == pytest.approx(F.cross_entropy(f(new, x), t).item(), rel=1e-12)
    assert opt.last.fsd == pytest.approx((log_p.exp() * (log_p - log_q)).sum(-1).mean().item(), rel=1e-9)
    assert opt.last.step_norm == pytest.approx((new - theta).norm().item(), rel=1e-12)
    assert opt.last.wsd == pytest.approx(opt.last.step_norm**2 / 2, rel=1e-12)
    assert opt.last.objective == pytest.approx(opt.last.loss + 0.7 * opt.last.fsd + 0.2 * opt.last.wsd, rel=1e-12)


@pytest.mark.parametrize("own_loss", [False, True])
@pytest.mark.parametrize("front_end", ["AdaptiveLR", "APO"])
def test_hooks_can_tell_trials(front_end: str, own_loss: bool) -> None:
    """They run in each backward: where ``in_trial`` isn't set, as often as without trials."""
    model, x, t, other = mlp()
    goal = objective(model, other)
    if own_loss:
        goal = apo.ProximalObjective(model, lambda: (x, t), loss=F.cross_entropy)
    base = torch.optim.SGD(model.parameters(), 0.1)
    opt: Any = apo.APO(model, goal) if front_end == "APO" else apo.AdaptiveLR(base, goal)
    seen: list[bool] = []
    model[0].weight.register_post_accumulate_grad_hook(lambda _: seen.append(opt.in_trial))
    model[0].register_forward_hook(lambda *_: seen.append(opt.in_trial))
    for _ in range(5):
        opt.step(closure_of(opt, model, x, t))
    assert seen.count(False) == 2 * 5
    assert seen.count(True) >= 3 * 5


def test_a_step_within_a_step_is_refused() -> None:
    """A hook that steps in the backward would be called by the trial's backward too, and so on."""
    model, x, t, _ = mlp()
    goal = apo.ProximalObjective(model, lambda: (x, t), loss=F.cross_entropy)
    each = [apo.AdaptiveLR(torch.optim.SGD([p], lr=0.1), goal) for p in model.parameters()]
    for p, opt in zip(model.parameters(), each, strict=True):
        p.register_post_accumulate_grad_hook(lambda _, opt=opt: opt.step())
    before = weights(model)
    with pytest.raises(RuntimeError, match="step must not be called within a step of the same optimizer"):
        F.cross_entropy(model(x), t).backward()
    assert same(before, weights(model))
    assert not any(opt.steps or opt.in_trial for opt in each)
