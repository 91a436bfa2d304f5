"""A start for P: whitening by sampled Fisher gradients, without an inverse.

In the first meta-updates ``∇_φ Q`` is mostly noise across directions, and P starts as the identity. A gradient ``w``
whose targets are sampled from the model's own outputs has ``E wwᵀ = F``, the Fisher matrix. So the energies of
``Y = S ⊙ BᵀWA`` say how far ``P (F + δI)`` is from a multiple of the identity, with ``δ = λ_WSD / λ_FSD``, whose share
of the energies is known in closed form. Relative steps go against what is above the mean energy τ. Their fixed point,
where P can represent it, is Theorem 1's ``(F + δI)⁻¹``, up to scale. Q goes on learning φ and the rate meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from apo.fisher.layout import ENERGY, Layout, LikeBlocks, Piece
from apo.layers.arena import Arena, Parts
from apo.layers.preconditioner import PreconditionedLayer
from apo.ranks.sharding import sum_over

__all__ = ["FisherStart"]


class FisherStart:
    """Steps of A, B and S towards ``(F + δI)⁻¹``, in the first ``updates`` meta-updates.

    With ``M = BᵀWA``, the energies of S are ``e = mean(S² ⊙ M²) + δ E``, those of A ``a = mean(Mᵀ(S² ⊙ M)/m) + δ N``,
    and B's likewise, where E and N are what noise of variance 1 in the place of W would give::

        E_ij = S_ij² ‖B_:i‖² ‖A_:j‖²,    N_kj = (AᵀA)_kj Σ_i S_ij² ‖B_:i‖² / m

    With τ the mean of e over the entries of all layers::

        S ← S exp(−ε (e − τ)/(e + τ))
        A ← A (I − ε R),    R_jk = (a − τI)_jk / √((a_jj + τ)(a_kk + τ)),    ‖R‖_F <= 2 in each square

    ε falls linearly to 0, so that the noise of single samples is averaged out of P before the start is over. The
    running means move with what they are measured in.

    Attributes:
        updates: how many meta-updates it lasts.
    """

    RATE = 0.1
    """ε at the first update."""
    BETA = 0.95
    """Of the running means, which are unbiased by their own weight. F changes fast at first, so they are short."""
    LONGEST = 2.0
    """Greatest Frobenius norm of a square of R."""
    WEIGHT = "energy_weight"

    def __init__(self, updates: int) -> None:
        self.updates = updates
        self._layout: Layout | None = None

    def prepare(self, layers: Sequence[PreconditionedLayer]) -> None:
        """Allocate the running means, which live beside those of the meta-optimizer."""
        for layer in layers:
            for own in layer.phi:
                own.buffers[ENERGY] = torch.zeros_like(own.tensor, memory_format=torch.contiguous_format)
            layer.parts["S"].buffers[self.WEIGHT] = torch.zeros((), dtype=torch.float32, device="cpu")

    def release(self, layers: Sequence[PreconditionedLayer]) -> bool:
        """Drop the running means: the start is over. Whether there were any."""
        held = [layer for layer in layers if self.WEIGHT in layer.parts["S"].buffers]
        self._layout = None
        for layer in held:
            del layer.parts["S"].buffers[self.WEIGHT]
            for own in layer.phi:
                del own.buffers[ENERGY]
        return bool(held)

    def missing(self, layer: PreconditionedLayer, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Zeros in the place of what :meth:`release` has dropped from a layer's state."""
        if f"S_{ENERGY}" in state:
            return {}
        found = {
            f"{name}_{ENERGY}": torch.zeros_like(state[name], memory_format=torch.contiguous_format)
            for name in layer.learned
        }
        return found | {f"S_{self.WEIGHT}": torch.zeros((), dtype=torch.float32, device="cpu")}

    def rescale(self, layers: Sequence[PreconditionedLayer], growths: Sequence[float]) -> None:
        """Follow a move of P's scale: the energies go with P."""
        held, factors = [], []
        for layer, growth in zip(layers, growths, strict=True):
            for own in layer.phi:
                if ENERGY in own.buffers:
                    held.append(own.buffers[ENERGY])
                    factors.append(growth)
        if held:
            torch._foreach_mul_(held, factors)

    def take(
        self, arena: Arena, sampled: Sequence[Tensor | None], parameters: Sequence[Tensor]
    ) -> list[PreconditionedLayer]:
        """:meth:`look` at a sampled gradient of each parameter. Which layers it has seen.

        Not those of which a part is frozen: what has no gradient has no energy either, and its P would grow.
        """
        missing = {p for p, w in zip(parameters, sampled, strict=True) if w is None}
        Ws = [
            W if missing.isdisjoint(layer.view.parameters) else None
            for layer, W in zip(arena.layers, arena.parts(sampled, parameters), strict=True)
        ]
        self.look(arena, Ws)
        return [layer for layer, W in zip(arena.layers, Ws, strict=True) if W is not None]

    @torch.no_grad()
    def look(self, arena: Arena, Ws: Parts) -> None:
        """Take the energies of a sampled gradient into the running means."""
        energies = arena.of_phi(*arena.operator.energies(Ws))
        arena.sum_blocks_(energies)
        each = iter(energies)
        means, weights = [], []
        found: list[Tensor] = []
        sizes: dict[int, float] = {}
        for layer, W in zip(arena.layers, Ws, strict=True):
            whole = layer.view.whole or layer.view
            for name, part, energy in zip(layer.learned, layer.phi, each, strict=False):
                if energy is not None:
                    if name != "S":
                        sizes[len(found)] = float(whole.m if name == "A" else whole.n)
                    means.append(part.buffers[ENERGY])
                    found.append(energy)
            if W is not None:
                weights.append(layer.parts["S"].buffers[self.WEIGHT])
        if sizes:
            divided = torch._foreach_div([found[at] for at in sizes], list(sizes.values()))
            for at, energy in zip(sizes, divided, strict=True):
                found[at] = energy
        if means:
            torch._foreach_lerp_(means, found, 1 - self.BETA)
        if weights:
            torch._foreach_lerp_(weights, [torch.ones_like(weights[0])] * len(weights), 1 - self.BETA)

    @torch.no_grad()
    def step(self, layers: Sequence[PreconditionedLayer], delta: float, done: int = 0) -> None:
        """One step of A, B and S.

        Args:
            delta: δ, what P's inverse has beside the Fisher matrix.
            done: how many updates there were before.
        """
        if not layers:
            return
        if self._layout is None or not self._layout.fits(layers):
            self._layout = Layout(layers)
        layout = self._layout
        blocks = [kind.together() for kind in layout.kinds]
        weights = torch.stack([layer.parts["S"].buffers[self.WEIGHT] for layer in layers]).tolist()
        noise = layout.noise([X for X, _ in blocks]) if delta else None
        tau = self._mean_energy(layers, weights, noise, delta)
        if not bool(tau > 0):
            return
        rate = self.RATE * max(0.0, 1 - done / self.updates)
        for pieces in layout.groups:
            self._step_scalings(pieces, [weights[piece.layer] for piece in pieces], delta, tau, rate)
        for kind, own in zip(layout.kinds, blocks, strict=True):
            self._step_blocks(kind, *own, kind.of_squares([weights[i] for i in kind.layers]), delta, tau, rate)

    def _mean_energy(
        self, layers: Sequence[PreconditionedLayer], weights: list[float], noise: Tensor | None, delta: float
    ) -> Tensor:
        """τ."""
        seen = [layer.parts["S"].buffers[ENERGY] for layer in layers]
        sums = torch.stack(torch._foreach_norm(seen, ord=1))  # energies are >= 0
        sums.div_(torch.tensor(weights, dtype=sums.dtype, device=sums.device))
        if noise is not None:
            sums.add_(noise, alpha=delta)
        whole = sum_over(sums, [layer.view.over for layer in layers])
        return whole.sum() / sum(layer.view.entries for layer in layers)

    def _step_blocks(
        self,
        kind: LikeBlocks,
        X: Tensor,
        energy: Tensor,
        weight: float | Tensor,
        delta: float,
        tau: Tensor,
        rate: float,
    ) -> None:
        """All blocks of one side at once."""
        a = energy / (weight.unsqueeze(-1) if isinstance(weight, Tensor) else weight)
        if delta:
            a.addcmul_(torch.bmm(X.mT, X), kind.noise.unsqueeze(-2), value=delta)
        diagonal = a.diagonal(dim1=-2, dim2=-1)
        scale = (diagonal + tau).rsqrt()
        diagonal.sub_(tau)
        if kind.inside is not None:  # what sticks out has no energies
            diagonal.mul_(kind.inside)
        R = a.mul_(scale.unsqueeze(-1)).mul_(scale.unsqueeze(-2))
        norm = torch.linalg.vector_norm(R, dim=(-2, -1), keepdim=True)
        R.mul_(self.LONGEST / norm.clamp_min_(self.LONGEST)).mul_(rate)
        energy = energy - torch.bmm(R, energy)
        energy -= torch.bmm(energy, R)
        kind.write(X - torch.bmm(X, R), energy)

    @staticmethod
    def _step_scalings(
        pieces: Sequence[Piece], weights: Sequence[float], delta: float, tau: Tensor, rate: float
    ) -> None:
        S, seen = [piece.S for piece in pieces], [piece.energy for piece in pieces]
        means = torch._foreach_div(seen, weights[0] if len(set(weights)) == 1 else list(weights))
        if delta:
            noise = torch._foreach_mul(S, S)
            torch._foreach_mul_(noise, [piece.a for piece in pieces])
            torch._foreach_addcmul_(means, noise, [piece.b for piece in pieces], delta)
            del noise
        factors = torch._foreach_add(means, tau, alpha=-1)
        torch._foreach_add_(means, tau)
        torch._foreach_div_(factors, means)
        torch._foreach_mul_(factors, -rate)
        torch._foreach_exp_(factors)
        torch._foreach_mul_(S, factors)
        torch._foreach_mul_(seen, factors)
        torch._foreach_mul_(seen, factors)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_layout": None}  # it is bound to this one's tensors
