"""The preconditioner of a whole model on torch's own products: as many operations for many layers as for one.

The matrices are taken apart in tiles (:mod:`apo_kernels.aten.tiles`), and every product is a batched one of all tiles
of a shape, or of as many as stay in the cache. G, V and S are packed into tiles on the way in. The directions leave
them on the way into the weights; M stays in tiles for the slopes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from apo_kernels.aten.buffers import Pool, Scalings
from apo_kernels.aten.operators import accumulation_dtype
from apo_kernels.aten.pieces import BlockSlopes, Diagonals, Stacks, Work
from apo_kernels.aten.squares import Pick, SquareBank
from apo_kernels.aten.tiles import TileClass, classes_of
from apo_kernels.aten.writing import WeightUpdate
from apo_kernels.blocks import is_stack
from apo_kernels.slopes import ModelEnergies, ModelSlopes, Parts

__all__ = ["AtenModel"]

CACHED = 2**17
"""Elements of a piece on a CPU: four buffers of them stay in its cache."""
AT_A_TIME = 2**22
"""Elements of a piece elsewhere: four buffers of them are small beside the model."""
HELD = 2**20
"""Elements of a class up to which the buffer of its directions is held."""


class KeptTiles(NamedTuple):
    """What slopes need of a trial: ``BᵀGA`` in tiles, a stack for each class, and which layers took part."""

    M: list[Tensor]
    present: list[int]


class AtenModel:
    """See :class:`apo_kernels.ModelPreconditioner`."""

    def __init__(
        self,
        As: Sequence[Tensor],
        Bs: Sequence[Tensor],
        Ss: Sequence[Tensor],
        widths: Sequence[tuple[int, ...]],
        learned: Sequence[str],
    ) -> None:
        self._As, self._Bs, self._Ss = ([x.detach() for x in each] for each in (As, Bs, Ss))
        self._learned = learned
        self._dtype = accumulation_dtype(Ss[0].dtype) if Ss else torch.float32
        self._like = self._Ss[0].new_empty(0, dtype=self._dtype) if Ss else torch.empty(0)
        self._classes = classes_of(self._As, self._Bs, self._Ss, learned)
        self._banks, self._of_block = self._join_blocks()
        whole = [S.shape[-1] for S in Ss]
        self._works = [self._work(each, widths, whole) for each in self._classes]
        self._S_views = [[[w.of(self._Ss[w.layer]) for w in work.matrix] for work in works] for works in self._works]
        self._bind_scratch()
        parts = [[w for own in each.regions for w in own.windows(widths[own.layer])] for each in self._classes]
        matrices = [[w for own in each.regions for w in own.windows([whole[own.layer]])] for each in self._classes]
        self._held_views: dict[Work, Tensor] = {}
        self._update = WeightUpdate(widths, parts, matrices, self._held, self._dtype)
        self._number_tiles()

    def _join_blocks(self) -> tuple[list[SquareBank], dict[tuple[int, str], tuple[SquareBank, int]]]:
        """The squares of equal sides, and for each block where its own are."""
        alike: dict[tuple[int, torch.dtype], list[tuple[int, str]]] = {}
        blocks = {"A": self._As, "B": self._Bs}
        for i, S in enumerate(self._Ss):
            for side in "AB":
                block = blocks[side][i]
                if block.numel() and not (is_stack(block, S) and block.shape[-1] == 1):
                    alike.setdefault((block.shape[-1], block.dtype), []).append((i, side))
        banks, of_block = [], {}
        for names in alike.values():
            bank = SquareBank([blocks[side][i] for i, side in names], self._dtype)
            banks.append(bank)
            of_block.update({name: (bank, k) for k, name in enumerate(names)})
        return banks, of_block

    def _work(self, each: TileClass, widths: Sequence[Sequence[int]], whole: Sequence[int]) -> list[Work]:
        blocks = {"A": self._As, "B": self._Bs}
        left, right = (Diagonals(each, side, blocks, self._dtype) if each.diagonal[side] else None for side in (0, 1))
        elements = CACHED if self._like.device.type == "cpu" else AT_A_TIME
        picks: dict[object, Pick] = {}
        return [
            Work(each, piece, self._of_block, (left, right), widths, whole, self._like, picks)
            for piece in each.pieces(elements)
        ]

    def _bind_scratch(self) -> None:
        """Scratch for all pieces but the large, which stays."""
        small = [work for works in self._works for work in works if not work.each.large]
        most = max((w.piece.count * w.each.rows * w.each.columns for w in small), default=0)
        scratch = [self._like.new_empty(most) for _ in range(4)]
        for work in small:
            work.bind(scratch)
        sizes = [each.count * each.stride[0] for each in self._classes]
        self._offsets = [sum(sizes[:k]) for k in range(len(sizes))]
        self._scalings = Scalings(self._Ss)
        self._pool = Pool(self._like, max(sum(sizes), self._scalings.size))
        self._most_at_once = max((each.stride[0] for each in self._classes if each.large), default=0)
        self._held = [
            each.of(self._like.new_empty(size), each.count) if size <= HELD and not each.large else None
            for each, size in zip(self._classes, sizes, strict=True)
        ]

    def _number_tiles(self) -> None:
        """The layer of each tile, the tiles layer by layer, and how many each has."""
        self._layers = [layer for works in self._works for work in works for layer in work.layers]
        device = self._like.device
        self._layer_of_tile = torch.tensor(self._layers, dtype=torch.int64, device=device)
        self._in_layers = self._layer_of_tile.argsort(stable=True)
        self._tiles_of_layer = self._layer_of_tile.bincount(minlength=len(self._Ss))
        self._shares: tuple[tuple[float, ...], Tensor] = ((), self._like)
        self._layer_of_square = {}
        for bank in self._banks:
            owners = [0] * bank.count
            for (layer, _), (own, k) in self._of_block.items():
                if own is bank:
                    for number in bank.numbers[k]:
                        owners[number] = layer
            self._layer_of_square[bank] = torch.tensor(owners, device=device)

    def step_(
        self,
        thetas: Parts,
        Gs: Parts,
        momentum_buffers: Sequence[Tensor | None],
        lr: Sequence[float],
        momentum: Sequence[float],
        weight_decay: Sequence[float],
        most: float,
        shares: Sequence[float] | None,
        total: Callable[[Tensor], None] | None,
    ) -> Tensor:
        present = _present(Gs)
        norms: list[Tensor] | None = [] if math.isfinite(most) else None
        Ys: list[Tensor] = []
        if present:
            Ys, _ = self._directions(Gs, norms=norms)
        rates: Sequence[float] | None = lr
        if norms is None:
            f = self._like.new_ones(())
        elif self._like.is_cpu:
            f, rates = self._bounded(norms, shares or (), total, most, lr)
        else:
            f = self._scaled(norms, self._share(shares or (), present), total, most, Ys)
            rates = None if bool(f.isnan()) else lr
        if not present or rates is None:
            return f
        shrink = [1 - rate * decay for rate, decay in zip(lr, weight_decay, strict=True)]
        numbers = self._held_numbers(rates, momentum, shrink)
        self._update(thetas, Gs, present, momentum_buffers, Ys, *numbers, carry=True)
        return f

    def _bounded(
        self,
        norms: Sequence[Tensor],
        shares: Sequence[float],
        total: Callable[[Tensor], None] | None,
        most: float,
        lr: Sequence[float],
    ) -> tuple[Tensor, Sequence[float] | None]:
        """What keeps the promise at ``most``, and the rates times it; NaN and None where it isn't finite. It is added
        up layer by layer, so that it is the same to the bit wherever the layers are."""
        terms = [0.0] * len(self._Ss)
        for layer, norm in zip(self._layers, torch.cat(list(norms)).tolist() if norms else (), strict=bool(norms)):
            terms[layer] += shares[layer] * norm * norm
        if total is not None:
            total(of_all := torch.tensor(terms, dtype=torch.float64))
            terms = of_all.tolist()
        promised = sum(terms)
        if not math.isfinite(promised):
            return self._like.new_full((), math.nan), None
        bound = max(promised, most)
        factor = most / bound if bound else 1.0
        return self._like.new_full((), factor), [rate * factor for rate in lr] if factor != 1 else lr

    @staticmethod
    def _scaled(
        norms: Sequence[Tensor],
        share: float | Tensor,
        total: Callable[[Tensor], None] | None,
        most: float,
        Ys: Sequence[Tensor],
    ) -> Tensor:
        """The same where looking at it would mean to wait for it: the directions are scaled."""
        squares = torch.cat(list(norms)).square_()
        promised = squares.sum().mul_(share) if isinstance(share, float) else torch.dot(squares, share)
        if total is not None:
            total(promised)
        f = torch.where(promised <= most, 1.0, most / promised) + (promised - promised)  # NaN where that isn't finite
        for Y in Ys:
            Y.mul_(f)
        return f

    def trial_(
        self,
        thetas: Parts,
        Gs: Parts,
        momentum_buffers: Sequence[Tensor | None],
        lengths: Sequence[float],
        momentum: Sequence[float],
        shrink: Sequence[float],
    ) -> KeptTiles:
        present = _present(Gs)
        Ys, Ms = self._directions(Gs, keep=True)
        if present:
            numbers = self._held_numbers(lengths, momentum, shrink)
            self._update(thetas, Gs, present, momentum_buffers, Ys, *numbers, carry=False)
        return KeptTiles(Ms, present)

    def _held_numbers(
        self, lengths: Sequence[float], momentum: Sequence[float], shrink: Sequence[float]
    ) -> tuple[Sequence[float], Sequence[float], Sequence[float]]:
        """What the dtype can't hold made infinite: torch would refuse it when half is written."""
        top = torch.finfo(self._dtype).max
        found = [
            each if max(map(abs, each)) <= top else [x if abs(x) <= top else math.copysign(math.inf, x) for x in each]
            for each in (lengths, momentum, shrink)
        ]
        return found[0], found[1], found[2]

    def keep(self, Gs: Parts) -> KeptTiles:
        present = _present(Gs)
        return KeptTiles(self._directions(Gs, keep=True, wanted=False)[1], present)

    def adopted(self, Ms: Mapping[int, Tensor]) -> KeptTiles:
        """What another path has kept, ``BᵀGA`` of the layers that took part, as this one keeps it."""
        stacks = self._tiles(True)
        for works, stack in zip(self._works, stacks, strict=True):
            for work in works:
                targets = [w.in_tiles(stack[work.here], work.piece.first) for w in work.matrix]
                pairs = [(x, w.of(Ms[w.layer])) for x, w in zip(targets, work.matrix, strict=True) if w.layer in Ms]
                torch._foreach_zero_(targets)
                if pairs:
                    torch._foreach_copy_([target for target, _ in pairs], [M for _, M in pairs])
        return KeptTiles(stacks, sorted(Ms))

    def _directions(
        self,
        Gs: Parts,
        *,
        keep: bool = False,
        wanted: bool = True,
        norms: list[Tensor] | None = None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """P(G) and M in tiles; to ``norms`` goes ``‖S⊙M‖`` of each tile."""
        stacks = self._stacks()
        Ys, Ms = self._tiles(wanted, self._held), self._tiles(keep)
        for works, S_views, Y, M in zip(self._works, self._S_views, Ys, Ms, strict=True):
            for work, views in zip(works, S_views, strict=True):
                into = M[work.here] if keep else None, self._here(work, Y) if wanted else None
                _forward(work, Gs, views, stacks, *into, norms)
        return Ys, Ms

    def _tiles(self, wanted: bool, held: Sequence[Tensor | None] | None = None) -> list[Tensor]:
        """A stack for each class, uninitialised."""
        if not wanted:
            return [self._like for _ in self._classes]
        held = held or [None] * len(self._classes)
        if all(x is not None for x in held):
            return [x for x in held if x is not None]
        flat = self._pool.take()
        return [
            each.of(flat[offset:], each.count) if x is None else x
            for each, offset, x in zip(self._classes, self._offsets, held, strict=True)
        ]

    def _stacks(self) -> Stacks:
        """What a call holds, with the scratch for large tiles, one of which is worked on at a time."""
        return {Work: [self._like.new_empty(self._most_at_once) for _ in range(4)] if self._most_at_once else []}

    def _here(self, work: Work, Y: Tensor) -> Tensor:
        """A piece's directions: views of what is held are held."""
        known = self._held_views.get(work)
        if known is None:
            known = Y[work.here]
            if any(Y is held for held in self._held):
                self._held_views[work] = known
        return known

    def _share(self, shares: Sequence[float], present: Sequence[int]) -> float | Tensor:
        """The share of all layers that take part, where it is one, or of each tile."""
        if len({shares[i] for i in present}) <= 1:
            return float(shares[present[0]]) if present else 0.0
        known, tensor = self._shares
        if known != tuple(shares):
            tensor = torch.tensor(shares, dtype=self._dtype, device=self._like.device)[self._layer_of_tile]
            self._shares = tuple(shares), tensor
        return tensor

    def slopes(self, Vs: Parts, kept: KeptTiles, lengths: Sequence[float]) -> ModelSlopes:
        # one after the other: the second is taken while the first is held
        slopes_S = self._scalings.on(self._pool.take(), kept.present)
        sizes_S = self._scalings.on(self._pool.take(), kept.present)
        found = self._block_slopes()
        stacks = self._stacks()
        inner, sizes = [], []
        length = self._lengths(lengths)
        first = 0
        for works, S_views, M in zip(self._works, self._S_views, kept.M, strict=True):
            for work, views in zip(works, S_views, strict=True):
                count = work.piece.count
                own = length
                if isinstance(own, Tensor):
                    own = own[self._layer_of_tile[first : first + count], None, None]
                first += count
                product, size = _slopes(work, Vs, views, stacks, M[work.here], own, found, (slopes_S, sizes_S))
                inner.append(product)
                sizes.append(size)
        for bank in self._banks:
            if isinstance(length, float):
                found.flat[bank].mul_(-length)
            else:
                found.squares[bank].mul_(-length[self._layer_of_square[bank], None, None])
        A, B = self._collect(found, kept.present, 0)
        size_A, size_B = self._collect(found, kept.present, 1)
        S, size_S = (self._of_present(x, kept.present) for x in (slopes_S, sizes_S))
        return ModelSlopes(A, B, S, size_A, size_B, size_S, self._by_layer(inner), self._by_layer(sizes))

    def energies(self, Gs: Parts) -> ModelEnergies:
        present = _present(Gs)
        energies_S = self._scalings.on(self._pool.take(), present)
        found, stacks = self._block_slopes(), self._stacks()
        for works, S_views in zip(self._works, self._S_views, strict=True):
            for work, views in zip(works, S_views, strict=True):
                _energies(work, Gs, views, stacks, found, energies_S)
        return ModelEnergies(*self._collect(found, present, 0), self._of_present(energies_S, present))

    def _by_layer(self, tiles: Sequence[Tensor]) -> Tensor:
        """The sum of each layer's tiles, in their order, so that it doesn't depend on other layers."""
        numbers = torch.cat(list(tiles)) if tiles else self._like
        return torch.segment_reduce(numbers[self._in_layers], "sum", lengths=self._tiles_of_layer, unsafe=True)

    def _lengths(self, lengths: Sequence[float]) -> float | Tensor:
        if len(set(lengths)) == 1:
            return float(lengths[0])
        return torch.tensor(lengths, dtype=self._dtype, device=self._like.device)

    def _block_slopes(self) -> BlockSlopes:
        """Sums for the squares, and for the diagonals that are learned."""
        found = BlockSlopes(self._banks)
        for side, blocks in (("A", self._As), ("B", self._Bs)):
            for i, block in enumerate(blocks):
                if side in self._learned[i] and (i, side) not in self._of_block:
                    shape = block.shape[:-2] if block.numel() else block.shape[:-1]
                    found.diagonals[side, i] = self._like.new_zeros(shape), self._like.new_zeros(shape)
        return found

    def _collect(
        self, found: BlockSlopes, present: Sequence[int], which: int
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """The slopes (0) or the sizes (1) of the As and of the Bs."""
        results: dict[str, list[Tensor | None]] = {side: [None] * len(self._Ss) for side in "AB"}
        for i in present:
            for side, blocks in (("A", self._As), ("B", self._Bs)):
                if side not in self._learned[i]:
                    continue
                if (i, side) in self._of_block:
                    bank, k = self._of_block[i, side]
                    own = bank.apart(found.flat[bank], found.sizes[bank], k)[which]
                else:
                    shape = blocks[i].shape
                    own = found.diagonals[side, i][which].reshape(shape[:-1] if which else shape)
                results[side][i] = own
        return results["A"], results["B"]

    def _of_present(self, tensors: Sequence[Tensor], present: Sequence[int]) -> list[Tensor | None]:
        there = set(present)
        return [x if i in there else None for i, x in enumerate(tensors)]


def _present(Gs: Parts) -> list[int]:
    """The layers that take part."""
    return [i for i, own in enumerate(Gs) if own is not None and any(x is not None for x in own)]


def _forward(
    work: Work,
    Gs: Parts,
    S_views: list[Tensor],
    stacks: Stacks,
    M: Tensor | None,
    Y: Tensor | None,
    norms: list[Tensor] | None,
) -> None:
    """P(G) into Y and ``BᵀGA`` into M, where they are wanted; ``‖S⊙M‖`` of each tile to ``norms``."""
    X0, X1, X2, X3 = work.scratch(stacks)
    G = work.load_parts(Gs, X0)
    product = work.inward(G, stacks, X2, X3 if M is None else M)
    if M is not None and product is G:
        M.copy_(G)
    if Y is None:
        return
    S = work.load_S(S_views, X1, stacks)
    SM = torch.mul(product, S, out=X2)
    if norms is not None:
        norms.append(torch.linalg.vector_norm(SM, dim=(1, 2)))
    work.outward(SM.mul_(S), stacks, X0, Y)


def _slopes(
    work: Work,
    Vs: Parts,
    S_views: list[Tensor],
    stacks: Stacks,
    M: Tensor,
    length: float | Tensor,
    found: BlockSlopes,
    of_S: tuple[Sequence[Tensor], Sequence[Tensor]],
) -> tuple[Tensor, Tensor]:
    """The derivatives and sizes of a piece into their places. Returns ``ΣS²MN`` and ``length·ΣS²M²`` of each tile."""
    X0, X1, X2, X3 = work.scratch(stacks)
    V = work.load_parts(Vs, X0)
    N = work.inward(V, stacks, X2, X3)
    spare = X3 if N is V else X0
    S = work.load_S(S_views, X1, stacks)
    S2 = torch.mul(S, S, out=X1)
    TM = torch.mul(M, S2, out=X2)
    size = torch.mul(M, TM, out=spare).mul_(2 * length)
    work.unload(size, of_S[1])
    work.add_sizes(found, size)
    total = size.sum((1, 2)).mul_(0.5)
    slope = torch.mul(N, TM, out=spare)
    inner = slope.sum((1, 2))
    work.unload(slope.mul_(-2 * length), of_S[0])
    work.add_diagonal_slopes(found, slope)
    TN = torch.mul(N, S2, out=spare)
    work.add_block_slopes(found, (N, TM), (M, TN))
    return inner, total


def _energies(
    work: Work, Gs: Parts, S_views: list[Tensor], stacks: Stacks, found: BlockSlopes, of_S: Sequence[Tensor]
) -> None:
    """The energies of a piece into their places."""
    X0, X1, X2, X3 = work.scratch(stacks)
    G = work.load_parts(Gs, X0)
    M = work.inward(G, stacks, X2, X3)
    S = work.load_S(S_views, X1, stacks)
    T = torch.mul(torch.mul(S, S, out=X1), M, out=X2)
    work.add_block_slopes(found, (M, T))
    energy = T.mul_(M)
    work.unload(energy, of_S)
    work.add_diagonal_slopes(found, energy)
