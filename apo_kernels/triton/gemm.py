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

**Addresses.** A tile's base is computed in int64; offsets within it are int32, and no tile spans 2³¹ elements. Sides
come from the tables in units of 8, so the compiler knows them to be multiples and moves 16 bytes at a time.

**Range.** In float16, ``U`` is stored times ``k``, such that ``k·G`` has its largest entry in [16, 32), and ``T`` with
``q·S`` in place of ``S``, its largest entry in [4, 8): powers of two found at packing, undone by the last epilogue.
They change the exponents of the intermediates and nothing else.
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
    rate_of,
    stack,
    storable,
    store_squares,
    store_tile,
    update,
)
from apo_kernels.triton.table_layout import Kind, LayerField, ProblemField, Role

_LAYER, _KIND, _SQUARE = (tl.constexpr(int(f)) for f in (ProblemField.LAYER, ProblemField.KIND, ProblemField.SQUARE))
_ROWS, _COLS = tl.constexpr(int(ProblemField.ROWS)), tl.constexpr(int(ProblemField.COLS))
_DEPTH = tl.constexpr(int(ProblemField.DEPTH))
_ROW0, _COL0 = tl.constexpr(int(ProblemField.ROW0)), tl.constexpr(int(ProblemField.COL0))
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


# A stage each: a product and its epilogue.


