"""Proximal point methods: what APO amortizes (section 3, Table 1, Eq. 3 and 4 of the paper).

One step minimises, over ``u``, ``loss(u) + λ_FSD · D_F(u, θ) + λ_WSD/2 · ‖u − θ‖²`` (Eq. 3), each term exact or by its
Taylor expansion at θ. A method is its choice of them:

=======================  ============  ============  =====
method                   loss          FSD           WSD
=======================  ============  ============  =====
gradient descent         first order   none          yes
Hessian-free             second order  none          yes
natural gradient         first order   second order  no
damped natural gradient  first order   second order  yes     Eq. 4
proximal point           exact         exact         yes
=======================  ============  ============  =====

They are for small problems in float64. The weights are one vector, and a step costs one Hessian-vector product per
iteration of conjugate gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from apo import checks

__all__ = [
    "DAMPED_NATURAL_GRADIENT",
    "GRADIENT_DESCENT",
    "HESSIAN_FREE",
    "NATURAL_GRADIENT",
    "PROXIMAL_POINT",
    "TABLE_1",
    "ProximalMethod",
    "closed_form_step",
    "flat_model",
    "hessian",
    "proximal_step",
]

Function = Callable[[Tensor], Tensor]
"""A scalar of the weight vector, twice differentiable."""


@dataclass(frozen=True)
class ProximalMethod:
    """A row of Table 1: how the loss and the FSD enter, and whether the WSD does."""

    name: str
    loss: Literal["first", "second", "exact"]
    fsd: Literal["second", "exact"] | None
    wsd: bool


GRADIENT_DESCENT = ProximalMethod("gradient descent", "first", None, True)
"""``θ − ∇J / λ_WSD``."""
HESSIAN_FREE = ProximalMethod("Hessian-free", "second", None, True)
"""``θ − (∇²J + λ_WSD I)⁻¹ ∇J``, by conjugate gradients."""
NATURAL_GRADIENT = ProximalMethod("natural gradient", "first", "second", False)
"""``θ − (λ_FSD G)⁻¹ ∇J``, where ``G``, the FSD's Hessian, is the Fisher matrix of a KL divergence."""
DAMPED_NATURAL_GRADIENT = ProximalMethod("damped natural gradient", "first", "second", True)
"""``θ − (λ_FSD G + λ_WSD I)⁻¹ ∇J`` (Eq. 4)."""
PROXIMAL_POINT = ProximalMethod("proximal point", "exact", "exact", True)
"""Eq. 3 itself, by an inner minimisation."""

TABLE_1 = (GRADIENT_DESCENT, HESSIAN_FREE, NATURAL_GRADIENT, PROXIMAL_POINT)


def proximal_step(
    theta: Tensor,
    loss: Function,
    discrepancy: Function | None = None,
    *,
    method: ProximalMethod = PROXIMAL_POINT,
    fsd_weight: float = 1.0,
    wsd_weight: float = 1.0,
    tolerance: float = 1e-12,
    iterations: int = 100,
) -> Tensor:
    """The new weights.

    Args:
        theta: ``(d,)``, the weights.
        loss: ``J_B(u)``.
        discrepancy: ``u ↦ D_F(u, θ)``, with its minimum, 0, at θ. Needed where the method has an FSD and λ_FSD
            isn't 0.
        method: a row of Table 1, or a method of your own.
        fsd_weight, wsd_weight: λ_FSD and λ_WSD, >= 0. A weight of a term that the method leaves out is ignored.
        tolerance: stop when the gradient's norm is below this fraction of its first value.
        iterations: most Newton steps. Each takes at most ``10 d`` conjugate-gradient iterations and a line search. A
            quadratic objective needs one step, and one more to correct its rounding.

    Raises:
        TypeError, ValueError: an argument isn't as above.
    """
    if not isinstance(theta, Tensor) or theta.ndim != 1 or not theta.is_floating_point():
        raise TypeError(f"theta must be a floating-point vector, but got {_described(theta)}")
    if not isinstance(method, ProximalMethod):
        raise TypeError(f"method must be an apo.proximal.ProximalMethod, but got {method!r}")
    if not callable(loss):
        raise TypeError(f"loss must be callable, but got {loss!r} ({type(loss).__name__})")
    if discrepancy is not None and not callable(discrepancy):
        raise TypeError(f"discrepancy must be callable or None, but got {discrepancy!r} ({type(discrepancy).__name__})")
    fsd_weight = checks.number("fsd_weight", fsd_weight) if method.fsd else 0.0
    wsd_weight = checks.number("wsd_weight", wsd_weight) if method.wsd else 0.0
    checks.number("tolerance", tolerance)
    checks.integer("iterations", iterations, least=1)
    if discrepancy is None and fsd_weight != 0:
        raise ValueError(f"discrepancy must be given for {method.name} unless fsd_weight is 0, but got None")
    terms = [_approximation(loss, theta, method.loss)]
    if discrepancy is not None and method.fsd and fsd_weight != 0:
        terms.append(_scaled(_approximation(discrepancy, theta, method.fsd), fsd_weight))
    if wsd_weight != 0:
        terms.append(lambda step: _Local(step @ step * wsd_weight / 2, wsd_weight * step, lambda v: wsd_weight * v))
    return theta.detach() + _minimise(terms, torch.zeros_like(theta), tolerance, iterations)


