"""The definitions, in plain torch: the specification that every other path is tested against.

Written for reading, not for speed. Any floating dtype, no rounding except the operands' own; differentiable to
any order by torch's autograd.

The operator is Eq. 10 of Bae et al., "Amortized Proximal Optimization" (NeurIPS 2022), in matrix form. With
``M = Bᵀ G A`` and, for a cotangent ``V`` of the result, ``N = Bᵀ V A``::

    P(G) = B (S² ⊙ M) Aᵀ
    dS   = 2 S ⊙ M ⊙ N
    dB   = (V A)(S² ⊙ M)ᵀ + (G A)(S² ⊙ N)ᵀ
    dA   = Vᵀ B (S² ⊙ M) + Gᵀ B (S² ⊙ N)
    dG   = P(V)                                  (P is symmetric)

and, relative to a block, ``AᵀdA`` and ``BᵀdB``.
"""

from __future__ import annotations

from torch import Tensor

from apo_kernels.blocks import blocks_from_dense, blocks_to_dense, is_stack, relative_derivative

__all__ = ["precondition", "precondition_step", "precondition_vjp"]


def precondition(G: Tensor, A: Tensor, B: Tensor, S: Tensor) -> Tensor:
    """``B (S² ⊙ BᵀGA) Aᵀ`` for ``G, S (*batch, m, n)``; ``A`` and ``B`` full or block-diagonal."""
    A, B = _dense(A, G, G.shape[-1]), _dense(B, G, G.shape[-2])
    return B @ (S.square() * (B.mT @ G @ A)) @ A.mT


def precondition_vjp(
    G: Tensor, A: Tensor, B: Tensor, S: Tensor, V: Tensor, *, relative: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(dG, dA, dB, dS)``, each of its operand's shape: the derivatives of ``⟨V, P(G)⟩``.

    With ``relative``, ``(dG, AᵀdA, BᵀdB, dS)``.
    """
    A_dense, B_dense = _dense(A, G, G.shape[-1]), _dense(B, G, G.shape[-2])
    S2 = S.square()
    M, N = B_dense.mT @ G @ A_dense, B_dense.mT @ V @ A_dense
    dS = 2 * S * M * N
    dB = (V @ A_dense) @ (S2 * M).mT + (G @ A_dense) @ (S2 * N).mT
    dA = V.mT @ B_dense @ (S2 * M) + G.mT @ B_dense @ (S2 * N)
    dG = B_dense @ (S2 * N) @ A_dense.mT
    dA, dB = _like(dA, A, G), _like(dB, B, G)
    if relative:
        dA, dB = relative_derivative(A, dA, G.shape[-1]), relative_derivative(B, dB, G.shape[-2])
    return dG, dA, dB, dS


def precondition_step(
    theta: Tensor,
    G: Tensor,
    A: Tensor,
    B: Tensor,
    S: Tensor,
    *,
    lr: float | Tensor,
    momentum: float = 0.0,
    momentum_buffer: Tensor | None = None,
    weight_decay: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The new weights and momentum: ``v ← μ v + P(G)``, ``θ ← (1 − lr·λ) θ − lr·v`` (out of place)."""
    direction = precondition(G, A, B, S)
    if momentum_buffer is not None:
        direction = momentum * momentum_buffer + direction
    return (1 - lr * weight_decay) * theta - lr * direction, direction


def _dense(block: Tensor, matrix: Tensor, side: int) -> Tensor:
    return blocks_to_dense(block, side) if is_stack(block, matrix) else block


def _like(dense: Tensor, block: Tensor, matrix: Tensor) -> Tensor:
    return blocks_from_dense(dense, block.shape[-1]) if is_stack(block, matrix) else dense
