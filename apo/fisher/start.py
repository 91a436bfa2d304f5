"""A start for P: whitening by sampled Fisher gradients, without an inverse.

In the first meta-updates ``∇_φ Q`` is mostly noise across directions, and P starts as the identity. A gradient ``w``
whose targets are sampled from the model's own outputs has ``E wwᵀ = F``, the Fisher matrix. So the energies of
``Y = S ⊙ BᵀWA`` say how far ``P (F + δI)`` is from a multiple of the identity, with ``δ = λ_WSD / λ_FSD``, whose share
of the energies is known in closed form. Relative steps go against what is above the mean energy τ. Their fixed point,
where P can represent it, is Theorem 1's ``(F + δI)⁻¹``, up to scale. Q goes on learning φ and the rate meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

import apo_kernels as ak
from apo.layers.arena import Arena, Parts
from apo.layers.preconditioner import PreconditionedLayer
from apo.ranks.sharding import sum_over, sum_over_

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
    BETA = 0.95
    """Of the running means, which are unbiased by their own weight. F changes fast at first, so they are short."""
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
                    means.append(part.buffers[self.ENERGY])
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
        noises = _noise(layers) if delta else [None] * len(layers)
        weights = [layer.parts["S"].buffers[self.WEIGHT].item() for layer in layers]
        tau = self._mean_energy(layers, noises, weights, delta)
        if not bool(tau > 0):
            return
        rate = self.RATE * max(0.0, 1 - done / self.updates)
        scalings: list[_Scaling] = []
        alike: dict[tuple[int, torch.dtype], list[_Block]] = {}
        for layer, noise, weight in zip(layers, noises, weights, strict=True):
            if not layer.view.held:
                continue
            for name, part in zip(layer.learned, layer.phi, strict=True):
                energy = part.buffers[self.ENERGY]
                if name == "S":
                    for piece in _pieces(part.tensor):
                        at = () if noise is None else noise.squares(piece)
                        scalings.append(_Scaling(part.tensor[piece], energy[piece], weight, at))
                    continue
                length = layer.view.n if name == "A" else layer.view.m
                own = _Block(part.tensor, energy, weight, None if noise is None else noise.of_side[name], length)
                alike.setdefault((part.tensor.shape[-1], part.tensor.dtype), []).append(own)
        for pieces in _cached(scalings):
            self._step_scalings(pieces, delta, tau, rate)
        for blocks in alike.values():
            self._step_blocks(blocks, delta, tau, rate)

    def _mean_energy(
        self, layers: Sequence[PreconditionedLayer], noises: Sequence[Noise | None], weights: list[float], delta: float
    ) -> Tensor:
        """τ."""
        seen = [layer.parts["S"].buffers[self.ENERGY] for layer in layers]
        sums = torch.stack(torch._foreach_norm(seen, ord=1))  # energies are >= 0
        sums.div_(torch.tensor(weights, dtype=sums.dtype, device=sums.device))
        totals = [noise.total if noise is not None else seen[0].new_zeros(()) for noise in noises]
        if delta:
            sums.add_(torch.stack(totals), alpha=delta)
        whole = sum_over(sums, [layer.view.over for layer in layers])
        return whole.sum() / sum(layer.view.entries for layer in layers)

    def _step_blocks(self, blocks: Sequence[_Block], delta: float, tau: Tensor, rate: float) -> None:
        """All blocks of one side at once."""
        tensors, energies = [own.tensor for own in blocks], [own.energy for own in blocks]
        X, energy = (torch.cat([_squares(x) for x in each]) for each in (tensors, energies))
        counts = [own.tensor.numel() // X[0].numel() for own in blocks]
        if alone := len(X) == 1:  # torch multiplies one square by other operations than several, and so to other bits
            X, energy = X.expand(2, -1, -1), energy.expand(2, -1, -1)
        a = energy / _of_squares([own.weight for own in blocks], counts, X)
        if delta:
            of_side = torch.cat([_rows(own) for own in blocks])
            a.addcmul_(torch.bmm(X.mT, X), of_side.unsqueeze(-2), value=delta)
        R = self._relative(a, tau, zip(blocks, counts, strict=True)).mul_(rate)
        X, energy = X - torch.bmm(X, R), energy - torch.bmm(R, energy)
        energy -= torch.bmm(energy, R)
        for targets, found in ((tensors, X), (energies, energy)):
            parts = torch.split(found[: len(found) - alone], counts)
            torch._foreach_copy_(targets, [x.view(to.shape) for x, to in zip(parts, targets, strict=True)])

    def _relative(self, a: Tensor, tau: Tensor, blocks: Iterable[tuple[_Block, int]]) -> Tensor:
        """R of each square, kept to its greatest norm."""
        scale = (a.diagonal(dim1=-2, dim2=-1) + tau).rsqrt()
        a.diagonal(dim1=-2, dim2=-1).sub_(tau)
        first = 0
        for own, count in blocks:
            rest = own.length % a.shape[-1]
            if rest:  # of the last square, what sticks out has no energies
                last = a[first : first + count].view(own.tensor.shape)[..., -1, :, :]
                last.diagonal(dim1=-2, dim2=-1)[..., rest:] = 0
            first += count
        R = a.mul_(scale.unsqueeze(-1)).mul_(scale.unsqueeze(-2))
        norm = torch.linalg.vector_norm(R, dim=(-2, -1), keepdim=True)
        return R.mul_(self.LONGEST / norm.clamp_min_(self.LONGEST))

    @staticmethod
    def _step_scalings(pieces: Sequence[_Scaling], delta: float, tau: Tensor, rate: float) -> None:
        own, seen = [x.tensor for x in pieces], [x.energy for x in pieces]
        means = torch._foreach_div(seen, [x.weight for x in pieces])
        if delta:
            noise = torch._foreach_mul(own, own)
            torch._foreach_mul_(noise, [x.squares[0] for x in pieces])
            torch._foreach_addcmul_(means, noise, [x.squares[1] for x in pieces], delta)
            del noise
        factors = torch._foreach_add(means, tau, alpha=-1)
        torch._foreach_add_(means, tau)
        torch._foreach_div_(factors, means)
        torch._foreach_mul_(factors, -rate)
        torch._foreach_exp_(factors)
        torch._foreach_mul_(own, factors)
        torch._foreach_mul_(seen, factors)
        torch._foreach_mul_(seen, factors)


class _Scaling(NamedTuple):
    """A piece of S with its energies, their weight, and the columns' squares of A and of B, if there is noise."""

    tensor: Tensor
    energy: Tensor
    weight: float
    squares: tuple[Tensor, ...]


