"""A start for P: whitening by sampled Fisher gradients, without an inverse.

In the first meta-updates ``∇_φ Q`` is mostly noise across directions, and P starts as the identity. A gradient ``w``
whose targets are sampled from the model's own outputs has ``E wwᵀ = F``, the Fisher matrix; so the energies of
``Y = S ⊙ BᵀWA`` say how far ``P (F + δI)`` is from a multiple of the identity, and relative steps against what is
above their mean τ lead there. They descend ``tr(P (F + δI)) − log det P``, whose minimum is Theorem 1's
``(F + δI)⁻¹``, up to scale, with ``δ = λ_WSD / λ_FSD``: noise of variance δ is added to ``w``. Q goes on learning φ and
the rate meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from apo.arena import Arena, Parts
from apo.preconditioner import Layer
from apo_kernels.aten import aligned_product

__all__ = ["FisherStart"]


class FisherStart:
    """Steps of A, B and S towards the Fisher matrix's inverse, in the first ``updates`` meta-updates.

    With e the running mean of ``Y²``, and τ its mean over the entries of all layers,
    ``S ← S exp(−ε (e − τ)/(e + τ))``. In each square, with a the running mean of ``YᵀY/m``::

        R_jk = (a − τI)_jk / √((a_jj + τ)(a_kk + τ)),    A ← A (I − ε R),    ‖R‖_F <= 2

    and B likewise.

    Attributes:
        updates: how many meta-updates it lasts.
    """

    RATE = 0.05
    BETA = 0.99
    """Of the running means, which are unbiased by their own weight."""
    LONGEST = 2.0
    """Greatest Frobenius norm of a square of R."""
    ENERGY = "energy"
    WEIGHT = "energy_weight"

    def __init__(self, updates: int) -> None:
        self.updates = updates

    def prepare(self, layers: Sequence[Layer]) -> None:
        """Allocate the running means, which live beside those of the meta-optimizer."""
        for layer in layers:
            for own in layer.phi:
                own.buffers[self.ENERGY] = torch.zeros_like(own.tensor, memory_format=torch.contiguous_format)
            layer.parts["S"].buffers[self.WEIGHT] = torch.zeros((), dtype=torch.float32, device="cpu")

    def release(self, layers: Sequence[Layer]) -> bool:
        """Drop the running means: the start is over. Whether there were any."""
        held = [layer for layer in layers if self.WEIGHT in layer.parts["S"].buffers]
        for layer in held:
            del layer.parts["S"].buffers[self.WEIGHT]
            for own in layer.phi:
                del own.buffers[self.ENERGY]
        return bool(held)

    def missing(self, layer: Layer) -> dict[str, Tensor]:
        """Zeros in the place of what :meth:`release` has dropped, by the names of a checkpoint."""
        found = {
            f"{name}_{self.ENERGY}": torch.zeros_like(own.tensor, memory_format=torch.contiguous_format)
            for name, own in zip(layer.learned, layer.phi, strict=True)
            if self.ENERGY not in own.buffers
        }
        return found | {f"S_{self.WEIGHT}": torch.zeros((), dtype=torch.float32, device="cpu")} if found else found

    def rescale(self, layers: Sequence[Layer], growths: Sequence[float]) -> None:
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
        # the relative derivatives of ⟨W, P(W)⟩/2 are YᵀY, YYᵀ and Y²
        found = arena.operator.slopes(Ws, arena.operator.keep(Ws), lengths=[-0.5] * len(arena.layers))
        for layer, W, *energies in zip(arena.layers, Ws, *found[:3], strict=True):
            if W is None:
                continue
            of = dict(zip("ABS", energies, strict=True))
            over = {"A": layer.view.m, "B": layer.view.n, "S": 1}
            for name, part in zip(layer.learned, layer.phi, strict=True):
                energy = of[name]
                assert energy is not None
                part.buffers[self.ENERGY].lerp_(energy / over[name], 1 - self.BETA)
            layer.parts["S"].buffers[self.WEIGHT].lerp_(torch.ones(()), 1 - self.BETA)

    @torch.no_grad()
    def step(self, layers: Sequence[Layer]) -> None:
        """One step of A, B and S."""
        means = []
        for layer in layers:
            weight = layer.parts["S"].buffers[self.WEIGHT].item()
            means.append([part.buffers[self.ENERGY] / weight for part in layer.phi])
        entries = sum(each[-1].numel() for each in means)
        tau = torch.stack([each[-1].sum() for each in means]).sum() / entries
        if not bool(tau > 0):
            return
        for layer, each in zip(layers, means, strict=True):
            for name, part, mean in zip(layer.learned, layer.phi, each, strict=True):
                if name == "S":
                    part.tensor.mul_(((mean - tau) / (mean + tau)).mul_(-self.RATE).exp_())
                else:
                    self._step_block(part.tensor, mean, tau, layer.view.n if name == "A" else layer.view.m)

    def _step_block(self, X: Tensor, a: Tensor, tau: Tensor, length: int) -> None:
        scale = (a.diagonal(dim1=-2, dim2=-1) + tau).rsqrt()
        a.diagonal(dim1=-2, dim2=-1).sub_(tau)
        rest = length % X.shape[-1]
        if rest:  # of the last square, what sticks out has no energies
            a.diagonal(dim1=-2, dim2=-1).select(-2, -1)[..., rest:] = 0
        R = a.mul_(scale.unsqueeze(-1)).mul_(scale.unsqueeze(-2))
        norm = torch.linalg.vector_norm(R, dim=(-2, -1), keepdim=True)
        R.mul_(self.RATE * self.LONGEST / norm.clamp_min_(self.LONGEST))
        X.sub_(aligned_product(X, R))
