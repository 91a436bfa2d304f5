"""The meta-gradient of φ, against finite differences of Q and against autograd through an unrolled step."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apo
from apo.fisher.start import FisherStart
from apo.phi.meta_optimizer import MetaOptimizer
from apo.phi.relative_steps import RelativeSteps
from apo_kernels import blocks_from_dense, blocks_to_dense
from tests.apo.helpers import Problem, apo_of, closure_of, convnet, difference, mlp, objective, scattered

Recorded = dict[str, list[Any]]


def attention() -> Problem:
    torch.manual_seed(3)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
            self.up = nn.ConvTranspose1d(4, 3, 2, stride=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(self.attention(x, x, x)[0].mT).mean(-1)

    x, other = torch.randn(6, 3, 4).double(), torch.randn(5, 3, 4).double()
    return Net().double(), x, torch.randint(3, (6,)), other


def embedding() -> Problem:
    torch.manual_seed(4)
    model = nn.Sequential(nn.Embedding(6, 4), nn.LSTM(4, 3, batch_first=True)).double()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)[0].sum(1)

    return Net(), torch.randint(6, (8, 3)), torch.randint(3, (8,)), torch.randint(6, (5, 3))


PROBLEMS = {"mlp": mlp, "convnet": convnet, "attention": attention, "embedding": embedding}


@contextmanager
def recorded(opt: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorded]:
    """Meta-gradients as they reach the meta-optimizers, which then don't move φ."""
    found: Recorded = {"blocks": [], "slopes": []}

    def meta_step(self: MetaOptimizer | RelativeSteps, grads: Any, sizes: Any = None) -> None:
        found["blocks"].append(list(grads))

    def update(groups: Any, slopes: Any, *_: Any) -> list[float]:
        found["slopes"].append(list(slopes))
        return [1.0] * len(groups)

    with monkeypatch.context() as patch:
        patch.setattr(MetaOptimizer, "step", meta_step)
        patch.setattr(RelativeSteps, "step", meta_step)
        patch.setattr(apo.APO, "_move_scale_to_rates", lambda self: None)
        patch.setattr(FisherStart, "step", lambda *_: None)
        if hasattr(opt, "rates"):
            patch.setattr(opt.rates, "update", update)
        yield found


def roughened(opt: apo.APO) -> None:
    """Blocks that are nothing special."""
    for layer in opt.layers:
        for tensor in layer.tensors():
            tensor.add_(0.3 * torch.randn_like(tensor))


def q_at(opt: Any, closure: Callable[[], Tensor]) -> float:
    opt.meta_step(closure)
    return opt.last.objective


