"""Meta-steps relative to what they change: descent on φ in coordinates of the blocks' own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from apo.meta_optimizer import EPS, Learned, count_updates
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

    def __init__(self) -> None:
        self.learned: list[Learned] = []

    def add(
        self, tensors: Iterable[Tensor], rates: Iterable[float], blocks: Iterable[bool], count: Tensor | None = None
    ) -> list[Learned]:
        """Take in the tensors of a layer; ε, and whether it is a block, of each; the layer's count of updates."""
        count = torch.zeros(()) if count is None else count
        new = []
        for tensor, rate, block in zip(tensors, rates, blocks, strict=True):
            size = tensor.new_zeros(tensor.shape[:-1] if block else tensor.shape)
            new.append(Learned(tensor, rate, count, {"slope": torch.zeros_like(tensor), "size": size}, block))
        self.learned += new
        return new

    @torch.no_grad()
    def step(self, grads: Sequence[Tensor | None], sizes: Sequence[Tensor | None]) -> None:
        """One step from the meta-gradients, one a tensor; None leaves it as it is.

        Args:
            grads: ``AᵀdA`` of a block A, ``dS`` of a scaling S.
            sizes: of a block's diagonal, in the shape of ``A[..., 0]``; of ``S dS``, in that of S. All >= 0.
        """
        found = [
            (own, grad, size)
            for own, grad, size in zip(self.learned, grads, sizes, strict=True)
            if grad is not None and size is not None
        ]
        count_updates(own for own, _, _ in found)
        for own, grad, size in found:
            if own.block:
                self._step_block(own, grad, size)
            else:
                self._step_scaling(own, grad, size)

    def _step_block(self, own: Learned, R: Tensor, size: Tensor) -> None:
        average, mean, unbias = self._means(own, R, size, self.BLOCK_BETAS)
        least = self.BLOCK_FLOOR * mean.mean(-1, keepdim=True) + EPS[own.tensor.dtype]
        scale = (mean + least).rsqrt_()
        change = torch.add(average, average.mT).mul_((scale * (unbias / 2)).unsqueeze(-1)).mul_(scale.unsqueeze(-2))
        length = torch.linalg.vector_norm(change, dim=(-2, -1), keepdim=True)
        change.mul_(own.rate * self.LONGEST / length.clamp_min_(self.LONGEST))
        own.tensor.sub_(aligned_product(own.tensor, change))

    def _step_scaling(self, own: Learned, grad: Tensor, size: Tensor) -> None:
        S = own.tensor
        average, mean, unbias = self._means(own, S * grad, size, self.S_BETAS)
        ratio = average / (mean + (self.S_FLOOR * mean.mean() + EPS[S.dtype]))
        S.mul_(ratio.clamp_(-1 / unbias, 1 / unbias).mul_(-own.rate * unbias).exp_())

    def _means(
        self, own: Learned, slope: Tensor, size: Tensor, betas: tuple[float, float]
    ) -> tuple[Tensor, Tensor, float]:
        """The running means of the derivative and of its size, and what takes the bias from their ratio."""
        average = own.buffers["slope"].lerp_(slope, 1 - betas[0])
        mean = own.buffers["size"].lerp_(size, 1 - betas[1])
        of_average, of_mean = (1 - beta ** own.count.item() for beta in betas)
        return average, mean, of_mean / of_average

    def scale_rates(self, factor: float) -> None:
        """Multiply every ε, for schedules of them."""
        for own in self.learned:
            own.rate *= factor
