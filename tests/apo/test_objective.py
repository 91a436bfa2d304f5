"""Discrepancies against their definitions, and what the objective accepts and refuses."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, distributions, nn

import apo
from apo.proximal import hessian
from tests.apo.helpers import closure_of, mlp, objective

N, C = 6, 4


def outputs(*shape: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(*shape).double(), torch.randn(*shape).double()


def test_kl_is_of_the_old_softmax_to_the_new() -> None:
    new, old = outputs(N, C)
    expected = distributions.kl_divergence(
        distributions.Categorical(logits=old), distributions.Categorical(logits=new)
    ).mean()
    assert apo.KL()(new, old).item() == pytest.approx(expected.item(), rel=1e-12)


def test_kl_over_another_dimension_is_the_mean_over_positions() -> None:
    new, old = outputs(N, C, 5)
    flat = apo.KL()(new.mT.reshape(-1, C), old.mT.reshape(-1, C))
    assert apo.KL(dim=1)(new, old).item() == pytest.approx(flat.item(), rel=1e-12)
    assert apo.KL()(new.mT, old.mT).item() == pytest.approx(flat.item(), rel=1e-12)


def test_squared_error() -> None:
    new, old = outputs(N, C)
    half = F.mse_loss(new, old, reduction="sum") / 2
    assert apo.SquaredError()(new, old).item() == pytest.approx((half / N).item(), rel=1e-12)
    assert apo.SquaredError(mean=True)(new, old).item() == pytest.approx((half / N / C).item(), rel=1e-12)


def test_bernoulli_kl() -> None:
    new, old = outputs(N, C)
    each = distributions.kl_divergence(distributions.Bernoulli(logits=old), distributions.Bernoulli(logits=new))
    assert apo.BernoulliKL()(new, old).item() == pytest.approx(each.sum().item() / N, rel=1e-10)
    assert apo.BernoulliKL(mean=True)(new, old).item() == pytest.approx(each.mean().item(), rel=1e-10)
    saturated = torch.full((1, 1), 200.0).double()
    assert apo.BernoulliKL()(-saturated, saturated).item() == pytest.approx(200)


def test_gaussian_kl() -> None:
    new, old = outputs(2, N, C)
    normal = [distributions.Normal(mean, (log_var / 2).exp()) for mean, log_var in (old, new)]
    expected = distributions.kl_divergence(*normal).sum() / N
    assert apo.GaussianKL()(tuple(new), tuple(old)).item() == pytest.approx(expected.item(), rel=1e-12)
    fixed = apo.GaussianKL(variance=4.0)(new[0], old[0])
    assert fixed.item() == pytest.approx((new[0] - old[0]).square().sum().item() / 8 / N, rel=1e-12)


@pytest.mark.parametrize("name", ["kl", "mse", "bernoulli", "gaussian"])
def test_discrepancies_vanish_at_the_old_outputs_and_curve_up(name: str) -> None:
    rho = apo.discrepancy.discrepancy_named(name)
    _, old = outputs(N, C)
    pair = name == "gaussian"

    def value(new: Tensor) -> Tensor:
        new = new.view(N, C)
        return rho((new, new / 2), (old, old / 2)) if pair else rho(new, old)

    new = old.flatten().requires_grad_()
    (slope,) = torch.autograd.grad(value(new), new)
    assert value(new).abs() < 1e-12
    assert slope.abs().max() < 1e-12
    assert torch.linalg.eigvalsh(hessian(value, new)).min() > -1e-12


def test_half_precision_outputs_are_compared_in_float32() -> None:
    new, old = (x.to(torch.bfloat16) for x in outputs(N, C))
    for rho in (apo.KL(), apo.SquaredError(), apo.BernoulliKL()):
        assert rho(new, old).dtype == torch.float32
        assert rho(new, old).item() == pytest.approx(rho(new.double(), old.double()).item(), rel=1e-5)


@pytest.mark.parametrize(("rho", "shape"), [(apo.KL(), (N, 1)), (apo.KL(dim=1), (N, 1, 5))])
def test_kl_of_one_class_is_refused_because_it_is_always_zero(rho: apo.KL, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"two classes or more, but got shape .*'bernoulli' for one logit"):
        rho(*outputs(*shape))


FRONT_ENDS: dict[str, Any] = {
    "AdaptiveLR": lambda model, goal: apo.AdaptiveLR(torch.optim.SGD(model.parameters(), lr=0.1), goal),
    "APO": apo.APO,
    "FullPreconditioner": apo.FullPreconditioner,
}


@pytest.mark.parametrize("make", FRONT_ENDS.values(), ids=FRONT_ENDS)
def test_an_objective_of_a_model_that_is_not_trained_is_refused(make: Any) -> None:
    model, other = nn.Linear(5, 3), nn.Linear(5, 3)
    with pytest.raises(ValueError, match=r"objective must be of the model.* Linear, shares no parameter"):
        make(model, objective(other, torch.randn(9, 5)))


def test_an_objective_is_accepted_where_its_model_may_be_the_one_that_is_trained() -> None:
    model, part = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)), nn.Linear(5, 3)
    x = torch.randn(9, 5)
    apo.APO(model, objective(model[0], x))
    apo.APO(part, objective(model, x, forward=lambda _, x: part(x)))
    apo.APO(part, objective(nn.Identity(), x))
    apo.APO(part, apo.ProximalObjective(model, fsd_weight=0.0))
    flat = torch.zeros(18, requires_grad=True)
    part.weight.data, part.bias.data = flat.data[:15].view(3, 5), flat.data[15:]
    apo.AdaptiveLR(torch.optim.SGD([flat], lr=0.1), objective(part, x))


class Returning(nn.Module):
    """A linear layer whose output is wrapped."""

    def __init__(self, wrap: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(5, 3).double()
        self.wrap = wrap

    def forward(self, x: Tensor, scale: float = 1.0) -> Any:
        return self.wrap(self.linear(x) * scale)


class HuggingFaceOutput(OrderedDict[str, Any]):
    """Their outputs: a mapping whose entries are attributes too."""

    @property
    def logits(self) -> Tensor:
        return self["logits"]


WRAPS: dict[str, Any] = {
    "tensor": lambda y: y,
    "tuple": lambda y: (y, "state"),
    "list": lambda y: [y],
    "Hugging Face": lambda y: HuggingFaceOutput(loss=y.sum(), logits=y),
    "mapping": lambda y: {"out": y},
}


@pytest.mark.parametrize("wrap", WRAPS)
def test_what_models_return(wrap: str) -> None:
    model = Returning(WRAPS[wrap])
    x, t = torch.randn(8, 5).double(), torch.randint(3, (8,))
    opt = apo.AdaptiveLR(torch.optim.SGD(model.parameters(), lr=0.5), objective(model, torch.randn(9, 5).double()))
    opt.step(closure_of(opt, model, x, t, lambda y, t: F.cross_entropy(model.linear(x), t)))
    plain = Returning(WRAPS["tensor"])
    torch.manual_seed(0)
    assert opt.last is not None
    assert opt.last.fsd > 0
    assert plain(x).shape == (8, 3)


def test_a_choice_of_outputs_and_of_the_call() -> None:
    model = Returning(lambda y: {"a": {"b": y}})
    goal = objective(
        model, torch.randn(9, 5).double(), outputs=lambda r: r["a"]["b"], forward=lambda m, x: m(x, scale=3.0)
    )
    anchor = goal.anchor(goal.draw())
    assert anchor is not None
    assert torch.equal(anchor.outputs, model.linear(anchor.batch) * 3)


@pytest.mark.parametrize("batch", [torch.ones(2, 5), (torch.ones(2, 5), 2.0), {"x": torch.ones(2, 5), "scale": 2.0}])
def test_batches_are_tensors_tuples_or_mappings(batch: Any) -> None:
    model = Returning(lambda y: y).float()
    goal = objective(model, lambda: batch)
    anchor = goal.anchor(goal.draw())
    assert anchor is not None
    assert torch.equal(anchor.outputs, model.linear(torch.ones(2, 5)) * (1 if isinstance(batch, Tensor) else 2))


def test_outputs_that_are_views_of_the_weights_are_kept_apart() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3).double())

        def forward(self, x: Tensor) -> Tensor:
            return self.weight

    model = Table()
    opt = apo.AdaptiveLR(torch.optim.SGD(model.parameters(), lr=0.5), objective(model, torch.zeros(1)))
    opt.step(closure_of(opt, model, torch.zeros(1), torch.randint(3, (4,))))
    assert opt.last.fsd > 0


def test_inputs_are_gone_through_again_and_again() -> None:
    model, *_ = mlp()
    batches = [torch.zeros(2, 5), torch.ones(2, 5)]
    goal = objective(model, batches)
    assert [goal.draw()[0, 0].item() for _ in range(5)] == [0, 1, 0, 1, 0]
    once = objective(model, iter(batches))
    once.draw(), once.draw()
    with pytest.raises(ValueError, match="inputs has run out: it is an iterator"):
        once.draw()
    with pytest.raises(ValueError, match="inputs must hold at least one batch"):
        objective(model, []).draw()


def test_no_batch_is_drawn_at_fsd_weight_zero() -> None:
    model, x, t, _ = mlp()
    opt = apo.AdaptiveLR(torch.optim.SGD(model.parameters(), lr=0.5), objective(model, None, fsd_weight=0))
    opt.step(closure_of(opt, model, x, t))
    assert opt.last.fsd == 0
    assert opt.last.objective == pytest.approx(opt.last.loss + 0.2 * opt.last.wsd)


def test_front_ends_fill_in_the_weight_that_was_left_open() -> None:
    model, *_, other = mlp()
    goal = objective(model, other, fsd_weight=None, wsd_weight=None)
    assert apo.AdaptiveLR(torch.optim.SGD(model.parameters(), lr=0.5), goal).objective.fsd_weight == 0.3
    pairs = [(other, torch.zeros(12, dtype=torch.long))]
    fresh = apo.ProximalObjective(model, pairs, loss=F.cross_entropy)
    assert apo.AdaptiveLR(torch.optim.SGD(model.parameters(), lr=0.5), fresh).objective.fsd_weight == 0.1
    assert apo.AdaptiveLR(torch.optim.SGD(model.parameters(), lr=0.5), goal).objective.wsd_weight == 0
    of_apo = apo.APO(model, goal).objective
    assert (of_apo.fsd_weight, of_apo.wsd_weight) == (1, 1e-4)
    given = apo.APO(model, objective(model, other, fsd_weight=None, wsd_weight=0.0)).objective
    assert (given.fsd_weight, given.wsd_weight) == (1, 0)
    assert goal.fsd_weight is None
    assert goal.wsd_weight is None


def test_a_loss_of_its_own_is_taken_on_the_other_batch_without_the_closure() -> None:
    model, x, t, other = mlp()
    targets = torch.randint(3, (12,))
    for fsd_weight in (0, 0.7):
        goal = objective(model, [(other, targets)], loss=F.cross_entropy, fsd_weight=fsd_weight)
        opt = apo.AdaptiveLR(torch.optim.SGD(model.parameters(), lr=0.5), goal, meta_lr=0)
        closure, calls = closure_of(opt, model, x, t), []
        old = model(other).detach()
        opt.step(lambda closure=closure, calls=calls: (calls.append(0), closure())[1])
        assert len(calls) == 1
        # A meta-rate of 0: the step taken is the trial.
        new = model(other).detach()
        assert opt.last.loss == pytest.approx(F.cross_entropy(new, targets).item(), rel=1e-12)
        assert opt.last.fsd == pytest.approx(apo.KL()(new, old).item() if fsd_weight else 0, rel=1e-9)
        assert opt.last.objective == pytest.approx(
            opt.last.loss + fsd_weight * opt.last.fsd + 0.2 * opt.last.wsd, rel=1e-12
        )
