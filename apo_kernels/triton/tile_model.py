"""The kernels of a whole model's step on blocks that fit a tile: :mod:`apo_kernels.triton.tile`, with what else a step
needs in the same launches.

**Parts.** A layer's gradient and weight lie in two places, its weight's and its bias', whose column comes last. A tile
takes the columns below ``n1`` from the one and the last one from the other, so that the weight's can be moved 16 bytes
at a time though the layer has an odd number of columns. The scaling and the momentum, one matrix each, are read as the
same two parts.

**Numbers.** Each layer has its own rate, momentum and decay: a row of the table ``numbers``.

**What the promise needs.** ``⟨G, P(G)⟩ = ‖S ⊙ BᵀGA‖²``: a number a tile, from what is there anyway.

**Slopes.** With ``M = BᵀGA`` kept of the forward, ``N = BᵀVA`` and ``T = S² ⊙ M``, the relative derivatives need
neither ``G`` nor ``GA``::

    BᵀdB = N Tᵀ + M (S² ⊙ N)ᵀ        over the tiles of a row
    AᵀdA = Nᵀ T + Mᵀ (S² ⊙ N)        over the tiles of a column

A program goes over its tile twice, in slabs of its columns for ``BᵀdB`` and of its rows for ``AᵀdA``, and computes
``N`` twice: with a whole ``N`` at hand, both would take more registers than there are. The second time it is the
transposed tile's, so that no product is transposed as a left operand, which was seen to be compiled wrongly on Hopper.
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
    narrowed,
    operand,
    stack,
    storable,
    store_squares,
    store_tile,
)
from apo_kernels.triton.table_layout import LayerField, ModelField, ModelRole, Number

_M, _N, _N1 = (tl.constexpr(int(x)) for x in (LayerField.M, LayerField.N, ModelField.N1))
_SIDE_B, _SIDE_A = tl.constexpr(int(LayerField.SIDE_B)), tl.constexpr(int(LayerField.SIDE_A))
_GROUP_B, _GROUP_A = tl.constexpr(int(LayerField.GROUP_B)), tl.constexpr(int(LayerField.GROUP_A))
_COUNT_B, _COUNT_A = tl.constexpr(int(LayerField.COUNT_B)), tl.constexpr(int(LayerField.COUNT_A))
_G, _G_BIAS, _THETA, _THETA_BIAS = (
    tl.constexpr(int(role)) for role in (ModelRole.G, ModelRole.G_BIAS, ModelRole.THETA, ModelRole.THETA_BIAS)
)
_A, _B, _S, _MOMENTUM, _P, _KEPT = (
    tl.constexpr(int(role))
    for role in (ModelRole.A, ModelRole.B, ModelRole.S, ModelRole.MOMENTUM, ModelRole.P, ModelRole.M)
)
_DA, _DB, _DS = (tl.constexpr(int(role)) for role in (ModelRole.DA, ModelRole.DB, ModelRole.DS))
_SIZE_A, _SIZE_B, _SIZE_S = (tl.constexpr(int(role)) for role in (ModelRole.SIZE_A, ModelRole.SIZE_B, ModelRole.SIZE_S))
_RATE, _MOMENTUM_OF, _SHRINK, _SHARE = (
    tl.constexpr(int(x)) for x in (Number.RATE, Number.MOMENTUM, Number.SHRINK, Number.SHARE)
)
_NUMBERS = tl.constexpr(len(Number))


@triton.jit
def tile_of(layers, layer, i, j, WIDE_MATRICES: tl.constexpr, WIDE_SQUARES: tl.constexpr):
    """Where tile ``(i, j)`` of a layer begins and how far it reaches; ``part``: so many of its columns are the
    weight's."""
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


