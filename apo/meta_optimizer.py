"""The meta-optimizer: what descends the meta-gradient of φ (Algorithm 1, ``φ ← φ − α ∇_φ Q``)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from apo import checks

__all__ = ["MetaOptimizer", "MetaOptimizerName"]

MetaOptimizerName = Literal["adam", "rmsprop"]

EPS = {torch.float32: 1e-18, torch.float64: 1e-150}
"""Meta-gradients have no scale of their own (they go with the square of the gradient, times the rate), so that an
eps that shows would be a setting. This one only keeps squares that underflow from being divided by."""


class MetaOptimizer:
    """Adam or RMSprop on lists of tensors, each with its own rate; the work is torch's.

    Args:
        tensors: φ, float32 or float64, written in place by :meth:`step`.
        rates: one meta-rate a tensor.
        name: ``"adam"`` (β = (0.9, decay)) or ``"rmsprop"`` (without bias correction: the first steps are up to
            ``1/√(1 − decay)`` times the rate, which is what brings φ home from a start far off).
        decay: of the running mean of squares.
    """

    def __init__(
        self, tensors: Iterable[Tensor], rates: Iterable[float], name: MetaOptimizerName, *, decay: float = 0.99
    ) -> None:
        checks.one_of("meta_optimizer", name, ("adam", "rmsprop"))
        self.name = name
        self.decay = decay
        self._optimizer: torch.optim.Optimizer | None = None
        self.tensors: list[Tensor] = []
        self.add(tensors, rates)

    def add(self, tensors: Iterable[Tensor], rates: Iterable[float]) -> None:
        """Take in further tensors."""
        alike: dict[tuple[float, torch.dtype], list[Tensor]] = {}
        for tensor, rate in zip(tensors, rates, strict=True):
            self.tensors.append(tensor)
            alike.setdefault((rate, tensor.dtype), []).append(tensor)
        for (rate, dtype), params in alike.items():
            group: dict[str, Any] = {"params": params, "lr": rate, "eps": EPS[dtype]}
            if self._optimizer is not None:
                self._optimizer.add_param_group(group)
            elif self.name == "adam":
                self._optimizer = torch.optim.Adam([group], betas=(0.9, self.decay))
            else:
                self._optimizer = torch.optim.RMSprop([group], alpha=self.decay)

    @torch.no_grad()
    def step(self, grads: Sequence[Tensor | None]) -> None:
        """One step from the meta-gradients, one a tensor; None leaves it as it is."""
        if self._optimizer is None:
            return
        for tensor, grad in zip(self.tensors, grads, strict=True):
            tensor.grad = grad
        self._optimizer.step()
        for tensor in self.tensors:
            tensor.grad = None

    def scale_rates(self, factor: float) -> None:
        """Multiply every meta-rate, for schedules of them."""
        if self._optimizer is not None:
            for group in self._optimizer.param_groups:
                group["lr"] *= factor

    def state_dict(self) -> dict[str, Any]:
        return {} if self._optimizer is None else self._optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self._optimizer is not None:
            self._optimizer.load_state_dict(state)
