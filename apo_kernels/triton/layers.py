"""How the layers of a call lie in memory: batches taken apart, blocks read as squares, sides turned where wanted.

Plain arithmetic on shapes and strides; no tensor's data is looked at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

from apo_kernels.blocks import block_count, is_stack, width
from apo_kernels.triton.errors import Unserved
from apo_kernels.triton.table_layout import ALIGN, Role

__all__ = ["BLOCKS", "BlockLayout", "LayerLayout", "View", "layers_of", "padded", "squares_of", "turns", "view_of"]

_STRIDE_LIMIT = 2**24
"""Of the sum of the strides: offsets within a tile of 128 by 128 are computed in int32."""

BLOCKS = (Role.A, Role.B, Role.DA, Role.DB)
_TURNED = {Role.A: Role.B, Role.B: Role.A, Role.DA: Role.DB, Role.DB: Role.DA}


def padded(side: int) -> int:
    """``side``, up to the next multiple of :data:`ALIGN`."""
    return block_count(side, ALIGN) * ALIGN


class View(NamedTuple):
    """A matrix (or a stack of squares) inside one of the call's tensors: strides in elements."""

    tensor: int
    dtype: torch.dtype
    offset: int
    row: int
    col: int
    square: int
    aligned: bool  # its first element, to 16 bytes

    @property
    def wide(self) -> bool:
        """Whether it can be moved 16 bytes at a time, from any multiple of :data:`ALIGN` columns on."""
        return self.aligned and self.col == 1 and self.row % ALIGN == 0 and self.square % ALIGN == 0


@dataclass(frozen=True)
class BlockLayout:
    """A block as squares: ``count`` of side ``side`` along a diagonal of ``length``, taken ``group`` at a time."""

    length: int
    side: int
    count: int
    group: int = 1

    @property
    def pitch(self) -> int:
        """The padded side of the widest group."""
        return padded(min(self.group * self.side, self.length))

    @property
    def groups(self) -> int:
        return block_count(self.count, self.group)

    def start(self, q: int) -> int:
        """Where group ``q`` begins on the diagonal."""
        return q * self.group * self.side

    def extent(self, q: int) -> int:
        """The true side of group ``q``."""
        return min(self.group * self.side, self.length - self.start(q))

    def grouped_for_tile(self, limit: int) -> BlockLayout:
        """As many squares side by side as a tile of side ``limit`` holds."""
        return BlockLayout(self.length, self.side, self.count, min(max(1, limit // self.side), self.count))

    def grouped_for_gemm(self) -> BlockLayout:
        """So many at a time that a group begins at a multiple of :data:`ALIGN` and isn't narrower than a tile."""
        step = ALIGN // gcd(self.side, ALIGN)
        wanted = step * block_count(64, self.side * step) if self.side < 64 else step
        return BlockLayout(self.length, self.side, self.count, min(wanted, self.count))


@dataclass(frozen=True)
class LayerLayout:
    """One matrix: ``m × n``, ``B`` and ``A`` as squares, and where each operand lies.

    A turned layer is the problem ``P(Gᵀ; B, A, Sᵀ) = P(G; A, B, S)ᵀ``: the same chain with ``B``'s side first.
    """

    m: int
    n: int
    B: BlockLayout
    A: BlockLayout
    views: Mapping[Role, View]


def turns(G: Tensor, A: Tensor, B: Tensor) -> bool:
    """Whether ``B`` is the wider side, as :mod:`apo_kernels.aten` has it where derivatives follow."""
    m, n = G.shape[-2:]
    return width(B, G, m) > width(A, G, n)


def layers_of(operands: Mapping[Role, Sequence[Tensor]], *, turn: bool) -> list[LayerLayout]:
    """The matrices of the call, each entry of a batch one; empty ones left out.

    Args:
        operands: the tensors by role, lists of equal length. A view's ``tensor`` counts through them role by role.
        turn: turn the layers that :func:`turns` names. Their blocks change roles, and so do the blocks' dtypes.
    """
    length = len(operands[Role.G])
    layers: list[LayerLayout] = []
    for i in range(length):
        G, A, B = (operands[role][i] for role in (Role.G, Role.A, Role.B))
        m, n = G.shape[-2:]
        if G.numel() == 0:
            continue
        squares = {Role.A: squares_of(A, G, n), Role.B: squares_of(B, G, m)}
        turned = turn and turns(G, A, B)
        for index in product(*(range(size) for size in G.shape[:-2])):
            views = {}
            for position, (role, tensors) in enumerate(operands.items()):
                view = view_of(tensors[i], position * length + i, index, role in BLOCKS and is_stack(tensors[i], G))
                if turned and role not in BLOCKS:
                    view = view._replace(row=view.col, col=view.row)
                views[_TURNED.get(role, role) if turned else role] = view
            if turned:
                layers.append(LayerLayout(n, m, squares[Role.A], squares[Role.B], views))
            else:
                layers.append(LayerLayout(m, n, squares[Role.B], squares[Role.A], views))
    return layers


def squares_of(block: Tensor, G: Tensor, length: int) -> BlockLayout:
    if is_stack(block, G):
        return BlockLayout(length, block.shape[-1], block.shape[-3])
    return BlockLayout(length, length, 1)


def view_of(x: Tensor, tensor: int, index: tuple[int, ...], stacked: bool) -> View:
    element = sum(at * stride for at, stride in zip(index, x.stride(), strict=False))
    offset = element * x.element_size()
    row, col = x.stride()[-2:]
    inner = 3 if stacked else 2
    reach = sum(stride for stride, size in zip(x.stride()[-inner:], x.shape[-inner:], strict=True) if size > 1)
    if reach >= _STRIDE_LIMIT:
        raise Unserved(f"triton serves matrices whose strides sum up to less than 2**24, but one has {x.stride()}")
    aligned = (x.data_ptr() + offset) % 16 == 0
    return View(tensor, x.dtype, offset, row, col, x.stride()[-3] if stacked else 0, aligned)
