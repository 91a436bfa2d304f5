"""What goes into and comes out of :class:`apo_kernels.ModelPreconditioner`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

__all__ = ["ModelEnergies", "ModelSlopes", "Parts"]

Parts = Sequence[Sequence[Tensor | None] | None]
"""One entry per layer: its matrices ``(*batch, m, width)``, side by side. None for a part or a layer that isn't
there."""


class ModelSlopes(NamedTuple):
    """How an objective changes with the preconditioner, one entry per layer, each None where it isn't learned or the
    layer was left out of the trial.

    With ``M = BᵀGA`` and ``N = BᵀVA``, for ``Q(θ − length·P(G))`` whose gradient there is ``V``:

    Attributes:
        A: ``−length·AᵀdA = −length·(Nᵀ(S²⊙M) + Mᵀ(S²⊙N))``, in A's shape, zero in what sticks out of a side.
        B: ``−length·BᵀdB = −length·(N(S²⊙M)ᵀ + M(S²⊙N)ᵀ)``.
        S: ``−length·S⊙dS = −2 length·S²⊙M⊙N``.
        size_A, size_B, size_S: ``length`` times what these would be for ``V = G``, without the sign: of A and B the
            diagonals, in the shapes of ``A[..., 0]`` and ``B[..., 0]``, of S ``2 length·S²⊙M²``.
        inner: ``⟨V, P(G)⟩`` of each layer, ``(layers,)``, 0 for one left out.
        size: ``length·⟨G, P(G)⟩``, likewise.

    All are float32 (float64 for float64 operands). On ATen the derivatives of blocks that lie in one storage lie in one
    likewise, at the same places relative to each other, and so do those of S: one operation can take all of them. What
    lies between them is zero.
    """

    A: list[Tensor | None]
    B: list[Tensor | None]
    S: list[Tensor | None]
    size_A: list[Tensor | None]
    size_B: list[Tensor | None]
    size_S: list[Tensor | None]
    inner: Tensor
    size: Tensor


class ModelEnergies(NamedTuple):
    """How far ``S ⊙ BᵀGA`` is from white, one entry per layer, each None where it isn't learned or there is no G.

    With ``M = BᵀGA``:

    Attributes:
        A: ``Mᵀ(S²⊙M)``, in A's shape, zero in what sticks out of a side.
        B: ``M(S²⊙M)ᵀ``.
        S: ``S²⊙M²``.

    They are half of the relative derivatives of ``⟨G, P(G)⟩``, and lie as those of :class:`ModelSlopes` do.
    """

    A: list[Tensor | None]
    B: list[Tensor | None]
    S: list[Tensor | None]
