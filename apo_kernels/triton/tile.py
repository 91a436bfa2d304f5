"""The tile kernel: one program computes one tile of the result, the whole chain on chip.

With block-diagonal ``A`` and ``B`` the operator of Eq. 10 falls apart into independent tiles: with ``B_i`` and ``A_j``
the squares that meet in tile ``(i, j)``::

    Y_ij = B_i (S_ij² ⊙ B_iᵀ G_ij A_j) A_jᵀ

so each entry of ``G``, ``S``, the weight and the momentum is read once and each of the weight and the momentum written
once: the least traffic there can be. Squares narrower than a tile lie side by side on its diagonal.

Whether 16 bytes can be moved at a time is a constant of a launch, one for its matrices and one for its squares: a
choice at run time costs a branch for each load, which then can't overlap.

A tile is worked on in slabs of ``SLAB`` columns of ``A_j``, ``s`` below: everything between the first and the last
product then needs registers for a slab and not for a tile, which is what makes float32 fit::

    U_s = G A_s    M_s = Bᵀ U_s    T_s = S_s² ⊙ M_s    W_s = B T_s    Y += W_s A_sᵀ

Its derivatives, with ``N_s = Bᵀ V A_s``::

    dS_s = 2 S_s ⊙ M_s ⊙ N_s
    dB  += (V A_s) T_sᵀ + (G A_s)(S_s² ⊙ N_s)ᵀ          over the slabs, then over the tiles of a row
    dA_s = Vᵀ W_s + Gᵀ B (S_s² ⊙ N_s)                   over the tiles of a column

The sums over tiles are left as parts, one per tile, which :func:`sum_parts` adds up in a fixed order: no atomics, so
the same bits in every run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from apo_kernels.triton.primitives import (
    LAYER_FIELDS,
    UNIT,
    load_squares,
    load_tile,
    matrix,
    narrowed,
    operand,
    rate_of,
    stack,
    store_squares,
    store_tile,
    update,
)
from apo_kernels.triton.table_layout import LayerField, Role

_M, _N = tl.constexpr(int(LayerField.M)), tl.constexpr(int(LayerField.N))
_SIDE_B, _SIDE_A = tl.constexpr(int(LayerField.SIDE_B)), tl.constexpr(int(LayerField.SIDE_A))
_GROUP_B, _GROUP_A = tl.constexpr(int(LayerField.GROUP_B)), tl.constexpr(int(LayerField.GROUP_A))
_COUNT_B, _COUNT_A = tl.constexpr(int(LayerField.COUNT_B)), tl.constexpr(int(LayerField.COUNT_A))
_G, _V, _A, _B, _S = (tl.constexpr(int(role)) for role in (Role.G, Role.V, Role.A, Role.B, Role.S))
_OUT, _MOMENTUM = tl.constexpr(int(Role.OUT)), tl.constexpr(int(Role.MOMENTUM))
_KEEP_U, _KEEP_M, _KEEP_W = (tl.constexpr(int(role)) for role in (Role.KEEP_U, Role.KEEP_M, Role.KEEP_W))
_DA, _DB, _DS = (tl.constexpr(int(role)) for role in (Role.DA, Role.DB, Role.DS))


@triton.jit
def place(tiles, layers, WIDE_MATRICES: tl.constexpr, WIDE_SQUARES: tl.constexpr):
    """Which tile of which layer this program has, and how far it reaches."""
    entry = tiles + tl.program_id(0) * 4
    layer, i, j = tl.load(entry).to(tl.int64), tl.load(entry + 1), tl.load(entry + 2)
    shape = layers + layer * LAYER_FIELDS
    first_B, first_A = i * tl.load(shape + _GROUP_B), j * tl.load(shape + _GROUP_A)
    side_B, side_A = tl.load(shape + _SIDE_B), tl.load(shape + _SIDE_A)
    row0, col0 = first_B * side_B, first_A * side_A
    rows = tl.minimum(tl.load(shape + _M) - row0, side_B * tl.load(shape + _GROUP_B)).to(tl.int32)
    cols = tl.minimum(tl.load(shape + _N) - col0, side_A * tl.load(shape + _GROUP_A)).to(tl.int32)
    # Where 16 bytes are moved at a time, all begins and ends at multiples of 8.
    if WIDE_MATRICES:
        col0 = tl.multiple_of(col0, UNIT)
    if WIDE_MATRICES or WIDE_SQUARES:
        cols = tl.multiple_of(cols, UNIT)
    if WIDE_SQUARES:
        rows = tl.multiple_of(rows, UNIT)
    return layer, i, j, first_B, first_A, side_B, side_A, row0, col0, rows, cols


@triton.jit(do_not_specialize_on_alignment=["lr_tensor"])
def tile_forward(
    tiles,
    layers,
    operands,
    lr,
    lr_tensor,
    momentum,
    decay,
    TYPE_G: tl.constexpr,
    TYPE_A: tl.constexpr,
    TYPE_B: tl.constexpr,
    TYPE_S: tl.constexpr,
    TYPE_OUT: tl.constexpr,
    TYPE_MOMENTUM: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    KEEP: tl.constexpr,
    UPDATE: tl.constexpr,
    HAS_BUFFER: tl.constexpr,
    HAS_MOMENTUM: tl.constexpr,
    HAS_DECAY: tl.constexpr,
    LR_IN_TENSOR: tl.constexpr,
    OF_V: tl.constexpr,
    SIDE: tl.constexpr,
    SLAB: tl.constexpr,
    WIDE_MATRICES: tl.constexpr,
    WIDE_SQUARES: tl.constexpr,
):
    """``P(G)`` of a tile, stored (and with it, if ``KEEP``, ``U``, ``M`` and ``W``) or made an update.

    ``OF_V``: of the cotangent in ``G``'s place, ``dG = P(V)``.
    """
    layer, _i, _j, first_B, first_A, side_B, side_A, row0, col0, rows, cols = place(
        tiles, layers, WIDE_MATRICES, WIDE_SQUARES
    )
    pg, gr, gc = matrix(operands, layer, _V if OF_V else _G, TYPE_G, WIDE_MATRICES)
    ps, sr, sc = matrix(operands, layer, _S, TYPE_S, WIDE_MATRICES)
    pa, ar, ac, aq, _ = stack(operands, layer, _A, TYPE_A, WIDE_SQUARES)
    pb, br, bc, bq, _ = stack(operands, layer, _B, TYPE_B, WIDE_SQUARES)
    g = operand(load_tile(pg, gr, gc, row0, col0, rows, cols, SIDE, SIDE, WIDE_MATRICES), COMPUTE)
    b = operand(load_squares(pb, br, bc, bq, side_B, first_B, 0, rows, SIDE, SIDE, WIDE_SQUARES), COMPUTE)

    y = tl.zeros((SIDE, SIDE), tl.float32)
    for s in range(0, SIDE, SLAB):
        at = col0 + s
        here = cols - s
        a = operand(load_squares(pa, ar, ac, aq, side_A, first_A, s, cols, SIDE, SLAB, WIDE_SQUARES), COMPUTE)
        u = tl.dot(g, a, input_precision=PRECISION)
        u_, c = narrowed(u, COMPUTE)
        m = tl.dot(tl.trans(b), u_, input_precision=PRECISION) * c
        scaling = load_tile(ps, sr, sc, row0, at, rows, here, SIDE, SLAB, WIDE_MATRICES).to(tl.float32)
        if KEEP:  # here neither Triton spills registers on sm_90; a line earlier or later one does
            pu, ur, uc = matrix(operands, layer, _KEEP_U, tl.float32, WIDE_MATRICES)
            store_tile(pu, ur, uc, row0, at, rows, here, u, tl.float32, SIDE, SLAB, WIDE_MATRICES)
            pm, mr, mc = matrix(operands, layer, _KEEP_M, tl.float32, WIDE_MATRICES)
            store_tile(pm, mr, mc, row0, at, rows, here, m, tl.float32, SIDE, SLAB, WIDE_MATRICES)
        t_, c = narrowed(m * scaling * scaling, COMPUTE)
        w = tl.dot(b, t_, input_precision=PRECISION) * c
        if KEEP:
            pw, wr, wc = matrix(operands, layer, _KEEP_W, tl.float32, WIDE_MATRICES)
            store_tile(pw, wr, wc, row0, at, rows, here, w, tl.float32, SIDE, SLAB, WIDE_MATRICES)
        w_, c = narrowed(w, COMPUTE)
        y += tl.dot(w_, tl.trans(a), input_precision=PRECISION) * c

    if UPDATE:
        rate = rate_of(lr, lr_tensor, LR_IN_TENSOR)
        update(
            y, operands, layer, row0, col0, rows, cols, rate, momentum, decay, TYPE_OUT, TYPE_MOMENTUM,
            _OUT, _MOMENTUM, HAS_BUFFER, HAS_MOMENTUM, HAS_DECAY, SIDE, SIDE, WIDE_MATRICES,
        )  # fmt: skip
    else:
        po, out_r, out_c = matrix(operands, layer, _OUT, TYPE_OUT, WIDE_MATRICES)
        store_tile(po, out_r, out_c, row0, col0, rows, cols, y, TYPE_OUT, SIDE, SIDE, WIDE_MATRICES)


@triton.jit
def tile_backward(
    tiles,
    layers,
    operands,
    TYPE_G: tl.constexpr,
    TYPE_V: tl.constexpr,
    TYPE_A: tl.constexpr,
    TYPE_B: tl.constexpr,
    TYPE_S: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    WANT_A: tl.constexpr,
    WANT_B: tl.constexpr,
    WANT_S: tl.constexpr,
    SIDE: tl.constexpr,
    SLAB: tl.constexpr,
    WIDE_MATRICES: tl.constexpr,
    WIDE_SQUARES: tl.constexpr,
):
    """The derivatives of a tile: ``dS`` stored, ``dA`` and ``dB`` stored as this tile's part of their sums.

    ``dG = P(V)`` is a forward's work (:func:`tile_forward`, ``OF_V``): here it would cost registers for a tile more.
    """
    layer, i, j, first_B, first_A, side_B, side_A, row0, col0, rows, cols = place(
        tiles, layers, WIDE_MATRICES, WIDE_SQUARES
    )
    shape = layers + layer * LAYER_FIELDS
    pg, gr, gc = matrix(operands, layer, _G, TYPE_G, WIDE_MATRICES)
    pv, vr, vc = matrix(operands, layer, _V, TYPE_V, WIDE_MATRICES)
    ps, sr, sc = matrix(operands, layer, _S, TYPE_S, WIDE_MATRICES)
    pa, ar, ac, aq, _ = stack(operands, layer, _A, TYPE_A, WIDE_SQUARES)
    pb, br, bc, bq, _ = stack(operands, layer, _B, TYPE_B, WIDE_SQUARES)
    g = operand(load_tile(pg, gr, gc, row0, col0, rows, cols, SIDE, SIDE, WIDE_MATRICES), COMPUTE)
    v = operand(load_tile(pv, vr, vc, row0, col0, rows, cols, SIDE, SIDE, WIDE_MATRICES), COMPUTE)
    b = operand(load_squares(pb, br, bc, bq, side_B, first_B, 0, rows, SIDE, SIDE, WIDE_SQUARES), COMPUTE)

    db = tl.zeros((SIDE, SIDE), tl.float32)
    for s in range(0, SIDE, SLAB):
        at = col0 + s
        here = cols - s
        a = operand(load_squares(pa, ar, ac, aq, side_A, first_A, s, cols, SIDE, SLAB, WIDE_SQUARES), COMPUTE)
        scaling = load_tile(ps, sr, sc, row0, at, rows, here, SIDE, SLAB, WIDE_MATRICES).to(tl.float32)
        ug, c_ug = narrowed(tl.dot(g, a, input_precision=PRECISION), COMPUTE)
        uv, c_uv = narrowed(tl.dot(v, a, input_precision=PRECISION), COMPUTE)
        m = tl.dot(tl.trans(b), ug, input_precision=PRECISION) * c_ug
        n = tl.dot(tl.trans(b), uv, input_precision=PRECISION) * c_uv
        if WANT_S:
            pd, dr, dc = matrix(operands, layer, _DS, tl.float32, WIDE_MATRICES)
            store_tile(pd, dr, dc, row0, at, rows, here, 2 * scaling * m * n, tl.float32, SIDE, SLAB, WIDE_MATRICES)
        tm, c_tm = narrowed(scaling * scaling * m, COMPUTE)
        tn, c_tn = narrowed(scaling * scaling * n, COMPUTE)
        if WANT_B:
            db += tl.dot(uv, tl.trans(tm), input_precision=PRECISION) * (c_uv * c_tm)
            db += tl.dot(ug, tl.trans(tn), input_precision=PRECISION) * (c_ug * c_tn)
        if WANT_A:
            wm, c_wm = narrowed(tl.dot(b, tm, input_precision=PRECISION) * c_tm, COMPUTE)
            da = tl.dot(tl.trans(v), wm, input_precision=PRECISION) * c_wm
            wn, c_wn = narrowed(tl.dot(b, tn, input_precision=PRECISION) * c_tn, COMPUTE)
            da += tl.dot(tl.trans(g), wn, input_precision=PRECISION) * c_wn
            pd, dr, dc, dq, part = stack(operands, layer, _DA, tl.float32, WIDE_SQUARES)
            reach = tl.minimum(tl.load(shape + _GROUP_A), tl.load(shape + _COUNT_A) - first_A) * side_A
            if WIDE_SQUARES:
                reach = reach // UNIT * UNIT
            store_squares(
                pd + i * part, dr, dc, dq, side_A, first_A, 0, s, reach, da, tl.float32, SIDE, SLAB, WIDE_SQUARES
            )

    if WANT_B:
        pd, dr, dc, dq, part = stack(operands, layer, _DB, tl.float32, WIDE_SQUARES)
        reach = tl.minimum(tl.load(shape + _GROUP_B), tl.load(shape + _COUNT_B) - first_B) * side_B
        if WIDE_SQUARES:
            reach = reach // UNIT * UNIT
        store_squares(pd + j * part, dr, dc, dq, side_B, first_B, 0, 0, reach, db, tl.float32, SIDE, SIDE, WIDE_SQUARES)


@triton.jit
def sum_parts(jobs, addresses, CHUNK: tl.constexpr):
    """``result[e] = Σ_p parts[p · length + e]`` for a chunk of one derivative, in the order of ``p``.

    ``jobs`` ``[programs, 5]`` (int64): index of the parts' address and of the result's, the chunk's first element, the
    length of a part, the number of parts.
    """
    job = jobs + tl.program_id(0) * 5
    parts = tl.load(addresses + tl.load(job)).to(tl.pointer_type(tl.float32))
    result = tl.load(addresses + tl.load(job + 1)).to(tl.pointer_type(tl.float32))
    first, length, count = tl.load(job + 2), tl.load(job + 3), tl.load(job + 4)
    e = first + tl.arange(0, CHUNK)
    total = tl.zeros((CHUNK,), tl.float32)
    for p in range(count):
        total += tl.load(parts + p * length + e, mask=e < length, other=0)
    tl.store(result + e, total, mask=e < length)
