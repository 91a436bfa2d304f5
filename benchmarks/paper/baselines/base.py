"""What the baselines share: momentum and weight decay, counters, and a state that resumes to the bit."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from benchmarks.common import checks

Closure = Callable[[], Any]
"""Clears the gradients, runs forward and backward, returns the loss."""


class Baseline(Optimizer):
    """Steps by ``v ← μ v + d``, ``θ ← (1 − lr·λ) θ − lr·v`` along directions ``d`` that a subclass finds.

    Keys of its param groups: ``lr``; ``momentum`` μ, in [0, 1); ``weight_decay`` λ, decoupled; ``damping``.

    Attributes:
        steps: how many steps were taken, skipped ones counted.
        skipped_steps: how many were left out because a gradient or a direction wasn't finite. Weights and momentum
            stay as they are.
    """

    COUNTERS: tuple[str, ...] = ("steps", "skipped_steps")
    SETTINGS: tuple[str, ...] = ()
    """Attributes that give the state its form: a state with others isn't loaded."""
    steps: int
    skipped_steps: int

    def _init_counters(self) -> None:
        for name in self.COUNTERS:
            setattr(self, name, 0)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            self._take_in(self.param_groups[-1])
        except BaseException:
            self.param_groups.pop()
            raise

    def _take_in(self, group: dict[str, Any]) -> None:
        """Check a new group, the last one. What a subclass has of it goes here too; an error leaves the group out."""
        for name in ("lr", "weight_decay", "damping"):
            checks.number(name, float(group[name]))
        checks.number("momentum", group["momentum"], below=1)
        for p in group["params"]:
            if not p.is_floating_point() or p.layout != torch.strided:
                raise TypeError(f"parameters must be dense floating-point tensors, but got {p.dtype}, {p.layout}")

    def _gradients_finite(self) -> bool:
        return all_finite([p.grad for group in self.param_groups for p in group["params"] if p.grad is not None])

    def _descend(self, directions: Mapping[Tensor, Tensor]) -> None:
        """Step along these directions, one for each parameter."""
        for group in self.param_groups:
            lr, momentum, decay = float(group["lr"]), group["momentum"], group["weight_decay"]
            for p in group["params"]:
                if p not in directions:
                    continue
                velocity = directions[p]
                if momentum:
                    state = self.state[p]
                    if "momentum_buffer" not in state:
                        state["momentum_buffer"] = torch.zeros_like(velocity)
                    velocity = state["momentum_buffer"].mul_(momentum).add_(velocity)
                if decay:
                    p.mul_(1 - lr * decay)
                p.sub_(velocity * lr)

    def _form(self) -> dict[str, Any]:
        settings = {name: str(getattr(self, name)) for name in self.SETTINGS}
        return {"kind": type(self).__name__, "settings": settings}

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with the counters under the key ``"baseline"``."""
        counters = {name: getattr(self, name) for name in self.COUNTERS}
        return {**super().state_dict(), "baseline": {**self._form(), "counters": counters}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the state of the same baseline; ValueError, and nothing is loaded, where it is another's."""
        own, extra = self._form(), state_dict.get("baseline", {})
        theirs = {key: extra.get(key) for key in own}
        if theirs != own:
            raise ValueError(f"state_dict must come from {own}, but it is from {theirs}")
        places = [place for group in state_dict["param_groups"] for place in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for place, p in zip(places, params, strict=len(places) == len(params)):
            shape = state_dict["state"].get(place, {}).get("momentum_buffer", p).shape
            if shape != p.shape:
                raise ValueError(f"state_dict must come from the same model, but has {shape} for {p.shape}")
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "baseline"})
        # torch has cast what it loaded to the dtypes of the weights: take it from the source
        self.state = defaultdict(dict)
        for place, p in zip(places, params, strict=True):
            if place in state_dict["state"]:
                self.state[p] = _copied(state_dict["state"][place], p.device)
        for name in self.COUNTERS:
            setattr(self, name, extra["counters"][name])


def all_finite(tensors: list[Tensor]) -> bool:
    """Whether every entry is finite; one synchronisation."""
    if not tensors:
        return True
    # 0·x is NaN where x isn't finite; its sum can't overflow as that of x could
    sums = torch.stack([(tensor * 0).sum(dtype=torch.float32) for tensor in tensors])
    return math.isfinite(sums.sum().item())


def _copied(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, copy=True)
    if isinstance(value, dict):
        return {key: _copied(held, device) for key, held in value.items()}
    if isinstance(value, list):
        return [_copied(held, device) for held in value]
    return value
