"""The slopes of a whole model on blocks that fit a tile: what follows the forward of
:mod:`apo_kernels.triton.tile_model`.

With ``M = BᵀGA`` kept of the forward, ``N = BᵀVA`` and ``T = S² ⊙ M``, the relative derivatives need neither ``G`` nor
``GA``::

    BᵀdB = N Tᵀ + M (S² ⊙ N)ᵀ        over the tiles of a row
    AᵀdA = Nᵀ T + Mᵀ (S² ⊙ N)        over the tiles of a column

A program goes over its tile twice, in slabs of its columns for ``BᵀdB`` and of its rows for ``AᵀdA``, and computes
``N`` twice: with a whole ``N`` at hand, both would take more registers than there are. The second time it is the
transposed tile's, so that no product is transposed as a left operand, which was seen to be compiled wrongly on Hopper.
"""

from __future__ import annotations

import triton
import triton.language as tl

from apo_kernels.triton.model_parts import load_diagonal, load_own, load_parts, load_split, store_own, tile_of
from apo_kernels.triton.primitives import (
    COLUMNS,
    LAYER_FIELDS,
    ROLES,
    UNIT,
    matrix,
    narrowed,
    operand,
    stack,
    store_squares,
)
from apo_kernels.triton.table_layout import LayerField, ModelRole, Number

_GROUP_B, _GROUP_A = tl.constexpr(int(LayerField.GROUP_B)), tl.constexpr(int(LayerField.GROUP_A))
_COUNT_B, _COUNT_A = tl.constexpr(int(LayerField.COUNT_B)), tl.constexpr(int(LayerField.COUNT_A))
_G, _G_BIAS, _KEPT = (tl.constexpr(int(role)) for role in (ModelRole.G, ModelRole.G_BIAS, ModelRole.M))
_A, _B, _S = (tl.constexpr(int(role)) for role in (ModelRole.A, ModelRole.B, ModelRole.S))
_DA, _DB, _DS = (tl.constexpr(int(role)) for role in (ModelRole.DA, ModelRole.DB, ModelRole.DS))
_SIZE_A, _SIZE_B, _SIZE_S = (tl.constexpr(int(role)) for role in (ModelRole.SIZE_A, ModelRole.SIZE_B, ModelRole.SIZE_S))
_RATE, _NUMBERS = tl.constexpr(int(Number.RATE)), tl.constexpr(len(Number))


