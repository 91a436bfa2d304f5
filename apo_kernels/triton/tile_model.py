"""The kernels of a whole model's step on blocks that fit a tile: :mod:`apo_kernels.triton.tile`, with what else a step
needs in the same launches. The slopes are in :mod:`apo_kernels.triton.tile_slopes`.

**Numbers.** Each layer has its own rate, momentum and decay: a row of the table ``numbers``.

**What the promise needs.** ``⟨G, P(G)⟩ = ‖S ⊙ BᵀGA‖²``: one number per tile, from what is there anyway.
"""

from __future__ import annotations

import triton
import triton.language as tl

from apo_kernels.triton.model_parts import (
    load_diagonal,
    load_own,
    load_parts,
    load_split,
    store_column,
    store_own,
    store_parts,
    tile_of,
)
from apo_kernels.triton.primitives import LAYER_FIELDS, UNIT, matrix, narrowed, operand, stack, store_tile
from apo_kernels.triton.table_layout import LayerField, ModelField, ModelRole, Number

_M, _N, _N1 = (tl.constexpr(int(x)) for x in (LayerField.M, LayerField.N, ModelField.N1))
_G, _G_BIAS, _THETA, _THETA_BIAS = (
    tl.constexpr(int(role)) for role in (ModelRole.G, ModelRole.G_BIAS, ModelRole.THETA, ModelRole.THETA_BIAS)
)
_A, _B, _S, _MOMENTUM, _P, _KEPT = (
    tl.constexpr(int(role))
    for role in (ModelRole.A, ModelRole.B, ModelRole.S, ModelRole.MOMENTUM, ModelRole.P, ModelRole.M)
)
_RATE, _MOMENTUM_OF, _SHRINK, _SHARE = (
    tl.constexpr(int(x)) for x in (Number.RATE, Number.MOMENTUM, Number.SHRINK, Number.SHARE)
)
_NUMBERS = tl.constexpr(len(Number))


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
        layers, layer, tl.load(entry + 1), tl.load(entry + 2), WIDE_MATRICES
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
    f = tl.where(promised <= most, 1.0, most / tl.maximum(promised, most, propagate_nan=tl.PropagateNan.ALL))
    f += promised - promised
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
