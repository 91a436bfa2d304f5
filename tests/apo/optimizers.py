"""Optimizers for AdaptiveLR to wrap, each with an oddity of those that others publish."""

from __future__ import annotations

import copy
import dataclasses
import math
import random
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Base = torch.optim.Optimizer


class Lookahead(Base):
    """Wraps another optimizer; every second step it draws the weights half-way to those of two steps ago."""

    def __init__(self, inner: Base) -> None:
        self.inner = inner  # as the published ones, without Optimizer.__init__
        self.param_groups, self.defaults, self.state = inner.param_groups, inner.defaults, inner.state
        self.count = 0
        self.slow = {id(p): p.detach().clone() for g in inner.param_groups for p in g["params"]}

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.inner.step()
        self.count += 1
        if self.count % 2 == 0:
            for group in self.param_groups:
                for p in group["params"]:
                    slow = self.slow[id(p)]
                    slow.lerp_(p, 0.5)
                    p.copy_(slow)


class PerParameter(Base):
    """Steps one parameter after the other, by ``update``."""

    def __init__(self, params: Any, lr: Any, **defaults: Any) -> None:
        super().__init__(params, {"lr": lr, **defaults})

    def update(self, p: Tensor, group: dict[str, Any]) -> None:
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, group)


class RateInMomentum(PerParameter):
    """``v ← 0.9 v + lr·g``, as TensorFlow's: the state depends on the rate."""

    def update(self, p: Tensor, group: dict[str, Any]) -> None:
        v = self.state[p].setdefault("v", torch.zeros_like(p))
        v.mul_(0.9).add_(p.grad, alpha=float(group["lr"]))
        p.sub_(v)


class Langevin(PerParameter):
    """SGD with noise that goes with ``lr ** power``."""

    def __init__(self, params: Any, lr: float, power: float, generator: Any = None) -> None:
        super().__init__(params, lr)
        self.power, self.generator = power, generator

    def update(self, p: Tensor, group: dict[str, Any]) -> None:
        rate = float(group["lr"])
        noise = torch.randn(p.shape, generator=self.generator, dtype=p.dtype)
        p.sub_(rate * p.grad + rate**self.power * (noise + random.random() + float(np.random.rand())))  # noqa: NPY002


class Means:
    def __init__(self) -> None:
        self.total, self.steps = torch.zeros(()), 0


@dataclasses.dataclass(slots=True)
class Slots:
    norm: Tensor
    seen: int = 0


class Hoarder(PerParameter):
    """SGD that keeps state in every place but ``optimizer.state``."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr, count=0, scale=torch.ones(()))
        self.total, self.means, self.slots = 0, Means(), Slots(torch.zeros(()))
        self.history, self.names, self.array = deque([0.0], maxlen=3), {"start"}, np.zeros(2)
        self.nested = {"lists": [[torch.zeros(2)]]}
        self.generator, self.pythons = torch.Generator().manual_seed(3), random.Random(4)

    def step(self, closure: Any = None) -> None:
        self.total += 1
        self.means.total += 1
        self.means.steps += 1
        self.slots.norm += 1
        self.slots.seen += 1
        self.history.append(self.pythons.random())
        self.names.add(f"step {self.total}")
        self.array += 1
        self.nested["lists"][0][0] += 1
        self.nested["lists"].append([torch.ones(1)])
        for group in self.param_groups:
            group["count"] += 1
            group["scale"] *= 0.5
        super().step()

    def update(self, p: Tensor, group: dict[str, Any]) -> None:
        self.state[p]["noted"] = Slots(torch.ones(()), self.total)
        p.sub_(p.grad * group["lr"])

    def held(self) -> list[Any]:
        noted = [self.state[p]["noted"] for g in self.param_groups for p in g["params"] if p in self.state]
        groups = [(g["count"], g["scale"]) for g in self.param_groups]
        parts = [self.total, vars(self.means), self.slots, [*self.history], sorted(self.names), self.array, noted]
        return copy.deepcopy([*parts, self.nested, groups, self.generator.get_state(), self.pythons.getstate()])


class Watching(PerParameter):
    """SGD scaled by how large the inputs were, which a hook on the model notes, as KFAC does."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr)
        self.square = torch.ones(())

    def watch(self, model: nn.Module) -> Base:
        def note(_: nn.Module, inputs: tuple[Tensor]) -> None:
            self.square.lerp_(inputs[0].square().mean(), 0.1)

        model.register_forward_pre_hook(note)
        return self

    def update(self, p: Tensor, group: dict[str, Any]) -> None:
        p.sub_(group["lr"] / self.square * p.grad)


