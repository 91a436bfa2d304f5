"""Both front ends equal Algorithm 1 as :mod:`apo.reference` writes it down, step by step."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apo
from apo import reference
from tests.apo.helpers import closure_of, mlp, objective

STEPS = 25


def goal_of(model: nn.Module, batches: list[Tensor]) -> apo.ProximalObjective:
    return objective(model, batches, fsd_weight=0.7, wsd_weight=0.2)


def batches() -> list[tuple[Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(STEPS, 16, 5, generator=generator, dtype=torch.float64)
    t = torch.randint(3, (STEPS, 16), generator=generator)
    return list(zip(x, t, torch.randn(STEPS, 12, 5, generator=generator, dtype=torch.float64), strict=True))


def follow(model: nn.Module, phi: dict[str, Tensor], descend: Any, update: Any) -> list[tuple[float, float]]:
    """Q and lr of each step of the reference."""
    found, memory = [], {}
    for x, t, other in batches():
        Q, memory = reference.algorithm_1_step(
            model,
            phi,
            descend,
            update,
            memory,
            loss=lambda y, t=t: F.cross_entropy(y, t),
            batch=x,
            other=other,
            discrepancy=apo.KL(),
            fsd_weight=0.7,
            wsd_weight=0.2,
        )
        found.append((Q.item(), phi["log lr"].exp().item()))
    return found


def train(opt: Any, model: nn.Module) -> list[tuple[float, float]]:
    found = []
    for x, t, _ in batches():
        opt.step(closure_of(opt, model, x, t))
        found.append((opt.last.objective, opt.param_groups[0]["lr"]))
    return found


def compare(found: list[tuple[float, float]], expected: list[tuple[float, float]]) -> None:
    for (q, lr), (expected_q, expected_lr) in zip(found, expected, strict=True):
        assert q == pytest.approx(expected_q, rel=1e-8)
        assert lr == pytest.approx(expected_lr, rel=1e-8)


@pytest.mark.parametrize("mu", [0.0, 0.9])
def test_adaptive_lr_is_algorithm_1(mu: float) -> None:
    model, *_ = mlp()
    twin, *_ = mlp()
    others = [other for *_, other in batches()]
    base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=mu)
    opt = apo.AdaptiveLR(base, goal_of(model, others), interval=1, meta_optimizer="rmsprop")
    found = train(opt, model)

    phi = {"log lr": torch.tensor(math.log(0.05), dtype=torch.float64, requires_grad=True)}
    descent = torch.optim.RMSprop(phi.values(), lr=0.1, alpha=0.99, eps=1e-150)
    compare(found, follow(twin, phi, descent.step, reference.sgd_with_momentum(mu)))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-7, atol=1e-10)


def without_biases() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7, bias=False), nn.Tanh(), nn.Linear(7, 3, bias=False)).double()


def test_apo_is_algorithm_1() -> None:
    model, twin = without_biases(), without_biases()
    others = [other for *_, other in batches()]
    opt = apo.APO(
        model,
        goal_of(model, others),
        lr=0.05,
        momentum=0,
        block_size=None,
        interval=1,
        method=apo.Method(meta_optimizer="adam", meta_lr=0.01, lr_meta_lr=0.03),
    )
    found = train(opt, model)

    phi = {"log lr": torch.tensor(math.log(0.05), dtype=torch.float64)}
    groups: list[dict[str, Any]] = []
    for name, p in twin.named_parameters():
        m, n = p.shape
        for block, start, side in (("A", torch.eye(n), n), ("B", torch.eye(m), m), ("S", torch.ones(m, n), 1)):
            phi[f"{name}.{block}"] = start.double()
            groups.append({"params": [phi[f"{name}.{block}"]], "lr": 0.01 / side})
    for each in phi.values():
        each.requires_grad_()
    blocks = torch.optim.Adam(groups, betas=(0.9, 0.99), eps=1e-150)
    rate = torch.optim.RMSprop([phi["log lr"]], lr=0.03, alpha=0.99, eps=1e-150)
    compare(found, follow(twin, phi, lambda: (blocks.step(), rate.step()), reference.preconditioned))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-7, atol=1e-10)
    assert (opt.layers[0].A - torch.eye(5)).norm() > 0.01
