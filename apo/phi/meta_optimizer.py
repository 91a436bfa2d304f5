"""The meta-optimizer: what descends the meta-gradient of φ (Algorithm 1, ``φ ← φ − α ∇_φ Q``)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from apo import checks
from apo.ranks.sharding import Over

__all__ = ["EPS", "Learned", "MetaOptimizer", "MetaOptimizerName", "count_updates"]

MetaOptimizerName = Literal["adam", "rmsprop"]

EPS = {torch.float32: 1e-18, torch.float64: 1e-150}
"""Meta-gradients have no fixed scale: they grow with the square of the gradient, times the rate. So eps is too small to
matter, except that it prevents division by squares that underflow."""


@dataclass(eq=False)
class Learned:
    """A tensor of φ and what the meta-optimizer remembers of it.

    Attributes:
        tensor: float32 or float64, written in place.
        rate: its meta-rate.
        count: 0-d float32 on the CPU, how many meta-updates it had; one for all tensors of a layer.
        block: whether it is a block A or B, not a scaling S.
        buffers: running means, by name.
        over: the groups of the ranks that hold its other parts (:mod:`apo.ranks.sharding`).
        alike: the groups of the ranks that hold the same and learn it from the sum of their derivatives.
        ones: 0-d on the CPU: what stands on the diagonal of what sticks out of a side, scaled as all of the block is.
        entries: of how many entries the whole of it is; None: its own.
    """

    tensor: Tensor
    rate: float = 0.0
    count: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float32, device="cpu"))
    block: bool = False
    buffers: dict[str, Tensor] = field(default_factory=dict)
    over: Over = ()
    alike: Over = ()
    entries: int | None = None
    ones: Tensor = field(default_factory=lambda: torch.ones((), dtype=torch.float32, device="cpu"))

    def __post_init__(self) -> None:
        self.ones = self.ones.to(self.tensor.dtype)


def count_updates(found: Iterable[Learned]) -> None:
    """Add one to the count of each layer that takes part."""
    torch._foreach_add_(list({id(each.count): each.count for each in found}.values()), 1)


class MetaOptimizer:
    """Adam or RMSprop on tensors, each with its own rate.

    Args:
        name: ``"adam"`` (β = (0.9, decay)) or ``"rmsprop"`` (without bias correction: the first steps are up to
            ``1/√(1 − decay)`` times the rate, which helps φ recover from a poor start).
        decay: of the running mean of squares.
    """

    def __init__(self, name: MetaOptimizerName, *, decay: float = 0.99) -> None:
        checks.one_of("meta_optimizer", name, ("adam", "rmsprop"))
        self.name = name
        self.decay = decay
        self.learned: list[Learned] = []

    def add(self, learned: Sequence[Learned]) -> None:
        """Take in further tensors."""
        for own in learned:
            own.buffers = self._start(own.tensor)
        self.learned += learned

    def _start(self, tensor: Tensor) -> dict[str, Tensor]:
        names = ("exp_avg", "exp_avg_sq") if self.name == "adam" else ("square_avg",)
        return {name: torch.zeros_like(tensor) for name in names}

    @torch.no_grad()
    def step(self, grads: Sequence[Tensor | None]) -> None:
        """One step from the meta-gradients, one per tensor; None leaves it as it is."""
        pairs = [(own, g) for own, g in zip(self.learned, grads, strict=True) if g is not None]
        if not pairs:
            return
        count_updates(own for own, _ in pairs)
        for own, grad in pairs:
            if self.name == "adam":
                self._adam(own, grad)
            else:
                square = own.buffers["square_avg"].mul_(self.decay).addcmul_(grad, grad, value=1 - self.decay)
                own.tensor.addcdiv_(grad, square.sqrt().add_(EPS[own.tensor.dtype]), value=-own.rate)

    def _adam(self, own: Learned, grad: Tensor) -> None:
        count = own.count.item()
        mean = own.buffers["exp_avg"].lerp_(grad, 0.1)
        square = own.buffers["exp_avg_sq"].mul_(self.decay).addcmul_(grad, grad, value=1 - self.decay)
        root = square.sqrt().div_(math.sqrt(1 - self.decay**count)).add_(EPS[own.tensor.dtype])
        own.tensor.addcdiv_(mean, root, value=-own.rate / (1 - 0.9**count))
