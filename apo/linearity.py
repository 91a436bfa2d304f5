"""Whether a step is linear in the learning rate, which is what makes its meta-gradient ``⟨V, θ′ − θ⟩``."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from apo.lookahead import Lookahead, surely

__all__ = ["OptimizerState", "check_linear", "get_rate", "set_rate"]

SIGNAL = 1e3
"""How far the weights must move, in units of their rounding errors, for a comparison to mean anything."""


def get_rate(group: dict[str, Any]) -> float:
    return float(group["lr"])


def set_rate(group: dict[str, Any], rate: float) -> None:
    """Write a learning rate where the optimizer reads it: capturable ones hold it in a tensor."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


class OptimizerState:
    """A copy of an optimizer's state and of its groups' settings (some keep counters there), which is put back when
    the block is left without :meth:`commit`."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._state = {p: _copied(state) for p, state in optimizer.state.items()}
        self._groups = [{k: _copied(v) for k, v in g.items() if k != "params"} for g in optimizer.param_groups]

        self._committed = False

    def commit(self) -> None:
        """Keep the state as it is now."""
        self._committed = True

    def __enter__(self) -> OptimizerState:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._committed:
            surely(self.restore)

    def restore(self) -> None:
        """Put the copies in the place of what is there: the optimizer owns them from then on."""
        self._optimizer.state.clear()
        self._optimizer.state.update(self._state)
        for group, settings in zip(self._optimizer.param_groups, self._groups, strict=True):
            for name in [k for k in group if k != "params" and k not in settings]:
                del group[name]
            for name, value in settings.items():
                if isinstance(value, Tensor) and isinstance(group.get(name), Tensor):
                    group[name].copy_(value)  # a capturable rate keeps its address
                else:
                    group[name] = value


def check_linear(optimizer: Optimizer) -> bool:
    """Take the step at several rates and put everything back.

    Returns:
        True; False where the weights didn't move, so that nothing can be said yet.

    Raises:
        TypeError: the optimizer's step needs a closure.
        ValueError: the step isn't proportional to ``lr``, or its state depends on it.
    """
    name = type(optimizer).__name__
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    rates = [get_rate(group) for group in optimizer.param_groups]
    if not any(rates):
        return False
    pre, post = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
    optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
    try:
        for grow in (1.0, 1e2, 1e4, 1e6, 1e8):
            once, state_once = _probe(optimizer, parameters, rates, grow)
            twice, state_twice = _probe(optimizer, parameters, rates, 2 * grow)
            noise = _norm([p.detach().double() * torch.finfo(p.dtype).eps for p in parameters])
            moved, off = _norm(twice), _norm([b - 2 * a for a, b in zip(once, twice, strict=True)])
            if off > 1e-2 * moved + 8 * noise or not _alike(state_once, state_twice):
                raise ValueError(
                    f"optimizer must take steps that are proportional to lr, with a state that doesn't depend on lr, "
                    f"but got {name}: its step at twice the rate is off by {off / max(moved, 1e-300):.1e} of its "
                    "length, or its state differs. AdaptiveLR can't learn its rate."
                )
            if moved == 0:
                return False
            if moved > SIGNAL * noise and grow > 1:
                break
    except TypeError as error:
        raise TypeError(f"optimizer must have a step() that needs no closure, but got {name}: {error}") from error
    finally:
        optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks = pre, post
    return True


def _probe(
    optimizer: Optimizer, parameters: list[Tensor], rates: list[float], factor: float
) -> tuple[list[Tensor], Any]:
    """The step at ``factor`` times the rates, in float64, and the state it leaves; nothing stays of it."""
    with Lookahead(parameters) as lookahead, OptimizerState(optimizer), torch.no_grad():
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            set_rate(group, rate * factor)
        optimizer.step()
        step = [p.double() - s.double() for p, s in zip(parameters, lookahead.start, strict=True)]
        return step, [_copied(optimizer.state.get(p, {})) for p in parameters]


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
