"""A gradient, the two factors of its Fisher block, and the damped inverse that every method should give.

KFAC (Martens & Grosse 2015, "Optimizing neural networks with Kronecker-factored approximate curvature")
takes the Fisher block of a weight ``(m, n)`` to be ``F_A ⊗ F_B``, with ``F_A (n, n)`` the second moment of
the layer's inputs and ``F_B (m, m)`` that of the gradients of its outputs. With its factored Tikhonov damping
(the paper's section 6.3) the preconditioned gradient is::

    P(G) = (F_B + δ_B I)⁻¹ G (F_A + δ_A I)⁻¹,   δ_A = π √γ,  δ_B = √γ / π,  π² = (tr F_A / n) / (tr F_B / m)

The factors are written ``F_A`` and ``F_B`` here, since ``A`` and ``B`` are the preconditioner's own blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.common.fisher.damping import tikhonov


class Eigen(NamedTuple):
    """``F = Q diag(values) Qᵀ``, values ascending."""

    values: Tensor
    Q: Tensor


@dataclass(frozen=True)
class LayerFactors:
    """``G (m, n)``, ``F_A (n, n)`` and ``F_B (m, m)``, all float64 and not rounded yet."""

    name: str
    source: str  # "recorded" or "synthetic"
    G: Tensor
    F_A: Tensor
    F_B: Tensor

    @cached_property
    def eigen_A(self) -> Eigen:
        return Eigen(*torch.linalg.eigh(self.F_A))

    @cached_property
    def eigen_B(self) -> Eigen:
        return Eigen(*torch.linalg.eigh(self.F_B))

    @cached_property
    def condition(self) -> float:
        """The larger of the factors' condition numbers; infinite where float64 calls one singular."""
        return max(_condition(self.eigen_A.values), _condition(self.eigen_B.values))

    def to(self, device: str) -> LayerFactors:
        return LayerFactors(self.name, self.source, *(x.to(device) for x in (self.G, self.F_A, self.F_B)))


class Damped:
    """A case at one damping ``γ``: float64 throughout."""

    def __init__(self, case: LayerFactors, damping: float) -> None:
        if damping == 0 and math.isinf(case.condition):
            raise ValueError(f"damping must be positive for case {case.name!r}, whose factors are singular; got 0")
        self.case, self.damping = case, damping
        self.delta_A, self.delta_B = tikhonov(case.F_A, case.F_B, damping)

    def exact(self, G: Tensor) -> Tensor:
        """``P(G)`` by LU solves, an algorithm that none of the methods uses."""
        half: Tensor = torch.linalg.solve(_shifted(self.case.F_B, self.delta_B), G)
        whole: Tensor = torch.linalg.solve(_shifted(self.case.F_A, self.delta_A), half, left=False)
        return whole

    @cached_property
    def result(self) -> Tensor:
        """``P(G)`` for the gradient of the case."""
        return self.exact(self.case.G)

    @cached_property
    def inverse_eigenvalues(self) -> Tensor:
        """``1 / ((λ_B + δ_B)(λ_A + δ_A)ᵀ)``, ``(m, n)``; what rounding has made negative counts as zero."""
        damped_A = self.case.eigen_A.values.clamp(min=0) + self.delta_A
        damped_B = self.case.eigen_B.values.clamp(min=0) + self.delta_B
        return 1 / (damped_B[:, None] * damped_A[None, :])


def _condition(values: Tensor) -> float:
    low, high = values[0].item(), values[-1].item()
    noise = len(values) * torch.finfo(values.dtype).eps * high
    return high / low if low > noise else math.inf


def _shifted(F: Tensor, delta: float) -> Tensor:
    return F + delta * torch.eye(len(F), dtype=F.dtype, device=F.device)
