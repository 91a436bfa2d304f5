"""Tiles of a bound model's layers, for :mod:`apo_kernels.triton.tile_model` and :mod:`apo_kernels.triton.tile_slopes`:
where one lies, and its loads and stores.

**Parts.** A layer's gradient and weight lie in two places, its weight's and its bias', whose column comes last. A tile
takes the columns below ``n1`` from the one and the last one from the other, so that the weight's can be moved 16 bytes
at a time though the layer has an odd number of columns. The scaling and the momentum, one matrix each, are read as the
same two parts.
"""

from __future__ import annotations

import triton
import triton.language as tl

from apo_kernels.triton.primitives import (
    COLUMNS,
    LAYER_FIELDS,
    ROLES,
    UNIT,
    load_squares,
    load_tile,
    matrix,
    operand,
    storable,
    store_tile,
)
from apo_kernels.triton.table_layout import LayerField, ModelField

_M, _N, _N1 = (tl.constexpr(int(x)) for x in (LayerField.M, LayerField.N, ModelField.N1))
_SIDE_B, _SIDE_A = tl.constexpr(int(LayerField.SIDE_B)), tl.constexpr(int(LayerField.SIDE_A))
_GROUP_B, _GROUP_A = tl.constexpr(int(LayerField.GROUP_B)), tl.constexpr(int(LayerField.GROUP_A))


@triton.jit
def tile_of(layers, layer, i, j, WIDE_MATRICES: tl.constexpr):
    """Where tile ``(i, j)`` of a layer begins and how far it reaches; ``part``: so many of its columns are the
    weight's. Worked out as in ``tile.place``: one function for both made ``tile_keep`` spill on sm_80."""
    shape = layers + layer * LAYER_FIELDS
    first_B, first_A = i * tl.load(shape + _GROUP_B), j * tl.load(shape + _GROUP_A)
    side_B, side_A = tl.load(shape + _SIDE_B), tl.load(shape + _SIDE_A)
    row0, col0 = first_B * side_B, first_A * side_A
    rows = tl.minimum(tl.load(shape + _M) - row0, side_B * tl.load(shape + _GROUP_B)).to(tl.int32)
    cols = tl.minimum(tl.load(shape + _N) - col0, side_A * tl.load(shape + _GROUP_A)).to(tl.int32)
    part = tl.minimum(tl.load(shape + _N1) - col0, cols).to(tl.int32)
    if WIDE_MATRICES:
        col0, part = tl.multiple_of(col0, UNIT), tl.multiple_of(part, UNIT)
    return first_B, first_A, side_B, side_A, row0, col0, rows, cols, part


@triton.jit
def raised(cols, WIDE: tl.constexpr):
    """``cols``, if ``WIDE`` up to the next multiple of 8: as far as a matrix with padded rows can be used."""
    if WIDE:
        return (cols + (UNIT - 1)) // UNIT * UNIT
    return cols


@triton.jit
def own_matrix(base, operands, layer, role, WIDE: tl.constexpr):
    """``(pointer, row stride)`` of a float32 matrix in the kernels' own memory at ``base``."""
    entry = operands + (layer * ROLES + role) * COLUMNS
    offset, row = tl.load(entry), tl.load(entry + 1)
    if WIDE:
        offset, row = offset // UNIT * UNIT, row // UNIT * UNIT
    return base + offset, row


@triton.jit
def load_own(base, operands, layer, role, row0, col0, rows, cols, R: tl.constexpr, C: tl.constexpr, WIDE: tl.constexpr):
    """A tile of a matrix in the kernels' own memory."""
    pointer, row = own_matrix(base, operands, layer, role, WIDE)
    one = tl.full((), 1, tl.int64)
    x = load_tile(pointer, row, one, row0, col0, rows, raised(cols, WIDE), R, C, WIDE)
    if WIDE:  # its pad may hold anything
        return tl.where((tl.arange(0, C) < cols)[None, :], x, 0.0)
    return x


@triton.jit
def store_own(
    base, operands, layer, role, row0, col0, rows, cols, x, R: tl.constexpr, C: tl.constexpr, WIDE: tl.constexpr
):
    """A tile into a matrix in the kernels' own memory; ``WIDE``: and zeros into its pad, up to a multiple of 8."""
    pointer, row = own_matrix(base, operands, layer, role, WIDE)
    one = tl.full((), 1, tl.int64)
    store_tile(pointer, row, one, row0, col0, rows, raised(cols, WIDE), x, tl.float32, R, C, WIDE)


