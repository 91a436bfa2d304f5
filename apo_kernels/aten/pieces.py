"""A piece of a class of tiles: what it reads, the products on it, and the sums that it adds to."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from apo_kernels.aten.operators import aligned_empty
from apo_kernels.aten.squares import Pick, SquareBank
from apo_kernels.aten.tiles import GridRun, Piece, TileClass

__all__ = ["BlockSlopes", "Diagonals", "Places", "Sources", "Stacks", "Work"]

Stacks = dict[object, Any]
"""The squares and diagonals that were joined, widened or picked in a call."""

Sources = Sequence[Sequence[Tensor | None] | None]


class Diagonals:
    """The pieces of diagonals on one side of a class, ``(pieces, size)``."""

    def __init__(self, each: TileClass, side: int, blocks: Mapping[str, Sequence[Tensor]], dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._pieces: list[Tensor] = []
        self.first: dict[int, int] = {}
        count = 0
        for region in each.regions:
            segment = (region.rows, region.columns)[side]
            diagonal = blocks[segment.side][region.layer][..., 0, 0][region.batch]
            diagonal = diagonal[..., segment.start : segment.start + segment.size * segment.squares]
            self._pieces.append(torch.unflatten(diagonal, -1, (segment.squares, segment.size)))
            self.first[id(region)] = count
            count += region.entries * segment.squares

    def stack(self) -> Tensor:
        return torch.cat([x.reshape(-1, x.shape[-1]).to(self.dtype) for x in self._pieces])


class Places:
    """Where some rows of a stack are, to be added to; each at most once."""

    def __init__(self, numbers: Sequence[int], device: torch.device) -> None:
        step = numbers[1] - numbers[0] if len(numbers) > 1 else 1
        regular = step > 0 and all(b - a == step for a, b in itertools.pairwise(numbers))
        self._slice = slice(numbers[0], numbers[-1] + 1, step) if regular else None
        self._numbers = None if regular else torch.tensor(numbers, device=device)

    def add(self, stack: Tensor, x: Tensor) -> None:
        if self._numbers is None:
            stack[self._slice].add_(x)
        else:
            stack.index_add_(0, self._numbers, x)


class BlockSlopes:
    """The sums that a call to ``slopes`` collects for the squares and the diagonals, and their flat storage."""

    def __init__(self, banks: Sequence[SquareBank]) -> None:
        self.flat: dict[SquareBank, Tensor] = {}
        self.squares: dict[SquareBank, Tensor] = {}
        self.sizes: dict[SquareBank, Tensor] = {}
        for bank in banks:
            self.flat[bank], self.squares[bank], self.sizes[bank] = bank.zeros()
        self.diagonals: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}


class Work:
    """A piece of a class of tiles, with the squares that it reads and the scratch that it is worked on in.

    Args:
        banks: for each layer and side its squares, where it has any.
        diagonals: of the left and the right side, where they are diagonals.
        picks: those of other pieces, which are shared where they are the same.
        widths, whole: for each layer the widths of its parts, and of the matrix.
    """

    def __init__(
        self,
        each: TileClass,
        piece: Piece,
        banks: dict[tuple[int, str], tuple[SquareBank, int]],
        diagonals: tuple[Diagonals | None, Diagonals | None],
        widths: Sequence[Sequence[int]],
        whole: Sequence[int],
        like: Tensor,
        picks: dict[object, Pick],
    ) -> None:
        self.each, self.piece, self.like = each, piece, like
        self.here = slice(piece.first, piece.first + piece.count)
        self.layers = [region.layer for region, part in piece.slices for _ in range(part.total)]
        self.parts = [w for region, part in piece.slices for w in region.windows(widths[region.layer], part)]
        self.matrix = [w for region, part in piece.slices for w in region.windows([whole[region.layer]], part)]
        self.diagonals = diagonals
        self.runs = piece.runs
        self.left_first = not each.large or each.rows <= each.columns
        numbers = tuple([self._square(side, at, banks, diagonals[side]) for at in self._tiles()] for side in (0, 1))
        self._bank: list[SquareBank | None] = [None, None]
        self._pick: list[Pick | None] = [None, None]
        self._of_diagonal: list[Tensor | None] = [None, None]
        self._tall = 1 if each.diagonal[1] or each.large else self.runs[0].tiles
        for side, size in ((0, each.rows), (1, each.columns)):
            if diagonals[side] is None:
                region = piece.slices[0][0]
                self._bank[side] = banks[region.layer, (region.rows, region.columns)[side].side][0]
                step = self._tall if side else 1
                own = tuple(numbers[side][::step])
                key = self._bank[side], own, size, side
                if key not in picks:
                    picks[key] = Pick(self._bank_of(side), own, size, side)
                self._pick[side] = picks[key]
            else:
                self._of_diagonal[side] = torch.tensor(numbers[side], device=like.device)
        self.places = [self._places(run, numbers) for run in self.runs]
        self._fixed: list[Tensor] = []
        self._panels: dict[int, Tensor] = {}

    def _tiles(self) -> list[tuple[int, int, int, int]]:
        """For each tile: the number of its slice, and its place in the region."""
        found = []
        for k, (_, part) in enumerate(self.piece.slices):
            for e in range(part.e, part.e + part.entries):
                for j in range(part.j, part.j + part.panels):
                    found += [(k, e, j, i) for i in range(part.i, part.i + part.tiles)]
        return found

    def _square(
        self,
        side: int,
        at: tuple[int, int, int, int],
        banks: dict[tuple[int, str], tuple[SquareBank, int]],
        diagonals: Diagonals | None,
    ) -> int:
        """The number of a tile's square in its bank, or of its piece of a diagonal."""
        k, e, j, i = at
        region = self.piece.slices[k][0]
        segment, q = ((region.rows, i), (region.columns, j))[side]
        if diagonals is not None:
            return diagonals.first[id(region)] + e * segment.squares + q
        bank, own = banks[region.layer, segment.side]
        numbers = bank.numbers[own]
        return numbers[segment.square + q + region.entry(e) * (len(numbers) // region.all_entries)]

    def _bank_of(self, side: int) -> SquareBank:
        bank = self._bank[side]
        assert bank is not None
        return bank

    def _places(self, run: GridRun, numbers: Sequence[Sequence[int]]) -> tuple[Places | None, Places | None]:
        """Where the left and right squares of a run's tiles are in their banks."""
        grid = run.panels * run.tiles
        grids = range(run.first, run.first + run.total, grid)
        left = [numbers[0][g + i] for g in grids for i in range(run.tiles)]
        right = [numbers[1][g + j] for g in grids for j in range(0, grid, run.tiles)]
        return tuple(  # type: ignore[return-value]
            None if self.each.diagonal[side] else Places(own, self.like.device)
            for side, own in enumerate((left, right))
        )

    def bind(self, scratch: Sequence[Tensor]) -> None:
        """Keep views of scratch that stays."""
        self._fixed = [self.each.of(x, self.piece.count) for x in scratch]
        if self._tall > 1:
            self._panels = {id(x): self._in_panels(x) for x in self._fixed}
        self._into_parts = [w.in_tiles(self._fixed[0], self.piece.first) for w in self.parts]
        self._out_of_tiles = [w.in_tiles(self._fixed[0], self.piece.first) for w in self.matrix]
        self._into_matrix = [w.in_tiles(self._fixed[1], self.piece.first) for w in self.matrix]

    def scratch(self, stacks: Stacks) -> list[Tensor]:
        """Four buffers, where nothing is bound those of the call."""
        return self._fixed or [self.each.of(x, self.piece.count) for x in stacks[Work]]

    def load_parts(self, sources: Sources, into: Tensor) -> Tensor:
        """The tiles of matrices in parts; what isn't there is zero."""
        views, targets, absent = [], [], []
        fixed = self._into_parts if self._fixed else [w.in_tiles(into, self.piece.first) for w in self.parts]
        for w, target in zip(self.parts, fixed, strict=True):
            own = sources[w.layer]
            x = None if own is None else own[w.part]
            if x is None:
                absent.append(target)
            else:
                views.append(w.of(x))
                targets.append(target)
        if self.each.large and len(views) == 1 and not absent and views[0].dtype == into.dtype:
            return views[0].reshape(into.shape)
        if absent:
            torch._foreach_zero_(absent)
        if targets:
            torch._foreach_copy_(targets, views)
        return into

    def load_S(self, views: list[Tensor], into: Tensor, stacks: Stacks) -> Tensor:
        """The tiles of S, times the diagonals."""
        if self.each.large and views[0].dtype == into.dtype:
            return views[0].reshape(into.shape)
        fixed = self._into_matrix if self._fixed else [w.in_tiles(into, self.piece.first) for w in self.matrix]
        torch._foreach_copy_(fixed, views)
        for side, axis in ((0, -1), (1, -2)):
            diagonals = self.diagonals[side]
            if diagonals is not None:
                if diagonals not in stacks:
                    stacks[diagonals] = diagonals.stack()
                into.mul_(stacks[diagonals].index_select(0, self._of_diagonal[side]).unsqueeze(axis))
        return into

    def inward(self, X: Tensor, stacks: Stacks, between: Tensor, out: Tensor) -> Tensor:
        """``Lᵀ X R`` into ``out``; X itself if both are diagonal, which S holds."""
        left, right = self._pick
        if left is None:
            return X if right is None else self._right(X, right(stacks), out)
        L = left(stacks, transposed=True)
        if right is None:
            return torch.bmm(L, X, out=out)
        if self.left_first:
            return self._right(torch.bmm(L, X, out=between), right(stacks), out)
        return torch.bmm(L, self._right(X, right(stacks), between), out=out)

    def outward(self, T: Tensor, stacks: Stacks, between: Tensor, out: Tensor) -> None:
        """``L T Rᵀ`` into ``out``."""
        left, right = self._pick
        if left is None:
            if right is None:
                out.copy_(T)
            else:
                self._right(T, right(stacks, transposed=True), out)
        elif right is None:
            torch.bmm(left(stacks), T, out=out)
        elif self.left_first:
            self._right(torch.bmm(left(stacks), T, out=between), right(stacks, transposed=True), out)
        else:
            torch.bmm(left(stacks), self._right(T, right(stacks, transposed=True), between), out=out)

    def _right(self, X: Tensor, R: Tensor, out: Tensor) -> Tensor:
        """Tiles of one panel, one above the other, are one matrix."""
        if self._tall == 1:
            return torch.bmm(X, R, out=out)
        torch.bmm(self._in_panels(X), R, out=self._in_panels(out))
        return out

    def _in_panels(self, X: Tensor) -> Tensor:
        known = self._panels.get(id(X))
        return known if known is not None else X.view(-1, self._tall * self.each.rows, self.each.columns)

    def add_block_slopes(self, found: BlockSlopes, *pairs: tuple[Tensor, Tensor]) -> None:
        """``Σ Xᵀ Y`` of the right squares and ``Σ X Yᵀ`` of the left ones over one or two pairs of X and Y, summed over
        the tiles of a square."""
        r, c = self.each.rows, self.each.columns
        for run, (left, right) in zip(self.runs, self.places, strict=True):
            here = slice(run.first, run.first + run.total)
            if self.each.learned[1] and right is not None:
                tall = run.grids * run.panels, run.tiles * r, c
                sums = self._sum([(X[here].view(tall).mT, Y[here].view(tall)) for X, Y in pairs])
                right.add(found.squares[self._bank_of(1)][:, :c, :c], sums)
            if self.each.learned[0] and left is not None:
                sums = self._sum([(X[here], Y[here].mT) for X, Y in pairs])
                if run.panels > 1:
                    sums = sums.view(run.grids, run.panels, run.tiles, r, r).sum(1).view(-1, r, r)
                left.add(found.squares[self._bank_of(0)][:, :r, :r], sums)

    def _sum(self, products: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        (X, Y), *others = products
        shape = X.shape[0], X.shape[1], Y.shape[2]
        out = aligned_empty(shape, X.dtype, X.device) if self.each.large else X.new_empty(shape)
        outer = X.shape[2] == 1  # BLAS rounds a sum of outer products otherwise for one tile than for several
        (torch.mul if outer else torch.bmm)(X, Y, out=out)
        for X, Y in others:
            (torch.addcmul if outer else torch.baddbmm)(out, X, Y, out=out)
        return out

    def add_sizes(self, found: BlockSlopes, E: Tensor) -> None:
        """Sums of columns and of rows, over the tiles of a square."""
        r, c = self.each.rows, self.each.columns
        for run, (left, right) in zip(self.runs, self.places, strict=True):
            here = E[run.first : run.first + run.total]
            if self.each.learned[1] and right is not None:
                sums = here.view(run.grids * run.panels, run.tiles * r, c).sum(1)
                right.add(found.sizes[self._bank_of(1)][:, :c], sums)
            if self.each.learned[0] and left is not None:
                rows = here.sum(2)
                if run.panels > 1:
                    rows = rows.view(run.grids, run.panels, run.tiles, r).sum(1).view(-1, r)
                left.add(found.sizes[self._bank_of(0)][:, :r], rows)
        self._add_diagonals(found, E, 1)

    def add_diagonal_slopes(self, found: BlockSlopes, D: Tensor) -> None:
        """Of diagonals the slopes are sums of those of S."""
        self._add_diagonals(found, D, 0)

    def unload(self, tiles: Tensor, matrices: Sequence[Tensor]) -> None:
        """Tiles into their layers' matrices."""
        if self._fixed and tiles.data_ptr() == self._fixed[0].data_ptr():
            views = self._out_of_tiles
        else:
            views = [w.in_tiles(tiles, self.piece.first) for w in self.matrix]
        torch._foreach_copy_([w.of(matrices[w.layer]) for w in self.matrix], views)

    def _add_diagonals(self, found: BlockSlopes, x: Tensor, which: int) -> None:
        """Sums of columns and of rows for diagonals that are learned, to the slopes (0) or the sizes (1)."""
        for side, dims in ((0, (1, 4)), (1, (2, 3))):
            if not (self.each.diagonal[side] and self.each.learned[side]):
                continue
            first = 0
            for region, part in self.piece.slices:
                segment = (region.rows, region.columns)[side]
                grid = x[first : first + part.total].view(
                    part.entries, part.panels, part.tiles, self.each.rows, self.each.columns
                )
                sums = grid.sum(dims).flatten(1)
                q = (part.i, part.j)[side]
                begin = segment.start + q * segment.size
                own = found.diagonals[segment.side, region.layer][which]
                own = own[region.batch].view(region.entries, -1)[part.e : part.e + part.entries]
                own[:, begin : begin + sums.shape[1]].add_(sums)
                first += part.total
