"""Where the tiles of a model's matrices lie: what is known of them before any number is.

The squares of A and B cut a layer's matrix into tiles, and tile by tile ``P(G)`` is a product of small matrices. Tiles
of one shape, of all layers, form a *class*: one contiguous stack that a batched product takes at once. A *region* is a
grid of tiles of one layer, ordered panel by panel: tiles that share the square of their columns follow each other.

A tile that is taller than wide is stored transposed, with A and B in each other's place, because BLAS is slow at such
products: a class has a *left* and a *right* side rather than B and A.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from apo_kernels.aten.operators import ALIGNMENT
from apo_kernels.blocks import block_count, is_stack

WORTH = 2**14
"""Elements of a piece from which on its operations cost little beside its arithmetic."""
__all__ = ["DIAGONAL", "LARGE", "GridRun", "Piece", "Region", "Segment", "Slice", "TileClass", "Window", "classes_of"]

DIAGONAL = 1024
"""Entries of a diagonal that one tile takes at most."""
LARGE = 2**15
"""Elements of a tile from which on it is multiplied on its own."""


class Segment(NamedTuple):
    """Squares of equal side along a side of a matrix, or pieces of its diagonal.

    Attributes:
        side: ``"A"`` or ``"B"``.
        start: where the first of them begins.
        size, squares: the side of the squares, and how many they are.
        diagonal: whether they are pieces of a diagonal.
        square: number of the first in its stack.
        kind: side of the block's squares, and its dtype: squares of one kind are held together.
    """

    side: str
    start: int
    size: int
    squares: int
    diagonal: bool
    square: int
    kind: tuple[int, torch.dtype]


class Slice(NamedTuple):
    """A part of a region whose tiles follow each other: batch entries, panels and tiles of a panel."""

    e: int
    entries: int
    j: int
    panels: int
    i: int
    tiles: int

    @property
    def total(self) -> int:
        return self.entries * self.panels * self.tiles


class Window(NamedTuple):
    """How a piece of a layer's matrix, or of one of its parts, lies in that and in the tiles of its class."""

    layer: int
    part: int
    size: tuple[int, ...]
    batch: tuple[int, ...]
    row: int
    column: int
    panel_step: int
    tile_step: int
    transposed: bool
    tile: int
    tile_steps: tuple[int, int, int]
    tile_row: int
    tile_column: int
    alone: bool

    def of(self, x: Tensor) -> Tensor:
        """The view ``(entries, panels, tiles, rows, columns)`` of the layer's matrix or part, or, where that lies in
        one tile, all of it as it is."""
        if self.alone:
            return x.mT if self.transposed else x
        strides = x.stride()
        down, right = strides[-2:]
        offset = x.storage_offset() + self.row * down + self.column * right
        entry = 0
        if len(strides) > 2:
            entry = strides[-3]
            for i, stride in zip(self.batch, strides, strict=False):
                offset += i * stride
        if self.transposed:
            down, right = right, down
        return x.as_strided(self.size, (entry, self.panel_step * right, self.tile_step * down, down, right), offset)

    def in_tiles(self, tiles: Tensor, first: int = 0) -> Tensor:
        """The same view of a stack of tiles, of which the class's tile ``first`` is the first."""
        apart, down, _ = tiles.stride()
        offset = tiles.storage_offset() + (self.tile - first) * apart + self.tile_row * down + self.tile_column
        if self.alone:
            return tiles.as_strided(self.size, (down, 1), offset)
        entry, panel, tile = self.tile_steps
        return tiles.as_strided(self.size, (entry * apart, panel * apart, tile * apart, down, 1), offset)


