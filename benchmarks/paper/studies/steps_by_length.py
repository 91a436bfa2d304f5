"""Relative steps measured by their length alone, as apo had them before it measured each direction by its size."""

from __future__ import annotations

import torch
from torch import Tensor

from apo.relative_steps import RelativeSteps

SMALLEST = {torch.float32: 1e-18, torch.float64: 1e-150}
"""Keeps squares that underflow from being divided by."""


class StepsByLength(RelativeSteps):
    """``A ← A (I − ε R/‖R‖)``, R the running mean of ``AᵀdA``'s symmetric part (β = 0.5) and the norm over all squares.

    S in its logarithm by Adam, β = (0.9, 0.99).
    """

    S_SHARE = 0.3
    """S's rate over ε."""

    def _step_block(self, i: int, X: Tensor, R: Tensor, size: Tensor) -> None:
        average, *_ = self._means(i, R, size, self.BLOCK_BETAS)
        change = average + average.mT
        X.sub_(X @ change.mul_(self.rates[i] / torch.linalg.vector_norm(change).clamp_min(SMALLEST[X.dtype])))

    def _step_scaling(self, i: int, S: Tensor, grad: Tensor, size: Tensor) -> None:
        slope = S * grad
        average, square, unbias = self._means(i, slope, slope.square(), self.S_BETAS)
        of_square = 1 - self.S_BETAS[1] ** self.steps[i]
        change = average * (unbias / of_square) / (square / of_square).sqrt_().add_(SMALLEST[S.dtype])
        S.mul_(change.mul_(-self.rates[i] * self.S_SHARE).exp_())
