"""A tile of the grouped GEMM (:mod:`apo_kernels.triton.gemm`): where it lies, its product, and an epilogue's loads and
stores.

**Addresses.** A tile's base is computed in int64; offsets within it are int32, and no tile spans 2³¹ elements. Sides
come from the tables in units of 8, so the compiler knows them to be multiples and moves 16 bytes at a time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from apo_kernels.triton.primitives import (
    AMAX_CHUNK,
    INTERPRETED,
    LAYER_FIELDS,
    PROBLEM_FIELDS,
    UNIT,
    load_tile,
    matrix,
    operand,
    packed,
    power_of_two,
    stack,
    storable,
    store_squares,
    store_tile,
)
from apo_kernels.triton.table_layout import LayerField, ProblemField, Role

_LAYER, _KIND, _SQUARE = (tl.constexpr(int(f)) for f in (ProblemField.LAYER, ProblemField.KIND, ProblemField.SQUARE))
_ROWS, _COLS = tl.constexpr(int(ProblemField.ROWS)), tl.constexpr(int(ProblemField.COLS))
_DEPTH = tl.constexpr(int(ProblemField.DEPTH))
_ROW0, _COL0 = tl.constexpr(int(ProblemField.ROW0)), tl.constexpr(int(ProblemField.COL0))
_M, _N, _AMAX_S = (tl.constexpr(int(field)) for field in (LayerField.M, LayerField.N, LayerField.AMAX_S))
_S = tl.constexpr(int(Role.S))


class TilePlace(NamedTuple):
    """A program's tile of a product ``rows × cols`` of ``depth``, and where it lies in a matrix of its layer.

    Attributes:
        layer, kind: whose product it is, and which of its launch's, a :class:`Kind`.
        square: of ``A`` or ``B``, the one that the product takes.
        row0, col0: where the product begins in an ``m × n`` matrix.
        row, col: the tile's corner in the product.
        top, left: its corner in the matrix.
        rows, cols, depth: the product's sides, pads included.
        true_rows, true_cols: what the product has from the corner on, pads excluded: beyond lies another product's.
        wide: whether what the epilogue reads and writes besides workspaces can be moved 16 bytes at a time.
    """

    layer: Any
    kind: Any
    square: Any
    row0: Any
    col0: Any
    row: Any
    col: Any
    top: Any
    left: Any
    rows: Any
    cols: Any
    depth: Any
    true_rows: Any
    true_cols: Any
    wide: Any


@triton.jit
def place_of(tiles, problems, layers, BM: tl.constexpr, BN: tl.constexpr):
    """This program's :class:`TilePlace`."""
    entry = tiles + tl.program_id(0) * 4
    problem = problems + tl.load(entry).to(tl.int64) * PROBLEM_FIELDS
    row, col = tl.load(entry + 1) * BM, tl.load(entry + 2) * BN
    layer, kind = tl.load(problem + _LAYER), tl.load(problem + _KIND)
    rows = tl.load(problem + _ROWS).to(tl.int32) * UNIT
    cols = tl.load(problem + _COLS).to(tl.int32) * UNIT
    depth = tl.load(problem + _DEPTH).to(tl.int32) * UNIT
    row0, col0 = tl.load(problem + _ROW0) * UNIT, tl.load(problem + _COL0) * UNIT
    square = tl.load(problem + _SQUARE)
    m, n = tl.load(layers + layer * LAYER_FIELDS + _M), tl.load(layers + layer * LAYER_FIELDS + _N)
    true_rows, true_cols = tl.minimum(m - row0, rows) - row, tl.minimum(n - col0, cols) - col
    top, left = row0 + row, col0 + col
    wide = tl.load(entry + 3) != 0
    return TilePlace(
        layer, kind, square, row0, col0, row, col, top, left, rows, cols, depth, true_rows, true_cols, wide
    )


# Where a product's operand begins, and its pitch.


@triton.jit
def square_of(operands, at, role, COMPUTE: tl.constexpr):
    """The square of ``A`` or ``B`` that the product takes."""
    pointer, pitch, square = packed(operands, at.layer, role, COMPUTE)
    return pointer + at.square * square, pitch


@triton.jit
def rows_of(operands, at, role, COMPUTE: tl.constexpr):
    """The rows of an ``m × n`` matrix that meet a square of ``B``."""
    pointer, pitch, _square = packed(operands, at.layer, role, COMPUTE)
    return pointer + at.row0 * pitch, pitch


@triton.jit
def cols_of(operands, at, role, COMPUTE: tl.constexpr):
    """The columns of an ``m × n`` matrix that meet a square of ``A``."""
    pointer, pitch, _square = packed(operands, at.layer, role, COMPUTE)
    return pointer + at.col0, pitch


@triton.jit
def scale_of(amax, layers, layer, FIELD: tl.constexpr):
    """``(k, 1/k)``, powers of two, for the matrix whose partial maxima begin at the layer's ``FIELD``."""
    shape = layers + layer * LAYER_FIELDS
    first, count = tl.load(shape + FIELD), tl.load(shape + FIELD + 1)
    lanes = tl.arange(0, AMAX_CHUNK)
    largest = tl.zeros((AMAX_CHUNK,), tl.float32)
    for at in range(0, count, AMAX_CHUNK):
        largest = tl.maximum(largest, tl.load(amax + first + at + lanes, mask=at + lanes < count, other=0))
    if FIELD == _AMAX_S:
        return power_of_two(tl.max(largest), 2)
    else:
        return power_of_two(tl.max(largest), 4)


