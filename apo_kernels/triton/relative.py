"""Relative steps (:mod:`apo_kernels.relative_steps`): a launch for all squares of a side, two for all scalings.

A square is a program's; scalings are cut into chunks of one tensor each. Their mean sizes are sums of a number a chunk,
which every program of the second launch adds up in the same order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from apo_kernels.triton.primitives import UNIT


@triton.jit
def averaged(mean, new, weight):
    """``torch.lerp``."""
    return tl.where(weight < 0.5, mean + weight * (new - mean), new - (new - mean) * (1 - weight))


@triton.jit
def step_squares(
    shape,
    X,
    slope,
    size,
    new_slope,
    new_size,
    rates,
    corrections,
    active,
    rate,
    correction,
    weight_slope,
    weight_size,
    floor,
    eps,
    longest,
    EACH: tl.constexpr,
    PRECISION: tl.constexpr,
    SIDE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """``X ← X (I − rate · R)`` of one square.

    ``shape`` (int64): how far squares lie apart in ``X``, ``slope`` and ``new_slope``, rows in ``size`` and
    ``new_size``; their side. ``EACH``: the squares have numbers of their own. ``WIDE``: sides and distances are
    multiples of 8.
    """
    q = tl.program_id(0).to(tl.int64)
    apart, apart_slope, apart_new = tl.load(shape), tl.load(shape + 1), tl.load(shape + 2)
    apart_size, apart_new_size, b = tl.load(shape + 3), tl.load(shape + 4), tl.load(shape + 5).to(tl.int32)
    if WIDE:
        apart, apart_slope, apart_new = apart // UNIT * UNIT, apart_slope // UNIT * UNIT, apart_new // UNIT * UNIT
        b = b // UNIT * UNIT
    if EACH:
        rate, correction = tl.load(rates + q), tl.load(corrections + q)
        takes_part = tl.load(active + q) != 0
        rate = tl.where(takes_part, rate, 0.0)
    else:
        takes_part = True
    r = tl.arange(0, SIDE)
    inside = (r < b)[:, None] & (r < b)[None, :]
    offset = r[:, None] * b + r[None, :]
    old = tl.load(slope + q * apart_slope + offset, mask=inside, other=0)
    found = averaged(old, tl.load(new_slope + q * apart_new + offset, mask=inside, other=0), weight_slope)
    mean = tl.load(size + q * apart_size + r, mask=r < b, other=0)
    found_mean = averaged(mean, tl.load(new_size + q * apart_new_size + r, mask=r < b, other=0), weight_size)
    x = tl.load(X + q * apart + offset, mask=inside, other=0)
    # What is used in several layouts the compiler loads once for each: no warp may write before all have read.
    tl.debug_barrier()
    tl.store(slope + q * apart_slope + offset, found, mask=inside & takes_part)
    tl.store(size + q * apart_size + r, found_mean, mask=(r < b) & takes_part)
    change = tl.where(takes_part, found, old)
    mean = tl.where(takes_part, found_mean, mean)
    scale = tl.where(r < b, tl.rsqrt(mean + (floor * (tl.sum(mean) / b) + eps)), 0.0)
    change = (change + tl.trans(change)) * scale[:, None] * scale[None, :] * (correction / 2)
    length = tl.sqrt(tl.sum(change * change))
    change *= rate * longest / tl.maximum(length, longest, propagate_nan=tl.PropagateNan.ALL)
    tl.store(X + q * apart + offset, x - tl.dot(x, change, input_precision=PRECISION), mask=inside & takes_part)


@triton.jit
def step_diagonals(
    shape,
    X,
    slope,
    size,
    new_slope,
    new_size,
    rates,
    corrections,
    active,
    rate,
    correction,
    weight_slope,
    weight_size,
    floor,
    eps,
    longest,
    EACH: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """:func:`step_squares` of ``CHUNK`` squares of side 1; ``shape`` ends with their number."""
    q = tl.program_id(0).to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
    inside = q < tl.load(shape + 6)
    takes_part = inside
    if EACH:
        rate, correction = tl.load(rates + q, mask=inside, other=0), tl.load(corrections + q, mask=inside, other=0)
        takes_part = inside & (tl.load(active + q, mask=inside, other=0) != 0)
    own_slope, own_size = slope + q * tl.load(shape + 1), size + q * tl.load(shape + 3)
    found = averaged(
        tl.load(own_slope, mask=inside, other=0),
        tl.load(new_slope + q * tl.load(shape + 2), mask=inside, other=0),
        weight_slope,
    )
    mean = averaged(
        tl.load(own_size, mask=inside, other=0),
        tl.load(new_size + q * tl.load(shape + 4), mask=inside, other=0),
        weight_size,
    )
    tl.store(own_slope, found, mask=takes_part)
    tl.store(own_size, mean, mask=takes_part)
    change = found / (mean + (floor * mean + eps)) * correction
    change *= rate * longest / tl.maximum(tl.abs(change), longest, propagate_nan=tl.PropagateNan.ALL)
    x = tl.load(X + q * tl.load(shape), mask=inside, other=0)
    tl.store(X + q * tl.load(shape), x - x * change, mask=takes_part)


@triton.jit
def average_scalings(
    chunks, slope, size, new_slope, new_size, active, sums, weight_slope, weight_size,
    EACH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The running means of a chunk, and the sum of its sizes.

    ``chunks`` ``[programs, 6]`` (int64): first element, how many, which tensor, the first of the tensor's chunks and
    how many it has, the tensor's number of entries.
    """
    entry = chunks + tl.program_id(0) * 6
    e = tl.arange(0, CHUNK)
    inside = e < tl.load(entry + 1)
    at = tl.load(entry) + e
    takes_part = True
    if EACH:
        takes_part = tl.load(active + tl.load(entry + 2)) != 0
    old = tl.load(size + at, mask=inside, other=0)
    mean = averaged(old, tl.load(new_size + at, mask=inside, other=0), weight_size)
    tl.store(size + at, mean, mask=inside & takes_part)
    tl.store(sums + tl.program_id(0), tl.sum(tl.where(takes_part, mean, old)))
    found = averaged(
        tl.load(slope + at, mask=inside, other=0), tl.load(new_slope + at, mask=inside, other=0), weight_slope
    )
    tl.store(slope + at, found, mask=inside & takes_part)


