"""Packing: operands of the grouped GEMM brought into the form that its loads need, all in one launch.

That form: the compute dtype, adjacent columns, sides padded with zeros to multiples of 8 elements, the narrow squares
of a stack gathered into wider block-diagonal ones. Zero pads stay zero through every product, so nothing else ever
looks at them. An operand that already has the form is used where it lies.

For float16 this launch also takes the largest magnitude of ``G``, ``V`` and ``S``, in parts, one per program: from them
the GEMM's epilogues take the powers of two that keep every intermediate in float16's range.
"""

from __future__ import annotations

import triton
import triton.language as tl

from apo_kernels.triton.primitives import UNIT, diagonal_offsets, storable
from apo_kernels.triton.table_layout import PackField

_FIELDS = tl.constexpr(len(PackField))


@triton.jit
def load_widened(address, code, base, offset, mask):
    """Entries at ``base + offset`` of a float32 (``code`` 0), float16 (1) or bfloat16 (2) matrix, in float32.

    Of the columns the compiler is told what it is told in :mod:`~apo_kernels.triton.primitives`.
    """
    if code == 0:
        wide = address.to(tl.pointer_type(tl.float32)) + base + offset
        x = tl.load(tl.max_contiguous(wide, [1, 2]), mask=mask, other=0)
    elif code == 1:
        half = address.to(tl.pointer_type(tl.float16)) + base + offset
        x = tl.load(tl.max_contiguous(half, [1, 2]), mask=mask, other=0).to(tl.float32)
    else:
        brain = address.to(tl.pointer_type(tl.bfloat16)) + base + offset
        x = tl.load(tl.max_contiguous(brain, [1, 2]), mask=mask, other=0).to(tl.float32)
    return x


@triton.jit
def pack(
    jobs,
    addresses,
    amax,
    COMPUTE: tl.constexpr,
    SCAN: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """One ``ROWS × COLS`` tile of one operand, by its row of ``jobs`` (:class:`PackField`).

    A destination of 0 means that the tile is only looked at for its largest magnitude.
    """
    pid = tl.program_id(0)
    job = jobs + pid * _FIELDS
    source, code, destination = tl.load(addresses + tl.load(job)), tl.load(job + 1), tl.load(job + 2)
    row_stride, col_stride, square_stride = tl.load(job + 3), tl.load(job + 4), tl.load(job + 5)
    side, first = tl.load(job + 6), tl.load(job + 7)
    row0, col0, rows, cols = tl.load(job + 8), tl.load(job + 9), tl.load(job + 10), tl.load(job + 11)
    pitch = tl.load(job + 12)
    r, c = tl.arange(0, ROWS), tl.arange(0, COLS)
    inside = (row0 + r < rows)[:, None] & (col0 + c < cols)[None, :]
    # Offsets fit int32: within a tile where there is one square, which may be large, else within a few small squares.
    alone = side >= tl.maximum(rows, cols)
    base = first * square_stride + tl.where(alone, row0 * row_stride + col0 * col_stride, 0)
    row, col = tl.where(alone, 0, row0).to(tl.int32) + r, tl.where(alone, 0, col0).to(tl.int32) + c
    offset, on_diagonal = diagonal_offsets(row, col, row_stride, col_stride, square_stride, side)
    x = load_widened(source, code, base, offset, inside & on_diagonal)
    if SCAN:
        tl.store(amax + pid, tl.max(tl.abs(x)))
    if destination != 0:
        target = tl.load(addresses + destination).to(tl.pointer_type(COMPUTE))
        # Zeros down to the next multiple of 8 rows, and across to the pitch.
        height = (rows + UNIT - 1) // UNIT * UNIT
        to = target + row0 * pitch + col0
        fits = (row0 + r < height)[:, None] & (col0 + c < pitch)[None, :]
        tl.store(to + (r[:, None] * pitch.to(tl.int32) + c[None, :]), storable(x, COMPUTE), mask=fits)
