"""Four ways to the same preconditioned gradient, each in the dtype of what it is given.

Every method's **operands** are made in float64 and then rounded to the storage dtype, which is the dtype that the
method sees: KFAC's factors for ``inverse`` and ``eigen``, blocks for ``chain`` and ``ours``, and the same blocks scaled
to about equal norms for ``chain_balanced`` and ``ours_balanced``. Section *Stability* of ``docs/benchmarks.md`` says
what is compared, and what is in whose favour.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import apo_kernels as ak
from benchmarks.common.fisher.damping import damped_inverse, eigenbasis
from benchmarks.kernels.stability.problem import Damped


class Breakdown(Exception):
    """A method has no result; the message says why."""


@dataclass(frozen=True)
class StoredOperands:
    """The gradient ``G (m, n)`` and what the method holds: tensors by name. All of one dtype."""

    G: Tensor
    held: dict[str, Tensor]
    delta_A: float
    delta_B: float

    def to(self, dtype: torch.dtype) -> StoredOperands:
        return replace(self, G=self.G.to(dtype), held={name: x.to(dtype) for name, x in self.held.items()})


@dataclass(frozen=True)
class Trace:
    """The result ``P(G) (m, n)`` and the intermediate results that can be seen, by name."""

    result: Tensor
    intermediates: dict[str, Tensor]


@dataclass(frozen=True)
class InverseMethod:
    key: str
    label: str
    prepare: Callable[[Damped], StoredOperands]
    apply: Callable[[StoredOperands], Trace]


def given_factors(problem: Damped) -> StoredOperands:
    held = {"F_A": problem.case.F_A, "F_B": problem.case.F_B}
    return StoredOperands(problem.case.G, held, problem.delta_A, problem.delta_B)


def given_blocks(problem: Damped) -> StoredOperands:
    S = problem.inverse_eigenvalues.sqrt()
    held = {"A": problem.case.eigen_A.Q, "B": problem.case.eigen_B.Q, "S": S}
    return StoredOperands(problem.case.G, held, problem.delta_A, problem.delta_B)


def given_balanced_blocks(problem: Damped) -> StoredOperands:
    """``2ᵏA, 2ᵏB, 2⁻²ᵏS``, ``k`` such that the largest entry of S comes near the other two's norm, ``2ᵏ``."""
    operands = given_blocks(problem)
    A, B, S = operands.held.values()
    k = round(math.log2(S.max().item()) / 3)
    return replace(operands, held={"A": A * 2.0**k, "B": B * 2.0**k, "S": S * 2.0 ** (-2 * k)})


def inverse(x: StoredOperands) -> Trace:
    """KFAC (Martens & Grosse 2015): ``(F_B + δ_B I)⁻¹ G (F_A + δ_A I)⁻¹`` by Cholesky inverses."""
    inverse_A = _inverse("F_A", x.held["F_A"], x.delta_A)
    inverse_B = _inverse("F_B", x.held["F_B"], x.delta_B)
    return Trace(inverse_B @ x.G @ inverse_A, {"inverse_A": inverse_A, "inverse_B": inverse_B})


def eigen(x: StoredOperands) -> Trace:
    """EKFAC's form (George et al. 2018): ``Q_B ((Q_Bᵀ G Q_A) / Λ) Q_Aᵀ``, with KFAC's own eigenvalues.

    ``Λ = (λ_B + δ_B)(λ_A + δ_A)ᵀ (m, n)`` is formed in the decomposition's dtype and stored, as the bases.
    """
    values_A, Q_A = _eigenbasis("F_A", x.held["F_A"])
    values_B, Q_B = _eigenbasis("F_B", x.held["F_B"])
    Lambda = ((values_B + x.delta_B)[:, None] * (values_A + x.delta_A)[None, :]).to(x.G.dtype)
    M = Q_B.T @ x.G @ Q_A
    T = M / Lambda
    return Trace(Q_B @ T @ Q_A.T, {"eigenvalues": Lambda, "M": M, "M/eigenvalues": T})


def ours(x: StoredOperands) -> Trace:
    """``B (S² ⊙ BᵀGA) Aᵀ`` by :func:`apo_kernels.precondition`, whose intermediates can't be seen."""
    A, B, S = x.held.values()
    return Trace(ak.precondition(x.G, A, B, S), {"S": S})


def chain(x: StoredOperands) -> Trace:
    """The same product as anyone would write it: each step rounded to the storage dtype."""
    A, B, S = x.held.values()
    S2 = S * S
    M = B.T @ x.G @ A
    T = S2 * M
    return Trace(B @ T @ A.T, {"S": S, "S²": S2, "M": M, "S²⊙M": T})


METHODS = (
    InverseMethod("inverse", "inverse (KFAC)", given_factors, inverse),
    InverseMethod("eigen", "eigenbasis (EKFAC)", given_factors, eigen),
    InverseMethod("chain", "plain chain", given_blocks, chain),
    InverseMethod("chain_balanced", "plain chain (balanced)", given_balanced_blocks, chain),
    InverseMethod("ours", "apo_kernels", given_blocks, ours),
    InverseMethod("ours_balanced", "apo_kernels (balanced)", given_balanced_blocks, ours),
)


def _inverse(name: str, F: Tensor, delta: float) -> Tensor:
    """The damped inverse, in the storage dtype."""
    found = damped_inverse(F, delta)
    if found is None:
        raise Breakdown(f"Cholesky of {name} failed")
    return found.to(F.dtype)


def _eigenbasis(name: str, F: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues in the decomposition's dtype, none below zero, and the basis in the storage dtype."""
    found = eigenbasis(F)
    if found is None:
        raise Breakdown(f"eigendecomposition of {name} failed")
    return found[0], found[1].to(F.dtype)