def closed_form_step(
    theta: Tensor, gradient: Tensor, G: Tensor, *, fsd_weight: float = 1.0, wsd_weight: float = 0.0
) -> Tensor:
    """Eq. 4, ``θ − (λ_FSD G + λ_WSD I)⁻¹ ∇J``, by a dense solve.

    ``theta`` and ``gradient`` are ``(d,)``, ``G`` is ``(d, d)``."""
    checks.number("fsd_weight", fsd_weight)
    checks.number("wsd_weight", wsd_weight)
    size = len(theta)
    for name, value, shape in (("gradient", gradient, (size,)), ("G", G, (size, size))):
        if value.shape != shape:
            raise ValueError(f"{name} must be {shape}, but got shape {tuple(value.shape)}")
    damped = fsd_weight * G + wsd_weight * torch.eye(len(theta), dtype=G.dtype, device=G.device)
    solved: Tensor = torch.linalg.solve(damped, gradient)
    return theta - solved


def hessian(function: Function, theta: Tensor) -> Tensor:
    """``(d, d)``, dense: of the FSD at θ it is Eq. 4's ``G``."""
    result: Tensor = torch.func.hessian(function)(theta.detach())
    return result


def flat_model(model: nn.Module) -> tuple[Tensor, Callable[..., Any]]:
    """``(theta, f)``: a copy of a model's parameters as one vector, and ``f(theta, *inputs)``, the model with a
    vector's weights. The model itself is never written."""
    checks.module("model", model)
    named = {name: p.detach() for name, p in model.named_parameters()}
    sizes = [p.numel() for p in named.values()]

    def call(theta: Tensor, *inputs: Any) -> Any:
        parts = zip(named, torch.split(theta, sizes), strict=True)
        return torch.func.functional_call(model, {name: part.view_as(named[name]) for name, part in parts}, inputs)

    return torch.cat([p.reshape(-1) for p in named.values()]), call


class _Local(NamedTuple):
    """A term at a point: value, gradient, and its Hessian's products."""

    value: Tensor
    gradient: Tensor
    hvp: Callable[[Tensor], Tensor]


_Term = Callable[[Tensor], _Local]
"""Of the step ``u − θ``."""


def _differentiated(function: Function, at: Tensor) -> _Local:
    u = at.detach().requires_grad_()
    with torch.enable_grad():
        value = function(u)
        (gradient,) = torch.autograd.grad(value, u, create_graph=True)

    def hvp(v: Tensor) -> Tensor:
        if not gradient.requires_grad:
            return torch.zeros_like(v)
        (product,) = torch.autograd.grad(gradient, u, v, retain_graph=True, allow_unused=True)
        return torch.zeros_like(v) if product is None else product

    return _Local(value.detach(), gradient.detach(), hvp)


def _approximation(function: Function, theta: Tensor, order: Literal["first", "second", "exact"]) -> _Term:
    checks.one_of("order", order, ("first", "second", "exact"))
    if order == "exact":
        return lambda step: _differentiated(function, theta + step)
    here = _differentiated(function, theta)
    if order == "first":
        return lambda step: _Local(here.value + here.gradient @ step, here.gradient, torch.zeros_like)

    def second(step: Tensor) -> _Local:
        curved = here.hvp(step)
        return _Local(here.value + (here.gradient + curved / 2) @ step, here.gradient + curved, here.hvp)

    return second


def _scaled(term: _Term, weight: float) -> _Term:
    def scaled(step: Tensor) -> _Local:
        local = term(step)
        return _Local(weight * local.value, weight * local.gradient, lambda v: weight * local.hvp(v))

    return scaled


def _sum(terms: list[_Term], step: Tensor) -> _Local:
    locals_ = [term(step) for term in terms]
    value = torch.stack([x.value for x in locals_]).sum()
    gradient = torch.stack([x.gradient for x in locals_]).sum(0)
    return _Local(value, gradient, lambda v: torch.stack([x.hvp(v) for x in locals_]).sum(0))


def _minimise(terms: list[_Term], step: Tensor, tolerance: float, iterations: int) -> Tensor:
    """Newton's method with conjugate gradients and a backtracking line search."""
    local = _sum(terms, step)
    goal = tolerance * local.gradient.norm()
    for _ in range(iterations):
        if local.gradient.norm() <= goal:
            break
        direction = _conjugate_gradients(local.hvp, -local.gradient)
        slope = local.gradient @ direction
        rate, new = 1.0, _sum(terms, step + direction)
        # A step that rounding hides is taken if it makes the gradient smaller.
        while not (new.value <= local.value + 1e-4 * rate * slope or new.gradient.norm() < local.gradient.norm() / 2):
            rate /= 2
            if rate < 1e-10:
                return step
            new = _sum(terms, step + rate * direction)
        step, local = step + rate * direction, new
    return step


def _conjugate_gradients(hvp: Callable[[Tensor], Tensor], b: Tensor, tolerance: float = 1e-12) -> Tensor:
    """``H⁻¹ b``. Where H curves down, stop before that direction; if it is the first, return b."""
    x = torch.zeros_like(b)
    residual, direction = b.clone(), b.clone()
    square = residual @ residual
    goal = tolerance**2 * square
    for i in range(10 * len(b)):
        if square <= goal:
            break
        curved = hvp(direction)
        curvature = direction @ curved
        if curvature <= 0:
            return b if i == 0 else x
        rate = square / curvature
        x = x + rate * direction
        residual = residual - rate * curved
        square, before = residual @ residual, square
        direction = residual + (square / before) * direction
    return x


def _described(value: object) -> str:
    return f"{value.dtype}, {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
