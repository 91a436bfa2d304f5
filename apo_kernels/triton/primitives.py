"""Device functions that the kernels share: addresses, loads, rounding, powers of two.

**The interpreter** holds bfloat16 values as their bit patterns, multiplies the patterns, and truncates where a GPU
rounds to nearest. So under interpretation every 16-bit operand is widened as soon as it is loaded and kept in
float32, rounded to the grid of its type by :func:`rounded`: the arithmetic of the GPU, value by value.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

from apo_kernels.triton.table_layout import ALIGN, Column, LayerField, ProblemField, Role

INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))
ROLES = tl.constexpr(len(Role))
COLUMNS = tl.constexpr(len(Column))
LAYER_FIELDS = tl.constexpr(len(LayerField))
PROBLEM_FIELDS = tl.constexpr(len(ProblemField))
UNIT = tl.constexpr(ALIGN)
AMAX_CHUNK = tl.constexpr(256)


@triton.jit
def rounded(x, TYPE: tl.constexpr):
    """``x`` (float32) rounded to the nearest value of ``TYPE``, ties to even, still in float32."""
    if TYPE == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        return tl.where(x == x, nearest, x)
    elif TYPE == tl.float16:
        return x.to(tl.float16).to(tl.float32)
    else:
        return x


@triton.jit
def operand(x, TYPE: tl.constexpr):
    """``x``, loaded or computed, as an operand of type ``TYPE`` of a matrix product."""
    if INTERPRETED:
        return rounded(x.to(tl.float32), TYPE)
    elif x.dtype == TYPE:
        return x
    else:
        return x.to(TYPE)


@triton.jit
def storable(x, TYPE: tl.constexpr):
    """``x`` (float32) as it is stored into memory of type ``TYPE``, rounded to nearest once."""
    if INTERPRETED:
        return rounded(x, TYPE).to(TYPE)
    else:
        return x.to(TYPE)


@triton.jit
def power_of_two(amax, TARGET: tl.constexpr):
    """``(k, 1/k)``, powers of two, such that ``2^TARGET <= k · amax < 2^(TARGET + 1)``; ``amax`` float32, not negative.

    Exact by construction: only exponents are touched. Where ``amax`` is 0 or near an end of float32's range, ``k`` is
    the nearest to that of which the inverse is a normal number too.
    """
    exponent = (amax.to(tl.int32, bitcast=True) >> 23) & 0xFF
    scale = tl.minimum(tl.maximum(254 + TARGET - exponent, 1), 253)
    return (scale << 23).to(tl.float32, bitcast=True), ((254 - scale) << 23).to(tl.float32, bitcast=True)


@triton.jit
def narrowed(x, TYPE: tl.constexpr):
    """``(y, c)`` with ``c · y ≈ x``: ``y`` an operand of type ``TYPE``.

    For float16, whose range is short, ``y`` is ``x`` times a power of two that brings its largest entry to 16.
    """
    if TYPE == tl.float16:
        k, inverse = power_of_two(tl.max(tl.abs(x)), 4)
        return operand(x * k, TYPE), inverse
    else:
        return operand(x, TYPE), 1.0


@triton.jit
def field(table, row, FIELD: tl.constexpr, FIELDS: tl.constexpr):
    return tl.load(table + row * FIELDS + FIELD)


# ``WIDE`` in what follows: a matrix's columns are adjacent, and its address and row stride such that the compiler can
# move 16 bytes at a time. Elsewhere it is told that neighbouring columns are adjacent, as they mostly are
# (``max_contiguous``, where the addresses arise: of a function's argument it would go unseen), so that it gives them to
# neighbouring threads. Triton 3.6 by itself gives these neighbouring rows, in a tenth of the bandwidth of an H100. One
# entry at a time is moved for all that, for alignment is unknown.


@triton.jit
def matrix(operands, layer, role, TYPE: tl.constexpr, WIDE: tl.constexpr):
    """``(pointer, row stride, column stride)`` of a matrix of a layer.

    The compiler is told here how it lies, where the values arise: what is said of a function's argument it doesn't see.
    """
    entry = operands + (layer * ROLES + role) * COLUMNS
    pointer, row, col = tl.load(entry).to(tl.pointer_type(TYPE)), tl.load(entry + 1), tl.load(entry + 2)
    if WIDE:
        pointer, row = tl.multiple_of(pointer, 16), tl.multiple_of(row, UNIT)
    return pointer, row, col


@triton.jit
def stack(operands, layer, role, TYPE: tl.constexpr, WIDE: tl.constexpr):
    """``(pointer, row, column, square, part stride)`` of a stack of squares."""
    entry = operands + (layer * ROLES + role) * COLUMNS
    pointer, row, col = matrix(operands, layer, role, TYPE, WIDE)
    square, part = tl.load(entry + 3), tl.load(entry + 4)
    if WIDE:
        square, part = tl.multiple_of(square, UNIT), tl.multiple_of(part, UNIT)
    return pointer, row, col, square, part


@triton.jit
def packed(operands, layer, role, TYPE: tl.constexpr):
    """``(pointer, row stride, square stride)`` of an operand of the grouped GEMM.

    Its columns are adjacent and its address and strides divisible such that the compiler can move 16 bytes at a time.
    """
    entry = operands + (layer * ROLES + role) * COLUMNS
    pointer = tl.multiple_of(tl.load(entry).to(tl.pointer_type(TYPE)), 16)
    return pointer, tl.load(entry + 1) // UNIT * UNIT, tl.load(entry + 3) // UNIT * UNIT


@triton.jit
def tile_offsets(row_stride, col_stride, row0, col0, R: tl.constexpr, C: tl.constexpr, WIDE: tl.constexpr):
    """Where a tile's corner lies in its matrix (int64), and its entries from there on (int32)."""
    down = tl.arange(0, R)[:, None] * row_stride.to(tl.int32)
    if WIDE:
        return row0 * row_stride + col0, down + tl.arange(0, C)[None, :]
    else:
        corner = row0 * row_stride + col0 * col_stride
        return corner, down + tl.arange(0, C)[None, :] * col_stride.to(tl.int32)


