"""What P does to each curvature: a diagnostic.

In the eigenbasis of a layer's Kronecker factors the Fisher matrix is nearly diagonal (EKFAC: George et al., 2018).
Along a direction ``u vᵀ`` of that basis it is the mean of ``(uᵀWv)²`` over sampled gradients W, and P is
``⟨u vᵀ, P(u vᵀ)⟩ = Σ_kl (Bᵀu)_k² S_kl² (Aᵀv)_l²``. Where P is the inverse of ``F + δI``, up to scale,
``p · (f + δ)`` is the same for all.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import apo_kernels as ak
from apo.fisher.sample import send_sample_back
from apo.layers.preconditioner import PreconditionedLayer
from apo.objective import ProximalObjective

__all__ = ["Spectrum", "SpectrumRow", "sampled_gradients", "spectrum_of"]


MOST_NAMED = 12
"""Lines of a picture that are named."""


@dataclass(frozen=True)
class SpectrumRow:
    """The directions of a layer whose curvature is in one decade; of all layers together ``layer`` is ``"all"``.

    Attributes:
        decade: the largest power of 10 below their curvature.
        directions: how many they are.
        curvature: their mean f, geometric as all means here.
        gain: their mean ``lr · p``.
        share: their mean ``lr · p · (f + δ)``: the share of a Newton step, on the quadratic that F is of.
    """

    layer: str
    decade: int
    directions: int
    curvature: float
    gain: float
    share: float


@dataclass(frozen=True)
class Spectrum:
    """``print`` it for a table, or :meth:`draw` it.

    Attributes:
        rows: layer by layer and then all layers together, from the largest curvature down.
        samples: how many gradients were sampled.
        flat: directions in which sampled gradients had nothing but rounding errors, which are in no row.
    """

    rows: tuple[SpectrumRow, ...]
    samples: int
    flat: int

    def of(self, layer: str = "all") -> tuple[SpectrumRow, ...]:
        """The rows of a layer, or of all of them together."""
        return tuple(row for row in self.rows if row.layer == layer)

    def draw(self, axes: Any) -> None:
        """Draw the shares over the curvatures on axes of matplotlib's: a line for each layer, and one for all together.

        Where P is the inverse the lines are level; under SGD they rise as the curvature does.
        """
        layers = list(dict.fromkeys(row.layer for row in self.rows))
        for layer in layers:
            rows = self.of(layer)
            style = {"color": "black", "linewidth": 2.5} if layer == "all" else {"linewidth": 1.0}
            axes.plot([row.curvature for row in rows], [row.share for row in rows], marker="o", label=layer, **style)
        axes.set(xscale="log", yscale="log", xlabel="curvature f", ylabel="share of a Newton step, lr·p·(f + δ)")
        if 0 < len(layers) <= MOST_NAMED:
            axes.legend()

    def __str__(self) -> str:
        lines = [("layer", "curvature", "directions", "lr·p", "lr·p·(f + δ)")]
        for row in self.rows:
            numbers = f"1e{row.decade:+03d}", f"{row.directions}", f"{row.gain:.3g}", f"{row.share:.3g}"
            lines.append((row.layer, *numbers))
        widths = [max(len(line[i]) for line in lines) for i in range(5)]
        text = [
            "  ".join([line[0].ljust(widths[0]), *(x.rjust(w) for x, w in zip(line[1:], widths[1:], strict=True))])
            for line in lines
        ]
        text.insert(1, "-" * len(text[0]))
        return "\n".join([*text, f"{self.samples} samples; {self.flat} directions without curvature"])

    __repr__ = __str__


def sampled_gradients(
    objective: ProximalObjective, outputs: Any, parameters: Sequence[Tensor], count: int
) -> Iterator[list[Tensor | None]]:
    """``.grad`` of the parameters for each of some samples of the Fisher matrix; the next one begins anew."""
    for seed in range(count):
        for p in parameters:
            p.grad = None
        if not send_sample_back(objective, outputs, seed, again=seed < count - 1):
            kind = type(objective.discrepancy).__name__
            raise ValueError(f"discrepancy must have a fisher_sample for a spectrum, but {kind} has none")
        yield [p.grad for p in parameters]


def spectrum_of(
    layers: Sequence[PreconditionedLayer],
    samples: Sequence[Sequence[Tensor | None]],
    rates: Sequence[float],
    delta: float,
) -> Spectrum:
    """The spectrum from sampled gradients.

    Args:
        samples: for each sample the layers' matrices, of which None counts as zeros. The basis is of the first half of
            them, and the curvatures are of the second: of the same ones they would come out too far apart.
        rates: of each layer.
        delta: δ.
    """
    half = len(samples) // 2
    rows: list[SpectrumRow] = []
    every: list[tuple[Tensor, Tensor]] = []
    flat = 0
    for k, (layer, rate) in enumerate(zip(layers, rates, strict=True)):
        own = [each[k] for each in samples]
        if all(W is None for W in own):
            continue
        Ws = torch.stack([torch.zeros_like(layer.S) if W is None else W.to(layer.S.dtype) for W in own])
        f, p = _along_basis(layer, Ws[:half], Ws[half:])
        there = f > (10 * torch.finfo(f.dtype).eps) ** 2 * f.max()
        flat += int((~there).sum())
        every.append((f[there].double(), rate * p[there].double()))
        rows += _by_decade(layer.view.name, *every[-1], delta)
    if every:
        fs, gains = zip(*every, strict=True)
        rows += _by_decade("all", torch.cat(fs), torch.cat(gains), delta)
    return Spectrum(tuple(rows), len(samples), flat)


def _along_basis(layer: PreconditionedLayer, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """f and p along the directions of the basis, ``(*batch, m, n)``."""
    U, V = (_basis(x, side.learned) for x, side in ((first, layer.sides[1]), (first.mT, layer.sides[0])))
    f = (U.mT @ second @ V).square().mean(0)
    B, A = (_dense(block, layer.S, dim) for block, dim in ((layer.B, -2), (layer.A, -1)))
    p = (B.mT @ U).square().mT @ layer.S.square() @ (A.mT @ V).square()
    return f, p


def _basis(Ws: Tensor, learned: bool) -> Tensor:
    """Eigenvectors of ``Σ W Wᵀ``; the identity where the side has no block, whose P can't turn anything."""
    if not learned:
        return torch.eye(Ws.shape[-2], dtype=Ws.dtype, device=Ws.device).expand(*Ws.shape[1:-2], -1, -1)
    vectors: Tensor = torch.linalg.eigh((Ws.double() @ Ws.double().mT).sum(0)).eigenvectors
    return vectors.to(Ws.dtype)


def _dense(block: Tensor, S: Tensor, dim: int) -> Tensor:
    return block if block.ndim == S.ndim else ak.blocks_to_dense(block, S.shape[dim])


def _by_decade(layer: str, f: Tensor, gain: Tensor, delta: float) -> Iterator[SpectrumRow]:
    decades = f.log10().floor()
    for decade in sorted(set(decades.tolist()), reverse=True):
        here = decades == decade
        means = (_mean(x[here].tolist()) for x in (f, gain, gain * (f + delta)))
        yield SpectrumRow(layer, int(decade), int(here.sum()), *means)


def _mean(values: Iterable[float]) -> float:
    logs = [math.log(x) if x > 0 else -math.inf for x in values]
    return math.exp(sum(logs) / len(logs))
