"""How the layers of a whole model lie: what is laid down when a preconditioner is bound, and where results go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from apo_kernels.blocks import is_stack
from apo_kernels.triton import config
from apo_kernels.triton import plan as plans
from apo_kernels.triton.errors import Unserved
from apo_kernels.triton.layers import BlockLayout, View, padded, squares_of, view_of
from apo_kernels.triton.plan_builder import to_device
from apo_kernels.triton.table_layout import ALIGN, Column, LayerField, ModelField, ModelRole, Role

__all__ = ["BLOCKS", "Layout", "Matrix", "ModelLayers", "batch_strides", "contiguous", "lay"]

Tensors = Sequence[Tensor]

BLOCKS = (ModelRole.A, ModelRole.B)


@dataclass(frozen=True)
class Matrix:
    """One matrix of a layer (a batch has several), with its blocks as squares that tiles take together."""

    layer: int
    index: tuple[int, ...]
    m: int
    n: int
    n1: int
    B: BlockLayout
    A: BlockLayout
    views: dict[ModelRole, View]
    pitch_S: int
    offset: int = 0

    @property
    def pitch(self) -> int:
        return padded(self.n)


class ModelLayers:
    """The layers of a preconditioner.

    Attributes:
        matrices: of all layers in turn; ``of_layer`` says which are a layer's.
        wide: the layers with squares wider than a tile.
        flat_size: how many elements a piece of memory with a matrix of each has.
        shapes, static: the tables of shapes, on the device, and of addresses, as far as it doesn't change.
    """

    def __init__(
        self,
        precision: str | None,
        As: Tensors,
        Bs: Tensors,
        Ss: Tensors,
        widths: Sequence[tuple[int, ...]],
        learned: Sequence[str],
    ) -> None:
        self.As, self.Bs, self.Ss, self.widths, self.learned = As, Bs, Ss, widths, learned
        self.precision = precision
        self.device = Ss[0].device if Ss else torch.device("cpu")
        self.target = plans.target_of(self.device)
        self.limit = config.tile_limit(self.target, torch.float32, backward=False)
        self.matrices: list[Matrix] = []
        self.of_layer: list[list[int]] = [[] for _ in Ss]
        self.wide: set[int] = set()
        self.flat_size = 0
        for i, (A, B, S) in enumerate(zip(As, Bs, Ss, strict=True)):
            self._add(i, A, B, S)
        self.layer_of = np.array([each.layer for each in self.matrices], np.int64)
        self.static = self._static_table()
        self._hosts: list[Tensor] = []
        self.shapes = self.table(self._shape_rows(), np.int64)

    def _add(self, i: int, A: Tensor, B: Tensor, S: Tensor) -> None:
        own = self.widths[i]
        if len(own) == 2 and own[1] != 1:
            raise Unserved(f"triton serves a weight and a bias of width 1, but widths[{i}] is {own}")
        if S.dtype == torch.float64:
            raise TypeError("backend triton serves float32, bfloat16 and float16, but Ss has float64 entries")
        if not S.numel():
            return
        m, n = S.shape[-2:]
        squares = [squares_of(X, S, side) for X, side in ((B, m), (A, n))]
        if any(each.side > self.limit for each in squares):
            self.wide.add(i)
        pitch = S.stride(-2) if S.stride(-1) == 1 and n <= S.stride(-2) < n + ALIGN else n
        for x in (A, B, S):
            if x.data_ptr() == 0 or x.is_neg():
                raise TypeError(f"backend triton needs blocks that lie in memory as they are, but a {type(x).__name__}")
        for index in product(*(range(size) for size in S.shape[:-2])):
            views = {
                role: view_of(x, i, index, role in BLOCKS and is_stack(x, S))
                for role, x in ((ModelRole.A, A), (ModelRole.B, B), (ModelRole.S, S))
            }
            B_squares, A_squares = (each.grouped_for_tile(self.limit) for each in squares)
            self.of_layer[i].append(len(self.matrices))
            self.matrices.append(Matrix(i, index, m, n, own[0], B_squares, A_squares, views, pitch, self.flat_size))
            self.flat_size += m * padded(n)

    def _static_table(self) -> NDArray[np.int64]:
        table = np.zeros((max(1, len(self.matrices)), len(Role), len(Column)), np.int64)
        for at, each in enumerate(self.matrices):
            blocks = {
                ModelRole.A: self.As[each.layer], ModelRole.B: self.Bs[each.layer], ModelRole.S: self.Ss[each.layer]
            }  # fmt: skip
            for role, x in blocks.items():
                lay(table[at, role], each.views[role])
                table[at, role, Column.ADDRESS] = x.data_ptr() + each.views[role].offset
            for role in (ModelRole.P, ModelRole.M):
                table[at, role, Column.ADDRESS], table[at, role, Column.ROW] = each.offset, each.pitch
        return table

    def _shape_rows(self) -> list[list[int]]:
        rows = []
        for each in self.matrices:
            row = [0] * len(LayerField)
            row[LayerField.M], row[LayerField.N], row[ModelField.N1] = each.m, each.n, each.n1
            row[LayerField.SIDE_B], row[LayerField.GROUP_B], row[LayerField.COUNT_B] = (
                each.B.side, each.B.group, each.B.count
            )  # fmt: skip
            row[LayerField.SIDE_A], row[LayerField.GROUP_A], row[LayerField.COUNT_A] = (
                each.A.side, each.A.group, each.A.count
            )  # fmt: skip
            rows.append(row)
        return rows or [[0] * len(LayerField)]

    def table(self, rows: Sequence[Sequence[int]] | NDArray[Any], dtype: Any) -> Tensor:
        host, table = to_device(np.array(rows, dtype), self.device)
        if plans._capturing(self.device):
            self._hosts.append(host)  # a replay copies from there again
        return table

    def views(self, i: int, flat: Tensor) -> Tensor:
        """A layer's matrices in a flat piece of memory."""
        shape = self.Ss[i].shape
        if not self.of_layer[i]:
            return flat.new_zeros(shape)
        first = self.matrices[self.of_layer[i][0]]
        strides = *batch_strides(shape[:-2], first.m * first.pitch), first.pitch, 1
        return flat[first.offset :].as_strided(shape, strides)


