"""The layers that the Fisher start steps, laid out once: like blocks as one stack, S in pieces that a cache holds, and
room for the energies that noise would give them: E and N of :class:`~apo.fisher.start.FisherStart`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from operator import is_
from typing import NamedTuple

import torch
from torch import Tensor

from apo.layers.preconditioner import PreconditionedLayer
from apo.phi.meta_optimizer import Learned
from apo.ranks.sharding import sum_over_

__all__ = ["ENERGY", "Layout", "LikeBlocks", "Piece"]

ENERGY = "energy"
"""The running mean of a tensor's energies, among its buffers."""
AT_A_TIME = 2**16
"""Entries of S on a CPU."""


class Piece(NamedTuple):
    """A piece of S with its energies, the squared norms of the columns of A and of B, ``(*batch, 1, n)`` and
    ``(*batch, m, 1)``, where B's part of what noise gives goes, if B is learned, and the number of its layer."""

    S: Tensor
    energy: Tensor
    a: Tensor
    b: Tensor
    of_B: Tensor | None
    layer: int


class _Side(NamedTuple):
    """A learned block, the side of a layer that it is of, and of how many entries of the other side noise is a mean."""

    own: Learned
    batch: torch.Size
    length: int
    others: int
    layer: int


class LikeBlocks:
    """Learned blocks of one width and dtype: their squares one after the other, ``(count, b, b)``.

    Attributes:
        sides: whose blocks they are.
        counts: how many squares each has.
        layers: the number of each one's layer.
        lengths: ``(count, b)``, the squared norms of the columns.
        noise: ``(count, b)``, by which the columns of ``AᵀA`` give A's energies of noise; zeros for what sticks out.
        inside: ``(count, b)``, zeros for what sticks out of a side and ones elsewhere; None where nothing does.
        alone: whether there is one square. Torch multiplies one by other operations than several, and so to other
            bits, while ranks that hold the same block may hold several beside it: so it is multiplied twice.
    """

    def __init__(self, sides: Sequence[_Side]) -> None:
        b, like = sides[0].own.tensor.shape[-1], sides[0].own.tensor
        self.sides = list(sides)
        self._blocks = [side.own.tensor.view(-1, b, b) for side in sides]
        self._energies = [side.own.buffers[ENERGY].view(-1, b, b) for side in sides]
        self.counts = [len(x) for x in self._blocks]
        self.layers = [side.layer for side in sides]
        self.lengths, self.noise = (like.new_zeros(sum(self.counts), b) for _ in "12")
        self.alone = len(self.lengths) == 1
        self._shares = self.of_squares([1 / side.others for side in sides])
        self.inside: Tensor | None = None
        if any(side.length % b for side in sides):
            self.inside = torch.zeros_like(self.noise)
            for within in self.along(self.inside):
                within.fill_(1)

    def along(self, columns: Tensor) -> list[Tensor]:
        """Numbers of the squares' columns ``(count, b)``, as those of each block along its side: views
        ``(*batch, length)``."""
        parts = torch.split(columns, self.counts)
        return [
            x.view(*side.batch, x.numel() // max(side.batch.numel(), 1))[..., : side.length]
            for x, side in zip(parts, self.sides, strict=True)
        ]

    def of_squares(self, values: list[float]) -> float | Tensor:
        """A number of each block's: one, where it is the same, or one for each square, ``(count, 1)``."""
        if len(set(values)) == 1:
            return values[0]
        each = torch.tensor(values, dtype=self.noise.dtype).repeat_interleave(torch.tensor(self.counts))
        return each.to(self.noise.device, non_blocking=True)[:, None]

    def together(self) -> tuple[Tensor, Tensor]:
        """The squares and their energies, as new tensors."""
        X, energy = torch.cat(self._blocks), torch.cat(self._energies)
        return (X.expand(2, -1, -1), energy.expand(2, -1, -1)) if self.alone else (X, energy)

    def measure(self, X: Tensor) -> None:
        """Set :attr:`lengths`."""
        self.lengths.copy_(X[: len(self.lengths)].square().sum(-2))

    def take_means(self) -> None:
        """Divide :attr:`noise`, which is a sum, by how many entries it is of."""
        self.noise.mul_(self._shares)

    def write(self, X: Tensor, energy: Tensor) -> None:
        """Write the squares and their energies back."""
        for targets, found in ((self._blocks, X), (self._energies, energy)):
            torch._foreach_copy_(targets, torch.split(found[: len(self.noise)], self.counts))


class Layout:
    """Layers as they are stepped together, bound to the tensors that hold them until these are replaced.

    Attributes:
        kinds: their learned blocks.
        groups: their scalings S in pieces, on a CPU as many together as stay in its cache.
    """

    def __init__(self, layers: Sequence[PreconditionedLayer]) -> None:
        self._tensors, self._layers = _tensors(layers), list(layers)
        held = [(i, layer) for i, layer in enumerate(layers) if layer.view.held]
        alike: dict[tuple[int, torch.dtype], list[_Side]] = {}
        for i, layer in held:
            whole, (*batch, m, n) = layer.view.whole or layer.view, layer.S.shape
            for name, length, others in (("A", n, whole.m), ("B", m, whole.n)):
                if name in layer.learned:
                    own = layer.parts[name]
                    side = _Side(own, torch.Size(batch), length, others, i)
                    alike.setdefault((own.tensor.shape[-1], own.tensor.dtype), []).append(side)
        self.kinds = [LikeBlocks(sides) for sides in alike.values()]
        lengths, noise = dict[int, Tensor](), dict[int, Tensor]()
        for kind in self.kinds:
            ids = [id(side.own) for side in kind.sides]
            lengths |= zip(ids, kind.along(kind.lengths), strict=True)
            noise |= zip(ids, kind.along(kind.noise), strict=True)
        # in the order of the layers, which is that of all ranks; their kinds may differ
        parts = [layer.parts[name] for name in "AB" for _, layer in held if name in layer.learned]
        self._alike = [(noise[id(own)], own.alike) for own in parts]
        self._sides: dict[int, tuple[Tensor | None, Tensor]] = {}
        pieces = []
        for i, layer in held:
            a = _lengths(layer, "A", -1, lengths).unsqueeze(-2)
            b = _lengths(layer, "B", -2, lengths).unsqueeze(-1)
            of_A, of_B = (noise.get(id(layer.parts[name])) for name in "AB")
            self._sides[i] = None if of_A is None else of_A.unsqueeze(-2), a
            pieces += _pieces(i, layer, a, b, None if of_B is None else of_B.unsqueeze(-1))
        self.groups = _cached(pieces)

    def fits(self, layers: Sequence[PreconditionedLayer]) -> bool:
        """Whether it is one of these layers, and they are held where they were."""
        now = _tensors(layers)
        return len(now) == len(self._tensors) and all(map(is_, now, self._tensors))

    def noise(self, Xs: Sequence[Tensor]) -> Tensor:
        """Set what noise gives, with the squares of each of :attr:`kinds`.

        Returns:
            Of each layer the sum of S's energies of noise; 0 for those that this rank holds nothing of.
        """
        for kind, X in zip(self.kinds, Xs, strict=True):
            kind.measure(X)
        targets, found, columns = list[Tensor](), list[Tensor](), defaultdict[int, list[Tensor]](list)
        for pieces in self.groups:
            S = [piece.S for piece in pieces]
            for piece, S2 in zip(pieces, torch._foreach_mul(S, S), strict=True):
                columns[piece.layer].append(piece.b.mT @ S2)
                if piece.of_B is not None:
                    targets.append(piece.of_B)
                    found.append(S2 @ piece.a.mT)
        sums = [x[0] if len(x) == 1 else _joined(x) for x in columns.values()]
        for (of_A, _), x in zip(self._sides.values(), sums, strict=True):
            if of_A is not None:
                targets.append(of_A)
                found.append(x)
        if targets:
            torch._foreach_copy_(targets, found)
        sum_over_([x for x, _ in self._alike], [alike for _, alike in self._alike])
        for kind in self.kinds:
            kind.take_means()
        # all that is summed is >= 0
        products = torch._foreach_mul(sums, [a for _, a in self._sides.values()]) if sums else ()
        totals = iter(torch._foreach_norm(products, ord=1) if sums else ())
        zero = self._layers[0].S.new_zeros(())
        return torch.stack([next(totals) if layer.view.held else zero for layer in self._layers])


def _tensors(layers: Sequence[PreconditionedLayer]) -> list[Tensor]:
    return [x for layer in layers for own in layer.phi for x in (own.tensor, own.buffers[ENERGY])]


def _lengths(layer: PreconditionedLayer, name: str, dim: int, learned: Mapping[int, Tensor]) -> Tensor:
    """The squared norms of a block's columns, along a side of S; of what is learned they are there."""
    block, S = layer.parts[name].tensor, layer.S
    if id(layer.parts[name]) in learned:
        return learned[id(layer.parts[name])]
    squares = block.square().sum(-2)
    return squares if block.ndim == S.ndim else squares.flatten(-2)[..., : S.shape[dim]]


def _joined(columns: Sequence[Tensor]) -> Tensor:
    """Sums over the rows of pieces as those over all rows; those of a batch's pieces as the batch's."""
    return torch.stack(list(columns)).sum(0) if columns[0].ndim == 2 else torch.cat(list(columns))


def _pieces(i: int, layer: PreconditionedLayer, a: Tensor, b: Tensor, of_B: Tensor | None) -> list[Piece]:
    """Along the first dimension of S, on a CPU as many entries as stay in its cache."""
    S, energy = layer.S, layer.parts["S"].buffers[ENERGY]
    step = max(AT_A_TIME * len(S) // max(S.numel(), 1), 1) if S.device.type == "cpu" else max(len(S), 1)
    return [
        Piece(S[at], energy[at], a if S.ndim == 2 else a[at], b[at], None if of_B is None else of_B[at], i)
        for at in (slice(first, first + step) for first in range(0, max(len(S), 1), step))
    ]


def _cached(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """As many at a time as stay in a CPU's cache; elsewhere all."""
    groups: list[list[Piece]] = []
    entries = 0
    for piece in pieces:
        entries += piece.S.numel()
        if not groups or (piece.S.device.type == "cpu" and entries > AT_A_TIME):
            groups.append([])
            entries = piece.S.numel()
        groups[-1].append(piece)
    return groups
