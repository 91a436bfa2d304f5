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

A stage is a product and its epilogue, made of the functions in :mod:`apo_kernels.triton.gemm_product`.

**Range.** In float16, ``U`` is stored times ``k``, such that ``k·G`` has its largest entry in [16, 32), and ``T`` with
``q·S`` in place of ``S``, its largest entry in [4, 8): powers of two found at packing, undone by the last epilogue.
They change the exponents of the intermediates and nothing else.
"""

from __future__ import annotations

import triton
import triton.language as tl

from apo_kernels.triton.gemm_product import (
    cols_of,
    load_scaling,
    multiply,
    place_of,
    rows_of,
    scale_of,
    square_of,
    store_block,
    store_packed,
    store_result,
)
from apo_kernels.triton.primitives import LAYER_FIELDS, UNIT, rate_of, update
from apo_kernels.triton.table_layout import Kind, LayerField, Role

_M, _N = tl.constexpr(int(LayerField.M)), tl.constexpr(int(LayerField.N))
_SIDE_B, _SIDE_A = tl.constexpr(int(LayerField.SIDE_B)), tl.constexpr(int(LayerField.SIDE_A))
_GROUP_B, _GROUP_A = tl.constexpr(int(LayerField.GROUP_B)), tl.constexpr(int(LayerField.GROUP_A))
_AMAX_G, _AMAX_V = tl.constexpr(int(LayerField.AMAX_G)), tl.constexpr(int(LayerField.AMAX_V))
_AMAX_S = tl.constexpr(int(LayerField.AMAX_S))
_FOR_V, _BLOCK = tl.constexpr(int(Kind.FOR_V)), tl.constexpr(int(Kind.BLOCK))
_G, _V, _A, _B = (tl.constexpr(int(role)) for role in (Role.G, Role.V, Role.A, Role.B))
_U, _UV, _T, _TV = (tl.constexpr(int(role)) for role in (Role.U, Role.UV, Role.T, Role.TV))
_W, _WV = tl.constexpr(int(Role.W)), tl.constexpr(int(Role.WV))
_OUT, _MOMENTUM = tl.constexpr(int(Role.OUT)), tl.constexpr(int(Role.MOMENTUM))
_KEEP_U, _KEEP_M, _KEEP_W = (tl.constexpr(int(role)) for role in (Role.KEEP_U, Role.KEEP_M, Role.KEEP_W))
_DA, _DB, _DS = (tl.constexpr(int(role)) for role in (Role.DA, Role.DB, Role.DS))


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