@triton.jit
def model_slopes(
    tiles,
    layers,
    operands,
    numbers,
    kept,
    results,
    TYPE_V: tl.constexpr,
    TYPE_V_BIAS: tl.constexpr,
    TYPE_A: tl.constexpr,
    TYPE_B: tl.constexpr,
    TYPE_S: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    WANT_A: tl.constexpr,
    WANT_BS: tl.constexpr,
    SIDE: tl.constexpr,
    SLAB: tl.constexpr,
    WIDE_MATRICES: tl.constexpr,
    WIDE_SQUARES: tl.constexpr,
):
    """The slopes and sizes of a tile, into ``results``: of S as they are, of A, B and both inner products as parts of
    sums, where the layer learns them.

    ``tiles`` ``[programs, 5]`` (int32): layer, row and column of the tile, where its parts of ``⟨V, P(G)⟩`` and of
    ``length ⟨G, P(G)⟩`` go.
    """
    entry = tiles + tl.program_id(0) * 5
    layer, i, j = tl.load(entry).to(tl.int64), tl.load(entry + 1), tl.load(entry + 2)
    first_B, first_A, side_B, side_A, row0, col0, rows, cols, part = tile_of(layers, layer, i, j, WIDE_MATRICES)
    ps, sr, sc = matrix(operands, layer, _S, TYPE_S, WIDE_MATRICES)
    pa, ar, ac, aq, _ = stack(operands, layer, _A, TYPE_A, WIDE_SQUARES)
    pb, br, bc, bq, _ = stack(operands, layer, _B, TYPE_B, WIDE_SQUARES)
    v = load_parts(
        operands, layer, _G, _G_BIAS, row0, col0, rows, cols, part,
        TYPE_V, TYPE_V_BIAS, COMPUTE, SIDE, SIDE, WIDE_MATRICES,
    )  # fmt: skip
    length = tl.load(numbers + layer * _NUMBERS + _RATE)
    part_a = own_part(operands, layer, _SIZE_A, i)
    shape = layers + layer * LAYER_FIELDS
    reach = tl.minimum(tl.load(shape + _GROUP_A), tl.load(shape + _COUNT_A) - first_A) * side_A

    if WANT_BS:
        b = operand(load_diagonal(pb, br, bc, bq, side_B, first_B, 0, rows, SIDE, SIDE, WIDE_SQUARES), COMPUTE)
        db = tl.zeros((SIDE, SIDE), tl.float32)
        inner, size_b = tl.zeros((SIDE,), tl.float32), tl.zeros((SIDE,), tl.float32)
        for t in range(0, SIDE, SLAB):
            at, here = col0 + t, cols - t
            a = operand(load_diagonal(pa, ar, ac, aq, side_A, first_A, t, cols, SIDE, SLAB, WIDE_SQUARES), COMPUTE)
            u_, c = narrowed(tl.dot(v, a, input_precision=PRECISION), COMPUTE)
            n = tl.dot(tl.trans(b), u_, input_precision=PRECISION) * c
            m = load_own(kept, operands, layer, _KEPT, row0, at, rows, here, SIDE, SLAB, WIDE_MATRICES)
            s = load_split(ps, sr, sc, row0, at, rows, here, part - t, True, SIDE, SLAB, WIDE_MATRICES)
            size = 2 * length * (s * m) * (s * m)
            store_own(results, operands, layer, _SIZE_S, row0, at, rows, here, size, SIDE, SLAB, WIDE_MATRICES)
            size_b += tl.sum(size, axis=1)
            store_sizes(results, part_a, first_A * side_A + t, reach - t, tl.sum(size, axis=0), SLAB)
            s *= s
            ds = s * m * n
            inner += tl.sum(ds, axis=1)
            ds *= -2 * length
            store_own(results, operands, layer, _DS, row0, at, rows, here, ds, SIDE, SLAB, WIDE_MATRICES)
            db = plus_products(db, n, s * m, m, s * n, COMPUTE, PRECISION)
        reach_b = tl.minimum(tl.load(shape + _GROUP_B), tl.load(shape + _COUNT_B) - first_B) * side_B
        store_sizes(results, own_part(operands, layer, _SIZE_B, j), first_B * side_B, reach_b, size_b, SIDE)
        store_own_squares(results, operands, layer, _DB, j, side_B, first_B, reach_b, -length * db, SIDE, WIDE_SQUARES)
        tl.store(results + tl.load(entry + 3), tl.sum(inner))
        tl.store(results + tl.load(entry + 4), tl.sum(size_b) / 2)

    if WANT_A and part_a >= 0:  # the same of the transposed tile, A and B in each other's place
        whole = operand(load_diagonal(pa, ar, ac, aq, side_A, first_A, 0, cols, SIDE, SIDE, WIDE_SQUARES), COMPUTE)
        da = tl.zeros((SIDE, SIDE), tl.float32)
        for t in range(0, SIDE, SLAB):
            top, below = row0 + t, rows - t
            bt = operand(load_diagonal(pb, br, bc, bq, side_B, first_B, t, rows, SIDE, SLAB, WIDE_SQUARES), COMPUTE)
            u_, c = narrowed(tl.dot(tl.trans(v), bt, input_precision=PRECISION), COMPUTE)
            n = tl.dot(tl.trans(whole), u_, input_precision=PRECISION) * c
            m = tl.trans(load_own(kept, operands, layer, _KEPT, top, col0, below, cols, SLAB, SIDE, WIDE_MATRICES))
            s = tl.trans(load_split(ps, sr, sc, top, col0, below, cols, part, True, SLAB, SIDE, WIDE_MATRICES))
            s *= s
            da = plus_products(da, n, s * m, m, s * n, COMPUTE, PRECISION)
        store_own_squares(results, operands, layer, _DA, i, side_A, first_A, reach, -length * da, SIDE, WIDE_SQUARES)


@triton.jit
def plus_products(found, n, tm, m, tn, COMPUTE: tl.constexpr, PRECISION: tl.constexpr):
    """``found + N Tᵀ + M T_Nᵀ``."""
    n_, c_n = narrowed(n, COMPUTE)
    tm_, c_tm = narrowed(tm, COMPUTE)
    m_, c_m = narrowed(m, COMPUTE)
    tn_, c_tn = narrowed(tn, COMPUTE)
    if COMPUTE == tl.float16:  # with powers of two to multiply by
        found += tl.dot(n_, tl.trans(tm_), input_precision=PRECISION) * (c_n * c_tm)
        return found + tl.dot(m_, tl.trans(tn_), input_precision=PRECISION) * (c_m * c_tn)
    else:
        found = tl.dot(n_, tl.trans(tm_), found, input_precision=PRECISION)
        return tl.dot(m_, tl.trans(tn_), found, input_precision=PRECISION)


@triton.jit
def own_part(operands, layer, role, part):
    """Where a part of a sum begins; negative where the layer doesn't learn that."""
    entry = operands + (layer * ROLES + role) * COLUMNS
    stride = tl.load(entry + 4)
    return tl.where(stride > 0, tl.load(entry) + part * stride, -1)


@triton.jit
def store_sizes(results, at, first, reach, x, C: tl.constexpr):
    c = tl.arange(0, C)
    tl.store(results + at + first + c, x, mask=(c < reach) & (at >= 0))


@triton.jit
def store_own_squares(
    results, operands, layer, role, part, side, first, reach, x, SIDE: tl.constexpr, WIDE: tl.constexpr
):
    """A tile's part of the slope of a block, as far as it has squares, if the layer learns it."""
    entry = operands + (layer * ROLES + role) * COLUMNS
    at, row, square = own_part(operands, layer, role, part), tl.load(entry + 1), tl.load(entry + 3)
    reach = tl.where(at >= 0, reach, 0)
    if WIDE:
        at, row, square, reach = at // UNIT * UNIT, row // UNIT * UNIT, square // UNIT * UNIT, reach // UNIT * UNIT
    one = tl.full((), 1, tl.int64)
    store_squares(results + at, row, one, square, side, first, 0, 0, reach, x, tl.float32, SIDE, SIDE, WIDE)
