"""Whether a step is proportional to the learning rate, which is what makes its meta-gradient ``⟨V, θ′ − θ⟩``."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from apo.rates import get_rate, set_rate
from apo.snapshot import OptimizerSnapshot, with_wrapped, without_hooks
from apo.trial import Lookahead, random_state, restore_random_state

__all__ = ["Linearity", "check_linear"]

SIGNAL = 1e3
"""How far the weights must move, in units of their rounding errors, for a comparison to mean anything."""


@dataclass(frozen=True)
class Linearity:
    """What :func:`check_linear` found: whether the step edits ``.grad`` in place, as old L2 decays do."""

    edits_gradients: bool


def check_linear(optimizer: Optimizer) -> Linearity | None:
    """Take the step at several rates, with a few of the parameters, and put everything back.

    Of each group the smallest parameter of each number of dimensions takes part, if it has a gradient that isn't
    zero. One copy of the weights is held meanwhile. Each probe starts from the same random state; no step hooks run.

    Returns:
        None where nothing moved, so that nothing can be said yet.

    Raises:
        TypeError: the optimizer's step needs a closure.
        ValueError: the step isn't proportional to ``lr``, or its state depends on it.
    """
    name = type(optimizer).__name__
    chosen = [_few(group["params"]) if get_rate(group) else [] for group in optimizer.param_groups]
    parameters = [p for few in chosen for p in few]
    if not parameters:
        return None
    probe = _Probe(optimizer, chosen)
    try:
        for grow in (1.0, 1e2, 1e4, 1e6, 1e8):
            once, state_once = probe(grow)
            twice, state_twice = probe(2 * grow)
            noise = _norm([p.detach().double() * torch.finfo(p.dtype).eps for p in parameters])
            moved, off = _norm(twice), _norm([b - 2 * a for a, b in zip(once, twice, strict=True)])
            if off > 1e-2 * moved + 8 * noise or not _alike(state_once, state_twice):
                raise ValueError(
                    f"optimizer must take steps that are proportional to lr, with a state that doesn't depend on lr, "
                    f"but got {name}: its step at twice the rate is off by {off / max(moved, 1e-300):.1e} of its "
                    "length, or its state differs. AdaptiveLR can't learn its rate."
                )
            if moved == 0:
                return None
            if moved > SIGNAL * noise and grow > 1:
                break
    except TypeError as error:
        raise TypeError(f"optimizer must have a step() that needs no closure, but got {name}: {error}") from error
    return Linearity(probe.edits_gradients)


def _few(params: list[Tensor]) -> list[Tensor]:
    smallest: dict[int, Tensor] = {}
    for p in sorted(params, key=lambda p: p.numel()):
        if p.ndim not in smallest and p.grad is not None and bool((p.grad.to_dense() != 0).any()):
            smallest[p.ndim] = p
    return list(smallest.values())


class _Probe:
    """``probe(factor)``: the step at ``factor`` times the rates, in float64, and the state it leaves."""

    def __init__(self, optimizer: Optimizer, chosen: list[list[Tensor]]) -> None:
        self._optimizer = optimizer
        self._all = with_wrapped(optimizer)
        self._chosen = chosen
        self._parameters = [p for few in chosen for p in few]
        self._rates = [get_rate(group) for group in optimizer.param_groups]
        self._weights = [p for group in optimizer.param_groups for p in group["params"]]
        self._grads = [(p, p.grad, p.grad.clone()) for p in self._parameters if p.grad is not None]
        self.edits_gradients = False

    def __call__(self, factor: float) -> tuple[list[Tensor], Any]:
        groups = self._optimizer.param_groups
        rng = random_state(self._parameters)
        with torch.no_grad(), OptimizerSnapshot(self._optimizer), Lookahead(self._weights) as lookahead:
            start = {id(p): s for p, s in zip(self._weights, lookahead.start, strict=True)}
            try:
                for group, few, rate in zip(groups, self._chosen, self._rates, strict=True):
                    group["params"][:] = few
                    set_rate(group, rate * factor)
                with without_hooks(self._all, before=True):
                    self._optimizer.step()
                step = [p.double() - start[id(p)].double() for p in self._parameters]
                return step, [_copied(self._optimizer.state.get(p, {})) for p in self._parameters]
            finally:
                restore_random_state(rng)
                self._restore_gradients()

    def _restore_gradients(self) -> None:
        for p, grad, content in self._grads:
            edited = p.grad is not grad or not torch.equal(grad.to_dense(), content.to_dense())
            self.edits_gradients = self.edits_gradients or edited
            if edited:
                p.grad = grad
                grad.copy_(content)


def _norm(tensors: list[Tensor]) -> float:
    return math.hypot(*(float(t.double().norm()) for t in tensors))


def _alike(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_alike(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_alike, a, b))
    if isinstance(a, Tensor):
        return a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=1e-4, atol=0, equal_nan=True)
    if isinstance(a, float):
        return math.isclose(a, b, rel_tol=1e-4)
    return True


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {k: _copied(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(v) for v in value) if type(value) in (list, tuple) else copy.copy(value)
    return copy.deepcopy(value) if not callable(value) else value