class Layout:
    """Offsets in elements of what slopes are written to: the results, and behind them parts of sums."""

    def __init__(self) -> None:
        self.size = 0
        self._behind = 0

    @staticmethod
    def rounded(count: int) -> int:
        return -(-count // ALIGN) * ALIGN

    def take(self, count: int) -> int:
        start = self.size
        self.size += self.rounded(count)
        return start

    def later(self, count: int) -> int:
        """Room for parts: a negative number until :meth:`settle`."""
        self._behind += self.rounded(count)
        return -self._behind

    def settle(self, table: NDArray[np.int64], jobs: list[tuple[int, ...]]) -> None:
        """Put the parts behind what was taken."""
        end = self.size + self._behind
        for role in (ModelRole.DA, ModelRole.DB, ModelRole.SIZE_A, ModelRole.SIZE_B):
            column = table[:, role, Column.ADDRESS]
            column[column < 0] += end
        jobs[:] = [(start + end if start < 0 else start, *rest) for start, *rest in jobs]
        self.size = end


def lay(entry: NDArray[np.int64], view: View) -> None:
    entry[Column.ROW], entry[Column.COL], entry[Column.SQUARE] = view.row, view.col, view.square


def contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    return (*batch_strides(shape[:-1], shape[-1]), 1)


def batch_strides(shape: Sequence[int], apart: int) -> tuple[int, ...]:
    strides = []
    for size in reversed(shape):
        strides.append(apart)
        apart *= size
    return tuple(reversed(strides))
