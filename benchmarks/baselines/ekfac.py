"""EKFAC: diagonal second moments in KFAC's eigenbasis."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.baselines.capture import Capture
from benchmarks.baselines.damping import eigenbasis, wide
from benchmarks.baselines.kronecker import KroneckerFactored
from benchmarks.baselines.layers import FactoredLayer, second_moment_of_gradients

__all__ = ["EKFAC"]


class EKFAC(KroneckerFactored):
    """``P(G) = Q_B ((Q_Bᵀ G Q_A) / (S + γ)) Q_Aᵀ``: the diagonal of the Fisher block in KFAC's eigenbasis.

    George et al. 2018. ``F_A = Q_A Λ_A Q_Aᵀ`` and ``F_B`` likewise every ``inverse_interval`` steps; the running
    average ``S = E[(Q_Bᵀ g Q_A)²]`` of the examples' gradients ``g`` takes in every batch that the factors do, in the
    basis of the day. A new basis starts it from KFAC's own ``λ_B λ_Aᵀ``, which counts as ``PRIOR`` batches. Where an
    eigendecomposition fails the old basis stays, and ``failed_inverses`` counts it.

    Arguments, attributes and errors: :class:`~benchmarks.baselines.kronecker.KroneckerFactored`.
    """

    def _decompose(self, layer: FactoredLayer) -> None:
        state = self.state[layer.view.weight]
        pair = eigenbasis(state["F_A"]), eigenbasis(state["F_B"])
        self.failed_inverses += pair.count(None)
        if pair[0] is None or pair[1] is None:
            return
        (values_A, Q_A), (values_B, Q_B) = pair
        dtype = self._dtype(wide(state["F_A"]))
        state["Q_A"], state["Q_B"] = Q_A.to(dtype), Q_B.to(dtype)
        state["S"] = torch.outer(values_B, values_A).to(dtype)

    def _after_factors(self, capture: Capture) -> None:
        for layer in self.layers:
            state = self.state[layer.view.weight]
            if "S" not in state or not capture.finite:
                continue
            Q_A, Q_B = wide(state["Q_A"]), wide(state["Q_B"])
            calls = self._positions(layer, capture)
            if calls:
                found = [second_moment_of_gradients(a, Ds, Q_A, Q_B) for a, Ds in calls]
                self._average(state, "S", torch.stack(found).sum(0), state["batches"])

    def _precondition(self, layer: FactoredLayer, G: Tensor) -> Tensor | None:
        state = self.state[layer.view.weight]
        if "S" not in state:
            return None
        Q_A, Q_B, S = (wide(state[name]) for name in ("Q_A", "Q_B", "S"))
        damping = self.param_groups[layer.group]["damping"]
        return Q_B @ ((Q_B.T @ G @ Q_A) / (S + damping)) @ Q_A.T
