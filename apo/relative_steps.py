"""Meta-steps relative to what they change: descent on φ in coordinates of the blocks' own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from apo.meta_optimizer import EPS, Learned, count_updates
from apo.shared_storage import Numbers, SharedScalings, SharedSquares, shared
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
        self._shared: list[SharedSquares | SharedScalings] = []

    def add(self, learned: Sequence[Learned]) -> None:
        """Take in further tensors: they and their running means become views of storage that like ones share."""
        for own in learned:
            size = own.tensor.shape[:-1] if own.block else own.tensor.shape
            own.buffers = {"slope": torch.zeros_like(own.tensor), "size": own.tensor.new_zeros(size)}
        self.learned += learned
        self._shared = shared(self.learned)

    @torch.no_grad()
    def step(self, grads: Sequence[Tensor | None], sizes: Sequence[Tensor | None]) -> None:
        """One step from the meta-gradients, one per tensor; None leaves it as it is.

        Args:
            grads: ``AᵀdA`` of a block A, ``S dS`` of a scaling S.
            sizes: of a block's diagonal, in the shape of ``A[..., 0]``; of ``S dS``, in that of S. All >= 0.
        """
        given = zip(self.learned, grads, sizes, strict=True)
        found = {own: (grad, size) for own, grad, size in given if grad is not None and size is not None}
        if not found:
            return
        count_updates(found)
        counts = dict(zip(found, torch.stack([own.count for own in found]).tolist(), strict=True))
        for each in self._shared:
            self._step_alike(each, found, counts)

    def _step_alike(
        self,
        each: SharedSquares | SharedScalings,
        found: Mapping[Learned, tuple[Tensor, Tensor]],
        counts: Mapping[Learned, float],
    ) -> None:
        taking_part = [own for own in each.learned if own in found]
        if not taking_part:
            return
        slopes, sizes = ([found[own][i] for own in taking_part] for i in (0, 1))
        squares = isinstance(each, SharedSquares)
        betas = self.BLOCK_BETAS if squares else self.S_BETAS
        torch._foreach_lerp_([own.buffers["slope"] for own in taking_part], slopes, 1 - betas[0])
        torch._foreach_lerp_([own.buffers["size"] for own in taking_part], sizes, 1 - betas[1])
        unbias = each.each(lambda own: _unbias(counts[own], betas) if own in found else 1.0)
        # a rate of 0 leaves a tensor that doesn't take part as it is
        rate = each.each(lambda own: own.rate if own in found else 0.0)
        if isinstance(each, SharedSquares):
            self._step_squares(each, rate, unbias)
        else:
            self._step_scalings(each, rate, unbias)

    def _step_squares(self, squares: SharedSquares, rate: Numbers, unbias: Numbers) -> None:
        for part in squares.parts():
            X, average, mean = squares.tensor[part], squares.slope[part], squares.size[part]
            least = self.BLOCK_FLOOR * mean.mean(-1, keepdim=True) + EPS[X.dtype]
            scale = (mean + least).rsqrt_()
            change = torch.add(average, average.mT).mul_(scale.unsqueeze(-1)).mul_(scale.unsqueeze(-2))
            change.mul_(_part(unbias, part) / 2)
            length = torch.linalg.vector_norm(change, dim=(-2, -1), keepdim=True)
            change.mul_(_part(rate, part) * self.LONGEST / length.clamp_min_(self.LONGEST))
            X.sub_(torch.bmm(X, change) if len(X) > 1 else aligned_product(X, change))

    def _step_scalings(self, scalings: SharedScalings, rate: Numbers, unbias: Numbers) -> None:
        floors = scalings.mean_sizes().mul_(self.S_FLOOR).add_(EPS[scalings.tensor.dtype])
        for part, floor in scalings.parts(floors):
            ratio = scalings.slope[part] / (scalings.size[part] + floor)
            ratio.mul_(_part(unbias, part)).clamp_(-1, 1)
            scalings.tensor[part].mul_(ratio.mul_(-_part(rate, part)).exp_())

    def __getstate__(self) -> dict[str, Any]:
        return {"learned": self.learned}  # a pickle doesn't keep views of one storage together

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.learned = state["learned"]
        self._shared = shared(self.learned)

    def scale_rates(self, factor: float) -> None:
        """Multiply every ε, for schedules of them."""
        for own in self.learned:
            own.rate *= factor


def _unbias(count: float, betas: tuple[float, float]) -> float:
    """What takes the bias from the ratio of the two running means."""
    of_average, of_mean = (1 - beta**count for beta in betas)
    return float(of_mean / of_average)


def _part(number: Numbers, part: slice) -> Numbers:
    return number[part] if isinstance(number, Tensor) else number
