"""What the baselines share: momentum and weight decay, counters, and a state that resumes to the bit."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
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
    steps: int
    skipped_steps: int

    def __init__(
        self, params: Iterable[Any], *, lr: float, damping: float, momentum: float = 0.9, weight_decay: float = 0.0
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "damping": damping}
        for name, value in defaults.items():
            checks.number(name, value, below=1 if name == "momentum" else math.inf)
        for name in self.COUNTERS:
            setattr(self, name, 0)
        super().__init__(params, defaults)

    def _step_along(self, directions: Callable[[], Mapping[Tensor, Tensor]]) -> None:
        """Step along these directions, one for each parameter, unless a gradient or one of them isn't finite."""
        self.steps += 1
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        found = directions() if all_finite(grads) else None
        if found is None or not all_finite([*found.values()]):
            self.skipped_steps += 1
            return
        for group in self.param_groups:
            lr, momentum, decay = float(group["lr"]), group["momentum"], group["weight_decay"]
            for p in filter(found.__contains__, group["params"]):
                velocity = found[p]
                if momentum:
                    buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(velocity))
                    velocity = buffer.mul_(momentum).add_(velocity)
                if decay:
                    p.mul_(1 - lr * decay)
                p.sub_(velocity * lr)

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with the counters."""
        return {**super().state_dict(), "counters": {name: getattr(self, name) for name in self.COUNTERS}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        # torch has cast what it loaded to the dtypes of the weights: take it from the source
        held = deepcopy(state_dict["state"])
        params = [p for group in self.param_groups for p in group["params"]]
        self.state = defaultdict(dict, {p: held[place] for place, p in enumerate(params) if place in held})
        for name, count in state_dict["counters"].items():
            setattr(self, name, count)


def all_finite(tensors: list[Tensor]) -> bool:
    """Whether every entry is finite; one synchronisation."""
    if not tensors:
        return True
    # 0·x is NaN where x isn't finite; its sum can't overflow as that of x could
    sums = torch.stack([(tensor * 0).sum(dtype=torch.float32) for tensor in tensors])
    return math.isfinite(sums.sum().item())