@triton.jit
def step_scalings(
    chunks, S, slope, size, rates, corrections, active, sums, rate, correction, floor, eps,
    EACH: tl.constexpr, CHUNK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """``S ← S exp(−rate · r)`` of a chunk of :func:`average_scalings`."""
    entry = chunks + tl.program_id(0) * 6
    tensor, first, count = tl.load(entry + 2), tl.load(entry + 3), tl.load(entry + 4)
    lanes = tl.arange(0, LANES)
    total = tl.zeros((LANES,), tl.float32)
    for p in range(0, count, LANES):
        total += tl.load(sums + first + p + lanes, mask=p + lanes < count, other=0)
    least = floor * (tl.sum(total) / tl.load(entry + 5).to(tl.float32)) + eps
    takes_part = True
    if EACH:
        rate, correction = tl.load(rates + tensor), tl.load(corrections + tensor)
        takes_part = tl.load(active + tensor) != 0
    e = tl.arange(0, CHUNK)
    inside = (e < tl.load(entry + 1)) & takes_part
    at = tl.load(entry) + e
    ratio = tl.load(slope + at, mask=inside, other=0) / (tl.load(size + at, mask=inside, other=0) + least)
    ratio = tl.clamp(ratio * correction, -1.0, 1.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(S + at, tl.load(S + at, mask=inside, other=0) * tl.exp(-rate * ratio), mask=inside)