@triton.jit
def load_tile(
    pointer, row_stride, col_stride, row0, col0, rows, cols, R: tl.constexpr, C: tl.constexpr, WIDE: tl.constexpr
):
    """``X[row0 : row0 + R, col0 : col0 + C]`` of a matrix, zero from ``rows`` and ``cols`` (counted in the tile) on.

    ``WIDE``: the compiler must know ``col0`` and ``cols`` for multiples of 8.
    """
    inside = (tl.arange(0, R) < rows)[:, None] & (tl.arange(0, C) < cols)[None, :]
    corner, offset = tile_offsets(row_stride, col_stride, row0, col0, R, C, WIDE)
    if WIDE:
        return tl.load(pointer + corner + offset, mask=inside, other=0)
    else:
        return tl.load(tl.max_contiguous(pointer + corner + offset, [1, 2]), mask=inside, other=0)


@triton.jit
def store_tile(
    pointer,
    row_stride,
    col_stride,
    row0,
    col0,
    rows,
    cols,
    x,
    TYPE: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    WIDE: tl.constexpr,
):
    """``x`` into ``X[row0 :, col0 :]``, as far as ``rows`` and ``cols`` (counted in the tile)."""
    inside = (tl.arange(0, R) < rows)[:, None] & (tl.arange(0, C) < cols)[None, :]
    corner, offset = tile_offsets(row_stride, col_stride, row0, col0, R, C, WIDE)
    if WIDE:
        tl.store(pointer + corner + offset, storable(x, TYPE), mask=inside)
    else:
        tl.store(tl.max_contiguous(pointer + corner + offset, [1, 2]), storable(x, TYPE), mask=inside)