class Chained(Base):
    """Two optimizers as one; its groups are made anew whenever they are asked for."""

    def __init__(self, *parts: Base) -> None:
        self.parts, self.defaults = parts, {}

    @property
    def param_groups(self) -> Any:
        return [group for part in self.parts for group in part.param_groups]

    @property
    def state(self) -> Any:
        return {p: held for part in self.parts for p, held in part.state.items()}

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> None:
        for part in self.parts:
            part.step()


class IgnoresRate(PerParameter):
    def update(self, p: Tensor, group: dict[str, Any]) -> None:
        p.sub_(0.01 * p.grad)


class EditsGradients(Base):
    """Adds decay to ``.grad`` in place, through ``.data``, and clips all gradients together."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        nn.utils.clip_grad_norm_(params, 1e-3)
        for p in params:
            p.grad.data.add_(p.data, alpha=0.1)
            p.sub_(self.param_groups[0]["lr"] * p.grad)


class RootRate(PerParameter):
    def update(self, p: Tensor, group: dict[str, Any]) -> None:
        p.sub_(math.sqrt(group["lr"]) * p.grad)


class SetsItsRate(PerParameter):
    def update(self, p: Tensor, group: dict[str, Any]) -> None:
        p.sub_(group["lr"] * p.grad)

    def step(self, closure: Any = None) -> None:
        super().step()
        for group in self.param_groups:
            group["lr"] *= 1.1


BASES: dict[str, Callable[[Any], Base]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "capturable": lambda p: torch.optim.Adam(p, lr=torch.tensor(1e-2)),
    "Lookahead": lambda p: Lookahead(torch.optim.Adam(p, lr=1e-2)),
    "Lookahead twice": lambda p: Lookahead(Lookahead(torch.optim.SGD(p, lr=0.1, momentum=0.9))),
    "rate in momentum": lambda p: RateInMomentum(p, 0.1),
    "Langevin": lambda p: Langevin(p, 0.01, 1.0),
    "own generator": lambda p: Langevin(p, 0.01, 1.0, torch.Generator().manual_seed(1)),
    "hoarder": lambda p: Hoarder(p, 0.1),
    "edits gradients": lambda p: EditsGradients(p, 0.1),
    "chained": lambda p: chained([*p]),
}


def chained(params: list[Tensor]) -> Base:
    return Chained(torch.optim.AdamW(params[:2], lr=1e-2), torch.optim.SGD(params[2:], lr=0.1, momentum=0.9))


def state_of(base: Base) -> str:
    """All that a base holds, as text; not what AdaptiveLR puts beside it."""
    inner = getattr(base, "inner", None)
    held = base.held() if isinstance(base, Hoarder) else []
    generator = getattr(base, "generator", None)
    own = [
        getattr(base, "count", None),
        [*getattr(base, "slow", {}).values()],
        None if inner is None else state_of(inner),
    ]
    drawn = None if generator is None else generator.get_state().tolist()
    groups = [{k: v for k, v in g.items() if not k.startswith("apo_")} for g in base.param_groups]
    states = {p: {k: v for k, v in s.items() if not str(k).startswith("apo_")} for p, s in base.state.items()}
    return repr((held, own, drawn, groups, {p: s for p, s in states.items() if s}))
