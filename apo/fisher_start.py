"""A start for P: whitening by sampled Fisher gradients, without an inverse.

In the first meta-updates ``∇_φ Q`` is mostly noise across directions, and P starts as the identity. A gradient ``w``
whose targets are sampled from the model's own outputs has ``E wwᵀ = F``, the Fisher matrix. So the energies of
``Y = S ⊙ BᵀWA`` say how far ``P (F + δI)`` is from a multiple of the identity, with ``δ = λ_WSD / λ_FSD``, whose share
of the energies is known in closed form. Relative steps go against what is above the mean energy τ. Their fixed point,
where P can represent it, is Theorem 1's ``(F + δI)⁻¹``, up to scale. Q goes on learning φ and the rate meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

import apo_kernels as ak
from apo.arena import Arena, Parts
from apo.preconditioner import PreconditionedLayer
from apo.sharding import sum_over, sum_over_

__all__ = ["FisherStart"]

AT_A_TIME = 2**16
"""Entries of S on a CPU."""


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
        energies = arena.of_phi(*arena.operator.energies(Ws))
        arena.sum_blocks_(energies)
        each = iter(energies)
        means, found, weights = [], [], []
        for layer, W in zip(arena.layers, Ws, strict=True):
            whole = layer.view.whole or layer.view
            for name, part, energy in zip(layer.learned, layer.phi, each, strict=False):
                if energy is not None:
                    means.append(part.buffers[self.ENERGY])
                    found.append(energy if name == "S" else energy / (whole.m if name == "A" else whole.n))
            if W is not None:
                weights.append(layer.parts["S"].buffers[self.WEIGHT])
        if means:
            torch._foreach_lerp_(means, found, 1 - self.BETA)
        if weights:
            torch._foreach_lerp_(weights, [torch.ones(())] * len(weights), 1 - self.BETA)

    @torch.no_grad()
    def step(self, layers: Sequence[PreconditionedLayer], delta: float, done: int = 0) -> None:
        """One step of A, B and S.

        Args:
            delta: δ, what P's inverse has beside the Fisher matrix.
            done: how many updates there were before.
        """
        if not layers:
            return
        noises = _noise(layers) if delta else [None] * len(layers)
        weights = [layer.parts["S"].buffers[self.WEIGHT].item() for layer in layers]
        sums = []
        for layer, noise, weight in zip(layers, noises, weights, strict=True):
            own = layer.parts["S"].buffers[self.ENERGY].sum() / weight
            sums.append(own if noise is None else own.add_(noise.total, alpha=delta))
        whole = sum_over(torch.stack(sums), [layer.view.over for layer in layers])
        tau = whole.sum() / sum(layer.view.entries for layer in layers)
        if not bool(tau > 0):
            return
        rate = self.RATE * max(0.0, 1 - done / self.updates)
        for layer, noise, weight in zip(layers, noises, weights, strict=True):
            if not layer.view.held:
                continue
            for name, part in zip(layer.learned, layer.phi, strict=True):
                energy = part.buffers[self.ENERGY]
                if name == "S":
                    self._step_scaling(part.tensor, energy, weight, noise, delta, tau, rate)
                    continue
                mean = energy / weight
                if noise is not None:
                    mean.add_(noise.of_block[name], alpha=delta)
                R = self._relative(mean, tau, layer.view.n if name == "A" else layer.view.m).mul_(rate)
                part.tensor.sub_(part.tensor @ R)
                energy.sub_(R @ energy)
                energy.sub_(energy @ R)

    @staticmethod
    def _step_scaling(
        S: Tensor, energy: Tensor, weight: float, noise: Noise | None, delta: float, tau: Tensor, rate: float
    ) -> None:
        for part in _pieces(S):
            own, seen = S[part], energy[part]
            mean = seen / weight
            if noise is not None:
                a, b = noise.squares(part)
                mean.addcmul_(own.square().mul_(a), b * delta)
            factor = mean.sub(tau).div_(mean.add_(tau)).mul_(-rate).exp_()
            own.mul_(factor)
            seen.mul_(factor.square_())

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


@dataclass
class Noise:
    """The energies expected if W were noise of variance 1.

    Attributes:
        a, b: the squared norms of the columns of A and of B, ``(*batch, 1, n)`` and ``(*batch, m, 1)``: S's energies
            are ``S² ⊙ b a``.
        total: their sum.
        of_block: those of A and of B, where these are learned.
    """

    a: Tensor
    b: Tensor
    total: Tensor
    of_block: dict[str, Tensor] = field(default_factory=dict)

    def squares(self, part: slice) -> tuple[Tensor, Tensor]:
        """``a`` and ``b`` of a piece of S."""
        return self.a if self.a.ndim == 2 else self.a[part], self.b[part]


def _noise(layers: Sequence[PreconditionedLayer]) -> list[Noise | None]:
    """None for layers that others own."""
    found: list[Noise | None] = []
    sums: dict[str, list[tuple[PreconditionedLayer, Noise, Tensor]]] = {"A": [], "B": []}
    for layer in layers:
        if not layer.view.held:
            found.append(None)
            continue
        a, b = _column_squares(layer.A, layer.S, -1).unsqueeze(-2), _column_squares(layer.B, layer.S, -2).unsqueeze(-1)
        own = Noise(a, b, a.new_zeros(()))
        of_rows, of_columns = [], []
        for part in _pieces(layer.S):
            S2, (a_here, b_here) = layer.S[part].square(), own.squares(part)
            of_rows.append((S2 @ a_here.mT).squeeze(-1))
            of_columns.append((b_here.mT @ S2).squeeze(-2))
        columns = torch.stack(of_columns).sum(0) if layer.S.ndim == 2 else torch.cat(of_columns)
        own.total = (columns * a.squeeze(-2)).sum()
        for side, x in (("A", columns), ("B", torch.cat(of_rows))):
            if side in layer.learned:
                sums[side].append((layer, own, x))
        found.append(own)
    # summed over the ranks that hold other rows, or other columns
    pairs = [(x, layer.parts[side].alike) for side, each in sums.items() for layer, _, x in each]
    sum_over_([x for x, _ in pairs], [alike for _, alike in pairs])
    for side, each in sums.items():
        for layer, own, x in each:
            block, whole = layer.parts[side].tensor, layer.view.whole or layer.view
            x.div_(whole.m if side == "A" else whole.n)
            own.of_block[side] = block.mT @ block * ak.by_square(x, block).unsqueeze(-2)
    return found


def _pieces(S: Tensor) -> list[slice]:
    """Along the first dimension of S, on a CPU as many entries as stay in its cache."""
    count = len(S)
    step = max(AT_A_TIME * count // max(S.numel(), 1), 1) if S.device.type == "cpu" else max(count, 1)
    return [slice(first, first + step) for first in range(0, max(count, 1), step)]


def _column_squares(block: Tensor, S: Tensor, dim: int) -> Tensor:
    """The squared norm of each column of a full block or a stack of squares, along a side of S."""
    squares = block.square().sum(-2)
    return squares if block.ndim == S.ndim else squares.flatten(-2)[..., : S.shape[dim]]