@triton.jit
def load_column(pointer, row_stride, row0, rows, is_there, R: tl.constexpr):
    r = tl.arange(0, R)
    offset = row0 * row_stride + r * row_stride.to(tl.int32)
    return tl.load(pointer + offset, mask=(r < rows) & is_there, other=0)


@triton.jit
def store_column(
    pointer, row_stride, row0, rows, is_there, at, x, TYPE: tl.constexpr, R: tl.constexpr, C: tl.constexpr
):
    """Column ``at`` of ``x``."""
    r = tl.arange(0, R)
    column = tl.sum(tl.where((tl.arange(0, C) == at)[None, :], x, 0.0), axis=1)
    offset = row0 * row_stride + r * row_stride.to(tl.int32)
    tl.store(pointer + offset, storable(column, TYPE), mask=(r < rows) & is_there)


@triton.jit
def joined(x, column, at, C: tl.constexpr):
    """``x`` with its column ``at`` replaced."""
    return tl.where((tl.arange(0, C) == at)[None, :], column[:, None], x)


@triton.jit
def load_parts(
    operands, layer, role, role_bias, row0, col0, rows, cols, part,
    TYPE: tl.constexpr, TYPE_BIAS: tl.constexpr, TO: tl.constexpr, R: tl.constexpr, C: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A tile of a matrix in two parts, either of which may be missing (its address is 0): zeros then."""
    p, pr, pc = matrix(operands, layer, role, TYPE, WIDE)
    reach = tl.where(p.to(tl.int64) != 0, part, 0)
    if WIDE:
        reach = reach // UNIT * UNIT
    x = operand(load_tile(p, pr, pc, row0, col0, rows, reach, R, C, WIDE), TO)
    q, qr, _ = matrix(operands, layer, role_bias, TYPE_BIAS, False)
    column = load_column(q, qr, row0, rows, (cols > part) & (q.to(tl.int64) != 0), R)
    return joined(x, operand(column, TO), part, C)


@triton.jit
def store_parts(
    operands, layer, role, role_bias, row0, col0, rows, cols, part, x,
    TYPE: tl.constexpr, TYPE_BIAS: tl.constexpr, R: tl.constexpr, C: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A tile into a matrix in two parts, into those that are there."""
    p, pr, pc = matrix(operands, layer, role, TYPE, WIDE)
    reach = tl.where(p.to(tl.int64) != 0, part, 0)
    if WIDE:
        reach = reach // UNIT * UNIT
    store_tile(p, pr, pc, row0, col0, rows, reach, x, TYPE, R, C, WIDE)
    q, qr, _ = matrix(operands, layer, role_bias, TYPE_BIAS, False)
    there = (cols > part) & (q.to(tl.int64) != 0)
    store_column(q, qr, row0, rows, there, part, x, TYPE_BIAS, R, C)


@triton.jit
def load_split(
    pointer, row, col, row0, col0, rows, cols, part, is_there, R: tl.constexpr, C: tl.constexpr, WIDE: tl.constexpr
):
    """A tile of one matrix, in float32, read in the two parts of its layer; zeros if it isn't there."""
    reach = tl.where(is_there, part, 0)
    if WIDE:
        reach = reach // UNIT * UNIT
    x = load_tile(pointer, row, col, row0, col0, rows, reach, R, C, WIDE).to(tl.float32)
    column = load_column(pointer + (col0 + part) * col, row, row0, rows, (cols > part) & is_there, R)
    return joined(x, column.to(tl.float32), part, C)


@triton.jit
def load_diagonal(
    pointer, row, col, square, side, first, col0, limit, R: tl.constexpr, C: tl.constexpr, WIDE: tl.constexpr
):
    """:func:`load_squares`; ``WIDE``: there is one square, which may be read whole: what isn't wanted of it is zeroed
    afterwards."""
    if WIDE:
        x = load_squares(pointer, row, col, square, side, first, col0, raised(limit, True), R, C, True)
        inside = (tl.arange(0, R) < limit)[:, None] & (col0 + tl.arange(0, C) < limit)[None, :]
        return tl.where(inside, x, tl.zeros((R, C), x.dtype))
    return load_squares(pointer, row, col, square, side, first, col0, limit, R, C, False)
