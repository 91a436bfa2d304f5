"""A start for P: whitening by sampled Fisher gradients, without an inverse.

In the first meta-updates ``∇_φ Q`` is mostly noise across directions, and P starts as the identity. A gradient ``w``
whose targets are sampled from the model's own outputs has ``E wwᵀ = F``, the Fisher matrix. So the energies of
``Y = S ⊙ BᵀWA`` say how far ``P (F + δI)`` is from a multiple of the identity, with ``δ = λ_WSD / λ_FSD``, whose share
of the energies is known in closed form. Relative steps go against what is above the mean energy τ. Their fixed point,
where P can represent it, is Theorem 1's ``(F + δI)⁻¹``, up to scale. Q goes on learning φ and the rate meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import apo_kernels as ak
from apo.arena import Arena, Parts
from apo.preconditioner import PreconditionedLayer
from apo.sharding import sum_over, sum_over_

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
    BETA = 0.99
    """Of the running means, which are unbiased by their own weight."""
    LONGEST = 2.0
    """Greatest Frobenius norm of a square of R."""
    ENERGY = "energy"
    WEIGHT = "energy_weight"

    def __init__(self, updates: int) -> None:
        self.updates = updates

    def prepare(self, layers: Sequence[PreconditionedLayer]) -> None:
        """Allocate the running means, which live beside those of the meta-optimizer."""
        for layer in layers:
            for own in layer.phi:
                own.buffers[self.ENERGY] = torch.zeros_like(own.tensor, memory_format=torch.contiguous_format)
            layer.parts["S"].buffers[self.WEIGHT] = torch.zeros((), dtype=torch.float32, device="cpu")

    def release(self, layers: Sequence[PreconditionedLayer]) -> bool:
        """Drop the running means: the start is over. Whether there were any."""
        held = [layer for layer in layers if self.WEIGHT in layer.parts["S"].buffers]
        for layer in held:
            del layer.parts["S"].buffers[self.WEIGHT]
            for own in layer.phi:
                del own.buffers[self.ENERGY]
        return bool(held)

    def missing(self, layer: PreconditionedLayer, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Zeros in the place of what :meth:`release` has dropped from a layer's state."""
        if f"S_{self.ENERGY}" in state:
            return {}
        found = {
            f"{name}_{self.ENERGY}": torch.zeros_like(state[name], memory_format=torch.contiguous_format)
            for name in layer.learned
        }
        return found | {f"S_{self.WEIGHT}": torch.zeros((), dtype=torch.float32, device="cpu")}

    def rescale(self, layers: Sequence[PreconditionedLayer], growths: Sequence[float]) -> None:
        """Follow a move of P's scale: the energies go with P."""
        held, factors = [], []
        for layer, growth in zip(layers, growths, strict=True):
            for own in layer.phi:
                if self.ENERGY in own.buffers:
                    held.append(own.buffers[self.ENERGY])
                    factors.append(growth)
        if held:
            torch._foreach_mul_(held, factors)

    @torch.no_grad()
    def look(self, arena: Arena, Ws: Parts) -> None:
        """Take the energies of a sampled gradient into the running means."""
        # they are half of the relative derivatives of ⟨W, P(W)⟩
        found = arena.operator.slopes(Ws, arena.operator.keep(Ws), lengths=[-0.5] * len(arena.layers))
        energies, _ = arena.by_name(found)
        arena.sum_blocks_(energies)
        each = iter(energies)
        for layer, W in zip(arena.layers, Ws, strict=True):
            whole = layer.view.whole or layer.view
            over = {"A": whole.m, "B": whole.n, "S": 1}
            for name, part, energy in zip(layer.learned, layer.phi, each, strict=False):
                if energy is not None:
                    part.buffers[self.ENERGY].lerp_(energy / over[name], 1 - self.BETA)
            if W is not None:
                layer.parts["S"].buffers[self.WEIGHT].lerp_(torch.ones(()), 1 - self.BETA)

    @torch.no_grad()
    def step(self, layers: Sequence[PreconditionedLayer], delta: float, done: int = 0) -> None:
        """One step of A, B and S.

        Args:
            delta: δ, what P's inverse has beside the Fisher matrix.
            done: how many updates there were before.
        """
        if not layers:
            return
        means = []
        for layer, of_noise in zip(layers, _energies_of_noise(layers) if delta else [{}] * len(layers), strict=True):
            weight = layer.parts["S"].buffers[self.WEIGHT].item()
            own = [part.buffers[self.ENERGY] / weight for part in layer.phi]
            if of_noise:
                torch._foreach_add_(own, [of_noise[name] for name in layer.learned], alpha=delta)
            means.append(own)
        sums = sum_over(torch.stack([each[-1].sum() for each in means]), [layer.view.over for layer in layers])
        tau = sums.sum() / sum(layer.view.entries for layer in layers)
        if not bool(tau > 0):
            return
        rate = self.RATE * max(0.0, 1 - done / self.updates)
        for layer, each in zip(layers, means, strict=True):
            if not layer.view.held:
                continue
            for name, part, mean in zip(layer.learned, layer.phi, each, strict=True):
                if name == "S":
                    r = ((mean - tau) / (mean + tau)).mul_(-rate).exp_()
                    part.tensor.mul_(r)
                    part.buffers[self.ENERGY].mul_(r.square_())
                else:
                    R = self._relative(mean, tau, layer.view.n if name == "A" else layer.view.m).mul_(rate)
                    part.tensor.sub_(part.tensor @ R)
                    energy = part.buffers[self.ENERGY]
                    energy.sub_(R @ energy)
                    energy.sub_(energy @ R)

    def _relative(self, a: Tensor, tau: Tensor, length: int) -> Tensor:
        """R of each square, kept to its greatest norm."""
        scale = (a.diagonal(dim1=-2, dim2=-1) + tau).rsqrt()
        a.diagonal(dim1=-2, dim2=-1).sub_(tau)
        rest = length % a.shape[-1]
        if rest:  # of the last square, what sticks out has no energies
            a.diagonal(dim1=-2, dim2=-1).select(-2, -1)[..., rest:] = 0
        R = a.mul_(scale.unsqueeze(-1)).mul_(scale.unsqueeze(-2))
        norm = torch.linalg.vector_norm(R, dim=(-2, -1), keepdim=True)
        return R.mul_(self.LONGEST / norm.clamp_min_(self.LONGEST))


