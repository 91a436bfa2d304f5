"""Algorithm 1 on one page of plain torch, by autograd through an unrolled step: what the front ends must equal.

Nothing here is fast, and nothing in it is an option. :class:`~apo.AdaptiveLR` and :class:`~apo.APO` differ from it in
how they get ``∇_φ Q`` (one ordinary backward at θ′), not in what they get.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from apo_kernels.reference import precondition

__all__ = ["algorithm_1_step", "preconditioned", "proximal_objective", "sgd_with_momentum"]

Weights = dict[str, Tensor]
Update = Callable[[Weights, Weights, Mapping[str, Tensor], Weights], tuple[Weights, Weights]]
"""``update(θ, g, φ, memory) -> (θ′, memory)``, differentiable in φ; the memory holds momentum and the like."""


def proximal_objective(
    model: nn.Module, new: Weights, old: Weights, loss: Callable[[Any], Tensor], batch: Any, other: Tensor,
    discrepancy: Callable[[Tensor, Tensor], Tensor], fsd_weight: float, wsd_weight: float,
) -> Tensor:  # fmt: skip
    """``Q = J_B(θ′) + λ_FSD D_F(θ′, θ; B′) + λ_WSD/2 ‖θ′ − θ‖²`` (Eq. 8)."""
    J = loss(functional_call(model, new, (batch,)))
    fsd = discrepancy(functional_call(model, new, (other,)), functional_call(model, old, (other,)).detach())
    wsd = sum(((new[name] - old[name]) ** 2).sum() for name in old) / 2
    return J + fsd_weight * fsd + wsd_weight * wsd


def algorithm_1_step(
    model: nn.Module, phi: Mapping[str, Tensor], descend: Callable[[], Any], update: Update, memory: Weights,
    *, loss: Callable[[Any], Tensor], batch: Any, other: Tensor,
    discrepancy: Callable[[Tensor, Tensor], Tensor], fsd_weight: float, wsd_weight: float,
) -> tuple[Tensor, Weights]:  # fmt: skip
    """One turn of Algorithm 1's loop with K = 1: φ first, then the weights with the new φ.

    Args:
        model: its parameters are written.
        phi: leaves that require grad; ``descend()`` steps them down their ``.grad``, as ``optimizer.step`` does.
        update: the optimizer's step as a function of φ.
        memory: what ``update`` remembers.
        loss: of the model's output on ``batch``, the batch B.
        other: the batch B′.

    Returns:
        Q at the lookahead, and the new memory.
    """
    theta = {name: p.detach() for name, p in model.named_parameters()}
    leaves = {name: p.clone().requires_grad_() for name, p in theta.items()}
    J = loss(functional_call(model, leaves, (batch,)))
    g = dict(zip(leaves, torch.autograd.grad(J, list(leaves.values())), strict=True))

    new, _ = update(theta, g, phi, memory)  # the lookahead θ′(φ)
    Q = proximal_objective(model, new, theta, loss, batch, other, discrepancy, fsd_weight, wsd_weight)
    for each, grad in zip(phi.values(), torch.autograd.grad(Q, list(phi.values())), strict=True):
        each.grad = grad
    descend()  # φ ← φ − α ∇_φ Q

    with torch.no_grad():
        new, memory = update(theta, g, phi, memory)  # the real step, with the new φ
        for name, p in model.named_parameters():
            p.copy_(new[name])
    return Q.detach(), memory


def sgd_with_momentum(mu: float) -> Update:
    """``v ← μ v + g``, ``θ′ = θ − lr v``, with ``φ = {"log lr"}``."""

    def update(theta: Weights, g: Weights, phi: Mapping[str, Tensor], memory: Weights) -> tuple[Weights, Weights]:
        v = {name: mu * memory[name] + g[name] if memory else g[name] for name in g}
        return {name: theta[name] - phi["log lr"].exp() * v[name] for name in theta}, v

    return update


def preconditioned(theta: Weights, g: Weights, phi: Mapping[str, Tensor], memory: Weights) -> tuple[Weights, Weights]:
    """``θ′ = θ − lr B (S² ⊙ BᵀGA) Aᵀ`` (Eq. 10) of matrices without biases, with φ ``"log lr"`` and each weight's
    ``"name.A"``, ``"name.B"`` and ``"name.S"``."""
    lr = phi["log lr"].exp()
    blocks = {name: [phi[f"{name}.{block}"] for block in "ABS"] for name in theta}
    return {name: theta[name] - lr * precondition(g[name], *blocks[name]) for name in theta}, memory
