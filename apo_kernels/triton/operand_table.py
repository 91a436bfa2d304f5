"""The one table that changes from step to step: where every operand of every layer lies."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apo_kernels.triton.layers import LayerLayout, View
from apo_kernels.triton.table_layout import Column, Role

__all__ = ["Made", "OperandTable"]

_WORKSPACE = -1
"""Among the tensors: the last one."""


class Made:
    """What lies in the workspace in place of a layer's operands: packed copies, intermediates, parts of sums."""

    def __init__(self) -> None:
        self.packed: dict[Role, tuple[int, int, int]] = {}
        """Offset in bytes, pitch and square stride by role."""
        self.parts: dict[Role, tuple[int, int]] = {}
        """Offset in bytes and size in elements of the first of the parts that a derivative is written as."""


class OperandTable:
    """The operands' table of all layers, ``[layers, ROLES, COLUMNS]``, and after it single addresses, by index."""

    def __init__(self, layers: Sequence[LayerLayout], made: Sequence[Made], single: Sequence[View | int]) -> None:
        self._values: list[int] = []
        self._moving: list[tuple[int, int, int]] = []  # where in the table, which tensor, byte offset in it
        for layer, own in zip(layers, made, strict=True):
            for role in Role:
                self._values += self._row(role, layer, own)
        for place in single:
            self._move(len(self._values), place)
            self._values.append(0)

    @staticmethod
    def first_single(layers: int) -> int:
        """The index of the first single address behind the table of ``layers`` layers."""
        return layers * len(Role) * len(Column)

    def _row(self, role: Role, layer: LayerLayout, own: Made) -> list[int]:
        row = [0] * len(Column)
        if role in own.packed:
            offset, row[Column.ROW], row[Column.SQUARE] = own.packed[role]
            row[Column.COL] = 1
            self._move(len(self._values), offset)
            return row
        if role not in layer.views:
            return row
        view = layer.views[role]
        row[Column.ROW], row[Column.COL], row[Column.SQUARE] = view.row, view.col, view.square
        if role in own.parts:
            offset, row[Column.PART] = own.parts[role]
            self._move(len(self._values), offset)
        else:
            self._move(len(self._values), view)
        return row

    def _move(self, at: int, place: View | int) -> None:
        tensor, offset = (place.tensor, place.offset) if isinstance(place, View) else (_WORKSPACE, place)
        self._moving.append((at, tensor, offset))

    @cached_property
    def _arrays(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return np.array(self._values, np.int64), np.array(self._moving, np.int64).reshape(-1, 3)

    def fill(self, pointers: Sequence[int]) -> NDArray[np.int64]:
        """The table for tensors that lie at ``pointers``, the last of them the workspace."""
        values, moving = self._arrays
        filled: NDArray[Any] = values.copy()
        filled[moving[:, 0]] = np.array(pointers, np.int64)[moving[:, 1]] + moving[:, 2]
        return filled
