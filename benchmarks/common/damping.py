"""Damped inverses and eigenbases of Kronecker factors, in float32 at least whatever the factors are kept in."""

from __future__ import annotations

import math

import torch
from torch import Tensor

ATTEMPTS = 24


def tikhonov(F_A: Tensor, F_B: Tensor, damping: float) -> tuple[float, float]:
    """``(δ_A, δ_B) = (π √γ, √γ / π)``: ``π`` balances the mean eigenvalues (and is 1 if a factor is zero).

    The factored Tikhonov damping of Martens & Grosse 2015, section 6.3:
    ``(F_A + δ_A I) ⊗ (F_B + δ_B I) ≈ F_A ⊗ F_B + γ I``. A scale moved from one factor to the other changes nothing.
    """
    mean_A, mean_B = F_A.diagonal().mean().item(), F_B.diagonal().mean().item()
    pi = math.sqrt(mean_A / mean_B) if mean_A > 0 and mean_B > 0 else 1.0
    return pi * math.sqrt(damping), math.sqrt(damping) / pi


def damped_inverse(F: Tensor, shift: float, dtype: torch.dtype) -> tuple[Tensor | None, int]:
    """``((F + δ I)⁻¹ rounded to dtype, how often it failed)`` by Cholesky.

    An attempt fails where the factorisation does (rounding has made ``F + δ I`` indefinite) or where the inverse
    isn't finite in ``dtype``; δ is then multiplied by ten. None where every attempt failed.
    """
    work = wide(F)
    eye = torch.eye(len(work), dtype=work.dtype, device=work.device)
    least = torch.finfo(work.dtype).eps * (work.diagonal().mean().item() or 1.0)
    for failed in range(ATTEMPTS):
        L, info = torch.linalg.cholesky_ex(work + shift * eye)
        if info.item() == 0:
            inverse = torch.cholesky_inverse(L).to(dtype)
            if bool(inverse.isfinite().all()):
                return inverse, failed
        shift = max(10 * shift, least)
    return None, ATTEMPTS


def eigenbasis(F: Tensor) -> tuple[Tensor, Tensor] | None:
    """``(λ, Q)`` with ``F = Q diag(λ) Qᵀ`` and no λ below zero; None where the decomposition fails."""
    for dtype in (wide(F).dtype, torch.float64):
        try:
            values, Q = torch.linalg.eigh(F.to(dtype))
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # float32 can fail to converge, float64 rarely
            continue
        if bool(values.isfinite().all()):
            return values.clamp(min=0), Q
    return None


def wide(tensor: Tensor) -> Tensor:
    """In float32, or float64 where it is that: LAPACK and cuSOLVER know nothing narrower."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
