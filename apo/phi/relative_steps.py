"""Meta-steps relative to what they change: descent on φ in coordinates of the blocks' own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import apo_kernels as ak
from apo.phi.meta_optimizer import Learned, count_updates
from apo.phi.shared_storage import SharedScalings, SharedSquares, shared

__all__ = ["RelativeSteps"]


class RelativeSteps:
    """``A ← A (I − ε R)``, ``B`` likewise, and ``S ← S exp(−ε r)``, with R and r the directions of descent.

    A block steps in its own coordinates: with ``A (I + E)`` in place of A, the derivative of Q with respect to E is
    ``AᵀdA``, whatever the scale and the basis of A (as in Li's PSGD, 2018, and Lin et al.'s SINGD, 2024). It is divided
    by its *size*, its magnitude if V equalled G: on the diagonal of ``AᵀdA`` twice the energy of a column of
    ``S ⊙ BᵀGA``, times the trial's rate; for ``S dS`` twice the square of the entry. The ratio is −1 where the trial
    left the gradient as it was, 0 where it reached the minimum, and +1 where it went twice as far, for large gradients
    and small ones alike::

        R_ij = mean(sym(AᵀdA)_ij) / √(mean(size_i) mean(size_j)),    r = mean(S dS) / mean(size)

    The running mean of a block's derivative is short (β = 0.5), those of sizes are longer, and so is that of S's
    derivative: ``m n`` numbers learned from as many noisy ones. ``R`` is kept to a Frobenius norm of 2 in each
    square, r to 1. So no step changes a singular value by more than the share ``2 ε``, and any condition number is
    reached in a number of steps that grows with its logarithm.
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
        taking_part = [own in found for own in each.learned]
        if not any(taking_part):
            return
        if each.tensor.numel() == 0:  # this rank holds nothing of them, and others wait for its part of the sums
            if isinstance(each, SharedScalings) and each.total is not None:
                each.total(each.tensor.new_zeros(len(each.counts)))
            return
        active = None
        if not all(taking_part):
            active = each.numbers(lambda own: float(own in found))
            assert isinstance(active, Tensor)
            active = active != 0
        squares = isinstance(each, SharedSquares)
        betas = self.BLOCK_BETAS if squares else self.S_BETAS
        slope, size = each.together(found)
        step: dict[str, Any] = {
            "rate": each.numbers(lambda own: own.rate),
            "betas": betas,
            "correction": each.numbers(lambda own: _unbias(counts[own], betas) if own in found else 1.0),
            "active": active,
        }
        held = each.tensor, each.slope, each.size, slope, size
        if isinstance(each, SharedSquares):
            ak.relative_step_squares_(*held, **step, floor=self.BLOCK_FLOOR, longest=self.LONGEST)
        else:
            step |= {"lengths": each.counts, "entries": each.entries, "total": each.total}
            ak.relative_step_scalings_(*held, **step, floor=self.S_FLOOR)

    def __getstate__(self) -> dict[str, Any]:
        return {"learned": self.learned}  # a pickle doesn't keep views of one storage together

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.learned = state["learned"]
        self._shared = shared(self.learned)


def _unbias(count: float, betas: tuple[float, float]) -> float:
    """What takes the bias from the ratio of the two running means."""
    of_average, of_mean = (1 - beta**count for beta in betas)
    return float(of_mean / of_average)