class _Block(NamedTuple):
    """A block with its energies, their weight, what noise gives each column of its side, and the side's length."""

    tensor: Tensor
    energy: Tensor
    weight: float
    of_side: Tensor | None
    length: int


@dataclass
class Noise:
    """The energies expected if W were noise of variance 1.

    Attributes:
        a, b: the squared norms of the columns of A and of B, ``(*batch, 1, n)`` and ``(*batch, m, 1)``: S's energies
            are ``S² ⊙ b a``.
        total: their sum.
        of_side: where A is learned, ``Σ_i S_ij² ‖B_:i‖² / m``, by which the columns of ``AᵀA`` give those of A; for B
            likewise.
    """

    a: Tensor
    b: Tensor
    total: Tensor
    of_side: dict[str, Tensor] = field(default_factory=dict)

    def squares(self, part: slice) -> tuple[Tensor, Tensor]:
        """``a`` and ``b`` of a piece of S."""
        return self.a if self.a.ndim == 2 else self.a[part], self.b[part]


def _noise(layers: Sequence[PreconditionedLayer]) -> list[Noise | None]:
    """None for layers that others own."""
    found: list[Noise | None] = []
    sums: dict[str, list[tuple[PreconditionedLayer, Noise, Tensor]]] = {"A": [], "B": []}
    held = [layer for layer in layers if layer.view.held]
    squares = _column_squares([x for layer in held for x in (layer.A, layer.B)])
    summed: list[tuple[Noise, Tensor, Tensor]] = []
    scaled: list[tuple[Noise, Tensor]] = []
    for layer in layers:
        if not layer.view.held:
            found.append(None)
            continue
        S = layer.S
        a, b = _along(next(squares), layer.A, S, -1).unsqueeze(-2), _along(next(squares), layer.B, S, -2).unsqueeze(-1)
        own = Noise(a, b, a)
        found.append(own)
        if layer.learned == "S":  # A and B are ones
            scaled.append((own, S))
            continue
        rows, columns = [], []
        for part in _pieces(S):
            S2, (a_here, b_here) = S[part].square(), own.squares(part)
            rows.append((S2 @ a_here.mT).squeeze(-1))
            columns.append((b_here.mT @ S2).squeeze(-2))
        in_all = columns[0] if len(columns) == 1 else torch.stack(columns).sum(0) if S.ndim == 2 else torch.cat(columns)
        summed.append((own, in_all, a.squeeze(-2)))
        for side, x in (("A", in_all), ("B", rows[0] if len(rows) == 1 else torch.cat(rows))):
            if side in layer.learned:
                sums[side].append((layer, own, x))
    if summed:
        products = torch._foreach_mul([x for _, x, _ in summed], [side for *_, side in summed])
        for (own, *_), total in zip(summed, torch._foreach_norm(products, ord=1), strict=True):
            own.total = total  # all that it sums is >= 0
    if scaled:
        lengths = torch._foreach_norm([S for _, S in scaled])
        for (own, _), total in zip(scaled, torch._foreach_mul(lengths, lengths), strict=True):
            own.total = total
    # summed over the ranks that hold other rows, or other columns
    pairs = [(x, layer.parts[side].alike) for side, each in sums.items() for layer, _, x in each]
    sum_over_([x for x, _ in pairs], [alike for _, alike in pairs])
    each = [(side, own, x, layer.view.whole or layer.view) for side, of in sums.items() for layer, own, x in of]
    sizes = [float(whole.m if side == "A" else whole.n) for side, *_, whole in each]
    means = torch._foreach_div([x for *_, x, _ in each], sizes) if each else ()
    for (side, own, *_), mean in zip(each, means, strict=True):
        own.of_side[side] = mean
    return found