@dataclass
class Region:
    """Tiles of one layer: ``entries`` of its batch × panels × tiles of a panel.

    Attributes:
        batch: the index of all dimensions of the batch but the last.
        number: of that index, of ``all_entries`` of the batch in all.
        single: whether it holds all rows of a matrix that isn't a batch, in one tile each.
    """

    layer: int
    batch: tuple[int, ...]
    entries: int
    rows: Segment
    columns: Segment
    transposed: bool
    number: int
    all_entries: int
    single: bool
    first: int = 0

    @property
    def whole(self) -> Slice:
        return Slice(0, self.entries, 0, self.columns.squares, 0, self.rows.squares)

    def entry(self, e: int) -> int:
        """The number of an entry in the whole batch."""
        return self.number * self.entries + e

    def tile(self, e: int, j: int, i: int) -> int:
        return self.first + (e * self.columns.squares + j) * self.rows.squares + i

    def slices(self, most: int) -> Iterator[Slice]:
        """In parts of at most ``most`` tiles."""
        panels, tiles = self.columns.squares, self.rows.squares
        if self.whole.total <= most:
            yield self.whole
        elif panels * tiles <= most:
            step = most // (panels * tiles)
            for e in range(0, self.entries, step):
                yield Slice(e, min(step, self.entries - e), 0, panels, 0, tiles)
        elif tiles <= most:
            step = most // tiles
            for e, j in product(range(self.entries), range(0, panels, step)):
                yield Slice(e, 1, j, min(step, panels - j), 0, tiles)
        else:
            for e, j, i in product(range(self.entries), range(panels), range(0, tiles, most)):
                yield Slice(e, 1, j, 1, i, min(most, tiles - i))

    def windows(self, widths: Sequence[int], part: Slice | None = None) -> Iterator[Window]:
        """Of parts of these widths, which lie side by side: an only one is the matrix itself."""
        part = part or self.whole
        begin = 0
        for k, width in enumerate(widths):
            yield from self._windows(k, begin, begin + width, part)
            begin += width

    def _windows(self, k: int, begin: int, end: int, part: Slice) -> Iterator[Window]:
        """Squares that lie in the columns from ``begin`` to ``end``, and pieces of those that reach beyond them."""
        segment = self.rows if self.transposed else self.columns
        first = part.i if self.transposed else part.j
        beyond = first + (part.tiles if self.transposed else part.panels)
        size, start = segment.size, segment.start
        low, high = max(first, -(-(begin - start) // size)), min(beyond, (end - start) // size)
        if low < high:
            yield self._window(k, begin, end, part, low, high - low, 0, size)
        for q in sorted({(begin - start) // size, (end - start) // size}):
            if first <= q < beyond and not low <= q < high:
                left, right = max(begin, start + q * size), min(end, start + (q + 1) * size)
                if left < right:
                    yield self._window(k, begin, end, part, q, 1, left - start - q * size, right - left)

    def _window(self, k: int, begin: int, end: int, part: Slice, q: int, squares: int, cut: int, width: int) -> Window:
        rows, columns, transposed = self.rows, self.columns, self.transposed
        j, i, panels, tiles, r, c = part.j, part.i, part.panels, part.tiles, rows.size, columns.size
        if transposed:
            i, tiles, r = q, squares, width
        else:
            j, panels, c = q, squares, width
        down, right = rows.start + i * rows.size, columns.start + j * columns.size
        if transposed:
            down, right = right, down
        alone = self.single and width == end - begin
        return Window(
            layer=self.layer,
            part=k,
            size=(r, c) if alone else (part.entries, panels, tiles, r, c),
            batch=(*self.batch, part.e),
            row=down,
            column=right + cut - begin,
            panel_step=columns.size,
            tile_step=rows.size,
            transposed=transposed,
            tile=self.tile(part.e, j, i),
            tile_steps=(columns.squares * rows.squares, rows.squares, 1),
            tile_row=cut if transposed else 0,
            tile_column=0 if transposed else cut,
            alone=alone,
        )


class GridRun(NamedTuple):
    """Tiles of a piece, from ``first`` on, in ``grids`` grids of ``panels`` panels of ``tiles`` tiles."""

    first: int
    grids: int
    panels: int
    tiles: int

    @property
    def total(self) -> int:
        return self.grids * self.panels * self.tiles


@dataclass
class Piece:
    """Tiles of a class that are worked on at a time: as many as stay in the cache."""

    first: int
    count: int
    slices: list[tuple[Region, Slice]]

    @property
    def runs(self) -> list[GridRun]:
        found: list[GridRun] = []
        first = 0
        for _, part in self.slices:
            form = part.panels, part.tiles
            if found and found[-1][2:] == form:
                found[-1] = found[-1]._replace(grids=found[-1].grids + part.entries)
            else:
                found.append(GridRun(first, part.entries, *form))
            first += part.total
        return found


@dataclass
class TileClass:
    """Tiles of one shape whose sides are of one kind.

    Attributes:
        rows, columns: of a tile.
        diagonal: whether the left and the right side are diagonals.
        learned: whether derivatives of the left and the right side are wanted.
        large: whether its tiles are multiplied one by one.
    """

    rows: int
    columns: int
    diagonal: tuple[bool, bool]
    learned: tuple[bool, bool]
    large: bool
    regions: list[Region] = field(default_factory=list)
    count: int = 0

    def add(self, region: Region) -> None:
        region.first = self.count
        self.count += region.whole.total
        self.regions.append(region)

    @property
    def stride(self) -> tuple[int, int, int]:
        """Of a stack of its tiles; the rows of large ones are aligned."""
        down = block_count(self.columns, ALIGNMENT) * ALIGNMENT if self.large else self.columns
        return self.rows * down, down, 1

    def of(self, flat: Tensor, count: int) -> Tensor:
        """The first elements of a buffer as ``count`` tiles."""
        return flat.as_strided((count, self.rows, self.columns), self.stride, flat.storage_offset())

    def pieces(self, elements: int) -> list[Piece]:
        """In pieces of about ``elements`` elements."""
        most = 1 if self.large else max(elements // (self.rows * self.columns), 1)
        found: list[Piece] = []
        for region in self.regions:
            for part in region.slices(most):
                if not found or found[-1].count + part.total > most or self._apart(found[-1], part):
                    found.append(Piece(region.tile(part.e, part.j, part.i), 0, []))
                found[-1].slices.append((region, part))
                found[-1].count += part.total
        return found

    def _apart(self, piece: Piece, part: Slice) -> bool:
        """Whether a grid of another form comes on its own: where the tiles of a panel are multiplied as one matrix, and
        where each is worth its operations."""
        last = piece.slices[-1][1]
        same = (last.panels, last.tiles) == (part.panels, part.tiles)
        worth = min(piece.count, part.total) * self.rows * self.columns >= WORTH
        return not same and (worth or (last.tiles != part.tiles and not self.diagonal[1]))


def classes_of(
    As: Sequence[Tensor], Bs: Sequence[Tensor], Ss: Sequence[Tensor], learned: Sequence[str]
) -> list[TileClass]:
    """The classes of a model's tiles."""
    found: dict[tuple[object, ...], TileClass] = {}
    for layer, (A, B, S, letters) in enumerate(zip(As, Bs, Ss, learned, strict=True)):
        *batch, m, n = S.shape
        entries = batch.pop() if batch else 1
        for number, before in enumerate(product(*map(range, batch))):
            for rows, columns in product(_segments("B", B, S, m), _segments("A", A, S, n)):
                single = S.ndim == 2 and rows.size == m and columns.squares == 1
                region = _region(layer, before, entries, rows, columns, number, entries * math.prod(batch), single)
                rows, columns = region.rows, region.columns
                form = (
                    rows.size,
                    columns.size,
                    (rows.diagonal, columns.diagonal),
                    (rows.side in letters, columns.side in letters),
                    rows.size * columns.size >= LARGE and not rows.diagonal and not columns.diagonal,
                )
                key = form, rows.kind, columns.kind
                if key not in found:
                    found[key] = TileClass(*form)
                if entries:
                    found[key].add(region)
    # in an order of their own, because what a square's tiles add to it is summed class by class
    return [found[key] for key in sorted(found, key=str) if found[key].count]


def _region(
    layer: int,
    batch: tuple[int, ...],
    entries: int,
    rows: Segment,
    columns: Segment,
    number: int,
    all_entries: int,
    single: bool,
) -> Region:
    small = rows.size * columns.size < LARGE
    transposed = small and rows.size > columns.size and not rows.diagonal
    if transposed:
        rows, columns = columns, rows
    return Region(layer, batch, entries, rows, columns, transposed, number, all_entries, single)


def _segments(side: str, block: Tensor, S: Tensor, length: int) -> Iterator[Segment]:
    """Whole squares, and the rest of the side."""
    stack = is_stack(block, S)
    b = block.shape[-1] if stack else length
    diagonal = stack and b == 1
    if diagonal:
        b = min(length, DIAGONAL)
    if not length:
        return
    whole, rest = divmod(length, b)
    kind = (1 if diagonal else block.shape[-1]), block.dtype
    if whole:
        yield Segment(side, 0, b, whole, diagonal, 0, kind)
    if rest:
        yield Segment(side, whole * b, rest, 1, diagonal, whole, kind)