def prepared(problem: str, **settings: Any) -> tuple[apo.APO, nn.Module, Problem, Callable[[], Tensor]]:
    """An APO with a momentum and blocks of its own, φ frozen so far."""
    model, x, t, other = made = PROBLEMS[problem]()
    settings = {"lr": 0.005, "momentum": 0.9, "interval": 0, "weight_decay": 0.03, **settings}
    opt = apo_of(model, objective(model, other), **settings)
    closure = closure_of(opt, model, x, t)
    for _ in range(2):
        opt.step(closure)
    roughened(opt)
    return opt, model, made, closure


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("block_size", [None, 3, 1])
@pytest.mark.parametrize(("decoupled", "meta_optimizer"), [(True, "relative"), (False, "adam")])
def test_blocks_equal_finite_differences(
    problem: str, block_size: int | None, decoupled: bool, meta_optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The meta-gradients, which of blocks are relative to them where the steps are."""
    settings = {"decoupled_weight_decay": decoupled, "meta_optimizer": meta_optimizer}
    opt, _, _, closure = prepared(problem, block_size=block_size, **settings)
    with recorded(opt, monkeypatch) as found:
        opt.meta_step(closure)
        tensors = [t for layer in opt.layers for t in layer.tensors()]
        parts = [(layer, name) for layer in opt.layers for name in layer.learned]
        assert len(found["blocks"][0]) == len(tensors)
        generator = torch.Generator().manual_seed(0)
        for (layer, name), tensor, grad in zip(parts, tensors, found["blocks"][0], strict=True):
            start = tensor.clone()
            direction = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
            # half of it along the gradient, lest the product be small beside what it is made of
            direction = direction / direction.norm() + grad / grad.norm()
            change = direction
            if meta_optimizer == "relative":
                change = start * direction if name == "S" else without_what_sticks_out(layer, name) @ direction

            def q(h: float, tensor: Tensor = tensor, start: Tensor = start, along: Tensor = change) -> float:
                tensor.copy_(start + h * along)
                return q_at(opt, closure)

            expected = difference(q)
            tensor.copy_(start)
            assert (grad * direction).sum().item() == pytest.approx(expected, rel=1e-6), f"{name} of {layer.view.name}"
        log_lr = math.log(opt.param_groups[0]["lr"])

        def q_of_rate(h: float) -> float:
            opt.param_groups[0]["lr"] = math.exp(log_lr + h)
            return q_at(opt, closure)

        assert found["slopes"][0][0] == pytest.approx(difference(q_of_rate), rel=1e-6)


def without_what_sticks_out(layer: Any, name: str) -> Tensor:
    """A block, with zeros in a last square beyond the side."""
    block, side = getattr(layer, name), layer.view.n if name == "A" else layer.view.m
    if block.ndim == layer.S.ndim:
        return block
    return blocks_from_dense(blocks_to_dense(block, side), block.shape[-1])


def dense_p(layer: Any, G: Tensor, A: Tensor, B: Tensor, S: Tensor) -> Tensor:
    """Eq. 10 from its definition, with dense blocks."""
    if A.ndim == G.ndim + 1:
        A = blocks_to_dense(A, layer.view.n)
    if B.ndim == G.ndim + 1:
        B = blocks_to_dense(B, layer.view.m)
    return B @ (S**2 * (B.mT @ G @ A)) @ A.mT


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("block_size", [None, 3])
@pytest.mark.parametrize(("lookahead", "meta_optimizer"), [("whole", "relative"), ("step", "adam")])
def test_blocks_equal_autograd_through_an_unrolled_step(
    problem: str, block_size: int | None, lookahead: str, meta_optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"lookahead": lookahead, "meta_optimizer": meta_optimizer}
    opt, model, (_, x, t, other), closure = prepared(problem, block_size=block_size, **settings)
    with recorded(opt, monkeypatch) as found:
        opt.meta_step(closure)

    model.eval()
    named = dict(model.named_parameters())
    name_of = {p: name for name, p in named.items()}
    loss = F.cross_entropy(model(x), t)
    grads = dict(zip(named.values(), torch.autograd.grad(loss, list(named.values()), create_graph=True), strict=True))
    phi, log_lr = [], torch.tensor(math.log(opt.param_groups[0]["lr"]), dtype=torch.float64, requires_grad=True)
    trial = {}
    for layer in opt.layers:
        operands = {k: getattr(layer, k).clone() for k in "ABS"}
        phi += [operands[k].requires_grad_() for k in layer.learned]
        view = layer.view
        G = view.joined(view.matrices(grads[p] for p in view.parameters))
        velocity = log_lr.exp() * dense_p(layer, G, **operands)
        # all that momentum 0.9 makes of this gradient, or the next step
        velocity = 10 * velocity if lookahead == "whole" else velocity + 0.9 * layer.momentum
        for p, step in zip(view.parameters, scattered(view, velocity), strict=True):
            trial[name_of[p]] = (1 - log_lr.exp() * 0.03) * p.detach() - step
    new, old = torch.func.functional_call(model, trial, other), model(other).detach()
    kl = (old.softmax(-1) * (old.log_softmax(-1) - new.log_softmax(-1))).sum(-1).mean()
    wsd = sum((trial[name] - p.detach()).square().sum() for name, p in named.items()) / 2
    q = F.cross_entropy(torch.func.functional_call(model, trial, x), t) + 0.7 * kl + 0.2 * wsd

    assert opt.last is not None
    assert opt.last.objective == pytest.approx(q.item(), rel=1e-12)
    *expected, expected_slope = torch.autograd.grad(q, [*phi, log_lr])
    parts = [(layer, name) for layer in opt.layers for name in layer.learned]
    for (layer, name), grad, wanted in zip(parts, found["blocks"][0], expected, strict=True):
        if meta_optimizer == "relative":
            wanted = layer.S * wanted if name == "S" else without_what_sticks_out(layer, name).mT @ wanted
        assert (grad - wanted).norm() <= 1e-9 * wanted.norm()
    assert found["slopes"][0][0] == pytest.approx(expected_slope.item(), rel=1e-9)


BASES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.3, weight_decay=0.01),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.9),
    "Nesterov": lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.9, nesterov=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.02),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.05),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
}


def unit_step(base: str, thetas: list[Tensor], gs: list[Tensor]) -> Tensor:
    """What the base subtracts at rate 1, from the weights and gradients of all steps so far."""
    t, g = len(gs), gs[-1]
    if base == "SGD":
        return g + 0.01 * thetas[-1]
    if base in ("momentum", "Nesterov"):
        v = sum(0.9 ** (t - 1 - i) * gi for i, gi in enumerate(gs))
        return g + 0.9 * v if base == "Nesterov" else v
    if base == "Adagrad":
        return g / (sum(gi**2 for gi in gs).sqrt() + 1e-10)
    if base == "RMSprop":
        return g / (sum(0.01 * 0.99 ** (t - 1 - i) * gi**2 for i, gi in enumerate(gs)).sqrt() + 1e-8)
    mean = sum(0.1 * 0.9 ** (t - 1 - i) * gi for i, gi in enumerate(gs)) / (1 - 0.9**t)
    square = sum(0.001 * 0.999 ** (t - 1 - i) * gi**2 for i, gi in enumerate(gs)) / (1 - 0.999**t)
    return mean / (square.sqrt() + 1e-8) + (0.1 * thetas[-1] if base == "AdamW" else 0)


def reach_of(base: str, t: int) -> float:
    """How much of step t a trial is: RMSprop's are as long as its later ones."""
    return float((1 - 0.99**t) ** 0.5) if base == "RMSprop" else 1.0


@pytest.mark.parametrize("base", BASES)
def test_log_rate_equals_finite_differences_and_autograd(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, t, other = mlp()
    rates = {"first": [*model[0].parameters()], "second": [*model[2].parameters()]}
    opt = apo.AdaptiveLR(BASES[base]([{"params": p} for p in rates.values()]), objective(model, other), interval=0)
    closure = closure_of(opt, model, x, t)
    history = []
    for last in (False, False, True):
        thetas = [p.detach().clone() for p in model.parameters()]
        closure()
        history.append((thetas, [p.grad.clone() for p in model.parameters()]))
        if not last:
            opt.step(closure)

    with recorded(opt, monkeypatch) as found:
        opt.meta_step(closure)
        slopes = found["slopes"][0]
        for group, slope in zip(opt.param_groups, slopes, strict=True):
            rate = group["lr"]

            def q(h: float, group: Any = group, rate: float = rate) -> float:
                group["lr"] = rate * math.exp(h)
                return q_at(opt, closure)

            assert slope == pytest.approx(difference(q), rel=1e-6)
            group["lr"] = rate

    model.eval()
    log_lr = torch.tensor([math.log(g["lr"]) for g in opt.param_groups], dtype=torch.float64, requires_grad=True)
    trial = {}
    for i, (name, p) in enumerate(model.named_parameters()):
        step = unit_step(base, [thetas[i] for thetas, _ in history], [grads[i] for _, grads in history])
        trial[name] = p.detach() - reach_of(base, len(history)) * log_lr[i // 2].exp() * step
    new, old = torch.func.functional_call(model, trial, other), model(other).detach()
    kl = (old.softmax(-1) * (old.log_softmax(-1) - new.log_softmax(-1))).sum(-1).mean()
    wsd = sum((trial[name] - p.detach()).square().sum() for name, p in model.named_parameters()) / 2
    value = F.cross_entropy(torch.func.functional_call(model, trial, x), t) + 0.7 * kl + 0.2 * wsd
    (expected,) = torch.autograd.grad(value, log_lr)
    assert slopes == pytest.approx(expected.tolist(), rel=1e-9)


def test_full_preconditioner_equals_finite_differences_and_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, t, other = mlp()
    opt = apo.FullPreconditioner(model, objective(model, other), lr=0.3)
    closure = closure_of(opt, model, x, t)
    opt.P.add_(0.1 * torch.randn_like(opt.P))
    with recorded(opt, monkeypatch) as found:
        opt.meta_step(closure)
        grad, start = found["blocks"][0][0], opt.P.clone()
        direction = grad / grad.norm() + torch.randn_like(grad) / len(grad)

        def q(h: float) -> float:
            opt.P.copy_(start + h * direction)
            return q_at(opt, closure)

        assert (grad * direction).sum().item() == pytest.approx(difference(q), rel=1e-6)
        opt.P.copy_(start)

    theta, f = apo.proximal.flat_model(model)
    P = start.clone().requires_grad_()
    closure()
    step = 0.3 * P @ torch.cat([p.grad.flatten() for p in model.parameters()])
    new, old = f(theta - step, other), f(theta, other)
    kl = (old.softmax(-1) * (old.log_softmax(-1) - new.log_softmax(-1))).sum(-1).mean()
    value = F.cross_entropy(f(theta - step, x), t) + 0.7 * kl + 0.1 * step.square().sum()
    (expected,) = torch.autograd.grad(value, P)
    assert (grad - expected).norm() <= 1e-9 * expected.norm()


@pytest.mark.parametrize("reach", [1.0, 0.5])
@pytest.mark.parametrize("base", ["momentum", "RMSprop"])
def test_log_rate_of_a_loss_on_other_examples(base: str, reach: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """``dQ/d log lr`` at the rate ``reach · lr``, where the loss of Q is that of B′."""
    model, x, t, other = mlp()
    targets = torch.randint(3, (12,))
    goal = objective(model, [(other, targets)], loss=F.cross_entropy)
    groups = [{"params": [*model[0].parameters()]}, {"params": [*model[2].parameters()]}]
    opt = apo.AdaptiveLR(BASES[base](groups), goal, interval=0, reach=reach)
    closure = closure_of(opt, model, x, t)
    opt.step(closure)
    opt.step(closure)

    plain = copy.deepcopy(opt.optimizer.state_dict())
    with recorded(opt, monkeypatch) as found:
        opt.meta_step(closure)
    start, old = [p.detach().clone() for p in model.parameters()], model(other).detach()
    closure()
    rates = [g["lr"] for g in opt.param_groups]
    for i, slope in enumerate(found["slopes"][0]):

        def q(h: float, i: int = i) -> float:
            opt.optimizer.load_state_dict(copy.deepcopy(plain))
            for j, g in enumerate(opt.optimizer.param_groups):
                g["lr"] = reach * reach_of(base, 3) * rates[j] * math.exp(h if i == j else 0)
            opt.optimizer.step()
            with torch.no_grad():
                y = model(other)
                wsd = sum((p - s).square().sum() for p, s in zip(model.parameters(), start, strict=True)) / 2
                value = F.cross_entropy(y, targets) + 0.7 * apo.KL()(y, old) + 0.2 * wsd
                for p, s in zip(model.parameters(), start, strict=True):
                    p.copy_(s)
            return value.item()

        assert slope == pytest.approx(difference(q), rel=1e-6)


@pytest.mark.parametrize("reach", [0.3, 0.5])
def test_a_shorter_reach_changes_where_q_is_evaluated_and_not_the_step(reach: float) -> None:
    taken = []
    for r in (1.0, reach):
        model, x, t, other = mlp()
        opt = apo.AdaptiveLR(BASES["momentum"](model.parameters()), objective(model, other), meta_lr=0, reach=r)
        closure = closure_of(opt, model, x, t)
        for _ in range(3):
            opt.step(closure)
        taken.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(taken[1], taken[0], rtol=0, atol=1e-14)
