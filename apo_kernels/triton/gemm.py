"""The grouped GEMM: one launch does one product of the chain for every layer of a model.

A launch's programs are the tiles of all its products, listed in a table on the device. The chain of Eq. 10 and its
derivatives (:mod:`apo_kernels.reference`) take these launches, whatever the number of layers:

========= ======================================= ============================================
stage     products                                epilogue
========= ======================================= ============================================
right     ``U = G A`` (and ``V A``)               store
scale     ``M = Bᵀ U``                            ``T = S² ⊙ M``
left      ``W = B T``                             store
out       ``Y = W Aᵀ``                            store ``P(G)``
update    ``Y = W Aᵀ``                            momentum, weight decay, write of the weight
pair      ``M = Bᵀ U`` and ``N = Bᵀ V A``         ``S² ⊙ M``, ``S² ⊙ N``, ``dS = 2 S ⊙ M ⊙ N``
left_dB   ``W`` of both; ``dB``                   store; ``dB`` is one product of doubled depth
dA_dG     ``dA``; ``dG = W_V Aᵀ``                 store; ``dA`` is one product of doubled depth
========= ======================================= ============================================

Forward: right, scale, left, out (or update). Derivatives: right, pair, left_dB, dA_dG.

**OperandTable.** A tile's base is computed in int64; offsets within it are int32, and no tile spans 2³¹ elements. Sides
come from the tables in units of 8, so the compiler knows them to be multiples and moves 16 bytes at a time.

**Range.** In float16, ``U`` is stored times ``k``, such that ``k·G`` has its largest entry in [16, 32), and ``T`` with
``q·S`` in place of ``S``, its largest entry in [4, 8): powers of two found at packing, undone by the last epilogue.
They change the exponents of the intermediates and nothing else.
"""

from __future__ import annotations

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
    rate_of,
    stack,
    storable,
    store_squares,
    store_tile,
    update,
)
from apo_kernels.triton.table_layout import Kind, LayerField, Role

_M, _N = tl.constexpr(int(LayerField.M)), tl.constexpr(int(LayerField.N))
_SIDE_B, _SIDE_A = tl.constexpr(int(LayerField.SIDE_B)), tl.constexpr(int(LayerField.SIDE_A))
_GROUP_B, _GROUP_A = tl.constexpr(int(LayerField.GROUP_B)), tl.constexpr(int(LayerField.GROUP_A))
_AMAX_G, _AMAX_V = tl.constexpr(int(LayerField.AMAX_G)), tl.constexpr(int(LayerField.AMAX_V))
_AMAX_S = tl.constexpr(int(LayerField.AMAX_S))
_FOR_V, _BLOCK = tl.constexpr(int(Kind.FOR_V)), tl.constexpr(int(Kind.BLOCK))
_G, _V, _A, _B, _S = (tl.constexpr(int(role)) for role in (Role.G, Role.V, Role.A, Role.B, Role.S))
_U, _UV, _T, _TV = (tl.constexpr(int(role)) for role in (Role.U, Role.UV, Role.T, Role.TV))
_W, _WV = tl.constexpr(int(Role.W)), tl.constexpr(int(Role.WV))
_OUT, _MOMENTUM = tl.constexpr(int(Role.OUT)), tl.constexpr(int(Role.MOMENTUM))
_KEEP_U, _KEEP_M, _KEEP_W = (tl.constexpr(int(role)) for role in (Role.KEEP_U, Role.KEEP_M, Role.KEEP_W))
_DA, _DB, _DS = (tl.constexpr(int(role)) for role in (Role.DA, Role.DB, Role.DS))


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
    x,
    x_pitch,
    y,
    y_pitch,
    row,
    col,
    rows,
    cols,
    depth,
    X_TURNED: tl.constexpr,
    Y_TURNED: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """``acc + X Y`` for the tile at ``(row, col)`` of ``X (rows × depth)`` times ``Y (depth × cols)``.

    A turned operand lies in memory transposed, and is transposed as it is loaded, never as an accumulator: Triton
    3.4 to 3.7 was seen to get that wrong on Hopper.
    """
    r, c, k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    in_rows, in_cols = row + r < rows, col + c < cols
    if X_TURNED:
        x += row
    else:
        x += row.to(tl.int64) * x_pitch
    if Y_TURNED:
        y += col.to(tl.int64) * y_pitch
    else:
        y += col
    xp, yp = x_pitch.to(tl.int32), y_pitch.to(tl.int32)
    for d in range(0, depth, BK):
        in_depth = k < depth - d
        if X_TURNED:
            xt = tl.load(x + k[:, None] * xp + r[None, :], mask=in_depth[:, None] & in_rows[None, :], other=0)
            left = tl.trans(operand(xt, COMPUTE))
            x += BK * x_pitch
        else:
            xt = tl.load(x + r[:, None] * xp + k[None, :], mask=in_rows[:, None] & in_depth[None, :], other=0)
            left = operand(xt, COMPUTE)
            x += BK
        if Y_TURNED:
            yt = tl.load(y + c[:, None] * yp + k[None, :], mask=in_cols[:, None] & in_depth[None, :], other=0)
            right = tl.trans(operand(yt, COMPUTE))
            y += BK
        else:
            yt = tl.load(y + k[:, None] * yp + c[None, :], mask=in_depth[:, None] & in_cols[None, :], other=0)
            right = operand(yt, COMPUTE)
            y += BK * y_pitch
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
    return acc