@triton.jit
def stepped(
    y, operands, numbers, layer, row0, col0, rows, cols, part,
    TYPE_THETA: tl.constexpr, TYPE_THETA_BIAS: tl.constexpr, WRITE_BUFFER: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """``v ← μ v + y``, ``θ ← shrink θ − v``: a tile of the weights. At momentum 0 the buffer's content isn't read."""
    own = numbers + layer * _NUMBERS
    mu = tl.load(own + _MOMENTUM_OF)
    buffer, br, bc = matrix(operands, layer, _MOMENTUM, tl.float32, WIDE)
    there = buffer.to(tl.int64) != 0
    y += mu * load_split(buffer, br, bc, row0, col0, rows, cols, part, there & (mu != 0), R, C, WIDE)
    if WRITE_BUFFER:
        reach = tl.where(there, part, 0)
        if WIDE:
            reach = reach // UNIT * UNIT
        store_tile(buffer, br, bc, row0, col0, rows, reach, y, tl.float32, R, C, WIDE)
        last = buffer + (col0 + part) * bc
        store_column(last, br, row0, rows, there & (cols > part), part, y, tl.float32, R, C)
    theta = load_parts(
        operands, layer, _THETA, _THETA_BIAS, row0, col0, rows, cols, part,
        TYPE_THETA, TYPE_THETA_BIAS, tl.float32, R, C, WIDE,
    )  # fmt: skip
    store_parts(
        operands, layer, _THETA, _THETA_BIAS, row0, col0, rows, cols, part, tl.load(own + _SHRINK) * theta - y,
        TYPE_THETA, TYPE_THETA_BIAS, R, C, WIDE,
    )  # fmt: skip


@triton.jit
def model_forward(
    tiles,
    layers,
    operands,
    numbers,
    workspace,
    kept,
    TYPE_G: tl.constexpr,
    TYPE_G_BIAS: tl.constexpr,
    TYPE_A: tl.constexpr,
    TYPE_B: tl.constexpr,
    TYPE_S: tl.constexpr,
    TYPE_THETA: tl.constexpr,
    TYPE_THETA_BIAS: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    DIRECTION: tl.constexpr,
    UPDATE: tl.constexpr,
    WRITE_BUFFER: tl.constexpr,
    KEEP: tl.constexpr,
    SIDE: tl.constexpr,
    SLAB: tl.constexpr,
    WIDE_MATRICES: tl.constexpr,
    WIDE_SQUARES: tl.constexpr,
):
    """``P(G)`` of a tile.

    ``DIRECTION``: into ``workspace``, and ``share · ‖S ⊙ M‖²`` of it into the place that the tile's row names.
    ``UPDATE``: a step, or with ``WRITE_BUFFER`` false a trial. ``KEEP``: ``M``, into ``kept``; with neither of the
    others, ``M`` alone.
    """
    entry = tiles + tl.program_id(0) * 4
    layer = tl.load(entry).to(tl.int64)
    first_B, first_A, side_B, side_A, row0, col0, rows, cols, part = tile_of(
        layers, layer, tl.load(entry + 1), tl.load(entry + 2), WIDE_MATRICES, WIDE_SQUARES
    )
    ps, sr, sc = matrix(operands, layer, _S, TYPE_S, WIDE_MATRICES)
    pa, ar, ac, aq, _ = stack(operands, layer, _A, TYPE_A, WIDE_SQUARES)
    pb, br, bc, bq, _ = stack(operands, layer, _B, TYPE_B, WIDE_SQUARES)
    g = load_parts(
        operands, layer, _G, _G_BIAS, row0, col0, rows, cols, part,
        TYPE_G, TYPE_G_BIAS, COMPUTE, SIDE, SIDE, WIDE_MATRICES,
    )  # fmt: skip
    b = operand(load_diagonal(pb, br, bc, bq, side_B, first_B, 0, rows, SIDE, SIDE, WIDE_SQUARES), COMPUTE)

    y = tl.zeros((SIDE, SIDE), tl.float32)
    energy = tl.zeros((SIDE,), tl.float32)
    for s in range(0, SIDE, SLAB):
        at, here = col0 + s, cols - s
        a = operand(load_diagonal(pa, ar, ac, aq, side_A, first_A, s, cols, SIDE, SLAB, WIDE_SQUARES), COMPUTE)
        u_, c = narrowed(tl.dot(g, a, input_precision=PRECISION), COMPUTE)
        m = tl.dot(tl.trans(b), u_, input_precision=PRECISION) * c
        if KEEP:
            store_own(kept, operands, layer, _KEPT, row0, at, rows, here, m, SIDE, SLAB, WIDE_MATRICES)
        if DIRECTION or UPDATE:
            scaling = load_split(ps, sr, sc, row0, at, rows, here, part - s, True, SIDE, SLAB, WIDE_MATRICES)
            m *= scaling
            if DIRECTION:
                energy += tl.sum(m * m, axis=1)
            t_, c = narrowed(m * scaling, COMPUTE)
            w_, c_w = narrowed(tl.dot(b, t_, input_precision=PRECISION) * c, COMPUTE)
            y += tl.dot(w_, tl.trans(a), input_precision=PRECISION) * c_w

    if DIRECTION:
        share = tl.load(numbers + layer * _NUMBERS + _SHARE)
        tl.store(workspace + tl.load(entry + 3), share * tl.sum(energy))
        store_own(workspace, operands, layer, _P, row0, col0, rows, cols, y, SIDE, SIDE, WIDE_MATRICES)
    if UPDATE:
        rate = tl.load(numbers + layer * _NUMBERS + _RATE)
        stepped(
            rate * y, operands, numbers, layer, row0, col0, rows, cols, part,
            TYPE_THETA, TYPE_THETA_BIAS, WRITE_BUFFER, SIDE, SIDE, WIDE_MATRICES,
        )  # fmt: skip


@triton.jit
def model_apply(
    tiles,
    layers,
    operands,
    numbers,
    workspace,
    sums,
    TYPE_THETA: tl.constexpr,
    TYPE_THETA_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """``v ← μ v + lr · f · P(G)``, ``θ ← shrink θ − v`` for ``ROWS × COLS`` of a layer.

    ``f = most / max(sum, most)``, from the sum of the promises in ``sums[0]``; it goes to ``sums[1]``. Where the sum
    isn't finite, f is NaN, and nothing else is written.
    """
    entry = tiles + tl.program_id(0) * 4
    layer, row0, col0 = tl.load(entry).to(tl.int64), tl.load(entry + 1).to(tl.int64), tl.load(entry + 2).to(tl.int64)
    most = tl.load(numbers + tl.load(entry + 3) * _NUMBERS)
    promised = tl.load(sums)
    f = most / tl.maximum(promised, most, propagate_nan=tl.PropagateNan.ALL) + (promised - promised)
    tl.store(sums + 1, f, mask=tl.program_id(0) == 0)
    if f == f:
        applied(f, layers, operands, numbers, workspace, layer, row0, col0, TYPE_THETA, TYPE_THETA_BIAS, ROWS, COLS)


@triton.jit
def applied(
    f, layers, operands, numbers, workspace, layer, row0, col0,
    TYPE_THETA: tl.constexpr, TYPE_THETA_BIAS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    shape = layers + layer * LAYER_FIELDS
    rows = tl.minimum(tl.load(shape + _M) - row0, ROWS).to(tl.int32)
    cols = tl.minimum(tl.load(shape + _N) - col0, COLS).to(tl.int32)
    part = tl.minimum(tl.load(shape + _N1) - col0, cols).to(tl.int32)
    y = load_own(workspace, operands, layer, _P, row0, col0, rows, cols, ROWS, COLS, False)
    rate = f * tl.load(numbers + layer * _NUMBERS + _RATE)
    stepped(
        rate * y, operands, numbers, layer, row0, col0, rows, cols, part,
        TYPE_THETA, TYPE_THETA_BIAS, True, ROWS, COLS, False,
    )  # fmt: skip


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
    first_B, first_A, side_B, side_A, row0, col0, rows, cols, part = tile_of(
        layers, layer, i, j, WIDE_MATRICES, WIDE_SQUARES
    )
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


@triton.jit
def model_sums(jobs, workspace, results, CHUNK: tl.constexpr, PARTS: tl.constexpr, LANES: tl.constexpr):
    """``results[to + e] = Σ_p workspace[from + p · length + e]``, in the same order in every run.

    ``jobs`` ``[programs, 5]`` (int64): from, to, the chunk's first element, the length of a part, the number of parts.
    A part of one element is summed by :data:`LANES` of them at a time, longer ones by ``PARTS`` chunks.
    """
    job = jobs + tl.program_id(0) * 5
    source, to = workspace + tl.load(job), results + tl.load(job + 1)
    first, length, count = tl.load(job + 2), tl.load(job + 3), tl.load(job + 4)
    if length == 1:
        lanes = tl.arange(0, LANES)
        sums = tl.zeros((LANES,), tl.float32)
        for p in range(0, count, LANES):
            sums += tl.load(source + p + lanes, mask=p + lanes < count, other=0)
        tl.store(to, tl.sum(sums))
    else:
        e, own = first + tl.arange(0, CHUNK), tl.arange(0, PARTS)
        total = tl.zeros((CHUNK,), tl.float32)
        for at in range(0, count, PARTS):
            inside = (at + own < count)[:, None] & (e < length)[None, :]
            total += tl.sum(tl.load(source + (at + own)[:, None] * length + e[None, :], mask=inside, other=0), axis=0)
        tl.store(to + e, total, mask=e < length)
