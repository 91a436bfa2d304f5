"""EKFAC: diagonal second moments in KFAC's eigenbasis."""

import torch
from torch import Tensor

from benchmarks.common.fisher.capture import Capture
from benchmarks.common.fisher.damping import eigenbasis
from benchmarks.common.fisher.layers import FactoredLayer, second_moment_of_gradients
from benchmarks.paper.baselines.base import all_finite
from benchmarks.paper.baselines.kronecker import KroneckerFactored


class EKFAC(KroneckerFactored):
    """``P(G) = Q_B ((Q_Bᵀ G Q_A) / (S + γ)) Q_Aᵀ``: the diagonal of the Fisher block in KFAC's eigenbasis.

    George et al. 2018. ``F_A = Q_A Λ_A Q_Aᵀ`` and ``F_B`` likewise every ``inverse_interval`` steps; the running
    average ``S = E[(Q_Bᵀ g Q_A)²]`` of the examples' gradients ``g`` takes in every batch that the factors do. It
    starts anew with each basis, from KFAC's own ``λ_B λ_Aᵀ`` in the place of a first batch. Where an eigendecomposition
    fails the old basis stays, and ``failed_inverses`` counts it. γ is added to the whole block, not to the factors: the
    same γ damps less than KFAC's, and the best one is larger.
    """

    def _decompose(self, layer: FactoredLayer) -> None:
        state = self.state[layer.weight]
        eigen_A, eigen_B = (eigenbasis(state[name], retry=True) for name in ("F_A", "F_B"))
        self.failed_inverses += (eigen_A is None) + (eigen_B is None)
        if eigen_A is None or eigen_B is None:
            return
        state["Q_A"], state["Q_B"] = (eigen[1].to(state["F_A"].dtype) for eigen in (eigen_A, eigen_B))
        state["S"] = torch.outer(eigen_B[0], eigen_A[0]).to(state["F_A"].dtype)
        state["S_batches"] = 1

    def _after_factors(self, capture: Capture) -> None:
        for layer in self.layers:
            state = self.state[layer.weight]
            if "S" not in state or not capture.finite:
                continue
            calls = self._positions(layer, capture)
            if calls:
                found = [second_moment_of_gradients(a, Ds, state["Q_A"], state["Q_B"]) for a, Ds in calls]
                new = torch.stack(found).sum(0)
                if all_finite([new]):
                    state["S_batches"] += 1
                    self._average(state, "S", new, state["S_batches"])

    def _precondition(self, layer: FactoredLayer, G: Tensor) -> Tensor | None:
        state = self.state[layer.weight]
        if "S" not in state:
            return None
        Q_A, Q_B, S = (state[name] for name in ("Q_A", "Q_B", "S"))
        damping = self.param_groups[0]["damping"]
        P: Tensor = Q_B @ ((Q_B.T @ G @ Q_A) / (S + damping)) @ Q_A.T
        return P
