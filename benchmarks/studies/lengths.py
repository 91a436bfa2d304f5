"""Relative steps by their length alone: apo's before it measured each direction by its size."""

from __future__ import annotations

import torch
from torch import Tensor

from apo.meta_optimizer import EPS, Learned
from apo.relative_steps import RelativeSteps

__all__ = ["ByLength"]


class ByLength(RelativeSteps):
    """``A ← A (I − ε R/‖R‖)``, R the running mean of ``AᵀdA``'s symmetric part (β = 0.5) and the norm over all squares;
    S in its logarithm by Adam, β = (0.9, 0.99)."""

    S_SHARE = 0.3
    """S's rate over ε."""

    def _step_block(self, own: Learned, R: Tensor, size: Tensor) -> None:
        X = own.tensor
        average, *_ = self._means(own, R, size, self.BLOCK_BETAS)
        change = average + average.mT
        X.sub_(X @ change.mul_(own.rate / torch.linalg.vector_norm(change).clamp_min(EPS[X.dtype])))

    def _step_scaling(self, own: Learned, grad: Tensor, size: Tensor) -> None:
        S = own.tensor
        slope = S * grad
        average, square, unbias = self._means(own, slope, slope.square(), self.S_BETAS)
        of_square = 1 - self.S_BETAS[1] ** own.count.item()
        change = average * (unbias / of_square) / (square / of_square).sqrt_().add_(EPS[S.dtype])
        S.mul_(change.mul_(-own.rate * self.S_SHARE).exp_())
