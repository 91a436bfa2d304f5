"""How a step depends on the learning rate, which decides what its meta-gradient is."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from apo.ranks.sharding import Shards, local, sum_over
from apo.rates.log_rates import get_rate, set_rate
from apo.trial import Lookahead, copies_of, random_state, restore_random_state, surely
from apo.wrapped.snapshot import Gradients, OptimizerSnapshot, copied, with_wrapped, without_hooks

__all__ = ["check_linear", "is_proportional"]

SIGNAL = 1e3
"""How far the weights must move, in units of their rounding errors, for a comparison to mean anything."""

GROWTH = (1.0, 8.0, 1e2, 1e4, 1e6, 1e8)
"""By what the rates are multiplied until that is so. The second is mild, so that what caps its rate, as Adafactor does,
is served as long as the cap is far."""


def check_linear(optimizer: Optimizer) -> bool | None:
    """Take the step at several rates, with a few of the parameters, and put everything back.

    Of each group the smallest parameter of each number of dimensions takes part, if it has a gradient that isn't
    zero. One copy of the weights is held meanwhile. Each probe starts from the same random state; no step hooks run.

    Where the state depends on the rate, the step after it is looked at as well: it must depend on the rate too.

    Returns:
        Whether the step is proportional to the rate, ``θ′ − θ = lr · d``, so that ``dQ/d log lr = ⟨V, θ′ − θ⟩``. False:
        it is ``c + lr · d``, as where the rate stands inside the momentum or weights are drawn to others as well.
        None: nothing moved, so that nothing can be said yet.

    Raises:
        TypeError: the optimizer's step needs a closure.
        ValueError: the step is neither proportional to ``lr`` nor linear in it beside a constant; it sets ``lr``; it
            raises.
    """
    groups = [[p for p in group["params"] if get_rate(group)] for group in optimizer.param_groups]
    chosen = [_few(params) for params in groups]
    if not any(chosen):
        return None
    name = type(optimizer).__name__
    with Lookahead([p for group in optimizer.param_groups for p in group["params"]]) as weights:
        try:
            return _found(_Probe(optimizer, chosen, weights), name)
        except _StepFailed:  # some take no step with only a part of their parameters
            try:
                return _found(_Probe(optimizer, groups, weights), name)
            except _StepFailed as failure:
                error = failure.__cause__
                if isinstance(error, TypeError):
                    raise TypeError(
                        f"optimizer must have a step() that needs no closure, but got {name}: {error}"
                    ) from error
                raise ValueError(
                    f"optimizer must be able to take its step, but {name}.step() raised {type(error).__name__}: {error}"
                ) from error


class _StepFailed(Exception):
    """The optimizer's step raised its ``__cause__``."""


def _found(probe: _Probe, name: str) -> bool | None:
    alike, proportional, moved, noise = True, True, 0.0, 0.0
    for grow in GROWTH:
        once, state_once = probe(grow)
        twice, state_twice = probe(2 * grow)
        noise = probe.noise()
        moved, off = probe.norm(twice), probe.norm(_combined(twice, once, -2))
        alike = alike and not probe.shards.any(not _alike(state_once, state_twice))
        proportional = proportional and off <= 1e-2 * moved + 8 * noise
        if not proportional and not _is_linear(probe, grow, 0):
            raise ValueError(
                f"optimizer must take steps that are proportional to lr, or linear in it, but got {name}: its step at "
                f"twice the rate is off by {off / max(moved, 1e-300):.1e} of its length. AdaptiveLR can't learn its "
                "rate."
            )
        if moved == 0:
            return None
        if moved > SIGNAL * noise and grow > 1:
            break
    if not alike and not _is_linear(probe, grow, 1):
        raise ValueError(
            f"optimizer must take steps that are proportional to lr, or linear in it, but got {name}: its state "
            "depends on the rate in a way that decides its next step. AdaptiveLR can't learn its rate."
        )
    return proportional and alike


def _is_linear(probe: _Probe, grow: float, after: int) -> bool:
    """Whether the step, after some at the present rates, is ``c + lr · d`` with a d that isn't zero."""
    one, two, three = (probe(factor * grow, after=after, by=grow)[0] for factor in (1, 2, 3))
    bend = probe.norm([a - 2 * b + c for a, b, c in zip(one, two, three, strict=True)])
    change, noise = probe.norm(_combined(three, one, -1)), probe.noise()
    return change > 32 * noise and bend <= 1e-2 * change + 8 * noise


def is_proportional(before: list[Tensor], tried: list[Tensor], shards: Shards, factors: list[float]) -> bool:
    """Whether the step taken is the step tried, times ``factors``. Only the smallest parameter of each number of
    dimensions is compared; one synchronisation."""
    smallest: dict[int, int] = {}
    for i, p in sorted(enumerate(shards.parameters), key=lambda each: each[1].numel()):
        if p.numel() and p.grad is not None:
            smallest.setdefault(p.ndim, i)
    terms = []
    for i in smallest.values():
        wanted = factors[i] * tried[i].double()
        off = shards.parts[i].detach().double() - before[i].double() - wanted
        terms.append(torch.stack([off.norm(), wanted.norm(), factors[i] * _rounding(before[i]).norm()]).square())
    if not terms:
        return True
    overs = [shards.overs[i] for i in smallest.values() for _ in range(3)]
    squares = sum_over(torch.cat(terms), overs).view(-1, 3)
    off, moved, noise = squares.sum(0).sqrt().tolist()
    return bool(off <= 1e-2 * moved + 8 * noise)


