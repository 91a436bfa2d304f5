"""KFAC: Kronecker-factored approximate curvature, with explicit inverses."""

import torch
from torch import Tensor

from benchmarks.common.fisher.damping import damped_inverse, tikhonov
from benchmarks.common.fisher.layers import FactoredLayer
from benchmarks.paper.baselines.kronecker import KroneckerFactored

ATTEMPTS = 24


class KFAC(KroneckerFactored):
    """``P(G) = (F_B + δ_B I)⁻¹ G (F_A + δ_A I)⁻¹`` with ``δ_A = π √γ``, ``δ_B = √γ / π``.

    Martens & Grosse 2015; for convolutions Grosse & Martens 2016. The inverses come from Cholesky factorisations.
    Where one fails, that factor's δ is multiplied by ten until it succeeds, for this refresh, and ``failed_inverses``
    counts each time. Where none succeeds the old inverse stays.
    """

    def _decompose(self, layer: FactoredLayer) -> None:
        state = self.state[layer.weight]
        shifts = tikhonov(state["F_A"], state["F_B"], self.param_groups[0]["damping"])
        for name, shift in zip("AB", shifts, strict=True):
            inverse, failed = inverse_by_attempts(state[f"F_{name}"], shift)
            self.failed_inverses += failed
            if inverse is not None:
                state[f"inverse_{name}"] = inverse

    def _precondition(self, layer: FactoredLayer, G: Tensor) -> Tensor | None:
        state = self.state[layer.weight]
        if "inverse_A" not in state or "inverse_B" not in state:
            return None
        P: Tensor = state["inverse_B"] @ G @ state["inverse_A"]
        return P


def inverse_by_attempts(F: Tensor, shift: float) -> tuple[Tensor | None, int]:
    """``((F + δ I)⁻¹, how often it failed)``: at a failure δ is multiplied by ten; None where every attempt failed."""
    least = torch.finfo(F.dtype).eps * (F.diagonal().mean().item() or 1.0)
    for failed in range(ATTEMPTS):
        inverse = damped_inverse(F, shift)
        if inverse is not None and bool(inverse.isfinite().all()):
            return inverse, failed
        shift = max(10 * shift, least)
    return None, ATTEMPTS