@triton.jit
def multiply(
    acc,
    left,
    right,
    at,
    LEFT_TURNED: tl.constexpr,
    RIGHT_TURNED: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """``acc + X Y`` for the tile at ``at`` of ``X (rows × depth)`` times ``Y (depth × cols)``.

    ``left`` and ``right`` say where ``X`` and ``Y`` lie: pointer and pitch.

    A turned operand lies in memory transposed, and is transposed as it is loaded, never as an accumulator: Triton
    3.4 to 3.7 was seen to get that wrong on Hopper.
    """
    x, x_pitch = left
    y, y_pitch = right
    r, c, k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    in_rows, in_cols = at.row + r < at.rows, at.col + c < at.cols
    if LEFT_TURNED:
        x += at.row
    else:
        x += at.row.to(tl.int64) * x_pitch
    if RIGHT_TURNED:
        y += at.col.to(tl.int64) * y_pitch
    else:
        y += at.col
    xp, yp = x_pitch.to(tl.int32), y_pitch.to(tl.int32)
    for d in range(0, at.depth, BK):
        in_depth = k < at.depth - d
        if LEFT_TURNED:
            xt = tl.load(x + k[:, None] * xp + r[None, :], mask=in_depth[:, None] & in_rows[None, :], other=0)
            xo = tl.trans(operand(xt, COMPUTE))
            x += BK * x_pitch
        else:
            xt = tl.load(x + r[:, None] * xp + k[None, :], mask=in_rows[:, None] & in_depth[None, :], other=0)
            xo = operand(xt, COMPUTE)
            x += BK
        if RIGHT_TURNED:
            yt = tl.load(y + c[:, None] * yp + k[None, :], mask=in_cols[:, None] & in_depth[None, :], other=0)
            yo = tl.trans(operand(yt, COMPUTE))
            y += BK
        else:
            yt = tl.load(y + k[:, None] * yp + c[None, :], mask=in_depth[:, None] & in_cols[None, :], other=0)
            yo = operand(yt, COMPUTE)
            y += BK * y_pitch
        acc = tl.dot(xo, yo, acc, input_precision=PRECISION)
    return acc


@triton.jit
def store_packed(operands, at, role, x, COMPUTE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """``x`` into a workspace matrix, pads included: they are zeros."""
    pointer, pitch, _unused = packed(operands, at.layer, role, COMPUTE)
    r, c = tl.arange(0, BM), tl.arange(0, BN)
    pointer += at.top * pitch + at.left
    offset = r[:, None] * pitch.to(tl.int32) + c[None, :]
    if INTERPRETED:
        y = storable(x, COMPUTE)
    else:
        y = x.to(COMPUTE)
    tl.store(pointer + offset, y, mask=(at.row + r < at.rows)[:, None] & (at.col + c < at.cols)[None, :])


@triton.jit
def store_result(operands, at, role, x, TYPE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """``x`` into one of the caller's ``m × n`` matrices."""
    if at.wide:
        p, pr, pc = matrix(operands, at.layer, role, TYPE, True)
        store_tile(p, pr, pc, at.top, at.left, at.true_rows, at.true_cols // UNIT * UNIT, x, TYPE, BM, BN, True)
    else:
        p, pr, pc = matrix(operands, at.layer, role, TYPE, False)
        store_tile(p, pr, pc, at.top, at.left, at.true_rows, at.true_cols, x, TYPE, BM, BN, False)


@triton.jit
def load_scaling(operands, at, TYPE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """The tile of ``S``, in float32."""
    if at.wide:
        p, pr, pc = matrix(operands, at.layer, _S, TYPE, True)
        x = load_tile(p, pr, pc, at.top, at.left, at.true_rows, at.true_cols // UNIT * UNIT, BM, BN, True)
    else:
        p, pr, pc = matrix(operands, at.layer, _S, TYPE, False)
        x = load_tile(p, pr, pc, at.top, at.left, at.true_rows, at.true_cols, BM, BN, False)
    return x.to(tl.float32)


@triton.jit
def store_block(operands, at, role, side, group, left, x, BM: tl.constexpr, BN: tl.constexpr):
    """A tile of a derivative into its stack of squares of ``side``, of which ``group`` belong to one product.

    ``left``: of the layer's side, from the product's first square on. Where ``at.wide``, there is one square.
    """
    first, reach = at.square * group, tl.minimum(side * group, left)
    if at.wide:
        p, pr, pc, pq, _part = stack(operands, at.layer, role, tl.float32, True)
        reach = reach // UNIT * UNIT
        store_squares(p, pr, pc, pq, side, first, at.row, at.col, reach, x, tl.float32, BM, BN, True)
    else:
        p, pr, pc, pq, _part = stack(operands, at.layer, role, tl.float32, False)
        store_squares(p, pr, pc, pq, side, first, at.row, at.col, reach, x, tl.float32, BM, BN, False)