@triton.jit
def store_packed(
    operands,
    layer,
    role,
    row0,
    col0,
    row,
    col,
    rows,
    cols,
    x,
    COMPUTE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """``x`` into a workspace matrix at ``(row0 + row, col0 + col)``, pads included: they are zeros."""
    pointer, pitch, _unused = packed(operands, layer, role, COMPUTE)
    r, c = tl.arange(0, BM), tl.arange(0, BN)
    pointer += (row0 + row) * pitch + (col0 + col)
    offset = r[:, None] * pitch.to(tl.int32) + c[None, :]
    if INTERPRETED:
        y = storable(x, COMPUTE)
    else:
        y = x.to(COMPUTE)
    tl.store(pointer + offset, y, mask=(row + r < rows)[:, None] & (col + c < cols)[None, :])


@triton.jit
def store_result(
    operands, layer, role, row, col, rows, cols, x, wide, TYPE: tl.constexpr, R: tl.constexpr, C: tl.constexpr
):
    """``x`` into one of the caller's matrices from ``(row, col)`` on, 16 bytes at a time if ``wide``."""
    if wide:
        p, pr, pc = matrix(operands, layer, role, TYPE, True)
        store_tile(p, pr, pc, row, col, rows, cols // UNIT * UNIT, x, TYPE, R, C, True)
    else:
        p, pr, pc = matrix(operands, layer, role, TYPE, False)
        store_tile(p, pr, pc, row, col, rows, cols, x, TYPE, R, C, False)


@triton.jit
def load_scaling(operands, layer, row, col, rows, cols, wide, TYPE: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """``S`` from ``(row, col)`` on, in float32, 16 bytes at a time if ``wide``."""
    if wide:
        p, pr, pc = matrix(operands, layer, _S, TYPE, True)
        x = load_tile(p, pr, pc, row, col, rows, cols // UNIT * UNIT, R, C, True)
    else:
        p, pr, pc = matrix(operands, layer, _S, TYPE, False)
        x = load_tile(p, pr, pc, row, col, rows, cols, R, C, False)
    return x.to(tl.float32)


@triton.jit
def store_block(operands, layer, role, side, first, row, col, reach, x, wide, R: tl.constexpr, C: tl.constexpr):
    """A part of a derivative into its stack of squares, 16 bytes at a time if ``wide``: then there is one square."""
    if wide:
        p, pr, pc, pq, _part = stack(operands, layer, role, tl.float32, True)
        store_squares(p, pr, pc, pq, side, first, row, col, reach // UNIT * UNIT, x, tl.float32, R, C, True)
    else:
        p, pr, pc, pq, _part = stack(operands, layer, role, tl.float32, False)
        store_squares(p, pr, pc, pq, side, first, row, col, reach, x, tl.float32, R, C, False)


@triton.jit(do_not_specialize_on_alignment=["lr_tensor"])
def grouped_gemm(
    tiles,
    problems,
    layers,
    operands,
    amax,
    lr,
    lr_tensor,
    momentum,
    decay,
    STAGE: tl.constexpr,
    COMPUTE: tl.constexpr,
    TYPE_S: tl.constexpr,
    TYPE_OUT: tl.constexpr,
    TYPE_MOMENTUM: tl.constexpr,
    PRECISION: tl.constexpr,
    SCALED: tl.constexpr,
    KEEP: tl.constexpr,
    WANT_S: tl.constexpr,
    HAS_BUFFER: tl.constexpr,
    HAS_MOMENTUM: tl.constexpr,
    HAS_DECAY: tl.constexpr,
    LR_IN_TENSOR: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """One tile of one product of ``STAGE``, and its epilogue: see the module's docstring."""
    entry = tiles + tl.program_id(0) * 4
    problem = problems + tl.load(entry).to(tl.int64) * PROBLEM_FIELDS
    row, col = tl.load(entry + 1) * BM, tl.load(entry + 2) * BN
    layer, kind = tl.load(problem), tl.load(problem + 1)
    rows = tl.load(problem + 2).to(tl.int32) * UNIT
    cols = tl.load(problem + 3).to(tl.int32) * UNIT
    depth = tl.load(problem + 4).to(tl.int32) * UNIT
    row0, col0 = tl.load(problem + 5) * UNIT, tl.load(problem + 6) * UNIT
    square = tl.load(problem + 7)
    m, n = tl.load(layers + layer * LAYER_FIELDS + _M), tl.load(layers + layer * LAYER_FIELDS + _N)
    # What is left of the product from this tile's corner on, without pads: beyond it lies another product's.
    true_rows, true_cols = tl.minimum(m - row0, rows) - row, tl.minimum(n - col0, cols) - col
    top, left = row0 + row, col0 + col
    which = (kind == _FOR_V).to(tl.int64)
    # Whether what this tile's epilogue reads and writes besides workspaces can be moved 16 bytes at a time.
    wide = tl.load(entry + 3) != 0
    acc = tl.zeros((BM, BN), tl.float32)

    if STAGE == "right":
        x, xp, _unused = packed(operands, layer, _G + which, COMPUTE)
        y, yp, yq = packed(operands, layer, _A, COMPUTE)
        acc = multiply(
            acc, x + col0, xp, y + square * yq, yp, row, col, rows, cols, depth,
            False, False, COMPUTE, PRECISION, BM, BN, BK,
        )  # fmt: skip
        if KEEP:
            store_result(operands, layer, _KEEP_U, top, left, true_rows, true_cols, acc, wide, tl.float32, BM, BN)
        if SCALED:
            k, _ = scale_of(amax, layers, layer, _AMAX_G)
            if kind == _FOR_V:
                k, _ = scale_of(amax, layers, layer, _AMAX_V)
            acc *= k
        store_packed(operands, layer, _U + which, row0, col0, row, col, rows, cols, acc, COMPUTE, BM, BN)

    elif STAGE == "scale":
        x, xp, xq = packed(operands, layer, _B, COMPUTE)
        y, yp, _unused = packed(operands, layer, _U, COMPUTE)
        acc = multiply(
            acc, x + square * xq, xp, y + row0 * yp, yp, row, col, rows, cols, depth,
            True, False, COMPUTE, PRECISION, BM, BN, BK,
        )  # fmt: skip
        s = load_scaling(operands, layer, top, left, true_rows, true_cols, wide, TYPE_S, BM, BN)
        if KEEP:
            undo = 1.0
            if SCALED:
                _, undo = scale_of(amax, layers, layer, _AMAX_G)
            store_result(
                operands, layer, _KEEP_M, top, left, true_rows, true_cols, acc * undo, wide, tl.float32, BM, BN
            )
        acc *= s
        if SCALED:
            q, _ = scale_of(amax, layers, layer, _AMAX_S)
            s = s * q * q
        store_packed(operands, layer, _T, row0, col0, row, col, rows, cols, acc * s, COMPUTE, BM, BN)

    elif STAGE == "pair":
        x, xp, xq = packed(operands, layer, _B, COMPUTE)
        y, yp, _unused = packed(operands, layer, _U, COMPUTE)
        z, zp, _unused = packed(operands, layer, _UV, COMPUTE)
        acc = multiply(
            acc, x + square * xq, xp, y + row0 * yp, yp, row, col, rows, cols, depth,
            True, False, COMPUTE, PRECISION, BM, BN, BK,
        )  # fmt: skip
        other = tl.zeros((BM, BN), tl.float32)
        other = multiply(
            other, x + square * xq, xp, z + row0 * zp, zp, row, col, rows, cols, depth,
            True, False, COMPUTE, PRECISION, BM, BN, BK,
        )  # fmt: skip
        s = load_scaling(operands, layer, top, left, true_rows, true_cols, wide, TYPE_S, BM, BN)
        if WANT_S:
            ds = 2 * s * acc
            if SCALED:
                _, undo_g = scale_of(amax, layers, layer, _AMAX_G)
                _, undo_v = scale_of(amax, layers, layer, _AMAX_V)
                # One after the other: their product can leave float32's range where the result doesn't.
                ds = ds * undo_g * other * undo_v
            else:
                ds *= other
            store_result(operands, layer, _DS, top, left, true_rows, true_cols, ds, wide, tl.float32, BM, BN)
        if SCALED:
            q, _ = scale_of(amax, layers, layer, _AMAX_S)
            s *= q
        s *= s
        store_packed(operands, layer, _T, row0, col0, row, col, rows, cols, acc * s, COMPUTE, BM, BN)
        store_packed(operands, layer, _TV, row0, col0, row, col, rows, cols, other * s, COMPUTE, BM, BN)

    elif STAGE == "left" or STAGE == "left_dB":
        if kind != _BLOCK:
            x, xp, xq = packed(operands, layer, _B, COMPUTE)
            y, yp, _unused = packed(operands, layer, _T + which, COMPUTE)
            acc = multiply(
                acc, x + square * xq, xp, y + row0 * yp, yp, row, col, rows, cols, depth,
                False, False, COMPUTE, PRECISION, BM, BN, BK,
            )  # fmt: skip
            if KEEP:
                undo = 1.0
                if SCALED:
                    _, undo_g = scale_of(amax, layers, layer, _AMAX_G)
                    _, undo_q = scale_of(amax, layers, layer, _AMAX_S)
                    undo = undo_g * undo_q * undo_q
                store_result(
                    operands, layer, _KEEP_W, top, left, true_rows, true_cols, acc * undo, wide, tl.float32, BM, BN
                )
            store_packed(operands, layer, _W + which, row0, col0, row, col, rows, cols, acc, COMPUTE, BM, BN)
        elif STAGE == "left_dB":
            x, xp, _unused = packed(operands, layer, _UV, COMPUTE)
            y, yp, _unused = packed(operands, layer, _T, COMPUTE)
            acc = multiply(
                acc, x + row0 * xp, xp, y + row0 * yp, yp, row, col, rows, cols, depth,
                False, True, COMPUTE, PRECISION, BM, BN, BK,
            )  # fmt: skip
            x, xp, _unused = packed(operands, layer, _U, COMPUTE)
            y, yp, _unused = packed(operands, layer, _TV, COMPUTE)
            acc = multiply(
                acc, x + row0 * xp, xp, y + row0 * yp, yp, row, col, rows, cols, depth,
                False, True, COMPUTE, PRECISION, BM, BN, BK,
            )  # fmt: skip
            if SCALED:
                _, undo_g = scale_of(amax, layers, layer, _AMAX_G)
                _, undo_v = scale_of(amax, layers, layer, _AMAX_V)
                _, undo_q = scale_of(amax, layers, layer, _AMAX_S)
                acc = acc * undo_g * undo_q * undo_v * undo_q
            shape = layers + layer * LAYER_FIELDS
            side, group = tl.load(shape + _SIDE_B), tl.load(shape + _GROUP_B)
            reach = tl.minimum(side * group, m - row0)
            store_block(operands, layer, _DB, side, square * group, row, col, reach, acc, wide, BM, BN)

    else:
        if STAGE == "dA_dG" and kind == _BLOCK:
            x, xp, _unused = packed(operands, layer, _V, COMPUTE)
            y, yp, _unused = packed(operands, layer, _W, COMPUTE)
            acc = multiply(
                acc, x + col0, xp, y + col0, yp, row, col, rows, cols, depth,
                True, False, COMPUTE, PRECISION, BM, BN, BK,
            )  # fmt: skip
            if SCALED:
                # W holds k of G and q, W of V k of V and q: bring the first sum to the second one's scale.
                _, undo_g = scale_of(amax, layers, layer, _AMAX_G)
                k_v, undo_v = scale_of(amax, layers, layer, _AMAX_V)
                acc = acc * undo_g * k_v
            x, xp, _unused = packed(operands, layer, _G, COMPUTE)
            y, yp, _unused = packed(operands, layer, _WV, COMPUTE)
            acc = multiply(
                acc, x + col0, xp, y + col0, yp, row, col, rows, cols, depth,
                True, False, COMPUTE, PRECISION, BM, BN, BK,
            )  # fmt: skip
            if SCALED:
                _, undo_q = scale_of(amax, layers, layer, _AMAX_S)
                acc = acc * undo_v * undo_q * undo_q
            shape = layers + layer * LAYER_FIELDS
            side, group = tl.load(shape + _SIDE_A), tl.load(shape + _GROUP_A)
            reach = tl.minimum(side * group, n - col0)
            store_block(operands, layer, _DA, side, square * group, row, col, reach, acc, wide, BM, BN)
        else:
            if STAGE == "dA_dG":
                x, xp, _unused = packed(operands, layer, _WV, COMPUTE)
            else:
                x, xp, _unused = packed(operands, layer, _W, COMPUTE)
            y, yp, yq = packed(operands, layer, _A, COMPUTE)
            acc = multiply(
                acc, x + col0, xp, y + square * yq, yp, row, col, rows, cols, depth,
                False, True, COMPUTE, PRECISION, BM, BN, BK,
            )  # fmt: skip
            if SCALED:
                if STAGE == "dA_dG":
                    _, undo = scale_of(amax, layers, layer, _AMAX_V)
                else:
                    _, undo = scale_of(amax, layers, layer, _AMAX_G)
                _, undo_q = scale_of(amax, layers, layer, _AMAX_S)
                acc = acc * undo * undo_q * undo_q
            if STAGE == "update":
                rate = rate_of(lr, lr_tensor, LR_IN_TENSOR)
                if wide:
                    update(
                        acc, operands, layer, top, left, true_rows, true_cols // UNIT * UNIT, rate, momentum, decay,
                        TYPE_OUT, TYPE_MOMENTUM, _OUT, _MOMENTUM, HAS_BUFFER, HAS_MOMENTUM, HAS_DECAY, BM, BN, True,
                    )  # fmt: skip
                else:
                    update(
                        acc, operands, layer, top, left, true_rows, true_cols, rate, momentum, decay,
                        TYPE_OUT, TYPE_MOMENTUM, _OUT, _MOMENTUM, HAS_BUFFER, HAS_MOMENTUM, HAS_DECAY, BM, BN, False,
                    )  # fmt: skip
            else:
                store_result(operands, layer, _OUT, top, left, true_rows, true_cols, acc, wide, TYPE_OUT, BM, BN)