def _few(params: list[Tensor]) -> list[Tensor]:
    smallest: dict[int, Tensor] = {}
    for p in sorted(params, key=lambda p: p.numel()):
        if p.ndim in smallest or p.grad is None:
            continue
        if Shards([p]).any(bool((local(p.grad).to_dense() != 0).any())):
            smallest[p.ndim] = p
    return list(smallest.values())


class _Probe:
    """``probe(factor)``: the step at ``factor`` times the rates, in float64, and the state it leaves.

    Everything else is put back. ``after``: how many steps at ``by`` times the rates come before it.
    """

    def __init__(self, optimizer: Optimizer, chosen: list[list[Tensor]], weights: Lookahead) -> None:
        self._optimizer = optimizer
        self._all = with_wrapped(optimizer)
        self._chosen = chosen
        self._parameters = [p for few in chosen for p in few]
        self._rates = [get_rate(group) for group in optimizer.param_groups]
        self._weights = weights
        every = (p for group in optimizer.param_groups for p in group["params"])
        start = {id(p): s for p, s in zip(every, weights.start, strict=True)}
        self._start = [start[id(p)] for p in self._parameters]
        self._gradients = Gradients(self._parameters)
        self.shards = Shards(self._parameters)

    def noise(self) -> float:
        """The length of the weights' rounding errors."""
        return self.norm([_rounding(start) for start in self._start])

    def norm(self, tensors: list[Tensor]) -> float:
        """The length of a step, over all ranks that hold parts of it."""
        if not self.shards.groups:
            return math.hypot(*(float(t.double().norm()) for t in tensors))
        squares = torch.stack([t.double().norm().square() for t in tensors])
        return math.sqrt(self.shards.sum(squares).sum().item())

    def __call__(self, factor: float, *, after: int = 0, by: float = 1.0) -> tuple[list[Tensor], Any]:
        random = random_state(self._parameters)
        snapshot = OptimizerSnapshot(self._optimizer, self._parameters)
        try:
            with torch.no_grad(), without_hooks(self._all, before=True):
                self._set_others_aside()
                for _ in range(after):
                    self._step(by)
                parts = self.shards.parts
                before = self._start if after == 0 else copies_of(parts)
                self._step(factor)
            step = [p.detach().double() - s.double() for p, s in zip(parts, before, strict=True)]
            return step, self._state()
        finally:
            surely(snapshot.restore)
            surely(self._weights.restore)
            self._gradients.restore()
            restore_random_state(random)

    def _step(self, factor: float) -> None:
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            set_rate(group, rate * factor)
        try:
            self._optimizer.step()
        except Exception as error:
            raise _StepFailed from error
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            if not math.isclose(get_rate(group), rate * factor, rel_tol=1e-3):
                raise ValueError(
                    "optimizer must leave lr as it is set, because AdaptiveLR learns it, but got "
                    f"{type(self._optimizer).__name__}, whose step() writes it"
                )
        self._gradients.restore()

    def _set_others_aside(self) -> None:
        """Let only the chosen parameters be stepped, and hide the state of the others."""
        for group, few in zip(self._optimizer.param_groups, self._chosen, strict=True):
            group["params"][:] = few
        chosen = {id(p) for p in self._parameters}
        for one in self._all:
            state = getattr(one, "state", {})
            for p in [p for p in state if isinstance(p, Tensor) and id(p) not in chosen]:
                del state[p]

    def _state(self) -> Any:
        """What decides later steps, except the rates and the weights."""
        of_parameters = [copied(dict(one.state.get(p, {}))) for one in self._all for p in self._parameters]
        of_groups = [
            copied({k: v for k, v in group.items() if k not in ("lr", "params")})
            for one in self._all
            for group in one.param_groups
        ]
        of_optimizers = [
            copied({k: v for k, v in one.__dict__.items() if k not in ("param_groups", "state", "defaults")})
            for one in self._all
        ]
        return [of_parameters, of_groups, of_optimizers]


def _rounding(p: Tensor) -> Tensor:
    return p.detach().double() * torch.finfo(p.dtype).eps


def _combined(a: list[Tensor], b: list[Tensor], factor: float) -> list[Tensor]:
    return [x + factor * y for x, y in zip(a, b, strict=True)]


def _alike(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_alike(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_alike, a, b))
    if isinstance(a, Tensor):
        a, b = local(a).to_dense(), local(b).to_dense()
        return a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=1e-4, atol=0, equal_nan=True)
    if isinstance(a, float):
        return math.isclose(a, b, rel_tol=1e-4) or (math.isnan(a) and math.isnan(b))
    return True