@triton.jit
def diagonal_offsets(r, c, row_stride, col_stride, square_stride, side):
    """Where entries ``(r, c)`` of a block-diagonal tile lie in its stack, and which lie on the diagonal at all.

    The tile begins with the square that offsets count from; its squares have side ``side``. Divisions are in int32.
    """
    side = side.to(tl.int32)
    square = r // side
    down = square * square_stride.to(tl.int32) + (r - square * side) * row_stride.to(tl.int32)
    across = c % side * col_stride.to(tl.int32)
    return down[:, None] + across[None, :], square[:, None] == (c // side)[None, :]


@triton.jit
def load_squares(
    pointer,
    row_stride,
    col_stride,
    square_stride,
    side,
    first,
    col0,
    limit,
    R: tl.constexpr,
    C: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Columns ``col0 : col0 + C`` of the block-diagonal ``R × R`` tile that begins with square ``first`` of a stack.

    Zero off the diagonal squares and, in rows and columns, from ``limit`` on. ``WIDE``: there is one square.
    """
    pointer += first * square_stride
    if WIDE or side >= limit:
        x = load_tile(pointer, row_stride, col_stride, 0, col0, limit, limit - col0, R, C, WIDE)
    else:
        r, c = tl.arange(0, R), col0 + tl.arange(0, C)
        offset, on_diagonal = diagonal_offsets(r, c, row_stride, col_stride, square_stride, side)
        x = tl.load(
            tl.max_contiguous(pointer + offset, [1, 2]),
            mask=on_diagonal & (r < limit)[:, None] & (c < limit)[None, :],
            other=0,
        )
    return x


@triton.jit
def store_squares(
    pointer,
    row_stride,
    col_stride,
    square_stride,
    side,
    first,
    row0,
    col0,
    limit,
    x,
    TYPE: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The part at ``(row0, col0)`` of a tile into a stack: what lies on its diagonal squares, up to ``limit``."""
    pointer += first * square_stride
    if WIDE or side >= limit:
        store_tile(pointer, row_stride, col_stride, row0, col0, limit - row0, limit - col0, x, TYPE, R, C, WIDE)
    else:
        r, c = row0 + tl.arange(0, R), col0 + tl.arange(0, C)
        offset, on_diagonal = diagonal_offsets(r, c, row_stride, col_stride, square_stride, side)
        tl.store(
            tl.max_contiguous(pointer + offset, [1, 2]),
            storable(x, TYPE),
            mask=on_diagonal & (r < limit)[:, None] & (c < limit)[None, :],
        )


@triton.jit
def update(
    y,
    operands,
    layer,
    row0,
    col0,
    rows,
    cols,
    rate,
    momentum,
    decay,
    THETA_TYPE: tl.constexpr,
    MOMENTUM_TYPE: tl.constexpr,
    OUT_ROLE: tl.constexpr,
    MOMENTUM_ROLE: tl.constexpr,
    HAS_BUFFER: tl.constexpr,
    HAS_MOMENTUM: tl.constexpr,
    HAS_DECAY: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    WIDE: tl.constexpr,
):
    """``v ← μ v + y``, ``θ ← θ − lr (v + λ θ)``: the update of a tile of the weights, each written once.

    At momentum 0 the buffer's old content isn't read: it may hold anything.
    """
    if HAS_BUFFER:
        buffer, br, bc = matrix(operands, layer, MOMENTUM_ROLE, MOMENTUM_TYPE, WIDE)
        if HAS_MOMENTUM:
            y += momentum * load_tile(buffer, br, bc, row0, col0, rows, cols, R, C, WIDE).to(tl.float32)
        store_tile(buffer, br, bc, row0, col0, rows, cols, y, MOMENTUM_TYPE, R, C, WIDE)
    theta, tr, tc = matrix(operands, layer, OUT_ROLE, THETA_TYPE, WIDE)
    old = load_tile(theta, tr, tc, row0, col0, rows, cols, R, C, WIDE).to(tl.float32)
    if HAS_DECAY:
        y += decay * old
    store_tile(theta, tr, tc, row0, col0, rows, cols, old - rate * y, THETA_TYPE, R, C, WIDE)


@triton.jit
def rate_of(lr, lr_tensor, LR_IN_TENSOR: tl.constexpr):
    """The learning rate: a number of the launch, or read on the device, so that a captured graph follows it."""
    if LR_IN_TENSOR:
        return tl.load(lr_tensor).to(tl.float32)
    else:
        return lr