def _energies_of_noise(layers: Sequence[PreconditionedLayer]) -> list[dict[str, Tensor]]:
    """Those expected if W were noise of variance 1; nothing of layers that others own."""
    found: list[dict[str, Tensor]] = []
    of_rows, of_columns = [], []
    for layer in layers:
        if not layer.view.held:
            found.append({})
            continue
        S2 = layer.S.square()
        a, b = _column_squares(layer.A, S2, -1).unsqueeze(-2), _column_squares(layer.B, S2, -2).unsqueeze(-1)
        found.append({"S": S2 * a * b})
        if "A" in layer.learned:
            of_columns.append((layer, found[-1], (S2 * b).sum(-2)))
        if "B" in layer.learned:
            of_rows.append((layer, found[-1], (S2 * a).sum(-1)))
    # summed over the ranks that hold other rows, or other columns
    sides = ("A", of_columns), ("B", of_rows)
    pairs = [(x, layer.parts[side].alike) for side, each in sides for layer, _, x in each]
    sum_over_([x for x, _ in pairs], [alike for _, alike in pairs])
    for side, each in sides:
        for layer, own, x in each:
            block, whole = layer.parts[side].tensor, layer.view.whole or layer.view
            x.div_(whole.m if side == "A" else whole.n)
            own[side] = block.mT @ block * ak.by_square(x, block).unsqueeze(-2)
    return found


def _column_squares(block: Tensor, S: Tensor, dim: int) -> Tensor:
    """The squared norm of each column of a full block or a stack of squares, along a side of S."""
    squares = block.square().sum(-2)
    return squares if block.ndim == S.ndim else squares.flatten(-2)[..., : S.shape[dim]]
