"""Meta-steps relative to what they change: descent on φ in coordinates of the blocks' own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from apo.meta_optimizer import EPS
from apo_kernels.aten import aligned_product

__all__ = ["RelativeSteps"]


class RelativeSteps:
    """``A ← A (I − ε R)``, ``B`` likewise, and ``S ← S exp(−s)``, with R and s the directions of descent.

    A step of a block is taken in the coordinates that it makes for itself: with ``A (I + E)`` in place of A, the
    derivative of Q with respect to E is ``AᵀdA``, whatever the scale and the basis of A (Li's PSGD, 2018, and Lin et
    al.'s SINGD, 2024, step so too). Its symmetric part is taken; averaged briefly (β = 0.5: 0.9 is better on noisy
    gradients, and swings about the optimum where there is little noise); and divided by the Frobenius norm of the
    average, over all squares of a block-diagonal block, which bounds what a step does to any singular value to the
    share ε. So any condition number is reached in a number of steps that goes with its logarithm, and every entry of
    ``AᵀdA`` counts by its size: dividing each by its own running RMS, as Adam does, makes noise of the small ones.

    S steps in its logarithm by Adam, β = (0.9, 0.99), at a smaller rate: ``m n`` numbers learned from as many noisy
    derivatives.

    Args:
        tensors: φ, written in place by :meth:`step`.
        rates: ε, or Adam's rate in ``log S``, one a tensor.
        blocks: whether it is a block, one a tensor; S otherwise.
    """

    name = "relative"
    BLOCK_BETA = 0.5
    BETAS = (0.9, 0.99)
    """Of S's Adam."""

    def __init__(
        self, tensors: Iterable[Tensor] = (), rates: Iterable[float] = (), blocks: Iterable[bool] = ()
    ) -> None:
        self.tensors: list[Tensor] = []
        self.rates: list[float] = []
        self.blocks: list[bool] = []
        self.steps: list[int] = []
        self.averages: list[Tensor | None] = []
        self.squares: list[Tensor | None] = []
        self.add(tensors, rates, blocks)

    def add(self, tensors: Iterable[Tensor], rates: Iterable[float], blocks: Iterable[bool]) -> None:
        """Take in further tensors."""
        for tensor, rate, block in zip(tensors, rates, blocks, strict=True):
            self.tensors.append(tensor)
            self.rates.append(rate)
            self.blocks.append(block)
            self.steps.append(0)
            self.averages.append(None)
            self.squares.append(None)

    @torch.no_grad()
    def step(self, grads: Sequence[Tensor]) -> None:
        """One step from the meta-gradients, one a tensor: ``AᵀdA`` of a block A, ``dS`` of a scaling S."""
        for i, (tensor, grad) in enumerate(zip(self.tensors, grads, strict=True)):
            self.steps[i] += 1
            if self.blocks[i]:
                self._step_block(i, tensor, grad)
            else:
                self._step_scaling(i, tensor, grad)

    def _step_block(self, i: int, X: Tensor, R: Tensor) -> None:
        average = self.averages[i]
        if average is None:
            average = self.averages[i] = torch.zeros_like(X)
        average.lerp_(R, 1 - self.BLOCK_BETA).add_(R.mT, alpha=1 - self.BLOCK_BETA)
        length = torch.linalg.vector_norm(average).clamp_min(EPS[X.dtype])
        X.sub_(aligned_product(X, average).mul_(self.rates[i] / length))

    def _step_scaling(self, i: int, S: Tensor, grad: Tensor) -> None:
        slope = S * grad
        average, square = self.averages[i], self.squares[i]
        if average is None or square is None:
            average = self.averages[i] = torch.zeros_like(S)
            square = self.squares[i] = torch.zeros_like(S)
        beta1, beta2 = self.BETAS
        average.lerp_(slope, 1 - beta1)
        square.mul_(beta2).addcmul_(slope, slope, value=1 - beta2)
        unbias1, unbias2 = 1 - beta1 ** self.steps[i], 1 - beta2 ** self.steps[i]
        change = average / (square / unbias2).sqrt_().add_(EPS[S.dtype])
        S.mul_(change.mul_(-self.rates[i] / unbias1).exp_())

    def scale_rates(self, factor: float) -> None:
        """Multiply every meta-rate, for schedules of them."""
        self.rates = [rate * factor for rate in self.rates]

    def state_dict(self) -> dict[str, Any]:
        return {
            "steps": list(self.steps),
            "rates": list(self.rates),
            "averages": list(self.averages),
            "squares": list(self.squares),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up :meth:`state_dict`; tensors come to where φ is."""

        def taken(held: Sequence[Tensor | None]) -> list[Tensor | None]:
            pairs = zip(held, self.tensors, strict=True)
            return [None if x is None else x.to(device=t.device, dtype=t.dtype, copy=True) for x, t in pairs]

        self.steps = list(state["steps"])
        self.rates = list(state["rates"])
        self.averages, self.squares = taken(state["averages"]), taken(state["squares"])