@triton.jit
def right(
    operands,
    layers,
    amax,
    at,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    SCALED: tl.constexpr,
    KEEP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """``U = G A``, or ``V A``."""
    for_v = (at.kind == _FOR_V).to(tl.int64)
    G, A = cols_of(operands, at, _G + for_v, COMPUTE), square_of(operands, at, _A, COMPUTE)
    U = multiply(tl.zeros((BM, BN), tl.float32), G, A, at, False, False, COMPUTE, PRECISION, BM, BN, BK)
    if KEEP:
        store_result(operands, at, _KEEP_U, U, tl.float32, BM, BN)
    if SCALED:
        k, _ = scale_of(amax, layers, at.layer, _AMAX_G)
        if at.kind == _FOR_V:
            k, _ = scale_of(amax, layers, at.layer, _AMAX_V)
        U *= k
    store_packed(operands, at, _U + for_v, U, COMPUTE, BM, BN)


@triton.jit
def scale(
    operands,
    layers,
    amax,
    at,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    SCALED: tl.constexpr,
    KEEP: tl.constexpr,
    TYPE_S: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """``M = Bᵀ U``, and ``T = S² ⊙ M``."""
    B, U = square_of(operands, at, _B, COMPUTE), rows_of(operands, at, _U, COMPUTE)
    M = multiply(tl.zeros((BM, BN), tl.float32), B, U, at, True, False, COMPUTE, PRECISION, BM, BN, BK)
    S = load_scaling(operands, at, TYPE_S, BM, BN)
    if KEEP:
        undo = 1.0
        if SCALED:
            _, undo = scale_of(amax, layers, at.layer, _AMAX_G)
        store_result(operands, at, _KEEP_M, M * undo, tl.float32, BM, BN)
    M *= S
    if SCALED:
        q, _ = scale_of(amax, layers, at.layer, _AMAX_S)
        S = S * q * q
    store_packed(operands, at, _T, M * S, COMPUTE, BM, BN)


@triton.jit
def pair(
    operands,
    layers,
    amax,
    at,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    SCALED: tl.constexpr,
    WANT_S: tl.constexpr,
    TYPE_S: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """``M = Bᵀ U`` and ``N = Bᵀ V A``; ``S² ⊙ M``, ``S² ⊙ N``, and ``dS = 2 S ⊙ M ⊙ N``."""
    B = square_of(operands, at, _B, COMPUTE)
    U, UV = rows_of(operands, at, _U, COMPUTE), rows_of(operands, at, _UV, COMPUTE)
    M = multiply(tl.zeros((BM, BN), tl.float32), B, U, at, True, False, COMPUTE, PRECISION, BM, BN, BK)
    N = multiply(tl.zeros((BM, BN), tl.float32), B, UV, at, True, False, COMPUTE, PRECISION, BM, BN, BK)
    S = load_scaling(operands, at, TYPE_S, BM, BN)
    if WANT_S:
        dS = 2 * S * M
        if SCALED:
            _, undo_G = scale_of(amax, layers, at.layer, _AMAX_G)
            _, undo_V = scale_of(amax, layers, at.layer, _AMAX_V)
            # One after the other: their product can leave float32's range where the result doesn't.
            dS = dS * undo_G * N * undo_V
        else:
            dS *= N
        store_result(operands, at, _DS, dS, tl.float32, BM, BN)
    if SCALED:
        q, _ = scale_of(amax, layers, at.layer, _AMAX_S)
        S *= q
    S *= S
    store_packed(operands, at, _T, M * S, COMPUTE, BM, BN)
    store_packed(operands, at, _TV, N * S, COMPUTE, BM, BN)


@triton.jit
def left(
    operands,
    layers,
    amax,
    at,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    SCALED: tl.constexpr,
    KEEP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """``W = B T``, of ``G`` or of ``V``."""
    for_v = (at.kind == _FOR_V).to(tl.int64)
    B, T = square_of(operands, at, _B, COMPUTE), rows_of(operands, at, _T + for_v, COMPUTE)
    W = multiply(tl.zeros((BM, BN), tl.float32), B, T, at, False, False, COMPUTE, PRECISION, BM, BN, BK)
    if KEEP:
        undo = 1.0
        if SCALED:
            _, undo_G = scale_of(amax, layers, at.layer, _AMAX_G)
            _, undo_q = scale_of(amax, layers, at.layer, _AMAX_S)
            undo = undo_G * undo_q * undo_q
        store_result(operands, at, _KEEP_W, W * undo, tl.float32, BM, BN)
    store_packed(operands, at, _W + for_v, W, COMPUTE, BM, BN)


@triton.jit
def block_of_B(
    operands,
    layers,
    amax,
    at,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    SCALED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """``dB = (V A)(S² ⊙ M)ᵀ + (G A)(S² ⊙ N)ᵀ``."""
    UV, T = rows_of(operands, at, _UV, COMPUTE), rows_of(operands, at, _T, COMPUTE)
    dB = multiply(tl.zeros((BM, BN), tl.float32), UV, T, at, False, True, COMPUTE, PRECISION, BM, BN, BK)
    U, TV = rows_of(operands, at, _U, COMPUTE), rows_of(operands, at, _TV, COMPUTE)
    dB = multiply(dB, U, TV, at, False, True, COMPUTE, PRECISION, BM, BN, BK)
    if SCALED:
        _, undo_G = scale_of(amax, layers, at.layer, _AMAX_G)
        _, undo_V = scale_of(amax, layers, at.layer, _AMAX_V)
        _, undo_q = scale_of(amax, layers, at.layer, _AMAX_S)
        dB = dB * undo_G * undo_q * undo_V * undo_q
    shape = layers + at.layer * LAYER_FIELDS
    side, group, m = tl.load(shape + _SIDE_B), tl.load(shape + _GROUP_B), tl.load(shape + _M)
    store_block(operands, at, _DB, side, group, m - at.row0, dB, BM, BN)


@triton.jit
def block_of_A(
    operands,
    layers,
    amax,
    at,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    SCALED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """``dA = Vᵀ B (S² ⊙ M) + Gᵀ B (S² ⊙ N)``."""
    V, W = cols_of(operands, at, _V, COMPUTE), cols_of(operands, at, _W, COMPUTE)
    dA = multiply(tl.zeros((BM, BN), tl.float32), V, W, at, True, False, COMPUTE, PRECISION, BM, BN, BK)
    if SCALED:
        # W holds k of G and q, W of V k of V and q: bring the first sum to the second one's scale.
        _, undo_G = scale_of(amax, layers, at.layer, _AMAX_G)
        k_V, undo_V = scale_of(amax, layers, at.layer, _AMAX_V)
        dA = dA * undo_G * k_V
    G, WV = cols_of(operands, at, _G, COMPUTE), cols_of(operands, at, _WV, COMPUTE)
    dA = multiply(dA, G, WV, at, True, False, COMPUTE, PRECISION, BM, BN, BK)
    if SCALED:
        _, undo_q = scale_of(amax, layers, at.layer, _AMAX_S)
        dA = dA * undo_V * undo_q * undo_q
    shape = layers + at.layer * LAYER_FIELDS
    side, group, n = tl.load(shape + _SIDE_A), tl.load(shape + _GROUP_A), tl.load(shape + _N)
    store_block(operands, at, _DA, side, group, n - at.col0, dA, BM, BN)


@triton.jit
def result(
    operands,
    layers,
    amax,
    at,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    SCALED: tl.constexpr,
    FOR_V: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """``P(G) = W Aᵀ``, not stored yet; of ``V`` if ``FOR_V``."""
    W, A = cols_of(operands, at, _WV if FOR_V else _W, COMPUTE), square_of(operands, at, _A, COMPUTE)
    Y = multiply(tl.zeros((BM, BN), tl.float32), W, A, at, False, True, COMPUTE, PRECISION, BM, BN, BK)
    if SCALED:
        _, undo = scale_of(amax, layers, at.layer, _AMAX_V if FOR_V else _AMAX_G)
        _, undo_q = scale_of(amax, layers, at.layer, _AMAX_S)
        Y = Y * undo * undo_q * undo_q
    return Y


@triton.jit
def update_weight(
    Y,
    operands,
    at,
    rate,
    momentum,
    decay,
    TYPE_OUT: tl.constexpr,
    TYPE_MOMENTUM: tl.constexpr,
    HAS_BUFFER: tl.constexpr,
    HAS_MOMENTUM: tl.constexpr,
    HAS_DECAY: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """The step by ``Y``: momentum, weight decay, write of the weight."""
    if at.wide:
        update(
            Y, operands, at.layer, at.top, at.left, at.true_rows, at.true_cols // UNIT * UNIT, rate, momentum, decay,
            TYPE_OUT, TYPE_MOMENTUM, _OUT, _MOMENTUM, HAS_BUFFER, HAS_MOMENTUM, HAS_DECAY, BM, BN, True,
        )  # fmt: skip
    else:
        update(
            Y, operands, at.layer, at.top, at.left, at.true_rows, at.true_cols, rate, momentum, decay,
            TYPE_OUT, TYPE_MOMENTUM, _OUT, _MOMENTUM, HAS_BUFFER, HAS_MOMENTUM, HAS_DECAY, BM, BN, False,
        )  # fmt: skip


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
    at = place_of(tiles, problems, layers, BM, BN)
    if STAGE == "right":
        right(operands, layers, amax, at, COMPUTE, PRECISION, SCALED, KEEP, BM, BN, BK)
    elif STAGE == "scale":
        scale(operands, layers, amax, at, COMPUTE, PRECISION, SCALED, KEEP, TYPE_S, BM, BN, BK)
    elif STAGE == "pair":
        pair(operands, layers, amax, at, COMPUTE, PRECISION, SCALED, WANT_S, TYPE_S, BM, BN, BK)
    elif STAGE == "left":
        left(operands, layers, amax, at, COMPUTE, PRECISION, SCALED, KEEP, BM, BN, BK)
    elif STAGE == "left_dB":
        if at.kind != _BLOCK:
            left(operands, layers, amax, at, COMPUTE, PRECISION, SCALED, KEEP, BM, BN, BK)
        else:
            block_of_B(operands, layers, amax, at, COMPUTE, PRECISION, SCALED, BM, BN, BK)
    elif STAGE == "dA_dG":
        if at.kind == _BLOCK:
            block_of_A(operands, layers, amax, at, COMPUTE, PRECISION, SCALED, BM, BN, BK)
        else:
            dG = result(operands, layers, amax, at, COMPUTE, PRECISION, SCALED, True, BM, BN, BK)
            store_result(operands, at, _OUT, dG, TYPE_OUT, BM, BN)
    else:
        Y = result(operands, layers, amax, at, COMPUTE, PRECISION, SCALED, False, BM, BN, BK)
        if STAGE == "update":
            rate = rate_of(lr, lr_tensor, LR_IN_TENSOR)
            update_weight(
                Y, operands, at, rate, momentum, decay,
                TYPE_OUT, TYPE_MOMENTUM, HAS_BUFFER, HAS_MOMENTUM, HAS_DECAY, BM, BN,
            )  # fmt: skip
        else:
            store_result(operands, at, _OUT, Y, TYPE_OUT, BM, BN)
