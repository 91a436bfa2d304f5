"""Relative steps measured by their length alone, as apo had them before it measured each direction by its size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from apo.meta_optimizer import Learned, count_updates
from apo.relative_steps import RelativeSteps

SMALLEST = {torch.float32: 1e-18, torch.float64: 1e-150}  # keeps squares that underflow from being divided by


class StepsByLength(RelativeSteps):
    """``A ← A (I − ε R/‖R‖)``, R the running mean of ``AᵀdA``'s symmetric part (β = 0.5) and the norm over all squares.

    S in its logarithm by Adam, β = (0.9, 0.99).
    """

    S_SHARE = 0.3  # S's rate over ε

    @torch.no_grad()
    def step(self, grads: Sequence[Tensor | None], sizes: Sequence[Tensor | None]) -> None:
        found = [(own, grad) for own, grad in zip(self.learned, grads, strict=True) if grad is not None]
        count_updates(own for own, _ in found)
        for own, grad in found:
            (self._step_block if own.block else self._step_scaling)(own, grad)

    def _step_block(self, own: Learned, R: Tensor) -> None:
        X, average = own.tensor, own.buffers["slope"].lerp_(R, 1 - self.BLOCK_BETAS[0])
        change = average + average.mT
        X.sub_(X @ change.mul_(own.rate / torch.linalg.vector_norm(change).clamp_min(SMALLEST[X.dtype])))

    def _step_scaling(self, own: Learned, grad: Tensor) -> None:
        S = own.tensor
        slope = S * grad
        average = own.buffers["slope"].lerp_(slope, 1 - self.S_BETAS[0])
        square = own.buffers["size"].lerp_(slope.square(), 1 - self.S_BETAS[1])
        of_average, of_square = (1 - beta ** own.count.item() for beta in self.S_BETAS)
        change = (average / of_average) / (square / of_square).sqrt_().add_(SMALLEST[S.dtype])
        S.mul_(change.mul_(-own.rate * self.S_SHARE).exp_())
