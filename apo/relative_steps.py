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
    """``A ← A (I − ε R)``, ``B`` likewise, and ``S ← S exp(−ε r)``, with R and r the directions of descent.

    A step of a block is taken in the coordinates that it makes for itself: with ``A (I + E)`` in place of A, the
    derivative of Q with respect to E is ``AᵀdA``, whatever the scale and the basis of A (Li's PSGD, 2018, and Lin et
    al.'s SINGD, 2024, step so too). It is measured by its *size*: what it would be, but for the sign, had the trial
    left the gradient as it was. On the diagonal of ``AᵀdA`` that is twice the energy of a column of ``S ⊙ BᵀGA``,
    times the trial's rate; of ``S dS``, twice the square of the entry. The ratio is then −1 where the step could go
    on for ever, 0 where it ends as it should, +1 where it goes twice as far, be gradients large there or small::

        R_ij = mean(sym(AᵀdA)_ij) / √(mean(size_i) mean(size_j)),    r = mean(S dS) / mean(size)

    The running mean of a block's derivative is short (β = 0.5), those of sizes are longer, and so is that of S's
    derivative: ``m n`` numbers learned from as many noisy ones. ``R`` is kept to a Frobenius norm of 2 in each
    square, r to 1. So no step changes a singular value by more than the share ``2 ε``, and any condition number is
    reached in a number of steps that goes with its logarithm.

    Args:
        tensors: φ, written in place by :meth:`step`.
        rates: ε, one a tensor.
        blocks: whether it is a block, one a tensor; S otherwise.
    """

    name = "relative"
    BLOCK_BETAS = (0.5, 0.9)
    """Of the running means of the derivative and of its size."""
    S_BETAS = (0.9, 0.99)
    LONGEST = 2.0
    """Greatest Frobenius norm of a square of R."""
    BLOCK_FLOOR = 1e-6
    """Least size, over the mean size of the square."""
    S_FLOOR = 1e-3

    def __init__(
        self, tensors: Iterable[Tensor] = (), rates: Iterable[float] = (), blocks: Iterable[bool] = ()
    ) -> None:
        self.tensors: list[Tensor] = []
        self.rates: list[float] = []
        self.blocks: list[bool] = []
        self.steps: list[int] = []
        self.averages: list[Tensor | None] = []
        self.sizes: list[Tensor | None] = []
        self.add(tensors, rates, blocks)

    def add(self, tensors: Iterable[Tensor], rates: Iterable[float], blocks: Iterable[bool]) -> None:
        """Take in further tensors."""
        for tensor, rate, block in zip(tensors, rates, blocks, strict=True):
            self.tensors.append(tensor)
            self.rates.append(rate)
            self.blocks.append(block)
            self.steps.append(0)
            self.averages.append(None)
            self.sizes.append(None)

    @torch.no_grad()
    def step(self, grads: Sequence[Tensor | None], sizes: Sequence[Tensor | None]) -> None:
        """One step from the meta-gradients, one a tensor; None leaves it as it is.

        Args:
            grads: ``AᵀdA`` of a block A, ``dS`` of a scaling S.
            sizes: of a block's diagonal, in the shape of ``A[..., 0]``; of ``S dS``, in that of S. All >= 0.
        """
        for i, (tensor, grad, size) in enumerate(zip(self.tensors, grads, sizes, strict=True)):
            if grad is not None and size is not None:
                self.steps[i] += 1
                if self.blocks[i]:
                    self._step_block(i, tensor, grad, size)
                else:
                    self._step_scaling(i, tensor, grad, size)

    def _step_block(self, i: int, X: Tensor, R: Tensor, size: Tensor) -> None:
        average, mean, unbias = self._means(i, R, size, self.BLOCK_BETAS)
        least = self.BLOCK_FLOOR * mean.mean(-1, keepdim=True) + EPS[X.dtype]
        scale = (mean + least).rsqrt_()
        change = torch.add(average, average.mT).mul_((scale * (unbias / 2)).unsqueeze(-1)).mul_(scale.unsqueeze(-2))
        length = torch.linalg.vector_norm(change, dim=(-2, -1), keepdim=True)
        change.mul_(self.rates[i] * self.LONGEST / length.clamp_min_(self.LONGEST))
        X.sub_(aligned_product(X, change))

    def _step_scaling(self, i: int, S: Tensor, grad: Tensor, size: Tensor) -> None:
        average, mean, unbias = self._means(i, S * grad, size, self.S_BETAS)
        ratio = average / (mean + (self.S_FLOOR * mean.mean() + EPS[S.dtype]))
        S.mul_(ratio.clamp_(-1 / unbias, 1 / unbias).mul_(-self.rates[i] * unbias).exp_())

    def _means(self, i: int, slope: Tensor, size: Tensor, betas: tuple[float, float]) -> tuple[Tensor, Tensor, float]:
        """The running means of the derivative and of its size, and what takes the bias from their ratio."""
        average, mean = self.averages[i], self.sizes[i]
        if average is None or mean is None:
            average = self.averages[i] = torch.zeros_like(slope)
            mean = self.sizes[i] = torch.zeros_like(size)
        average.lerp_(slope, 1 - betas[0])
        mean.lerp_(size, 1 - betas[1])
        of_average, of_mean = (1 - beta ** self.steps[i] for beta in betas)
        return average, mean, of_mean / of_average

    def scale_rates(self, factor: float) -> None:
        """Multiply every meta-rate, for schedules of them."""
        self.rates = [rate * factor for rate in self.rates]

    def state_dict(self) -> dict[str, Any]:
        return {
            "steps": list(self.steps),
            "rates": list(self.rates),
            "averages": list(self.averages),
            "sizes": list(self.sizes),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up :meth:`state_dict`; tensors come to where φ is."""

        def taken(held: Sequence[Tensor | None]) -> list[Tensor | None]:
            pairs = zip(held, self.tensors, strict=True)
            return [None if x is None else x.to(device=t.device, dtype=t.dtype, copy=True) for x, t in pairs]

        self.steps = list(state["steps"])
        self.rates = list(state["rates"])
        self.averages, self.sizes = taken(state["averages"]), taken(state["sizes"])