def _squares(block: Tensor) -> Tensor:
    """A full block or a stack, in batches or not, as squares one after the other."""
    return block.reshape(-1, *block.shape[-2:])


def _rows(own: _Block) -> Tensor:
    """What noise gives each column of a block, square by square."""
    assert own.of_side is not None
    return ak.by_square(own.of_side, own.tensor).reshape(-1, own.tensor.shape[-1])


def _of_squares(values: list[float], counts: list[int], like: Tensor) -> float | Tensor:
    """A number of each block's: one, where it is the same, or one for each square."""
    if len(set(values)) == 1:
        return values[0]
    each = torch.tensor(values, dtype=like.dtype).repeat_interleave(torch.tensor(counts))
    return each.to(like.device, non_blocking=True)[:, None, None]


def _pieces(S: Tensor) -> list[slice]:
    """Along the first dimension of S, on a CPU as many entries as stay in its cache."""
    count = len(S)
    step = max(AT_A_TIME * count // max(S.numel(), 1), 1) if S.device.type == "cpu" else max(count, 1)
    return [slice(first, first + step) for first in range(0, max(count, 1), step)]


def _cached(pieces: Sequence[_Scaling]) -> Iterator[list[_Scaling]]:
    """As many at a time as stay in a CPU's cache; elsewhere all."""
    found: list[_Scaling] = []
    entries = 0
    for piece in pieces:
        if found and piece.tensor.device.type == "cpu" and entries + piece.tensor.numel() > AT_A_TIME:
            yield found
            found, entries = [], 0
        found.append(piece)
        entries += piece.tensor.numel()
    if found:
        yield found


def _column_squares(blocks: Sequence[Tensor]) -> Iterator[Tensor]:
    """The squared norm of each column, in the shape of ``block[..., 0]``; those of one side at once."""
    alike: dict[tuple[int, torch.dtype], list[int]] = {}
    for i, block in enumerate(blocks):
        alike.setdefault((block.shape[-1], block.dtype), []).append(i)
    found: dict[int, Tensor] = {}
    for places in alike.values():
        sums = torch.cat([_squares(blocks[i]) for i in places]).square_().sum(-2)
        parts = torch.split(sums, [blocks[i][..., 0].numel() // sums.shape[-1] for i in places])
        found |= {i: part.view(blocks[i].shape[:-1]) for i, part in zip(places, parts, strict=True)}
    return (found[i] for i in range(len(blocks)))


def _along(squares: Tensor, block: Tensor, S: Tensor, dim: int) -> Tensor:
    """What there is for each column of a block, along a side of S."""
    return squares if block.ndim == S.ndim else squares.flatten(-2)[..., : S.shape[dim]]
