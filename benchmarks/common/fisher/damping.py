"""Damped inverses, eigenbases and roots of symmetric matrices, in at least float32, whatever they are stored in."""

import math

import torch
from torch import Tensor


def tikhonov(F_A: Tensor, F_B: Tensor, damping: float) -> tuple[float, float]:
    """``(δ_A, δ_B) = (π √γ, √γ / π)``: ``π`` balances the mean eigenvalues (and is 1 if a factor is zero).

    The factored Tikhonov damping of Martens & Grosse 2015, section 6.3:
    ``(F_A + δ_A I) ⊗ (F_B + δ_B I) ≈ F_A ⊗ F_B + γ I``. A scale moved from one factor to the other changes nothing.
    """
    mean_A, mean_B = F_A.diagonal().mean().item(), F_B.diagonal().mean().item()
    pi = math.sqrt(mean_A / mean_B) if mean_A > 0 and mean_B > 0 else 1.0
    return pi * math.sqrt(damping), math.sqrt(damping) / pi


def damped_inverse(F: Tensor, shift: float) -> Tensor | None:
    """``(F + δ I)⁻¹`` by Cholesky; None where rounding has made ``F + δ I`` indefinite."""
    work = wide(F)
    L, info = torch.linalg.cholesky_ex(work + shift * torch.eye(len(work), dtype=work.dtype, device=work.device))
    return torch.cholesky_inverse(L) if info.item() == 0 else None


def eigenbasis(F: Tensor, *, retry: bool = False) -> tuple[Tensor, Tensor] | None:
    """``(λ, Q)`` with ``F = Q diag(λ) Qᵀ`` and no λ below zero; None where the decomposition fails.

    With ``retry`` one that fails in float32 is repeated in float64, which rarely fails to converge.
    """
    for dtype in (wide(F).dtype, torch.float64) if retry else (wide(F).dtype,):
        try:
            values, Q = torch.linalg.eigh(F.to(dtype))
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            continue
        if bool(values.isfinite().all()):
            return values.clamp(min=0), Q
    return None


def inverse_root(H: Tensor, damping: float, exponent: float) -> Tensor | None:
    """``(H + ε I)^(−exponent)`` by eigendecomposition, in H's dtype; None where that fails or isn't finite.

    Eigenvalues below the rounding error of the largest are noise, and count as that error.
    """
    pair = eigenbasis(H, retry=True)
    if pair is None:
        return None
    values, Q = pair
    values = values + damping
    noise = values[-1] * len(values) * torch.finfo(H.dtype).eps
    root = ((Q * values.clamp(min=noise).pow(-exponent)) @ Q.T).to(H.dtype)
    return root if bool(root.isfinite().all()) else None


def wide(tensor: Tensor) -> Tensor:
    """In float32, or float64 where it is that: LAPACK and cuSOLVER know nothing narrower."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
