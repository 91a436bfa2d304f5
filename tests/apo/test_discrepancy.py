"""Discrepancies against their definitions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, distributions

import apo
from apo.proximal import hessian

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


def test_kl_of_one_number_for_each_example_is_refused() -> None:
    """A softmax over the examples would make them compete as classes."""
    generator = torch.Generator()
    for outputs in (torch.randn(6), torch.randn(())):
        for use in (lambda x: apo.KL()(x, x), lambda x: apo.KL().fisher_sample(x, generator)):
            with pytest.raises(ValueError, match=r"'kl' needs outputs of examples by classes.*'bernoulli'.*'mse'"):
                use(outputs)


@pytest.mark.parametrize(
    "rho", [apo.SquaredError(), apo.SquaredError(mean=True), apo.BernoulliKL(), apo.GaussianKL(2.0)]
)
def test_one_number_alone_is_one_example(rho: Any) -> None:
    """As where ``squeeze`` meets a last batch of one."""
    new, old = torch.randn(()), torch.randn(())
    assert rho(new, old) == rho(new[None], old[None])
    samples = [rho.fisher_sample(x, torch.Generator().manual_seed(0))[0] for x in (old, old[None])]
    assert samples[0].shape == ()
    assert samples[0] == samples[1][0]


@pytest.mark.parametrize(("rho", "shape"), [(apo.KL(), (N, 1)), (apo.KL(dim=1), (N, 1, 5))])
def test_kl_of_one_class_is_refused_because_it_is_always_zero(rho: apo.KL, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"two classes or more, but got shape .*'bernoulli' for one logit"):
        rho(*outputs(*shape))
